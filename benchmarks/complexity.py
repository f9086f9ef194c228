"""Accuracy over complexity on scikit-learn's digits: what `complexity_weight` buys, and what the gates do.

A G-ResNeXt-50 of half the width with one block a stage (3x3 widths 64 to 512), from scratch and from a converted
ResNeXt, with several weights, beside the fixed 32 groups; writes complexity.json and complexity.png beside each other.

    python benchmarks/complexity.py --output benchmarks/results
"""

import argparse
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import timm
import torch
from huggingface_hub.utils import tqdm
from timm.data import resolve_model_data_config
from timm.models.resnet import Bottleneck
from timm.utils import random_seed

from timm_dgconv import DGConv2d, bench, demo, group_report

matplotlib.use("Agg")
from matplotlib import pyplot

FIXED = "fixed"
STARTS = ("from scratch", "from a converted ResNeXt")
NET: dict[str, Any] = dict(layers=(1, 1, 1, 1), base_width=2, num_classes=10)
Row = dict[str, Any]


def study(weights: list[float], seeds: int, epochs: int, image_size: int, device: torch.device) -> list[Row]:
    """A row for each seed, start and weight, and for timm's ResNeXt with its fixed groups."""
    size = {"input_size": (3, image_size, image_size), "crop_pct": 1.0}
    rows = []
    with tqdm(total=seeds * len(STARTS) * (1 + len(weights)), desc="runs") as bar:
        for seed in range(seeds):
            pretrained: dict[str, torch.Tensor] = {}
            for start in STARTS:
                trained = pretrained
                for weight in [None, *weights]:
                    random_seed(seed)
                    name = "resnext50_32x4d" if weight is None else "g_resnext50"
                    steering = dict(complexity_weight=weight) if weight else {}
                    model = timm.create_model(name, pretrained_cfg_overlay=size, **steering, **NET)
                    model.load_state_dict(trained, strict=False)  # converts
                    bar.set_postfix_str(f"{start}, weight {weight}")
                    rows.append({"seed": seed, "start": start, "weight": weight, **train(model, seed, epochs, device)})
                    if weight is None:
                        pretrained = {key: value.clone() for key, value in model.state_dict().items()}
                    bar.update()
    return rows


def train(model: torch.nn.Module, seed: int, epochs: int, device: torch.device) -> Row:
    """Train on the digits: accuracy, groups and share of connections over the epochs."""
    model.to(device, memory_format=torch.channels_last)
    loaders = demo.load_digits(resolve_model_data_config(model), seed, device)
    random_seed(seed)
    reports = [report(model)]
    top1 = 0.0
    for entry in demo.train(model, *loaders, epochs, device):
        reports.append(report(model))
        top1 = entry["top1"]
    return {
        "top1": top1,
        "share": reports[-1][0],
        "shares": [r[0] for r in reports],
        "groups": [r[1] for r in reports],
    }


def report(model: torch.nn.Module) -> tuple[float, list[int]]:
    """Share of a dense network's connections, and the groups of each layer."""
    if any(isinstance(module, DGConv2d) for module in model.modules()):
        learned = group_report(model)
        return learned.share, [layer.groups for layer in learned.layers]
    blocks = [module for module in model.modules() if isinstance(module, Bottleneck)]
    dense = sum(block.conv2.in_channels * block.conv2.out_channels for block in blocks)
    connected = sum(block.conv2.in_channels * block.conv2.out_channels / block.conv2.groups for block in blocks)
    return connected / dense, [block.conv2.groups for block in blocks]


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Accuracy over complexity, and the groups of every layer under it, a column a start."""
    figure, axes = pyplot.subplots(2, len(STARTS), figsize=(7.2, 5.2), sharex="row", sharey="row", layout="constrained")
    weights = list(dict.fromkeys(row["weight"] for row in rows))
    learned = [weight for weight in weights if weight is not None]
    for column, start in enumerate(STARTS):
        above, below = axes[:, column]
        for n, weight in enumerate(weights):
            these = [row for row in rows if (row["start"], row["weight"]) == (start, weight)]
            shares, top1s = [100 * row["share"] for row in these], [row["top1"] for row in these]
            style: dict[str, Any] = dict(color="black", marker="*", markersize=10)
            label = "ResNeXt, fixed"
            if weight is not None:
                gray = 0.75 * (1 - (n - 1) / max(1, len(learned) - 1))
                style = dict(color=str(gray), marker="os^Dv<>"[(n - 1) % 7], markersize=6)
                label = f"weight {weight:g}"
            above.plot(shares, top1s, linewidth=0, alpha=0.45, **{**style, "markersize": style["markersize"] * 0.6})
            above.errorbar(
                statistics.mean(shares),
                statistics.mean(top1s),
                yerr=statistics.stdev(top1s) if len(top1s) > 1 else 0,
                linewidth=0.8,
                capsize=2,
                label=label,
                **style,
            )
            middle = [2 ** statistics.mean(math.log2(row["groups"][-1][k]) for row in these) for k in range(4)]
            below.plot(range(1, 5), middle, linestyle="--" if weight is None else "-", linewidth=0.8, **style)
        above.set(xscale="log", title=start, xlabel="connections, % of dense")
        above.xaxis.set_major_formatter("{x:g}")
        below.set_yscale("log", base=2)
        below.yaxis.set_major_formatter("{x:g}")
        below.set(xlabel="stage", xticks=range(1, 5))
        for axis in (above, below):
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("held-out accuracy, %")
    axes[1, 0].set_ylabel("groups (geometric mean)")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8
    )
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=200)


def table(rows: list[Row]) -> str:
    """Means over the seeds as a Markdown table."""
    lines = [
        "| start | weight | connections, % of dense | top-1, % | groups (geometric mean) |",
        "|---|---|---|---|---|",
    ]
    for start, weight in dict.fromkeys((row["start"], row["weight"]) for row in rows):
        these = [row for row in rows if (row["start"], row["weight"]) == (start, weight)]
        shares, top1s = ([row[key] * factor for row in these] for key, factor in (("share", 100), ("top1", 1)))
        groups = [2 ** statistics.mean(math.log2(row["groups"][-1][k]) for row in these) for k in range(4)]
        lines.append(
            f"| {start} | {'fixed' if weight is None else f'{weight:g}'} | {statistics.mean(shares):.2f} "
            f"({min(shares):.2f} to {max(shares):.2f}) | {statistics.mean(top1s):.2f} ({min(top1s):.2f} to "
            f"{max(top1s):.2f}) | {', '.join(f'{g:.3g}' for g in groups)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, nargs="+", default=[1e-8, 1e-7, 1e-6, 1e-5])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("."))
    args = parser.parse_args()
    start = time.monotonic()
    rows = study(args.weights, args.seeds, args.epochs, args.img_size, torch.device(args.device))
    print(table(rows))
    print(f"{len(rows)} runs in {(time.monotonic() - start) / 60:.0f} minutes")
    bench.save(
        rows, args.output / "complexity.json", "python benchmarks/complexity.py " + " ".join(sys.argv[1:]), args.device
    )
    plot(
        rows,
        args.output / "complexity.png",
        f"G-ResNeXt-50 of half the width, a block a stage, digits of {args.img_size} pixels, seeds: {args.seeds}",
    )


if __name__ == "__main__":
    main()
