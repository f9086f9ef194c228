"""Convert a checkpoint into the folder that timm loads from disk and from the Hub."""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch
from huggingface_hub.utils.sha import sha_fileobj
from torch import Tensor, nn

from timm_dgconv import _compat, plots
from timm_dgconv.hub import card
from timm_dgconv.hub.checkpoint import CONFIG, WEIGHTS
from timm_dgconv.hub.model import BASELINE, Checkpoint, create, resolve
from timm_dgconv.models.compact import compact as compact_model
from timm_dgconv.models.group_net import group_layers
from timm_dgconv.report import group_report

CARD, FIGURE = "README.md", "groups.png"


class File(NamedTuple):
    """A file of a converted folder."""

    name: str
    size: int
    sha256: str


def convert(
    source: str,
    model_name: str,
    output: Path,
    compact: bool = False,
    use_ema: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[File], float]:
    """Convert a checkpoint into a folder that timm loads with ``create_model("local-dir:...")``, and verify it.

    The arguments are those of ``timm-dgconv convert``. No code in the source is executed. The output appears when
    everything in it is verified. A model that costs more than the target of its training is a warning.

    Returns:
        The files, and the largest difference between the outputs of the reloaded model and those of the source.

    Raises:
        ValueError: If the model is unknown, the output exists, or the source is not a checkpoint of this model.
        RuntimeError: If the Hub does not return the source, or the reloaded model computes something else.
    """
    architecture, cfg = resolve(model_name)
    if compact and model_name == BASELINE:
        raise ValueError(f"{BASELINE} has fixed groups already; convert it without --compact")
    if os.path.lexists(output):
        raise ValueError(f"{output} exists; use a new folder for --out")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"{output.absolute().parent} is not a folder; create it, or use another --out")
    checkpoint = Checkpoint(source, architecture, cfg, use_ema, model_kwargs)
    model = checkpoint.load()
    checkpoint.warn_above_target(model)
    outputs = _outputs(model)
    written = compact_model(model) if compact else model
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.absolute().parent) as work:
        folder = Path(work, output.name)
        folder.mkdir()
        state_dict = {name: value.contiguous() for name, value in written.state_dict().items()}
        safetensors.torch.save_file(state_dict, folder / WEIGHTS, metadata={"format": "pt"})
        _describe(written, folder, checkpoint.model_kwargs)
        difference = (_outputs(reload(folder)) - outputs).abs().max().item()
        # The compact form adds in another order. Otherwise the bits are the same.
        tolerance = 1e-5 * max(1.0, outputs.abs().max().item()) if compact else 0.0
        if not difference <= tolerance:
            raise RuntimeError(f"the outputs of the reloaded model differ by {difference:.1e} from those of {source}")
        files = list_files(folder)
        folder.rename(output)
    return files, difference


def describe(model_name: str, folder: Path) -> None:
    """Write config.json and model card of a model without weights, such as ``g_resnext50.dgconv_in1k``.

    ``hub_configs/`` is written with this function. The folder is created if it does not exist.

    Raises:
        ValueError: If the model is unknown.
    """
    architecture, cfg = resolve(model_name)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        # The original release has weights for this model, whose gates are unsorted.
        args = {"sort": False} if model_name == "g_resnext50.dgconv_in1k" else {}
        model = create(architecture, cfg, cfg.num_classes, **args)
    _describe(model, folder)


def reload(folder: Path) -> nn.Module:
    """Return the model that timm loads from a converted folder."""
    if tuple(int(number) for number in re.findall(r"\d+", timm.__version__)[:3]) >= (1, 0, 26):
        return timm.create_model(f"local-dir:{folder}", pretrained=True)
    # timm < 1.0.26 reads the safetensors file in a folder as a pickle, and a safetensors file by its path correctly.
    cfg, architecture, model_args = _compat.load_model_config_from_path(folder)
    cfg = {**cfg, "source": None, "file": str(folder / WEIGHTS)}
    return timm.create_model(architecture, pretrained=True, pretrained_cfg=cfg, **model_args)


def list_files(folder: Path) -> list[File]:
    """Return the files of a converted folder."""
    paths = [path for name in (CONFIG, WEIGHTS, CARD, FIGURE) if (path := folder / name).is_file()]
    return [File(path.name, path.stat().st_size, sha256(path)) for path in paths]


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return sha_fileobj(file).hex()


def _outputs(model: nn.Module) -> Tensor:
    """Return the outputs for two fixed images of noise."""
    size = timm.data.resolve_model_data_config(model)["input_size"]
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model.eval()(images)


def _describe(model: nn.Module, folder: Path, model_kwargs: Mapping[str, Any] | None = None) -> None:
    """Write config.json, and a model card with the groups if the model has values."""
    args = {name: value for name, value in (model_kwargs or {}).items() if name != "sort"}
    stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    if stem.in_channels != 3:
        args["in_chans"] = stem.in_channels
    layers = group_layers(model).values()
    if groups := card.fixed_groups(model):
        args["groups"] = groups
    elif not all(getattr(layer, "sort", True) for layer in layers):
        args["sort"] = False  # loaders that go by names need a model with these names
    path = folder / CONFIG
    _compat.save_config_for_hf(model, path, model_args=args or None)
    config = json.loads(path.read_text(encoding="utf-8"))
    # timm >= 1.0.31 stores the number of classes twice, and transformers fails if it is in `model_args`.
    config.get("model_args", {}).pop("num_classes", None)
    labels = {"label_names", "label_descriptions"} & set(config["pretrained_cfg"])
    config |= {name: config["pretrained_cfg"].pop(name) for name in labels}  # where transformers reads them, too
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    report = figure = None
    if any(not layer.weight.is_meta for layer in layers):
        report = group_report(model)
        if find_spec("matplotlib"):  # the extra `plot`
            figure = FIGURE
            plots.draw(report, folder / figure)
    (folder / CARD).write_text(card.model_card(model, report, figure, model_kwargs), encoding="utf-8")
