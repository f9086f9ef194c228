"""Measure accuracy over complexity on scikit-learn's digits, for several values of `complexity_weight`.

    python benchmarks/complexity.py --output benchmarks/results

The network is a G-ResNeXt-50 of half the width with one block per stage (3x3 layers of 64 to 512 channels). Each weight
trains it from scratch and from a converted ResNeXt. The ResNeXt with its 32 fixed groups is the baseline. The results
are complexity.json and complexity.png.
"""

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import bench
import timm
import torch
from huggingface_hub.utils import tqdm
from matplotlib.figure import Figure
from timm.data import resolve_model_data_config
from timm.models.resnet import Bottleneck
from timm.utils import random_seed

from timm_dgconv import demo

STARTS = ("from scratch", "from a converted ResNeXt")
NET: dict[str, Any] = dict(layers=(1, 1, 1, 1), base_width=2, num_classes=10)


def study(weights: list[float], seeds: int, epochs: int, image_size: int, device: torch.device) -> list[bench.Row]:
    """Return one row per seed, start and weight. The weight None is timm's ResNeXt with its fixed groups."""
    size = {"input_size": (3, image_size, image_size), "crop_pct": 1.0}
    rows = []
    with tqdm(total=seeds * len(STARTS) * (1 + len(weights)), desc="runs") as bar:
        for seed in range(seeds):
            pretrained: dict[str, torch.Tensor] = {}
            for start in STARTS:
                initial = pretrained  # empty for the first start
                for weight in [None, *weights]:
                    random_seed(seed)
                    name = "resnext50_32x4d" if weight is None else "g_resnext50"
                    steering = dict(complexity_weight=weight) if weight else {}
                    model = timm.create_model(name, pretrained_cfg_overlay=size, **steering, **NET)
                    model.load_state_dict(initial, strict=False)  # a DGConv2d converts the ResNeXt's weights
                    bar.set_postfix_str(f"{start}, weight {weight}")
                    rows.append({"seed": seed, "start": start, "weight": weight, **train(model, seed, epochs, device)})
                    if weight is None:
                        pretrained = {key: value.clone() for key, value in model.state_dict().items()}
                    bar.update()
    return rows


def train(model: torch.nn.Module, seed: int, epochs: int, device: torch.device) -> bench.Row:
    """Train on the digits. Return the final accuracy, and density and groups before and after every epoch."""
    model.to(device, memory_format=torch.channels_last)
    loaders = demo.load_digits(resolve_model_data_config(model), seed, device)
    random_seed(seed)
    history = [density_and_groups(model)]
    top1 = 0.0
    for entry in demo.train(model, *loaders, epochs, device):
        history.append(density_and_groups(model))
        top1 = entry["top1"]
    densities, groups = (list(values) for values in zip(*history, strict=True))
    return {"top1": top1, "density": densities[-1], "densities": densities, "groups": groups}


def density_and_groups(model: torch.nn.Module) -> tuple[float, list[int]]:
    """Return the connected share of all channel pairs of the 3x3 layers, and the groups of each layer."""
    convs = [module.conv2 for module in model.modules() if isinstance(module, Bottleneck)]
    groups = [getattr(conv, "num_groups", conv.groups) for conv in convs]
    pairs = [conv.in_channels * conv.out_channels for conv in convs]
    return sum(p / g for p, g in zip(pairs, groups, strict=True)) / sum(pairs), groups


def plot(rows: list[bench.Row], path: Path, title: str) -> None:
    """Draw accuracy over density, and below it the groups of every layer, with one column per start."""
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    axes = figure.subplots(2, len(STARTS), sharex="row", sharey="row")
    weights = list(dict.fromkeys(row["weight"] for row in rows))
    learned = [weight for weight in weights if weight is not None]
    for column, start in enumerate(STARTS):
        above, below = axes[:, column]
        for n, weight in enumerate(weights):
            these = [row for row in rows if (row["start"], row["weight"]) == (start, weight)]
            densities, top1s = [100 * row["density"] for row in these], [row["top1"] for row in these]
            style: dict[str, Any] = dict(color="black", marker="*", markersize=10)
            label = "ResNeXt, fixed"
            if weight is not None:
                gray = 0.75 * (1 - (n - 1) / max(1, len(learned) - 1))
                style = dict(color=str(gray), marker="os^Dv<>"[(n - 1) % 7], markersize=6)
                label = f"weight {weight:g}"
            above.plot(densities, top1s, linewidth=0, alpha=0.45, **{**style, "markersize": style["markersize"] * 0.6})
            above.errorbar(
                statistics.mean(densities),
                statistics.mean(top1s),
                yerr=statistics.stdev(top1s) if len(top1s) > 1 else 0,
                linewidth=0.8,
                capsize=2,
                label=label,
                **style,
            )
            line = "--" if weight is None else "-"
            below.plot(range(1, 5), mean_groups(these), linestyle=line, linewidth=0.8, **style)
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


def table(rows: list[bench.Row]) -> str:
    """Format the means over the seeds, with the smallest and largest value, as a Markdown table."""
    lines = [
        "| start | weight | connections, % of dense | top-1, % | groups (geometric mean) |",
        "|---|---|---|---|---|",
    ]
    for start, weight in dict.fromkeys((row["start"], row["weight"]) for row in rows):
        these = [row for row in rows if (row["start"], row["weight"]) == (start, weight)]
        densities, top1s = [100 * row["density"] for row in these], [row["top1"] for row in these]
        lines.append(
            f"| {start} | {'fixed' if weight is None else f'{weight:g}'} | {statistics.mean(densities):.2f} "
            f"({min(densities):.2f} to {max(densities):.2f}) | {statistics.mean(top1s):.2f} ({min(top1s):.2f} to "
            f"{max(top1s):.2f}) | {', '.join(f'{g:.3g}' for g in mean_groups(these))} |"
        )
    return "\n".join(lines)


def mean_groups(rows: list[bench.Row]) -> list[float]:
    """Return the geometric mean of the final groups of each layer."""
    layers = zip(*(row["groups"][-1] for row in rows), strict=True)
    return [2 ** statistics.mean(map(math.log2, groups)) for groups in layers]


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
    bench.save(rows, args.output / "complexity.json", args.device)
    title = (
        f"G-ResNeXt-50 of half the width, one block per stage, digits of {args.img_size} pixels, seeds: {args.seeds}"
    )
    plot(rows, args.output / "complexity.png", title)


if __name__ == "__main__":
    main()
