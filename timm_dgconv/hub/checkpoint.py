"""Read a checkpoint from a file or from the Hub without running code in it."""

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from huggingface_hub import snapshot_download
from timm.models import load_state_dict
from torch import Tensor

from timm_dgconv import _compat
from timm_dgconv.hub.errors import hub_errors, one_line

CONFIG, WEIGHTS = "config.json", "model.safetensors"
"""Names of the files in a folder and on the Hub."""
_SUFFIXES = (".bin", ".pt", ".pth", ".safetensors", ".tar")


class TrainingInfo(NamedTuple):
    """What timm stores beside the weights: in a checkpoint of train.py, or in the config.json of a folder."""

    epoch: int | None
    model_kwargs: dict[str, Any]
    data_args: dict[str, Any]  # of timm.data.resolve_data_config, and others that it ignores


def fetch(source: str) -> Path:
    """Return the path of a checkpoint file, and download it if it is on the Hub.

    The source is a file, a folder that `convert` or timm wrote, or a Hub id ``owner/name`` or ``owner/name@revision``.

    Raises:
        ValueError: If there is no such file, or if a folder or repository has no weights.
        RuntimeError: If the Hub does not return it.
    """
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        hub_id = re.fullmatch(r"(?:hf-hub:)?([\w.-]+/[\w.-]+)(?:@(.+))?", source)
        if path.exists() or hub_id is None or source.endswith(_SUFFIXES):
            raise ValueError(f"{source} is not a file; use a checkpoint file or a Hub id OWNER/NAME[@REVISION]")
        with hub_errors():
            path = Path(snapshot_download(hub_id[1], revision=hub_id[2], allow_patterns=[CONFIG, WEIGHTS]))
    if not (path / WEIGHTS).is_file():
        raise ValueError(f"{source} has no {WEIGHTS}; use a checkpoint, or a folder that timm-dgconv convert wrote")
    return path / WEIGHTS


def read_state_dict(path: Path, source: str, use_ema: bool) -> dict[str, Tensor]:
    """Read the state dict of a checkpoint file, whose name in error messages is `source`.

    Raises:
        ValueError: If the file would run code, is truncated, or has no state dict, or if a gate in it is nan.
    """
    try:
        with _safe_loading():
            state_dict: dict[str, Tensor] = load_state_dict(str(path), use_ema=use_ema, weights_only=True)
    except Exception as error:  # torch and pickle raise almost any exception for arbitrary bytes
        raise ValueError(f"{source} {_why_unreadable(path, error)}") from error
    if not state_dict or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise ValueError(f"{source} has no state dict; use a checkpoint that timm can load")
    for name, value in state_dict.items():
        if name.endswith((".gate", ".sorted_gate", ".unsorted_gate")) and value.isnan().any():
            raise ValueError(f"{source} has nan gates in {one_line(name)}; use an earlier checkpoint")
    return state_dict


def _why_unreadable(path: Path, error: BaseException) -> str:
    while error.__cause__ is not None:  # timm wraps some exceptions
        error = error.__cause__
    if isinstance(error, pickle.UnpicklingError):
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        with path.open("rb") as file:
            is_pickle = file.read(1) == b"\x80" or zipfile.is_zipfile(path)
        if name is not None or is_pickle:
            return f"would run {name[1] if name else 'code'} when it is loaded; refused, not executed: use a state dict"
        return "is not a checkpoint"  # without torch's advice to load it with weights_only=False
    if isinstance(error, EOFError | safetensors.SafetensorError) or re.search("PytorchStreamReader|EOF", str(error)):
        return f"is truncated or damaged: {one_line(error)}"
    return f"is not a checkpoint: {one_line(error)}"


def read_training_info(source: str, path: Path) -> TrainingInfo:
    """Read what timm stores beside the weights. Other checkpoints have nothing there.

    Raises:
        ValueError: If the config.json of a folder or repository is not a model of timm.
    """
    if not Path(source).is_file() and (path.parent / CONFIG).is_file():
        try:
            data_args, _, model_kwargs = _compat.timm_hub().load_model_config_from_path(path.parent)
            return TrainingInfo(None, dict(model_kwargs), dict(data_args))
        except Exception as error:  # any exception of timm for a file that users edit
            raise ValueError(
                f"{source} has a {CONFIG} that timm cannot read: {one_line(error)}; use its {WEIGHTS} alone"
            ) from error
    with _safe_loading(), suppress(Exception):
        # mmap does not read the tensors. Files from before torch 1.6 are not zip archives and cannot be mapped.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        epoch, args = checkpoint.get("epoch"), vars(checkpoint.get("args", argparse.Namespace()))
        model_kwargs = dict(args.get("model_kwargs") or {})
        if args.get("gp") is not None:
            model_kwargs.setdefault("global_pool", args["gp"])
        return TrainingInfo(epoch if type(epoch) is int else None, model_kwargs, args)
    return TrainingInfo(None, {}, {})


@contextmanager
def _safe_loading() -> Iterator[None]:
    """Allow the argparse.Namespace that timm's train.py stores, which timm < 1.0.26 does not, and ignore warnings."""
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
