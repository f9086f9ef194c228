"""Measure fine-tuning with the gates of a loaded ResNeXt at different distances from zero (`PRETRAINED_GATE`).

    python benchmarks/gate_margin.py --out gate_margin.json

A small ResNeXt with one block per stage trains on 600 of scikit-learn's digits. The G-ResNeXt of the same widths loads
its weights and trains on 600 other digits. Each row has the held-out accuracy of the ResNeXt, and the held-out accuracy
and the number of moved gates after the first step and after the epochs 1 and 10. A gate has moved if it is on the other
side of zero than after loading. The accuracy after the first step uses the running statistics of the ResNeXt.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench
import timm
import timm.optim
import torch
from sklearn.datasets import load_digits
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from timm_dgconv import DGConv2d
from timm_dgconv.layers import checkpoints

MODEL: dict[str, Any] = dict(
    layers=(1, 1, 1, 1), cardinality=8, base_width=8, channels=(64, 64, 128, 128), num_classes=10
)
MARGINS = (1e-8, 1e-3, 3e-3, 1e-2, 1e-1)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "momentum 0.03": dict(opt="momentum", lr=0.03),
    "momentum 0.003": dict(opt="momentum", lr=0.003),
    "adamw 1e-3": dict(opt="adamw", lr=1e-3),
    "adamw 1e-4": dict(opt="adamw", lr=1e-4),
}
BATCH = 50
EPOCHS = 10
PRETRAINING_EPOCHS = 30
Data = tuple[Tensor, Tensor]


def top1(model: nn.Module, data: Data) -> float:
    """Return the accuracy in percent."""
    model.eval()
    with torch.inference_mode():
        correct = (model(data[0]).argmax(1) == data[1]).float().mean().item()
    model.train()
    return 100 * correct


def signs(model: nn.Module) -> Tensor:
    """Return the sign bits of all gates."""
    return torch.cat([m.gate.detach().signbit() for m in model.modules() if isinstance(m, DGConv2d)])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, steps: int | None = None) -> None:
    """Train for one epoch, or for its first steps."""
    for batch in torch.randperm(len(data[0])).split(BATCH)[:steps]:
        loss = nn.functional.cross_entropy(model(data[0][batch]), data[1][batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def pretrain(data: Data) -> nn.Module:
    """Train the ResNeXt."""
    resnext = ResNet(Bottleneck, **MODEL)
    optimizer = timm.optim.create_optimizer_v2(resnext, opt="adamw", lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=PRETRAINING_EPOCHS)
    for _ in range(PRETRAINING_EPOCHS):
        train(resnext, optimizer, data)
        schedule.step()
    return resnext


def fine_tune(
    resnext: nn.Module, margin: float, optimizer_args: dict[str, Any], data: Data, held_out: Data
) -> bench.Row:
    """Load the ResNeXt with gates at this distance from zero, and fine-tune."""
    checkpoints.PRETRAINED_GATE = margin
    model = timm.create_model("test_g_resnext", **MODEL)
    model.load_state_dict(resnext.state_dict())
    start = signs(model)
    row = {"resnext": top1(resnext, held_out), "gates": len(start)}
    assert abs(top1(model, held_out) - row["resnext"]) < 0.5, "loading has changed the outputs"
    optimizer = timm.optim.create_optimizer_v2(model, **optimizer_args)
    statistics = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    train(model, optimizer, data, steps=1)
    model.load_state_dict(statistics, strict=False)
    row["step1"], row["step1 moved"] = top1(model, held_out), int((signs(model) != start).sum())
    for epoch in range(1, EPOCHS + 1):
        train(model, optimizer, data)
        if epoch in (1, EPOCHS):
            row[f"epoch{epoch}"], row[f"epoch{epoch} moved"] = top1(model, held_out), int((signs(model) != start).sum())
    return row


def study(seeds: int) -> Iterator[bench.Row]:
    """Yield one row per seed, optimizer and margin."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images = nn.functional.interpolate(images, scale_factor=4).expand(-1, 3, -1, -1).contiguous()
    labels = torch.tensor(digits.target)
    for seed in range(seeds):
        torch.manual_seed(seed)
        order = torch.randperm(len(images)).split([600, 600, len(images) - 1200])
        first, second, held_out = ((images[indices], labels[indices]) for indices in order)
        resnext = pretrain(first)
        for name, optimizer_args in OPTIMIZERS.items():
            for margin in MARGINS:
                torch.manual_seed(seed)
                row = fine_tune(resnext, margin, optimizer_args, second, held_out)
                yield {"seed": seed, "optimizer": name, "margin": margin, **row}


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gate_margin.json"))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    rows = []
    for row in study(args.seeds):
        rows.append(row)
        values = (f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items())
        print(*values, flush=True)
    bench.save(rows, args.out, "cpu")


if __name__ == "__main__":
    main()
