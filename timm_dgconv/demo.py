"""The main job on real images with nothing downloaded: train on scikit-learn's digits and show what was learned."""

import json
import math
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from timm.data import create_loader, resolve_model_data_config
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy, random_seed
from torch import nn

from timm_dgconv import __version__
from timm_dgconv.dgconv import DGConv2d
from timm_dgconv.report import group_report


class _Digits(torch.utils.data.Dataset[tuple[Any, int]]):
    """Part of scikit-learn's handwritten digits (1797 scans of 8x8 pixels, ten classes) as RGB images."""

    def __init__(self, images: "np.ndarray[Any, Any]", labels: "np.ndarray[Any, Any]") -> None:
        self.images = [Image.fromarray((image * (255 / 16)).astype(np.uint8)).convert("RGB") for image in images]
        self.labels = [int(label) for label in labels]
        self.transform: Any = None  # set by timm's create_loader

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), self.labels[index]


def load_digits(config: dict[str, Any], seed: int, device: torch.device, batch_size: int = 32) -> tuple[Any, Any]:
    """Loaders, as timm makes them, of 1347 digits to train with and 450 held out.

    Args:
        config: What timm.data.resolve_model_data_config says of the model.
        seed: Seed of the split.
        device: Where the images go.
        batch_size: Images a batch.

    Raises:
        RuntimeError: If scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise RuntimeError("the demo needs scikit-learn for its images: pip install 'timm-dgconv[demo]'") from error
    digits = load_digits()
    split = train_test_split(digits.images, digits.target, test_size=450, stratify=digits.target, random_state=seed)
    common = dict(
        input_size=config["input_size"],
        batch_size=batch_size,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        num_workers=0,
        persistent_workers=False,
        use_prefetcher=False,
        device=device,
    )
    return (
        create_loader(_Digits(split[0], split[2]), is_training=True, no_aug=True, **common),
        create_loader(_Digits(split[1], split[3]), is_training=False, crop_pct=config["crop_pct"], **common),
    )


def evaluate(model: nn.Module, loader: Iterable[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> float:
    """Top-1 accuracy in percent."""
    meter = AverageMeter()
    model.eval()
    with torch.inference_mode():
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            meter.update(accuracy(model(images), labels)[0].item(), labels.numel())
    return meter.avg


def train(
    model: nn.Module, train_loader: Any, test_loader: Any, epochs: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Train with AdamW and a cosine schedule.

    Yields:
        After each epoch its number from 1, mean loss and held-out accuracy (top1, percent).

    Raises:
        RuntimeError: If the loss is no longer finite.
    """
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=epochs,
        warmup_epochs=min(1, epochs - 1),
        warmup_lr=5e-5,
        step_on_epochs=False,
        updates_per_epoch=len(train_loader),
    )
    loss_fn = nn.CrossEntropyLoss()
    for epoch in range(epochs):
        model.train()
        meter = AverageMeter()
        bar = tqdm(train_loader, desc=f"epoch {epoch + 1}/{epochs}", unit="batch", leave=False, mininterval=1.0)
        for step, (images, labels) in enumerate(bar):
            images = images.to(device, memory_format=torch.channels_last)
            labels = labels.to(device)
            loss = loss_fn(model(images), labels)
            if not math.isfinite(loss.item()):
                raise RuntimeError(f"the loss became {loss.item()} in epoch {epoch + 1}; try another --seed")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step_update(epoch * len(train_loader) + step + 1)
            meter.update(loss.item(), labels.numel())
            bar.set_postfix(loss=f"{meter.avg:.3f}", refresh=False)
        yield {"epoch": epoch + 1, "loss": meter.avg, "top1": evaluate(model, test_loader, device)}


def _groups(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Name of every DGConv2d with its number of groups and of channels."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, DGConv2d)}
    return {name: (layer.num_groups, layer.in_channels) for name, layer in layers.items()}


def run(
    output: Path,
    model_name: str = "g_resnext50",
    epochs: int = 5,
    image_size: int = 32,
    device: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    complexity_weight: float = 0.0,
    complexity_target: float | None = None,
) -> dict[str, Any]:
    """Train on the digits, report accuracy and learned groups, write the model, reload it and check it.

    Args:
        output: Folder to write: `model.safetensors`, `config.json` and `summary.json`.
        model_name: A model of this package (any timm model with a DGConv2d).
        epochs: Number of epochs.
        image_size: Side of the images in pixels.
        device: Torch device; CUDA where there is one, else the CPU, if None.
        seed: Seed of the split, the initial weights and the order of the images.
        overwrite: Replace the output folder if it exists.
        complexity_weight: See `timm_dgconv.g_resnext.GResNeXt`.
        complexity_target: See there.

    Returns:
        What is written to `summary.json`.

    Raises:
        ValueError: For an output that exists, an unknown model or device, or numbers below one.
        RuntimeError: If scikit-learn is missing, or the reloaded model does not agree with the trained one.
    """
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists; name another folder with --output, or replace it with --overwrite")
    for option, number in {"epochs": epochs, "image size": image_size}.items():
        if number < 1:
            raise ValueError(f"{option} must be at least 1, got {number}")
    if not timm.is_model(model_name):
        raise ValueError(f"unknown model {model_name!r}; there are {', '.join(timm.list_models('*g_resnext*'))}")
    try:
        torch_device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=torch_device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ValueError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    random_seed(seed)
    # Models of others take no such argument.
    steering = dict(complexity_weight=complexity_weight or None, complexity_target=complexity_target)
    model = timm.create_model(
        model_name,
        num_classes=10,
        pretrained_cfg_overlay={"input_size": (3, image_size, image_size), "crop_pct": 1.0},
        **steering,
    ).to(torch_device, memory_format=torch.channels_last)
    groups_before = _groups(model)
    if not groups_before:
        raise ValueError(f"{model_name} has no DGConv2d; take one of {', '.join(timm.list_models('*g_resnext*'))}")
    train_loader, test_loader = load_digits(resolve_model_data_config(model), seed, torch_device)

    print(
        f"Training {model_name} ({sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters) on "
        f"{len(train_loader.dataset)} digits of {image_size}x{image_size}, {epochs} epochs, {torch_device}."
    )
    start = time.monotonic()
    history = []
    for entry in train(model, train_loader, test_loader, epochs, torch_device):
        report = group_report(model)
        history.append({**entry, "complexity": report.complexity, "share": report.share})
        print(
            f"epoch {entry['epoch']:2d}  loss {entry['loss']:.3f}  held-out accuracy {entry['top1']:.2f} %  "
            f"connections {100 * report.share:.2f} % of dense"
        )
    top1 = history[-1]["top1"]

    groups = _groups(model)
    print(f"\n{'layer':<16}{'channels':>9}{'groups at start':>17}{'learned':>9}")
    for name, (num_groups, channels) in groups.items():
        print(f"{name:<16}{channels:>9}{groups_before[name][0]:>17}{num_groups:>9}")

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as partial:
        save_for_hf(
            model.to(memory_format=torch.contiguous_format),  # safetensors stores no other
            partial,
            safe_serialization=True,
        )
        reloaded = timm.create_model(
            model_name, num_classes=10, checkpoint_path=str(Path(partial, "model.safetensors"))
        ).to(torch_device)
        top1_reloaded = evaluate(reloaded, test_loader, torch_device)
        if top1_reloaded != top1 or _groups(reloaded) != groups:
            raise RuntimeError(f"the reloaded model has {top1_reloaded:.2f} % where the trained one had {top1:.2f} %")
        summary = {
            "model": model_name,
            "top1": top1,
            "top1_reloaded": top1_reloaded,
            "groups": {name: num_groups for name, (num_groups, _) in groups.items()},
            "history": history,
            "seconds": round(time.monotonic() - start, 1),
            "epochs": epochs,
            "image_size": image_size,
            "device": str(torch_device),
            "seed": seed,
            "complexity_weight": complexity_weight,
            "complexity_target": complexity_target,
            "versions": {
                "timm-dgconv": __version__,
                "timm": timm.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "command": " ".join(sys.argv),
        }
        Path(partial, "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        if output.exists():
            shutil.rmtree(output)
        shutil.copytree(partial, output)
    return summary
