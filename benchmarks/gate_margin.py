"""How far from zero the gates of a loaded ResNeXt should be: fine-tuning after `dgconv.LOADED_GATE` = 1e-8 to 0.1.

A small ResNeXt (one block a stage) is trained on 600 of scikit-learn's digits, loaded into the G-ResNeXt of the same
widths, and fine-tuned on 600 other digits. Printed for each optimizer and margin: held-out accuracy of the ResNeXt,
after the first step and after epochs 1 and 10, and how many gates have changed sides by then. Accuracy after the first
step is measured with the running statistics of the ResNeXt.
"""

import argparse
import json
import platform
from pathlib import Path

import timm
import timm.optim
import torch
from sklearn.datasets import load_digits
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from timm_dgconv import DGConv2d, dgconv

MODEL = dict(layers=(1, 1, 1, 1), cardinality=8, base_width=8, channels=(64, 64, 128, 128), num_classes=10)
MARGINS = (1e-8, 1e-3, 3e-3, 1e-2, 1e-1)
OPTIMIZERS = {
    "momentum 0.03": dict(opt="momentum", lr=0.03),
    "momentum 0.003": dict(opt="momentum", lr=0.003),
    "adamw 1e-3": dict(opt="adamw", lr=1e-3),
    "adamw 1e-4": dict(opt="adamw", lr=1e-4),
}
BATCH = 50
EPOCHS = 10


def top1(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Accuracy in percent."""
    model.eval()
    with torch.inference_mode():
        correct = (model(data[0]).argmax(1) == data[1]).float().mean().item()
    model.train()
    return 100 * correct


def signs(model: nn.Module) -> Tensor:
    """Sign bits of all gates."""
    return torch.cat([m.gate.detach().signbit() for m in model.modules() if isinstance(m, DGConv2d)])


def epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor], steps: int | None = None
) -> None:
    """One epoch, or its first steps."""
    for batch in torch.randperm(len(data[0])).split(BATCH)[:steps]:
        loss = nn.functional.cross_entropy(model(data[0][batch]), data[1][batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    """Run the study and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gate_margin.json"))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    digits = load_digits()
    images = nn.functional.interpolate(
        torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, scale_factor=4
    )
    images, labels = images.expand(-1, 3, -1, -1).contiguous(), torch.tensor(digits.target)
    rows = []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        order = torch.randperm(len(images))
        first, second, held_out = ((images[i], labels[i]) for i in order.split([600, 600, len(images) - 1200]))
        resnext = ResNet(Bottleneck, **MODEL)
        optimizer = timm.optim.create_optimizer_v2(resnext, opt="adamw", lr=2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
        for _ in range(30):
            epoch(resnext, optimizer, first)
            schedule.step()
        before = top1(resnext, held_out)
        for name, optimizer_args in OPTIMIZERS.items():
            for margin in MARGINS:
                dgconv.LOADED_GATE = margin
                torch.manual_seed(seed)
                model = timm.create_model("test_g_resnext", **MODEL)
                model.load_state_dict(resnext.state_dict())
                start = signs(model)
                assert abs(top1(model, held_out) - before) < 0.5, "loading changed the function"
                optimizer = timm.optim.create_optimizer_v2(model, **optimizer_args)
                row = {"seed": seed, "optimizer": name, "margin": margin, "resnext": before, "gates": len(start)}
                state = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
                epoch(model, optimizer, second, steps=1)
                model.load_state_dict(state, strict=False)
                row["step1"], row["step1 moved"] = top1(model, held_out), int((signs(model) != start).sum())
                for number in range(1, EPOCHS + 1):
                    epoch(model, optimizer, second)
                    if number in (1, EPOCHS):
                        row[f"epoch{number}"] = top1(model, held_out)
                        row[f"epoch{number} moved"] = int((signs(model) != start).sum())
                rows.append(row)
                print(
                    " ".join(
                        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
                        for key, value in row.items()
                    ),
                    flush=True,
                )
    result = {
        "command": "python benchmarks/gate_margin.py",
        "device": "cpu, 2 cores",
        "versions": {"timm": timm.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
