"""The command timm-dgconv."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def _demo(args: argparse.Namespace) -> None:
    from timm_dgconv import demo

    output = args.output or Path(f"{args.model}_demo")
    summary = demo.run(
        output, args.model, args.epochs, args.img_size, args.device, args.seed, args.overwrite, args.complexity_target
    )
    weights = str(output / "model.safetensors")
    print(f"\nload it with timm.create_model({args.model!r}, num_classes=10, checkpoint_path={weights!r})")
    print(f"held-out accuracy {summary['top1']:.2f} % (reloaded: {summary['top1_reloaded']:.2f} %)")


def _convert(args: argparse.Namespace) -> None:
    from timm_dgconv.hub.convert import convert

    files, difference = convert(args.source, args.model, args.out, args.compact, args.ema, args.model_kwargs)
    print(f"written to {args.out}, reloaded with timm; largest difference between the outputs {difference:.1e}")
    _print_files(files)


def _publish(args: argparse.Namespace) -> None:
    from timm_dgconv.hub.publish import publish

    files, model_name, hub_id, url = publish(
        args.source, args.repo, args.model, args.private, args.revision, args.dry_run
    )
    if url is None:
        print(f"{model_name} would be uploaded to {hub_id}; nothing was sent:")
    else:
        print(f"{model_name} is on the Hub, downloaded again and compared: {url}")
    _print_files(files)
    print(f"\nload it with timm.create_model('hf-hub:{hub_id}', pretrained=True)")


def _print_files(files: Sequence[Any]) -> None:
    for file in files:
        print(f"  {file.name:<18} {file.size:>13,} bytes  sha256 {file.sha256}")


def _inspect(args: argparse.Namespace) -> None:
    from timm_dgconv import plots
    from timm_dgconv.hub.inspect import inspect

    if args.plot:
        plots.check(args.plot)
    elif args.layers:
        raise ValueError("--layers selects the layers of a plot; add --plot FILE")
    history = inspect(args.sources, args.model, args.ema, args.img_size, args.layers, args.model_kwargs)
    print(json.dumps(history.as_dicts(), indent=1) if args.json else history)
    if args.plot:
        plots.draw(history, args.plot, args.layers)


def _parser() -> argparse.ArgumentParser:
    from timm.utils import ParseKwargs

    def key_value(text: str) -> str:
        if "=" not in text:
            raise argparse.ArgumentTypeError(f"{text!r} is not a KEY=VALUE")
        return text

    parser = argparse.ArgumentParser(
        prog="timm-dgconv",
        description="G-ResNeXt for timm. To train, validate and benchmark g_resnext50 and g_resnext101, use timm's "
        "train.py, validate.py and benchmark.py.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    weights = argparse.ArgumentParser(add_help=False)  # options of several commands
    weights.add_argument("--no-ema", dest="ema", action="store_false", help="ignore averaged weights in a checkpoint")
    kwargs_help = "arguments of the model that change the network, as for timm's scripts (default: as timm stored them)"
    key_values: Any = dict(nargs="*", default={}, type=key_value, action=ParseKwargs, metavar="KEY=VALUE")
    weights.add_argument("--model-kwargs", **key_values, help=kwargs_help)

    demo = commands.add_parser(
        "demo",
        help="train on scikit-learn's digits, nothing downloaded",
        description="Train a G-ResNeXt on scikit-learn's digits (extra 'demo'). Print the held-out accuracy and "
        "the learned groups of each layer. Write the model, reload it with timm and compare the outputs.",
    )
    demo.set_defaults(run=_demo)
    add = demo.add_argument
    add("--model", default="g_resnext50", metavar="NAME", help="a model of this package (default: %(default)s)")
    add("--epochs", type=int, default=5, metavar="N", help="number of epochs (default: %(default)s)")
    add("--img-size", type=int, default=32, metavar="N", help="side of the images in pixels (default: %(default)s)")
    add("--device", help="torch device (default: CUDA if available, otherwise cpu)")
    add("--seed", type=int, default=0, metavar="N", help="seed of split, weights and order (default: %(default)s)")
    add("--output", type=Path, metavar="DIR", help="folder to write the model to (default: NAME_demo)")
    add("--overwrite", action="store_true", help="replace the output of an earlier demo")
    target_help = "largest share of a dense network's connections, or resnext for the share that a ResNeXt has"
    target: Any = dict(type=lambda text: text if text == "resnext" else float(text), metavar="T")
    add("--complexity-target", **target, help=target_help)

    convert = commands.add_parser(
        "convert",
        parents=[weights],
        help="convert a checkpoint into a folder that timm loads",
        description="Read a checkpoint without executing code in it. Write model.safetensors, config.json and a "
        "model card, reload the folder with timm and compare the outputs. timm then takes local-dir:DIR as a name.",
    )
    convert.set_defaults(run=_convert)
    add = convert.add_argument
    source_help = (
        "checkpoint of the original release, of timm's train.py or of a ResNeXt, a folder that timm loads, or the Hub "
        "id of a timm model, OWNER/NAME[@REVISION]"
    )
    model_help = (
        "name of the result: g_resnext50.dgconv_in1k for the G-ResNeXt-50 of the original release, "
        "resnext50_32x4d.dgconv_in1k for its baseline, g_resnext50.TAG or g_resnext101.TAG for your own training"
    )
    add("source", metavar="SRC", help=source_help)
    add("--model", required=True, metavar="ARCH.TAG", help=model_help)
    add("--out", required=True, type=Path, metavar="DIR", help="folder to write; must not exist")
    add("--compact", action="store_true", help="write plain group convolutions, which are smaller and faster")

    publish = commands.add_parser(
        "publish",
        help="upload a model to the Hugging Face Hub",
        description="Upload a converted folder to the Hugging Face Hub, download it again and compare the SHA-256 of "
        "its files. This needs a token with write access: hf auth login, or HF_TOKEN.",
    )
    publish.set_defaults(run=_publish)
    add = publish.add_argument
    add("source", metavar="SRC|DIR", help="folder that convert wrote, or a source of convert (requires --model)")
    add("--repo", required=True, metavar="OWNER/NAME", help="repository; created if it does not exist")
    add("--model", metavar="ARCH.TAG", help="see convert")
    add("--private", action="store_true", help="create a private repository")
    add("--revision", metavar="R", help="branch; created if it does not exist (default: main)")
    add("--dry-run", action="store_true", help="print what would be uploaded, and send nothing")

    inspect = commands.add_parser(
        "inspect",
        parents=[weights],
        help="print the groups that a checkpoint has learned, or the groups over the checkpoints of a run",
        description="Print the groups of each layer and their cost, and compare with dense layers and with a ResNeXt. "
        "For several checkpoints, print the groups of each layer and the density over the checkpoints.",
    )
    inspect.set_defaults(run=_inspect)
    add = inspect.add_argument
    sources_help = "checkpoint or folder that convert takes; checkpoints of train.py are sorted by epoch"
    add("sources", nargs="+", metavar="CKPT", help=sources_help)
    add("--model", required=True, metavar="NAME", help="architecture, such as g_resnext50")
    add("--json", action="store_true", help="print JSON: a list with one object per checkpoint")
    add("--plot", type=Path, metavar="FILE", help="draw the groups as .png, .svg or .pdf (extra 'plot')")
    layers_help = "layers in the plot (default: the first layer of each stage for one checkpoint, all for several)"
    add("--layers", nargs="+", default=[], metavar="NAME", help=layers_help)
    add("--img-size", type=int, metavar="N", help="side in pixels of the image for which multiply-adds are counted")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with these arguments, by default those of the process.

    Returns:
        Exit status: 0, or 2 after an error of the user, with one line on stderr.
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"timm-dgconv {args.command}: {error}", file=sys.stderr)
        return 2
    return 0
