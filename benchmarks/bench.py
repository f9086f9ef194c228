"""Time and memory of layers and networks, as ratios to timm's, measured in one run."""

import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.utils import tqdm
from timm.utils import reparameterize_model
from torch import Tensor, nn

from timm_dgconv import group_conv
from timm_dgconv.dgconv import LOADED_GATE, DGConv2d

Row = dict[str, Any]
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BASELINES = {"g_resnext50": "resnext50_32x4d", "g_resnext101": "resnext101_32x8d", "test_g_resnext": "test_resnet"}
FORMS = {
    "learnable": "gates that learn",
    "frozen": "gates with requires_grad off",
    "masked dense": "the original's way: a dense convolution with a masked weight",
    "deployed": "timm.utils.reparameterize_model",
}


def set_groups(module: nn.Module, groups: int, scattered: bool = False) -> None:
    """Close as many gates of each DGConv2d as this number of groups takes.

    Args:
        module: A model or layer.
        groups: A power of two; layers with fewer gates close all.
        scattered: Close random gates (by torch's generator) rather than the first, which make groups contiguous.

    Raises:
        ValueError: If groups is no power of two.
    """
    if groups < 1 or groups & (groups - 1):
        raise ValueError(f"groups={groups} must be a power of two")
    with torch.no_grad():
        for conv in (m for m in module.modules() if isinstance(m, DGConv2d)):
            bits = conv.gate.numel()
            order = torch.randperm(bits) if scattered else torch.arange(bits)
            conv.gate.fill_(LOADED_GATE)[order[: groups.bit_length() - 1]] = -LOADED_GATE


class _MaskedDense(nn.Module):
    """A DGConv2d as the original computes it."""

    def __init__(self, conv: DGConv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        weight = conv.weight * conv.connectivity()[:, :, None, None]
        return nn.functional.conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation)


def build(name: str, form: str, groups: int, scattered: bool = False) -> nn.Module:
    """A timm model; one of ours in one of `FORMS`, with this number of groups in each layer."""
    model = timm.create_model(name)
    set_groups(model, groups, scattered)
    if form == "frozen":
        for conv in (m for m in model.modules() if isinstance(m, DGConv2d)):
            conv.gate.requires_grad_(False)
    elif form == "masked dense":
        for block in [m for m in model.modules() if isinstance(getattr(m, "conv2", None), DGConv2d)]:
            block.conv2 = _MaskedDense(block.conv2)
    elif form == "deployed":
        model = reparameterize_model(model.eval())
    return model


def interleave(calls: dict[str, Callable[[], Any]], rounds: int, device: str, title: str) -> dict[str, list[float]]:
    """Seconds of every call, all of them once a round, so that a slower minute of the machine hits all alike."""

    def timed(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
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
    """Median milliseconds, and the ratio to the baseline of the same round: median and quartiles."""
    ratios = sorted(a / b for a, b in zip(times, baseline, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {
        "ms": round(1e3 * statistics.median(times), 2),
        "ratio": round(middle, 3),
        "quartiles": [round(low, 3), round(high, 3)],
        "ratio_of_minima": round(min(times) / min(baseline), 3),
    }


def versions(device: str) -> Row:
    """What the figures depend on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def layers(
    device: str,
    dtype: str,
    formats: Sequence[str],
    widths: Sequence[int],
    batch_size: int,
    rounds: int,
) -> list[Row]:
    """Forward and backward of one 3x3 layer: width x groups x memory format x span of the weight gradient.

    The image side is that of a ResNeXt on 160 pixels at this width, at most 40. The ratio is to torch.nn.Conv2d with
    these groups.
    """
    rows = []
    torch_dtype = DTYPES[dtype]
    for width in widths:
        side = max(1, min(40, 5120 // width))
        for name in formats:
            like: Any = dict(device=device, dtype=torch_dtype)
            x = torch.randn(batch_size, width, side, side, **like).to(memory_format=FORMATS[name]).requires_grad_()
            grad = torch.randn_like(x)
            for closed in range(width.bit_length()):
                groups = 1 << closed
                fixed = nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False, **like)
                conv = DGConv2d(width, width, 3, padding=1, bias=False, **like)
                set_groups(conv, groups)

                calls: dict[str, Callable[[], Any]] = {
                    "fixed": partial(_step, fixed, x, grad),
                    "policy": partial(_step, conv, x, grad),
                }
                for wider in range(closed + 1):
                    # The lowest closed bits, so that the order of channels stays.
                    span = ((1 << wider) - 1) << (width.bit_length() - 1 - closed)
                    calls[str(wider)] = partial(_step, conv, x, grad, (0, span))
                calls["masked dense"] = partial(_step, conv, x, grad, (width - 1, width - 1))
                times = interleave(calls, rounds, device, f"{width} channels, {groups} groups, {name}")
                for way, seconds in times.items():
                    row = dict(width=width, side=side, groups=groups, format=name, way=way)
                    rows.append({**row, **summary(seconds, times["fixed"])})
    return rows


def _step(layer: nn.Module, x: Tensor, grad: Tensor, spans: group_conv.Spans | None = None) -> None:
    if isinstance(layer, DGConv2d):
        layer.spans = spans
    torch.autograd.backward(layer(x), grad, inputs=[x, *layer.parameters()])
    layer.zero_grad()
    x.grad = None


def networks(
    model: str,
    device: str,
    dtype: str,
    formats: Sequence[str],
    what: str,
    batch_size: int,
    image_size: int,
    groups: int,
    scattered: bool,
    compiled: bool,
    rounds: int,
    others: Sequence[str] = (),
    forms: Sequence[str] | None = None,
) -> list[Row]:
    """A training step or inference of ours and of timm's ResNeXt with the same widths.

    Args:
        model: One of ours.
        device: "cpu" or "cuda".
        dtype: "float32", or that of autocast.
        formats: Of "nchw" and "nhwc".
        what: "train" (forward and backward), "sgd" (with an optimizer step, momentum 0.9) or "infer".
        batch_size: Number of images.
        image_size: Their side in pixels.
        groups: Number of groups of each layer.
        scattered: Closed gates at random places, so that channels are permuted.
        compiled: With torch.compile.
        rounds: Number of measurements of each.
        others: Further timm models.
        forms: Keys of `FORMS`; those that `what` can have by default.

    Returns:
        A row for each model, form and memory format; `largest_difference` to the learnable form where it infers.
    """
    baseline = BASELINES[model]
    forms = list(forms or (FORMS if what == "infer" else [form for form in FORMS if form != "deployed"]))
    autocast: Any = nullcontext if dtype == "float32" else lambda: torch.autocast(device, DTYPES[dtype])
    rows: list[Row] = []
    for name in formats:
        x = torch.randn(batch_size, 3, image_size, image_size, device=device).to(memory_format=FORMATS[name])
        calls: dict[str, Callable[[], Any]] = {}
        outputs: dict[str, Tensor] = {}
        for label in (baseline, *others, *(f"{model}, {form}" for form in forms)):
            torch.manual_seed(0)
            form = label.partition(", ")[2]
            net = build(label.partition(", ")[0], form, groups, scattered)
            net = net.to(device).to(memory_format=FORMATS[name])
            net.train(what != "infer")
            run: Any = torch.compile(net) if compiled else net
            if what == "infer":
                calls[label] = partial(_infer, run, x, autocast)
                if form:
                    outputs[label] = calls[label]().float()
            else:
                optimizer = torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9) if what == "sgd" else None
                calls[label] = partial(_train, run, x, autocast, optimizer)
        times = interleave(calls, rounds, device, f"{model}, {what}, {name}")
        for label, seconds in times.items():
            row = dict(model=label, what=what, format=name, dtype=dtype, compiled=compiled, batch=batch_size)
            row.update(image=image_size, groups=groups, scattered=scattered, **summary(seconds, times[baseline]))
            if label in outputs:
                reference = outputs.get(f"{model}, learnable", outputs[label])
                row["largest_difference"] = float((outputs[label] - reference).abs().max() / reference.abs().max())
            rows.append(row)
        calls.clear()
    _best_formats(rows, baseline)
    return rows


def _infer(net: nn.Module, x: Tensor, autocast: Any) -> Tensor:
    with torch.inference_mode(), autocast():
        return net(x)


def _train(net: nn.Module, x: Tensor, autocast: Any, optimizer: torch.optim.Optimizer | None) -> None:
    with autocast():
        loss = net(x).float().square().mean()
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    net.zero_grad()


def _best_formats(rows: list[Row], baseline: str) -> None:
    """Add the ratio of each one's better memory format to the baseline's."""
    best: dict[str, float] = {}
    for row in rows:
        best[row["model"]] = min(row["ms"], best.get(row["model"], math.inf))
    for row in rows:
        row["ratio_of_better_formats"] = round(best[row["model"]] / best[baseline], 3)


def memory(model: str, device: str, form: str, batch_size: int, image_size: int, groups: int) -> float:
    """Peak memory of two training steps in MiB, of this process, so call it in a new one.

    On a CPU the peak resident size above that before the first step; on CUDA what torch has allocated at most.
    """
    net = build(model, form, groups).to(device)
    x = torch.randn(batch_size, 3, image_size, image_size, device=device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for _ in range(2):
        net(x).square().mean().backward()
        net.zero_grad()
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def memories(model: str, device: str, batch_size: int, image_size: int, groups: int) -> list[Row]:
    """`memory` of the ResNeXt and of ours, each in a process of its own."""
    rows = []
    labels = [(BASELINES[model], ""), *((model, form) for form in FORMS if form != "deployed")]
    for name, form in tqdm(labels, desc=f"{model}, peak memory", leave=False):
        arguments = (name, device, form, batch_size, image_size, groups)
        code = f"from timm_dgconv import bench; print(bench.memory(*{arguments!r}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"measuring the memory of {name} failed: {done.stderr.strip().splitlines()[-1:]}")
        rows.append({"model": f"{name}, {form}" if form else name, "MiB": round(float(done.stdout.split()[-1]))})
    return rows


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def text(value: Any) -> str:
        if isinstance(value, list):
            return " to ".join(map(str, value))
        return f"{value:.1e}" if isinstance(value, float) and 0 < abs(value) < 1e-3 else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(text(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Step time over number of groups, a panel a width and memory format, a line a span, from `layers`."""
    try:
        import matplotlib
    except ImportError:
        raise RuntimeError("plots need matplotlib: pip install 'timm-dgconv[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    widths, formats = (sorted({row[key] for row in rows}) for key in ("width", "format"))
    figure, axes = pyplot.subplots(
        len(formats), len(widths), figsize=(3.2 * len(widths), 2.9 * len(formats) + 0.8), squeeze=False
    )
    ways = list(dict.fromkeys(row["way"] for row in rows))
    styles: dict[str, dict[str, Any]] = {
        "fixed": dict(color="black", linestyle="--", label="nn.Conv2d with these groups"),
        "masked dense": dict(color="black", linestyle=":", label="masked dense"),
        "policy": dict(color="black", linewidth=0, marker="o", markersize=5, label="what the policy takes"),
    }
    spans = [way for way in ways if way not in styles]
    for n, way in enumerate(spans):
        gray = 0.15 + 0.7 * n / max(1, len(spans) - 1)
        styles[way] = dict(color=str(gray), marker="x^sv+d1234<"[n % 11], markersize=4, linewidth=0.9)
        styles[way]["label"] = "D' = open bits" if way == "0" else f"and {way} more"
    for i, name in enumerate(formats):
        for j, width in enumerate(widths):
            axis = axes[i][j]
            for way in ways:
                points = [
                    (r["groups"], r["ms"]) for r in rows if (r["format"], r["width"], r["way"]) == (name, width, way)
                ]
                axis.plot(*zip(*points, strict=True), **styles[way]) if points else None
            axis.set(xscale="log", yscale="log", title=f"{width} channels, {name}")
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(ticker.NullFormatter())
            if i == len(formats) - 1:
                axis.set_xlabel("groups")
            if j == 0:
                axis.set_ylabel("forward + backward, ms")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.suptitle(title, fontsize=10)
    figure.legend(handles, labels, loc="lower center", ncols=5, fontsize=7, frameon=False)
    figure.tight_layout(rect=(0, 0.06 + 0.06 / len(formats), 1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def save(rows: Sequence[Row], path: Path, command: str, device: str) -> None:
    """Write rows with versions and command as JSON."""
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(json.dumps({"command": command, **versions(device), "rows": list(rows)}, indent=1) + "\n")
    beside.replace(path)
