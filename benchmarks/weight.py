"""Measure how soon trainings reach their `complexity_target` with a weight of the complexity.

    python benchmarks/weight.py --weights 0.01 0.1 1 --output benchmarks/results

Trainings on scikit-learn's digits: two networks from scratch, and a converted ResNeXt that was trained on the digits
before, each with SGD and AdamW. The results are weight.json and a table.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import bench
import timm
import torch
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from torch import nn

from timm_dgconv import DGConv2d, complexity, demo

SGD, ADAMW = dict(opt="sgd", momentum=0.9), dict(opt="adamw", weight_decay=0.05)
NET: dict[str, Any] = dict(num_classes=10, pretrained_cfg_overlay=dict(input_size=(3, 32, 32), crop_pct=1.0))
TRAININGS: dict[str, dict[str, Any]] = {
    "test_g_resnext, SGD": dict(model="test_g_resnext", target=0.1, lr=0.05, **SGD),
    "test_g_resnext, AdamW": dict(model="test_g_resnext", target=0.1, lr=1e-3, **ADAMW),
    "g_resnext50, SGD": dict(model="g_resnext50", target="resnext", lr=0.05, **SGD),
    "g_resnext50, AdamW": dict(model="g_resnext50", target="resnext", lr=1e-3, **ADAMW),
    "converted resnext50_32x4d, SGD": dict(model="g_resnext50", converted=True, target=0.02, lr=0.005, **SGD),
    "converted resnext50_32x4d, AdamW": dict(model="g_resnext50", converted=True, target=0.02, lr=1e-4, **ADAMW),
}


def density(model: nn.Module) -> float:
    """Return the share of a dense network's connections."""
    dense = sum(m.in_channels * m.out_channels for m in model.modules() if isinstance(m, DGConv2d))
    with torch.no_grad():
        return complexity(model).item() / dense if dense else 1.0


def train(model: nn.Module, epochs: int, **optimizer_args: Any) -> bench.Row:
    """Train with a cosine schedule, and return density and accuracy after each epoch."""
    loaders = demo.load_digits(resolve_model_data_config(model), 0, torch.device("cpu"))
    random_seed(0)
    model.to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, **optimizer_args)
    steps = len(loaders[0])
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=epochs, warmup_epochs=1, warmup_lr=1e-5, step_on_epochs=False, updates_per_epoch=steps
    )
    densities, top1s = [density(model)], []
    for epoch in range(epochs):
        model.train()
        for step, (images, labels) in enumerate(loaders[0]):
            loss = nn.functional.cross_entropy(model(images.to(memory_format=torch.channels_last)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step_update(epoch * steps + step + 1)
            densities.append(density(model))
        top1s.append(demo.evaluate(model, loaders[1], torch.device("cpu"))[0])
    return {"steps_per_epoch": steps, "densities": densities, "top1": top1s}


def table(rows: list[bench.Row]) -> str:
    """Format the rows as a Markdown table."""
    lines = [
        "| training | weight | epochs to the target | connections, % after each epoch | top-1, % after each epoch |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        steps = row["steps_per_epoch"]
        target = 1 / 32 if row["target"] == "resnext" else row["target"]
        reached = [n / steps for n, value in enumerate(row["densities"]) if value <= target]
        densities = ", ".join(f"{100 * value:.2f}" for value in row["densities"][steps::steps])
        top1 = ", ".join(f"{value:.1f}" for value in row["top1"])
        soon = f"{reached[0]:.2f}" if reached else "not reached"
        lines.append(f"| {row['training']} | {row['weight']:g} | {soon} | {densities} | {top1} |")
    return "\n".join(lines)


def main() -> None:
    """Run the trainings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.01, 0.1, 1])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--trainings", nargs="+", choices=TRAININGS, default=list(TRAININGS))
    parser.add_argument("--output", type=Path, default=Path("."))
    args = parser.parse_args()
    path = args.output / "weight.json"
    rows: list[bench.Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    resnext: dict[str, torch.Tensor] = {}
    if any(TRAININGS[name].get("converted") for name in args.trainings):
        random_seed(0)
        model = timm.create_model("resnext50_32x4d", **NET)
        print("resnext50_32x4d:", train(model, args.epochs, lr=1e-3, **ADAMW)["top1"])
        resnext = model.state_dict()
    for name in args.trainings:
        for weight in args.weights:
            options = dict(TRAININGS[name])
            model_name, target, converted = options.pop("model"), options.pop("target"), options.pop("converted", False)
            random_seed(0)
            model = timm.create_model(model_name, complexity_weight=weight, complexity_target=target, **NET)
            if converted:
                model.load_state_dict(resnext)
            rows.append({"training": name, "weight": weight, "target": target, **train(model, args.epochs, **options)})
            print(rows[-1]["training"], weight, rows[-1]["top1"], flush=True)
            bench.save(rows, path, "cpu")
    print(table(rows))


if __name__ == "__main__":
    main()
