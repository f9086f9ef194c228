"""Measure the time and memory of layers and networks as ratios to the network of timm with the same widths.

    python benchmarks/bench.py train                              # forward and backward
    python benchmarks/bench.py sgd --model g_resnext101           # with an optimizer step
    python benchmarks/bench.py infer --forms deployed --runtimes eager torch.compile onnxruntime openvino
    python benchmarks/bench.py memory                             # peak memory of training
    python benchmarks/bench.py layers --json layers.json          # forward and backward of single layers

Each round measures every network once, so that a slow minute of the machine affects all of them alike. The output is
one row per network and memory format: the median time, and the median and quartiles over the rounds of the ratio to
the network of timm in the first runtime (layers: to torch.nn.Conv2d with the same groups).
"""

import argparse
import itertools
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.utils import tqdm
from runtimes import RUNTIMES
from timm.utils import reparameterize_model
from torch import Tensor, nn

from timm_dgconv import DGConv2d, compact, freeze_groups
from timm_dgconv.models.base_models import BASE_MODELS
from timm_dgconv.ops import grouped
from timm_dgconv.runtimes import Run

Row = dict[str, Any]
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BASELINES = {**BASE_MODELS, "test_g_resnet": "test_resnet", "test_g_resnext": "test_resnet"}
FORMS = {
    "learnable": "nested gates that learn",
    "sorted": "the paper's gates with sort=True",
    "unsorted": "the paper's gates",
    "frozen": "gates without gradients",
    "masked dense": "a dense convolution with a masked weight, as in the original release",
    "compact": "timm_dgconv.compact",
    "deployed": "timm.utils.reparameterize_model",
}
ONLY_INFERENCE = ("compact", "deployed")


@torch.no_grad()
def set_groups(module: nn.Module, groups: int, permuted: bool = False) -> None:
    """Set the number of groups of every DGConv2d. Layers with too few gates close all of them.

    With `permuted` random gates are closed, and not the first ones.
    """
    for conv in (m for m in module.modules() if isinstance(m, DGConv2d)):
        conv.reset_gate(min(groups, 1 << conv.num_bits))
        if permuted:
            conv.gate.copy_(conv.gate[torch.randperm(conv.num_bits)])


def build(name: str, form: str, groups: int, permuted: bool = False, training: bool = True) -> nn.Module:
    """Build a timm model. A model of this package gets this number of groups in each layer and one of the `FORMS`."""
    torch.manual_seed(0)
    paper: dict[str, Any] = {"sorted": dict(nested=False), "unsorted": dict(sort=False)}
    model = timm.create_model(name, **paper.get(form, {}))
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.ones_(norm.weight)  # timm starts the last norm of a block at 0, which hides the block
    set_groups(model, groups, permuted)
    if form == "frozen":
        freeze_groups(model)
    elif form == "masked dense":
        for conv in (m for m in model.modules() if isinstance(m, DGConv2d)):
            conv.forward = conv.masked_dense
    elif form == "compact":
        model = compact(model)
    elif form == "deployed":
        model = reparameterize_model(compact(model).eval())
    return model.train(training)


def step(run: Run, net: nn.Module, x: Tensor, what: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Return what is measured: "infer", "train" (forward and backward), or "sgd" (also a step with momentum)."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9) if what == "sgd" else None

    def call() -> Tensor:
        with torch.inference_mode(what == "infer"), torch.autocast(x.device.type, dtype, dtype != torch.float32):
            y = run(x)
        if what != "infer":
            y.float().square().mean().backward()
            if optimizer is not None:
                optimizer.step()
            net.zero_grad()
        return y

    return call


def interleave(calls: dict[str, Callable[[], Any]], rounds: int, device: str, title: str) -> dict[str, list[float]]:
    """Return the seconds of every call in every round. Two warm-up calls come first."""
    is_cuda = torch.device(device).type == "cuda"

    def timed(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        if is_cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for call in calls.values():
        for _ in range(2):
            timed(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in tqdm(range(rounds), desc=title, leave=False):
        for name, call in calls.items():
            times[name].append(timed(call))
    return times


def summary(times: Sequence[float], baseline: Sequence[float]) -> Row:
    """Return the median in milliseconds, and the median and quartiles of the ratio to the baseline's same round."""
    ratios = sorted(a / b for a, b in zip(times, baseline, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 3
    return {
        "ms": round(1e3 * statistics.median(times), 2),
        "ratio": round(middle, 3),
        "quartiles": [round(low, 3), round(high, 3)],
    }


def layers(args: argparse.Namespace) -> list[Row]:
    """Measure forward and backward of a 3x3 layer for each width, memory format, number of groups and merged width.

    By default the input has the height and width of the features of this width in a ResNeXt for images of 160 pixels,
    at most 40. With few pixels and one thread, the rows have the time of the host. The way "policy" has the groups that
    the layer chooses for the weight gradient, the way "16" has groups of at least 16 channels there.
    """
    rows = []
    like: Any = dict(device=args.device, dtype=DTYPES[args.dtype])
    for width, name in itertools.product(args.widths, args.formats):
        side = args.side or max(1, min(40, 5120 // width))
        x = torch.randn(args.batch_size, width, side, side, **like).to(memory_format=FORMATS[name]).requires_grad_()
        grad = torch.randn_like(x)
        conv = DGConv2d(width, width, 3, padding=1, bias=False, **like)
        for num_closed in range(conv.gate.numel() + 1):
            groups = 1 << num_closed
            set_groups(conv, groups)
            fixed = nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False, **like)
            calls: dict[str, Callable[[], Any]] = {"fixed": partial(_layer_step, fixed, x, grad)}
            calls["policy"] = partial(_layer_step, conv, x, grad)
            for n in range(max(num_closed, 1)):
                calls[str(2 * width >> n)] = partial(_layer_step, conv, x, grad, 2 * width >> n)
            times = interleave(calls, args.rounds, args.device, f"{width} channels, {groups} groups, {name}")
            for way, seconds in times.items():
                row = dict(width=width, side=side, groups=groups, format=name, way=way)
                rows.append({**row, **summary(seconds, times["fixed"])})
    return rows


def _layer_step(layer: nn.Conv2d, x: Tensor, grad: Tensor, width: int | None = None) -> None:
    chosen = dict(grouped.MIN_CHANNELS)
    if width is not None:
        grouped.MIN_CHANNELS.update(dict.fromkeys(chosen, width))
    torch.autograd.backward(layer(x), grad, inputs=[x, *layer.parameters()])
    grouped.MIN_CHANNELS.update(chosen)
    layer.zero_grad()
    x.grad = None


def networks(args: argparse.Namespace) -> list[Row]:
    """Measure a training step or inference of each network in each runtime and memory format.

    Rows of inference contain the largest difference of the logits to the learnable form in eager torch, relative to its
    largest logit. The form "unsorted" is compared with itself in eager torch, since its weights join other channels.
    """
    dtype, training = DTYPES[args.dtype], args.what != "infer"
    rows: list[Row] = []
    for name in args.formats:
        x = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device)
        x = x.to(memory_format=FORMATS[name])

        def prepared(model: str, form: str, name: str = name) -> Any:
            net: Any = build(model, form, args.groups, args.permuted, training)
            return net.to(args.device, memory_format=FORMATS[name])

        calls: dict[str, Callable[[], Tensor]] = {}
        differences: dict[str, float] = {}
        references: dict[str, Tensor] = {}
        for label, (model, form, runtime) in _labels(args).items():
            net = prepared(model, form)
            calls[label] = step(RUNTIMES[runtime](net, x), net, x, args.what, dtype)
            if form and not training:
                like = "unsorted" if form == "unsorted" else "learnable"  # other groups if they are permuted
                if like not in references:
                    net = prepared(args.model, like)
                    references[like] = step(net, net, x, "infer", dtype)().float()
                reference = references[like]
                difference = (calls[label]().float() - reference).abs().max() / reference.abs().max()
                differences[label] = difference.item()
        times = interleave(calls, args.rounds, args.device, f"{args.model}, {args.what}, {name}")
        baseline = next(iter(calls))
        for label, seconds in times.items():
            row = dict(model=label, what=args.what, format=name, dtype=args.dtype)
            row.update(batch=args.batch_size, image=args.img_size, groups=args.groups, permuted=args.permuted)
            row.update(summary(seconds, times[baseline]))
            if label in differences:
                row["largest_difference"] = differences[label]
            rows.append(row)
    return rows


def _labels(args: argparse.Namespace) -> dict[str, tuple[str, str, str]]:
    """Return name, form and runtime of the networks by the label of their rows. The network of timm comes first."""
    forms = args.forms or [form for form in FORMS if form not in ONLY_INFERENCE or args.what == "infer"]
    nets = {name: (name, "") for name in (BASELINES[args.model], *args.others)}
    nets |= {f"{args.model}, {form}": (args.model, form) for form in forms}
    return {
        label if runtime == "eager" else f"{label}, {runtime}": (*net, runtime)
        for label, net in nets.items()
        for runtime in args.runtimes
    }


def memories(args: argparse.Namespace) -> list[Row]:
    """Measure the peak memory of training each network, each in a new process."""
    rows = []
    for label, (model, form, _) in tqdm(_labels(args).items(), desc=f"{args.model}, peak memory", leave=False):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
            peak = executor.submit(memory, model, args.device, form, args.batch_size, args.img_size, args.groups)
            rows.append({"model": label, "MiB": round(peak.result())})
    return rows


def memory(model: str, device: str, form: str, batch_size: int, image_size: int, groups: int) -> float:
    """Return the peak memory of two training steps in MiB. Call it once per process.

    On a CPU this is the growth of the peak resident size since the model was built, on CUDA the peak of torch's
    allocator.
    """
    is_cuda = torch.device(device).type == "cuda"
    net = build(model, form, groups).to(device)
    x = torch.randn(batch_size, 3, image_size, image_size, device=device)
    before = 0.0 if is_cuda else _peak_resident()
    for _ in range(2):
        net(x).square().mean().backward()
        net.zero_grad()
    return torch.cuda.max_memory_allocated(device) / 2**20 if is_cuda else _peak_resident() - before


def _peak_resident() -> float:
    """Return the peak resident size of this process in MiB."""
    try:
        import resource
    except ImportError:
        raise RuntimeError("peak memory on a CPU is not available on Windows, which has no module resource") from None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, Linux KiB


def table(rows: Sequence[Row]) -> str:
    """Format rows as a Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def text(value: Any) -> str:
        if isinstance(value, list):
            return " to ".join(map(str, value))
        return f"{value:.1e}" if isinstance(value, float) and 0 < abs(value) < 1e-3 else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(text(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def versions(device: str) -> Row:
    """Return what the figures depend on."""
    is_cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def save(rows: Sequence[Row], path: Path, device: str, **facts: Any) -> None:
    """Write rows with the command of this process, the versions and further facts as JSON, one row per line."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    write({"command": command, **versions(device), **facts, "rows": list(rows)}, path)


def write(content: Row, path: Path) -> None:
    """Replace a JSON file. A process that is stopped in between leaves the old file."""
    head = json.dumps({key: value for key, value in content.items() if key != "rows"}).removesuffix("}")
    rows = ",\n".join(f" {json.dumps(row)}" for row in content["rows"])
    part = path.with_suffix(".part")
    part.write_text(f'{head}, "rows": [\n{rows}\n]}}\n', encoding="utf-8")
    part.replace(path)


def _parser() -> argparse.ArgumentParser:
    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument(
        "what",
        choices=["train", "sgd", "infer", "memory", "layers"],
        help="forward and backward; the same with an optimizer step; inference; peak memory of training; forward and "
        "backward of single layers over the merged groups of the weight gradient",
    )
    parser.add_argument("--model", default="g_resnext50", choices=list(BASELINES), help="model to measure")
    parser.add_argument("--others", nargs="*", default=[], metavar="NAME", help="further timm models to measure")
    parser.add_argument(
        "--forms",
        nargs="*",
        choices=list(FORMS),
        metavar="FORM",
        help="forms of the model: " + "; ".join(f"'{form}' ({text})" for form, text in FORMS.items()),
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="dtype of autocast, or of the layers")
    parser.add_argument(
        "--format", dest="formats", nargs=1, default=list(FORMATS), choices=list(FORMATS), help="memory format"
    )
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="images per step")
    parser.add_argument("--img-size", type=int, default=160, metavar="N", help="side of the images in pixels")
    parser.add_argument("--groups", type=int, default=32, metavar="N", help="groups of every layer")
    parser.add_argument("--permuted", action="store_true", help="close random gates, not the first ones")
    parser.add_argument(
        "--runtimes",
        nargs="*",
        default=["eager"],
        choices=list(RUNTIMES),
        metavar="RUNTIME",
        help=f"programs that run the networks: {', '.join(RUNTIMES)}; training takes the first two",
    )
    parser.add_argument(
        "--widths", type=int, nargs="*", default=[128, 256, 512, 1024], metavar="C", help="channels of layers"
    )
    parser.add_argument("--side", type=int, metavar="N", help="height and width of the input of layers")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="measurements of each network or layer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    return parser


def main() -> None:
    """Run the command line."""
    parser = _parser()
    args = parser.parse_args()
    if args.what != "infer" and not {"eager", "torch.compile"} >= set(args.runtimes):
        parser.error(f"--runtimes {' '.join(args.runtimes)} is not for training; use eager and torch.compile")
    try:
        rows = {"layers": layers, "memory": memories}.get(args.what, networks)(args)
        print(table(rows))
        print(", ".join(f"{key} {value}" for key, value in versions(args.device).items()))
        if args.json:
            save(rows, args.json, args.device)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
