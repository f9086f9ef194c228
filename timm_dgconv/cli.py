"""The command timm-dgconv."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from timm_dgconv.hub.convert import File


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


def _print_files(files: Sequence["File"]) -> None:
    for file in files:
        print(f"  {file.name:<18} {file.size:>13,} bytes  sha256 {file.sha256}")


def _inspect(args: argparse.Namespace) -> None:
    from timm_dgconv import plots
    from timm_dgconv.hub.inspect import inspect

    if args.plot:
        plots.check(args.plot)
    elif args.layers:
        raise ValueError("--layers selects the layers of a plot; add --plot FILE")
    history = inspect(args.sources, args.model, args.ema, args.img_size, args.layers, args.model_kwargs, args.costs)
    print(json.dumps(history.as_dicts(), indent=1) if args.json else history)
    if args.plot:
        plots.draw(history, args.plot, args.layers)


def _measure(args: argparse.Namespace) -> None:
    import timm

    from timm_dgconv.hub.errors import one_line
    from timm_dgconv.measure import measure, write
    from timm_dgconv.models.group_net import TRAINING_ARGS
    from timm_dgconv.tracing import image_size

    if not args.out.absolute().parent.is_dir():
        raise ValueError(f"the folder of {args.out} does not exist; create it")
    if args.img_size is not None and args.img_size < 1:
        raise ValueError(f"--img-size {args.img_size} is not a number of at least 1")
    try:
        model = timm.create_model(args.model, **args.model_kwargs)
    except Exception as error:  # any exception of timm's constructors
        reason = f"{args.model} cannot be built with {args.model_kwargs}: {one_line(error)}"
        raise ValueError(f"{reason}; use another --model or other --model-kwargs") from error
    channels, height, width = image_size(model, None)
    size = (channels, args.img_size or height, args.img_size or width)
    content = measure(
        model, size, args.model, args.device, args.batch_size, args.runtime, args.rounds, args.channels_last
    )
    write(content, args.out)
    low, high = content["quartiles"]["whole"]
    print(
        f"the dense network takes {content['whole']:.2f} ms (quartiles {low:.2f} and {high:.2f}) on {content['device']}"
    )
    learn = sum(costs[0] for costs in content["layers"].values())
    least = sum(min(costs) for costs in content["layers"].values())
    print(f"its {len(content['layers'])} layers that learn groups take {learn:.2f} ms of it, {least:.2f} ms at least")
    smallest = 1 - (learn - least) / content["whole"]
    print(f"the smallest complexity_target that can be reached is {math.ceil(1e3 * smallest) / 1e3}")
    target = math.ceil(500 * (1 + smallest)) / 1000  # half way
    if target < 1:
        network = "".join(f"{name}={value} " for name, value in args.model_kwargs.items() if name not in TRAINING_ARGS)
        print(f"\ntrain with --model-kwargs {network}complexity_target={target} complexity_unit={args.out}")


def _parser() -> argparse.ArgumentParser:
    from timm.utils import ParseKwargs

    def key_value(text: str) -> str:
        if "=" not in text:
            raise argparse.ArgumentTypeError(f"{text!r} is not a KEY=VALUE")
        return text

    def target(text: str) -> str | float:
        return text if text == "resnext" else float(text)

    parser = argparse.ArgumentParser(
        prog="timm-dgconv",
        description="G-ResNeXt for timm. To train, validate and benchmark the models, use timm's train.py, "
        "validate.py and benchmark.py.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    builds = argparse.ArgumentParser(add_help=False)  # options of several commands
    kwargs_help = "arguments of the model that change the network, as for timm's scripts (default: as timm stored them)"
    builds.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        type=key_value,
        action=ParseKwargs,
        metavar="KEY=VALUE",
        help=kwargs_help,
    )
    weights = argparse.ArgumentParser(add_help=False, parents=[builds])
    weights.add_argument("--no-ema", dest="ema", action="store_false", help="ignore averaged weights in a checkpoint")

    demo = commands.add_parser(
        "demo",
        help="train on scikit-learn's digits, nothing downloaded",
        description="Train a G-ResNeXt on scikit-learn's digits (extra 'demo'). Print the held-out accuracy and "
        "the learned groups of each layer. Write the model, reload it with timm and compare the outputs. With the "
        "defaults this takes less than five minutes on two CPU cores.",
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
    add(
        "--complexity-target",
        type=target,
        metavar="T",
        help="largest share of a dense network's connections, or resnext for the share that a ResNeXt has",
    )

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
        "resnext50_32x4d.dgconv_in1k for its baseline, the name of a model and any TAG for your own training"
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
        "For several checkpoints, print the groups of each layer and the density over the checkpoints. No code in a "
        "checkpoint is executed.",
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
    add("--costs", metavar="FILE", help="print the costs in this table, too, which measure has written")

    measure = commands.add_parser(
        "measure",
        parents=[builds],
        help="measure the layers of a model on this device, for a target in milliseconds",
        description="Measure each layer with every number of groups, as it is deployed, and the whole dense network. "
        "Write a table for complexity_unit. An idle machine gives the best table.",
    )
    measure.set_defaults(run=_measure)
    add = measure.add_argument
    add("--model", required=True, metavar="NAME", help="model, such as g_resnet50")
    add("--out", required=True, type=Path, metavar="FILE", help="JSON file to write")
    add("--device", default="cpu", help="torch device (default: %(default)s)")
    add("--batch-size", type=int, default=1, metavar="N", help="number of images (default: %(default)s)")
    add(
        "--runtime", default="eager", metavar="R", help="eager, compile, onnxruntime or openvino (default: %(default)s)"
    )
    add("--img-size", type=int, metavar="N", help="side of the images in pixels (default: that of the model)")
    add("--rounds", type=int, default=30, metavar="N", help="measurements of each case (default: %(default)s)")
    add("--channels-last", action="store_true", help="use the memory format channels_last")
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
