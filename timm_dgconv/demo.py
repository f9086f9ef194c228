"""The main job on real images without a download: train on scikit-learn's digits and show the learned groups."""

import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from timm.data import create_loader, resolve_model_data_config
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy, random_seed
from torch import Tensor, nn

from timm_dgconv import __version__
from timm_dgconv.models.base_models import ARCHITECTURES
from timm_dgconv.models.group_net import layer_groups
from timm_dgconv.report import GroupHistory, group_report

_WEIGHTS, _SUMMARY = "model.safetensors", "summary.json"


class _Digits(torch.utils.data.Dataset[tuple[Any, int]]):
    """A part of scikit-learn's handwritten digits (1797 scans of 8x8 pixels, ten classes) as RGB images."""

    def __init__(self, images: Any, labels: Any) -> None:
        self.images = [Image.fromarray((image * (255 / 16)).astype("uint8")).convert("RGB") for image in images]
        self.labels = labels.tolist()
        self.transform: Any = None  # set by timm's create_loader

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), self.labels[index]


def load_digits(config: dict[str, Any], seed: int, device: torch.device, batch_size: int = 32) -> tuple[Any, Any]:
    """Return timm's data loaders for 1347 digits to train on and 450 held-out digits.

    The config is the result of timm.data.resolve_model_data_config, and the seed that of the split.

    Raises:
        RuntimeError: If scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise RuntimeError("the demo needs scikit-learn for its images: pip install 'timm-dgconv[demo]'") from error
    digits = load_digits()
    indices = train_test_split(range(len(digits.target)), test_size=450, stratify=digits.target, random_state=seed)
    training, held_out = (_Digits(digits.images[part], digits.target[part]) for part in indices)
    common = {key: config[key] for key in ("input_size", "interpolation", "mean", "std")}
    common |= dict(batch_size=batch_size, num_workers=0, persistent_workers=False, use_prefetcher=False, device=device)
    return (
        create_loader(training, is_training=True, no_aug=True, **common),
        create_loader(held_out, is_training=False, crop_pct=config["crop_pct"], **common),
    )


def evaluate(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> tuple[float, Tensor]:
    """Return the top-1 accuracy in percent, and the logits of all images."""
    model.eval()
    with torch.inference_mode():
        logits, labels = zip(*((model(images.to(device)), labels.to(device)) for images, labels in loader), strict=True)
    return accuracy(torch.cat(logits), torch.cat(labels))[0].item(), torch.cat(logits)


def train(
    model: nn.Module, train_loader: Any, test_loader: Any, epochs: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Train with AdamW and a cosine schedule.

    Yields:
        After each epoch its number, starting at 1, the mean loss, and the held-out accuracy (top1, percent).

    Raises:
        RuntimeError: If the loss is not finite.
    """
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    warmup = dict(warmup_epochs=min(1, epochs - 1), warmup_lr=5e-5)
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=epochs, step_on_epochs=False, updates_per_epoch=len(train_loader), **warmup
    )
    for epoch in range(epochs):
        model.train()
        meter = AverageMeter()
        bar = tqdm(train_loader, desc=f"epoch {epoch + 1}/{epochs}", unit="batch", leave=False, mininterval=1.0)
        for step, (images, labels) in enumerate(bar):
            images = images.to(device, memory_format=torch.channels_last)
            loss = nn.functional.cross_entropy(model(images), labels.to(device))
            if not loss.isfinite():
                raise RuntimeError(f"the loss became {loss.item()} in epoch {epoch + 1}; try another --seed")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step_update(epoch * len(train_loader) + step + 1)
            meter.update(loss.item(), labels.numel())
            bar.set_postfix(loss=f"{meter.avg:.3f}", refresh=False)
        yield {"epoch": epoch + 1, "loss": meter.avg, "top1": evaluate(model, test_loader, device)[0]}


def run(
    output: Path,
    model_name: str = "g_resnext50",
    epochs: int = 5,
    image_size: int = 32,
    device: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    complexity_target: float | str | None = None,
) -> dict[str, Any]:
    """Train on the digits, report accuracy and learned groups, write the model, reload it and compare the outputs.

    The arguments are the options of ``timm-dgconv demo``. The output is a folder for `model.safetensors`, `config.json`
    and `summary.json`, whose contents are returned.

    Raises:
        ValueError: If the output exists, a model or device is unknown, or a number is below one.
        RuntimeError: If scikit-learn is missing, or the outputs of the reloaded model differ.
    """
    _check_output(output, overwrite)
    for option, number in {"epochs": epochs, "image size": image_size}.items():
        if number < 1:
            raise ValueError(f"{option} must be at least 1, got {number}")
    if model_name not in ARCHITECTURES:
        raise ValueError(f"{model_name!r} is not a model of this package; use {', '.join(ARCHITECTURES)}")
    try:
        torch_device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=torch_device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ValueError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    random_seed(seed)
    cfg = {"input_size": (3, image_size, image_size), "crop_pct": 1.0}
    options = dict(num_classes=10, pretrained_cfg_overlay=cfg, complexity_target=complexity_target)
    model = timm.create_model(model_name, **options).to(torch_device, memory_format=torch.channels_last)
    report = first = group_report(model)
    train_loader, test_loader = load_digits(resolve_model_data_config(model), seed, torch_device)

    print(
        f"Training {model_name} ({sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters) on "
        f"{len(train_loader.dataset)} digits of {image_size}x{image_size}, {epochs} epochs, {torch_device}."
    )
    start = time.monotonic()
    history = []
    for entry in train(model, train_loader, test_loader, epochs, torch_device):
        report = group_report(model)
        history.append({**entry, "complexity": report.complexity, "density": report.density})
        print(
            f"epoch {entry['epoch']:2d}  loss {entry['loss']:.3f}  held-out accuracy {entry['top1']:.2f} %  "
            f"connections {100 * report.density:.2f} % of dense"
        )
    print(f"\n{GroupHistory((first, report), ('at start', 'learned'), (None, None))}")

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as work:
        folder = Path(work)
        _, expected = evaluate(model, test_loader, torch_device)
        # safetensors stores contiguous tensors only.
        save_for_hf(model.to(memory_format=torch.contiguous_format), work, safe_serialization=True)
        reloaded = timm.create_model(model_name, num_classes=10, checkpoint_path=str(folder / _WEIGHTS))
        reloaded.to(torch_device, memory_format=torch.channels_last)
        top1_reloaded, found = evaluate(reloaded, test_loader, torch_device)
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        # TF32, the default of cuDNN, has 10 bits.
        is_close = difference <= (1e-4 if torch_device.type == "cpu" else 1e-2)
        if not is_close or layer_groups(reloaded) != layer_groups(model):
            raise RuntimeError(f"the outputs of the reloaded model differ by {difference:.1e} of the largest output")
        summary = {
            "model": model_name,
            "top1": history[-1]["top1"],
            "top1_reloaded": top1_reloaded,
            "groups": {layer.name: layer.groups for layer in report.layers},
            "history": history,
            "seconds": round(time.monotonic() - start, 1),
            "epochs": epochs,
            "image_size": image_size,
            "device": str(torch_device),
            "seed": seed,
            "complexity_target": complexity_target,
            "versions": {"timm-dgconv": __version__, "timm": timm.__version__, "torch": torch.__version__},
        }
        (folder / _SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
        output.mkdir(exist_ok=True)
        for file in folder.iterdir():
            file.replace(output / file.name)
    return summary


def _check_output(output: Path, overwrite: bool) -> None:
    """Raise a ValueError if the demo may not write to a folder: it replaces only the output of a demo."""
    if not output.exists():
        return
    if not overwrite:
        raise ValueError(f"{output} exists; use another --output, or --overwrite to replace the output of a demo")
    names = {path.name for path in output.iterdir()} if output.is_dir() else {"a file"}
    if names and not {_SUMMARY} <= names <= {_SUMMARY, _WEIGHTS, "config.json"}:
        raise ValueError(
            f"{output} is not the output of a demo, so --overwrite does not replace it; use another --output"
        )
