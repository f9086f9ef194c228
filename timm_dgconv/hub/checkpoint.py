"""Read a checkpoint from a file or from the Hub without running code in it."""

import argparse
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from timm_dgconv import _compat
from timm_dgconv.hub.errors import hub_errors, one_line

CONFIG, WEIGHTS = "config.json", "model.safetensors"
"""Names of the files in a folder and on the Hub."""
_ALL_WEIGHTS = (WEIGHTS, "pytorch_model.bin")
_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".safetensors", ".tar")
_AVERAGES = ("state_dict_ema", "model_ema")
SAVE = "use a file that torch.save(model.state_dict(), FILE) wrote"


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
    hub_id = re.fullmatch(r"(?:hf-hub:)?([\w.-]+/[\w.-]+)(?:@(.+))?", source)
    if not path.is_dir() and (path.exists() or hub_id is None or source.endswith(_SUFFIXES)):
        raise ValueError(f"{source} is not a file; use a checkpoint file or a Hub id OWNER/NAME[@REVISION]")
    for weights in _ALL_WEIGHTS:
        folder = path
        if not path.is_dir() and hub_id is not None:
            with hub_errors():
                folder = Path(snapshot_download(hub_id[1], revision=hub_id[2], allow_patterns=[CONFIG, weights]))
        if (folder / weights).is_file():
            return folder / weights
    raise ValueError(f"{source} has no {' or '.join(_ALL_WEIGHTS)}; use the path of a checkpoint file")


def read(path: Path, source: str, use_ema: bool) -> tuple[dict[str, Tensor], TrainingInfo]:
    """Read the state dict of a checkpoint file, whose name in error messages is `source`, and what is beside it.

    Raises:
        ValueError: If the file would run code, is truncated, or has no state dict, if a gate in it is nan, or if the
            config.json of its folder is not a model of timm.
    """
    try:
        # timm's train.py stores an argparse.Namespace.
        safe, quiet = torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings()
        with path.open("rb") as file, safe, quiet:
            warnings.simplefilter("ignore")
            if file.read(9)[8:] == b"{":  # eight bytes of length, then JSON
                checkpoint: Any = safetensors.torch.load_file(path)
            else:
                file.seek(0)
                checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise almost any exception for arbitrary bytes
        raise ValueError(f"{source} {_why_unreadable(path, error)}") from error
    if not isinstance(checkpoint, dict):
        checkpoint = {}
    found = {name: value for name, value in {"": checkpoint, **checkpoint}.items() if _is_state_dict(value)}
    preferred = [name for name in (*(_AVERAGES if use_ema else ()), "state_dict", "model") if name in found]
    names = preferred[:1] or [name for name in found if name not in _AVERAGES]
    if len(names) != 1:
        has = f"several state dicts, {one_line(', '.join(map(str, names)))}" if names else "no state dict"
        raise ValueError(f"{source} has {has}; {SAVE}")
    for name, value in found[names[0]].items():
        if name.endswith((".gate", ".sorted_gate", ".unsorted_gate")) and value.isnan().any():
            raise ValueError(f"{source} has nan gates in {one_line(name)}; use an earlier checkpoint")
    return found[names[0]], _training_info(source, path, checkpoint)


def _is_state_dict(value: Any) -> bool:
    is_filled = isinstance(value, dict) and bool(value)
    return is_filled and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())


def _why_unreadable(path: Path, error: BaseException) -> str:
    said = one_line(error).split(". ")[0]  # without torch's advice to load it with weights_only=False
    with path.open("rb") as file:
        head = file.read(19)
    if head == b"version https://git":
        return "is a pointer of Git LFS; get the file itself with git lfs pull"
    if isinstance(error, pickle.UnpicklingError):
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        if name is not None or head[:1] == b"\x80" or zipfile.is_zipfile(path):
            return f"would run {name[1] if name else 'code'} when it is loaded; refused, not executed: {SAVE}"
        return f"is not a checkpoint; {SAVE}"
    if isinstance(error, EOFError | safetensors.SafetensorError) or re.search("PytorchStreamReader|EOF", str(error)):
        return f"is truncated or damaged: {said}"
    return f"is not a checkpoint: {said}; {SAVE}"


def _training_info(source: str, path: Path, checkpoint: dict[str, Any]) -> TrainingInfo:
    if not Path(source).is_file() and (path.parent / CONFIG).is_file():
        try:
            data_args, _, model_kwargs = _compat.load_model_config_from_path(path.parent)
            return TrainingInfo(None, dict(model_kwargs), dict(data_args))
        except Exception as error:  # any exception of timm for a file that users edit
            raise ValueError(
                f"{source} has a {CONFIG} that timm cannot read: {one_line(error)}; use its {path.name} alone"
            ) from error
    epoch, args = checkpoint.get("epoch"), checkpoint.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else {}
    model_kwargs = dict(args["model_kwargs"]) if isinstance(args.get("model_kwargs"), dict) else {}
    if args.get("gp") is not None:
        model_kwargs.setdefault("global_pool", args["gp"])
    return TrainingInfo(epoch if type(epoch) is int else None, model_kwargs, args)
