"""The command timm-dgconv."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from timm_dgconv.hub import File


def _demo(args: argparse.Namespace) -> None:
    from timm_dgconv import demo

    output = args.output or Path(f"{args.model}_demo")
    summary = demo.run(
        output,
        model_name=args.model,
        epochs=args.epochs,
        image_size=args.img_size,
        device=args.device,
        seed=args.seed,
        overwrite=args.overwrite,
        complexity_weight=args.complexity_weight,
        complexity_target=args.complexity_target,
    )
    print(f"\nwritten to {output}, reloaded with timm.create_model(..., checkpoint_path='{output}/model.safetensors')")
    print(f"held-out accuracy {summary['top1']:.2f} % (reloaded: {summary['top1_reloaded']:.2f} %)")


def _print_files(files: Sequence["File"]) -> None:
    for file in files:
        print(f"  {file.name:<18} {file.size:>13,} bytes  sha256 {file.sha256}")


def _convert(args: argparse.Namespace) -> None:
    from timm_dgconv import hub

    files, difference = hub.convert(args.source, args.model, args.out, compact=args.compact, use_ema=args.ema)
    print(f"written to {args.out}, reloaded through timm; largest difference between the outputs {difference:.1e}")
    _print_files(files)


def _publish(args: argparse.Namespace) -> None:
    from timm_dgconv import hub

    files, model_name, hub_id, url = hub.publish(
        args.source, args.repo, args.model, private=args.private, revision=args.revision, dry_run=args.dry_run
    )
    if url is None:
        print(f"{model_name} would go to {hub_id}; nothing was sent:")
    else:
        print(f"{model_name} is on the Hub, downloaded again and compared: {url}")
    _print_files(files)
    print(f"\nload it with timm.create_model('hf-hub:{hub_id}', pretrained=True)")
    if model_name in ("g_resnext50.dgconv_in1k", "g_resnext101.dgconv_in1k"):
        architecture = model_name.partition(".")[0]
        print(
            f"make it the default of create_model('{architecture}', pretrained=True) with this line in "
            f'timm_dgconv/g_resnext.py, in place of the one that begins alike:\n  "{model_name}": '
            f'_cfg(hf_hub_id="{hub_id}"),'
        )


def _inspect(args: argparse.Namespace) -> None:
    from timm_dgconv import hub, plots

    if args.plot:
        plots.check(args.plot)
    elif args.layers:
        raise ValueError("--layers chooses what a plot shows: add --plot FILE")
    history = hub.inspect(args.sources, args.model, use_ema=args.ema, image_size=args.img_size, layers=args.layers)
    print(json.dumps(history.as_dicts(), indent=1) if args.json else history.table())
    if args.plot:
        plots.draw(history, args.plot, args.layers)


def _bench(args: argparse.Namespace) -> None:
    import torch

    from timm_dgconv import bench

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    formats = [args.format] if args.format else list(bench.FORMATS)
    if args.what == "layers":
        rows = bench.layers(device, args.dtype, formats, args.widths, args.batch_size, args.rounds)
    elif args.what == "memory":
        rows = bench.memories(args.model, device, args.batch_size, args.img_size, args.groups)
    else:
        rows = bench.networks(
            args.model,
            device=device,
            dtype=args.dtype,
            formats=formats,
            what=args.what,
            batch_size=args.batch_size,
            image_size=args.img_size,
            groups=args.groups,
            scattered=args.scattered,
            compiled=args.compile,
            rounds=args.rounds,
            others=args.others,
            forms=args.forms,
        )
    print(bench.table(rows))
    print(", ".join(f"{key} {value}" for key, value in bench.versions(device).items()))
    if args.json:
        bench.save(rows, args.json, args.command_line, device)
    if args.plot:
        if args.what != "layers":
            raise ValueError("--plot draws the sweep: timm-dgconv bench layers --plot FILE")
        bench.plot(rows, args.plot, f"{bench.versions(device)['device']}, {args.dtype}, batch {args.batch_size}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="timm-dgconv",
        description="G-ResNeXt for timm. Training, validation and benchmarks need no command of their own: timm's "
        "train.py, validate.py and benchmark.py know g_resnext50 and g_resnext101.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="train on scikit-learn's digits, nothing downloaded",
        description="Trains a G-ResNeXt with timm's parts on scikit-learn's handwritten digits (extra 'demo'), prints "
        "the held-out accuracy and the groups that each layer has learned, writes the model, reloads it through timm "
        "and checks that the accuracy is the same. Less than five minutes on two CPU cores with the defaults.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument(
        "--model", default="g_resnext50", metavar="NAME", help="g_resnext50, g_resnext101 or the tiny test_g_resnext"
    )
    demo.add_argument("--epochs", type=int, default=5, metavar="N", help="number of epochs")
    demo.add_argument("--img-size", type=int, default=32, metavar="N", help="side of the images in pixels")
    demo.add_argument("--device", metavar="DEVICE", help="torch device; a GPU if there is one (default: automatic)")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="seed of split, weights and order")
    demo.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for model.safetensors, config.json and summary.json (default: NAME_demo)",
    )
    demo.add_argument(
        "--complexity-weight",
        type=float,
        default=0.0,
        metavar="W",
        help="factor of the complexity in every step, such as 1e-6: sparser groups",
    )
    demo.add_argument(
        "--complexity-target",
        type=float,
        metavar="T",
        help="share of a dense network's connections down to which the weight acts (default: always)",
    )
    demo.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    demo.set_defaults(run=_demo)

    convert = commands.add_parser(
        "convert",
        help="write a checkpoint as a folder that timm loads",
        description="Reads a checkpoint without executing anything in it, writes model.safetensors, config.json and "
        "README.md (model card), reloads the folder through timm and compares the outputs. The folder then works "
        "wherever timm takes a model name, as local-dir:DIR.",
    )
    convert.add_argument(
        "source",
        metavar="SRC",
        help="checkpoint of the original release, of timm's train.py or of a ResNeXt (.pth.tar, .pth, .pt, .bin, "
        ".safetensors), or the Hub id of a timm model, OWNER/NAME[@REVISION]",
    )
    convert.add_argument(
        "--model",
        required=True,
        metavar="ARCH.TAG",
        help="what it becomes: g_resnext50.dgconv_in1k for the original's G-ResNeXt-50, resnext50_32x4d.dgconv_in1k "
        "for its baseline, g_resnext50.TAG or g_resnext101.TAG with a tag of your own for your own training",
    )
    convert.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write; must not exist")
    convert.add_argument(
        "--compact",
        action="store_true",
        help="write plain group convolutions with the learned groups: the same outputs, smaller and faster",
    )
    convert.add_argument(
        "--no-ema", dest="ema", action="store_false", help="take the plain weights where the file has averaged ones too"
    )
    convert.set_defaults(run=_convert)

    publish = commands.add_parser(
        "publish",
        help="upload a model to the Hugging Face Hub",
        description="Uploads a converted folder to the Hugging Face Hub, downloads it again and compares the digests. "
        "Needs a token with write access: hf auth login, or HF_TOKEN.",
    )
    publish.add_argument(
        "source", metavar="SRC|DIR", help="folder that convert wrote, or what convert takes (then with --model)"
    )
    publish.add_argument("--repo", required=True, metavar="OWNER/NAME", help="repository; created if it is not there")
    publish.add_argument("--model", metavar="ARCH.TAG", help="see convert")
    publish.add_argument("--private", action="store_true", help="only who has access to the repository sees it")
    publish.add_argument("--revision", metavar="R", help="branch; created if it is not there (default: main)")
    publish.add_argument("--dry-run", action="store_true", help="print what would be uploaded, and send nothing")
    publish.set_defaults(run=_publish)

    inspect = commands.add_parser(
        "inspect",
        help="which groups a checkpoint has learned, or a run over its checkpoints",
        description="Prints the groups of each layer and what they cost, beside dense layers and beside the ResNeXt "
        "with the same widths; of several checkpoints of a run, how the groups moved and which share of a dense "
        "network's connections is left. Nothing in a checkpoint is executed.",
    )
    inspect.add_argument(
        "sources",
        nargs="+",
        metavar="CKPT",
        help="what convert takes, or a folder that it wrote; several of one run in order (those of train.py are put in "
        "the order of their epochs)",
    )
    inspect.add_argument("--model", required=True, metavar="NAME", help="architecture, such as g_resnext50")
    inspect.add_argument("--json", action="store_true", help="print JSON, a list with an object a checkpoint")
    inspect.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw it as .png, .svg or .pdf (extra 'plot'): groups over depth and the connectivity of some layers; of "
        "several checkpoints the groups over them",
    )
    inspect.add_argument(
        "--layers",
        nargs="+",
        default=[],
        metavar="NAME",
        help="layers whose connectivity is drawn, such as layer3.0.conv2 (default: the first of each stage); of "
        "several checkpoints the layers that are drawn (default: all)",
    )
    inspect.add_argument(
        "--img-size", type=int, metavar="N", help="side in pixels of the image for which multiply-adds are counted"
    )
    inspect.add_argument(
        "--no-ema", dest="ema", action="store_false", help="take the plain weights where the file has averaged ones too"
    )
    inspect.set_defaults(run=_inspect)

    bench = commands.add_parser(
        "bench",
        help="time and memory of layers and networks against timm's",
        description="Measures in one run, alternating, and prints times and ratios to timm's ResNeXt with the same "
        "widths (layers: to torch.nn.Conv2d with the same groups): median and quartiles of the ratios of a round, and "
        "the ratio of the better memory formats of each.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    bench.add_argument(
        "what",
        choices=["train", "sgd", "infer", "memory", "layers"],
        help="forward and backward; with an optimizer step; inference; peak memory of training; a sweep of layers over "
        "the bits D' that the weight gradient spans",
    )
    bench.add_argument("--model", default="g_resnext50", choices=["g_resnext50", "g_resnext101", "test_g_resnext"])
    bench.add_argument("--others", nargs="*", default=[], metavar="NAME", help="further timm models to measure")
    bench.add_argument(
        "--forms", nargs="*", metavar="FORM", help="of ours: learnable, frozen, 'masked dense', deployed"
    )
    bench.add_argument("--device", metavar="DEVICE", help="cpu or cuda (default: a GPU if there is one)")
    bench.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of autocast")
    bench.add_argument("--format", choices=["nchw", "nhwc"], help="memory format (default: both)")
    bench.add_argument("--batch-size", type=int, default=4, metavar="N", help="images a step")
    bench.add_argument("--img-size", type=int, default=160, metavar="N", help="side of the images in pixels")
    bench.add_argument("--groups", type=int, default=32, metavar="N", help="groups of every layer")
    bench.add_argument("--scattered", action="store_true", help="groups whose channels are not contiguous")
    bench.add_argument("--compile", action="store_true", help="with torch.compile")
    bench.add_argument("--widths", type=int, nargs="*", default=[128, 256, 512, 1024], metavar="C", help="of layers")
    bench.add_argument("--rounds", type=int, default=15, metavar="N", help="measurements of each")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="draw the sweep (extra 'plot')")
    bench.set_defaults(run=_bench)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.

    Returns:
        Exit status: 0, or 2 for a user's error, of which one line stands on stderr.
    """
    args = _parser().parse_args(argv)
    args.command_line = " ".join(["timm-dgconv", *(sys.argv[1:] if argv is None else argv)])
    try:
        args.run(args)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"timm-dgconv {args.command}: {error}", file=sys.stderr)
        return 2
    return 0
