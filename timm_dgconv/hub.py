"""The folder that timm loads from disk and from the Hub: convert a checkpoint into one, publish it."""

import argparse
import dataclasses
import json
import os
import pickle
import re
import shutil
import tempfile
import uuid
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm, validate_repo_id
from timm.models import get_arch_pretrained_cfgs, load_state_dict
from timm.models._hub import load_model_config_from_path, save_config_for_hf
from torch import Tensor, nn

from timm_dgconv import __version__, card, deploy, report
from timm_dgconv.card import BASELINE
from timm_dgconv.dgconv import DGConv2d
from timm_dgconv.digest import BAR, sha256

_WEIGHTS, _CONFIG, _CARD = "model.safetensors", "config.json", "README.md"
_SUFFIXES = (".bin", ".pt", ".pth", ".safetensors", ".tar")


class File(NamedTuple):
    """A file as it goes to the Hub."""

    name: str
    size: int
    sha256: str


class Converted(NamedTuple):
    """What `convert` wrote, and the largest difference between outputs reloaded from there and those of the source."""

    files: list[File]
    difference: float


class Published(NamedTuple):
    """What `publish` uploaded (or would), under which model name; no address if nothing was sent."""

    files: list[File]
    model_name: str
    hub_id: str
    url: str | None


def convert(source: str, model_name: str, output: Path, compact: bool = False, use_ema: bool = True) -> Converted:
    """Convert a checkpoint into a folder that timm loads with ``create_model("local-dir:...")``, and check it.

    Args:
        source: Checkpoint file (nothing in it is executed), or the Hub id of a timm model, ``owner/name`` or
            ``owner/name@revision``.
        model_name: Architecture and tag of the result, such as ``g_resnext50.dgconv_in1k``.
        output: Folder to write; it appears when everything in it is checked.
        compact: Write the compact form, see `timm_dgconv.compact`.
        use_ema: Take the averaged weights where the checkpoint has them.

    Returns:
        The files and how far the outputs of the reloaded model are from those of the source.

    Raises:
        ValueError: For an unknown model, an output that exists, or a source that is no checkpoint of this model.
        RuntimeError: If the Hub cannot be reached, or the reloaded model computes something else.
    """
    architecture, cfg = _resolve(model_name)
    if compact and model_name == BASELINE:
        raise ValueError(f"{BASELINE} has fixed groups already; convert it without --compact")
    if os.path.lexists(output):
        raise ValueError(f"{output} exists; name a new folder with --out")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"{output.absolute().parent} is no folder; create it, or name another place with --out")
    with tqdm(total=5, **BAR) as steps:
        model = _load(source, use_ema, architecture, cfg)
        outputs = _outputs(model)
        if not outputs.isfinite().all():
            raise ValueError(f"{source} is broken: the outputs of the model with these weights are not finite")

        _next(steps, "writing")
        written = deploy.compact(model) if compact else model
        partial = output.absolute().with_name(f".{output.name}.partial-{uuid.uuid4().hex[:8]}")
        partial.mkdir()
        try:
            state_dict = {name: value.contiguous() for name, value in written.state_dict().items()}
            try:
                safetensors.torch.save_file(state_dict, partial / _WEIGHTS, metadata={"format": "pt"})
            except safetensors.SafetensorError as error:
                raise RuntimeError(f"cannot write {output}: {error}") from error
            _describe(written, partial)

            _next(steps, "reloading")
            reloaded = _reload(partial)

            _next(steps, "comparing")
            difference = (_outputs(reloaded) - outputs).abs().max().item()
            # Sums in another order round differently; the same network gives the same bits.
            tolerance = 1e-5 * max(1.0, outputs.abs().max().item()) if compact else 0.0
            if not difference <= tolerance:
                raise RuntimeError(f"the reloaded model's outputs differ by {difference:.1e} from those of {source}")

            _next(steps, "hashing")
            files = _files(partial)
            partial.rename(output)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return Converted(files, difference)


def describe(model_name: str, folder: Path) -> None:
    """Write config.json and model card, what goes to the Hub beside the weights; ``hub_configs/`` is made with it.

    Args:
        model_name: Architecture and tag, such as ``g_resnext50.dgconv_in1k``.
        folder: Folder to write to; created if it is not there.

    Raises:
        ValueError: For an unknown model.
    """
    architecture, cfg = _resolve(model_name)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = _create(architecture, cfg, cfg.num_classes)
    _describe(model, folder)


def publish(
    source: str,
    repo_id: str,
    model_name: str | None = None,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
) -> Published:
    """Upload a converted folder to the Hub, download it again and compare the digests.

    Args:
        source: A folder with model.safetensors and config.json, or what `convert` takes.
        repo_id: Repository ``owner/name``; created if it is not there.
        model_name: Architecture and tag, needed if `source` must be converted first.
        private: Only who has access to the repository sees it.
        revision: Branch to upload to, created if it is not there; main if None.
        dry_run: Prepare everything and send nothing.

    Returns:
        What was uploaded and where.

    Raises:
        ValueError: For a source that cannot be published, see `convert`, or a name that the Hub does not take.
        RuntimeError: If the Hub refuses, cannot be reached, or returns something else than what was sent.
    """
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"--repo must be OWNER/NAME, got {repo_id!r}")
    if not Path(source).is_dir() and model_name is None:
        raise ValueError(f"{source} is no folder that convert wrote; say what it is with --model ARCH.TAG")
    api = HfApi(library_name="timm-dgconv", library_version=__version__)
    if not dry_run:
        with _hub_errors(repo_id):
            api.whoami()  # says early that there is no token, or no connection
    with tempfile.TemporaryDirectory() as work:
        folder = Path(source)
        if folder.is_dir():
            published = _check_folder(folder, model_name)
        else:
            assert model_name is not None
            published, folder = model_name, Path(work, "converted")
            convert(source, model_name, folder)
        files = _files(folder)
        hub_id = repo_id if revision in (None, "main") else f"{repo_id}@{revision}"
        if dry_run:
            return Published(files, published, hub_id, None)
        with _hub_errors(repo_id):
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            if private and not api.model_info(repo_id).private:
                raise RuntimeError(
                    f"{repo_id} exists and is public, nothing was uploaded; make it private in its settings, name "
                    "another --repo, or leave out --private"
                )
            if revision not in (None, "main"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                allow_patterns=[file.name for file in files],
                commit_message=f"{published}, with timm-dgconv {__version__}",
            )
            for file in tqdm(files, desc="downloading again", unit="file", **BAR):
                path = hf_hub_download(repo_id, file.name, revision=commit.oid, cache_dir=Path(work, "cache"))
                if (digest := sha256(Path(path))) != file.sha256:
                    raise RuntimeError(
                        f"the Hub returns another {file.name} than was uploaded to {repo_id}: sha256 {digest} in place "
                        f"of {file.sha256}; delete the file there and publish again"
                    )
    return Published(files, published, hub_id, str(url))


def inspect(
    sources: Sequence[str],
    model_name: str,
    use_ema: bool = True,
    image_size: int | None = None,
    layers: Sequence[str] = (),
) -> report.GroupHistory:
    """Report the groups in checkpoints of one run, without executing anything in them.

    They are read one after the other, and only their gates are kept.

    Args:
        sources: What `convert` takes, or folders that it wrote; in order, but by epoch if all of them have one.
        model_name: Architecture, with or without a tag, such as ``g_resnext50``.
        use_ema: Take the averaged weights where a checkpoint has them.
        image_size: Side in pixels of the image for which multiply-adds are counted; that of the model if None.
        layers: Names of layers that must be there.

    Returns:
        A report a checkpoint.

    Raises:
        ValueError: For an unknown model or layer, a source that is no checkpoint of the model, or checkpoints of
            different networks.
        RuntimeError: If the Hub cannot be reached.
    """
    architecture = model_name.partition(".")[0]
    if architecture not in (ours := timm.list_models(module="g_resnext")):
        raise ValueError(f"unknown model {model_name!r}; expected {', '.join(ours)}, with or without a tag")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image size must be at least 1, got {image_size}")
    default_tag = timm.get_pretrained_cfg(architecture).tag
    _, cfg = _resolve(model_name if "." in model_name else f"{architecture}.{default_tag}")
    size = cfg.input_size if image_size is None else (cfg.input_size[0], image_size, image_size)
    reports = []
    for source in tqdm(sources, desc="reading", unit="checkpoint", **BAR):
        folder = Path(source)
        if folder.is_dir() and not (folder / _WEIGHTS).is_file():
            raise ValueError(
                f"{source} has no {_WEIGHTS}; name a checkpoint, or a folder that timm-dgconv convert wrote"
            )
        path = folder / _WEIGHTS if folder.is_dir() else _fetch(source)
        learned = report.group_report(_load_gates(path, source, use_ema, architecture, cfg), size)
        learned.select(layers)
        reports.append((learned, source, _epoch(path)))
    if all(epoch is not None for *_, epoch in reports):  # a shell puts checkpoint-10 before checkpoint-2
        reports.sort(key=lambda entry: entry[2] or 0)
    return report.GroupHistory(*zip(*reports, strict=True))


def _next(steps: Any, name: str) -> None:
    steps.set_description(name, refresh=False)
    steps.update()


def _resolve(model_name: str) -> tuple[str, Any]:
    """Architecture and pretrained_cfg of a model name; a tag of one's own has the default tag's data settings."""
    architecture, _, tag = model_name.partition(".")
    ours = timm.list_models(module="g_resnext")
    if model_name == BASELINE:
        cfg = dataclasses.replace(
            timm.get_pretrained_cfg("g_resnext50.dgconv_in1k"),
            architecture=architecture,
            hf_hub_id=None,
            paper_name=card.RESNEXT_PAPER[0],
            paper_ids=card.RESNEXT_PAPER[1],
        )
    elif architecture not in ours or not re.fullmatch(r"[\w-]+", tag, re.ASCII):
        raise ValueError(f"unknown model {model_name!r}; expected {'.TAG, '.join(ours)}.TAG or {BASELINE}")
    elif model_name in get_arch_pretrained_cfgs(architecture):
        cfg = timm.get_pretrained_cfg(model_name)
    else:
        source: dict[str, Any] = dict.fromkeys(("hf_hub_id", "license", "origin_url", "paper_name", "paper_ids"))
        cfg = dataclasses.replace(timm.get_pretrained_cfg(architecture), tag=tag, url="", **source)
    return architecture, cfg


def _load(source: str, use_ema: bool, architecture: str, cfg: Any) -> nn.Module:
    """The model with the weights of a checkpoint, with as many classes as that has."""
    state_dict = _read(_fetch(source), source, use_ema)
    with torch.device("meta"):  # what does not fit takes no memory
        empty = _create(architecture, cfg, _num_classes(state_dict, cfg))
    _fill(empty, _without_data(state_dict), source, architecture, assign=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what a plain ResNeXt has no weights for keeps these initial values, the same every time
        model = _create(architecture, cfg, _num_classes(state_dict, cfg))
    _fill(model, state_dict, source, architecture)
    return model


def _load_gates(path: Path, source: str, use_ema: bool, architecture: str, cfg: Any) -> nn.Module:
    """The model on the meta device, all but the gates of the checkpoint; what has none is a plain convolution."""
    whole = _read(path, source, use_ema)
    gates = {name: value.float().clone() for name, value in whole.items() if name.endswith(".gate")}
    state_dict = _without_data(whole) | gates
    del whole
    with torch.device("meta"):
        model = _create(architecture, cfg, _num_classes(state_dict, cfg))
    _fill(model, state_dict, source, architecture, assign=True)
    for name, block in model.named_modules():
        conv = getattr(block, "conv2", None)
        if isinstance(conv, DGConv2d) and conv.gate.is_meta:
            weight = state_dict[f"{name}.conv2.weight"]
            like: Any = dict(stride=conv.stride, padding=conv.padding, dilation=conv.dilation)
            block.conv2 = nn.Conv2d(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,  # type: ignore[arg-type]
                groups=conv.in_channels // weight.shape[1],
                bias=False,
                device="meta",
                **like,
            )
    return model


def _epoch(path: Path) -> int | None:
    """The epoch that timm's train.py and others store in a checkpoint."""
    if path.suffix == ".safetensors":
        return None
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Mapped, the tensors are not read; files of the time before zip archives cannot be.
        with suppress(Exception):  # what can be read can fail to be mapped
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            epoch = checkpoint.get("epoch")
            return epoch if type(epoch) is int else None
    return None


def _without_data(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty(value.shape, device="meta") for name, value in state_dict.items()}


def _num_classes(state_dict: dict[str, Tensor], cfg: Any) -> int:
    head = state_dict.get("fc.weight")
    return cfg.num_classes if head is None or head.ndim != 2 or not head.numel() else len(head)


def _fill(
    model: nn.Module, state_dict: dict[str, Tensor], source: str, architecture: str, assign: bool = False
) -> None:
    """Load a state dict that must have all of the model and nothing else."""
    try:
        missing, unexpected = model.load_state_dict(state_dict, strict=False, assign=assign)
        problems = [f"it has no {name}" for name in missing] + [f"{architecture} has no {name}" for name in unexpected]
    except RuntimeError as error:  # shapes
        problems = [line.strip() for line in str(error).splitlines()[1:]]
    if problems:
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        raise ValueError(f"{source} is a checkpoint of another network than {architecture}: {_line(problems[0])}{more}")


def _create(architecture: str, cfg: Any, num_classes: int) -> nn.Module:
    cfg = dataclasses.replace(cfg, num_classes=num_classes)
    return timm.create_model(architecture, pretrained_cfg=cfg, num_classes=num_classes)


def _fetch(source: str) -> Path:
    """The checkpoint on this machine."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        raise ValueError(f"{source} is a folder; name the checkpoint file in it")
    if os.path.lexists(path):
        raise ValueError(f"{source} is no regular file, or a link to nothing; name a checkpoint file")
    hub_id = re.fullmatch(r"(?:hf-hub:)?([\w.-]+/[\w.-]+)(?:@(.+))?", source)
    if hub_id is None or source.endswith(_SUFFIXES):
        raise ValueError(f"there is no file {source}; expected a checkpoint, or a Hub id OWNER/NAME[@REVISION]")
    with _hub_errors(source):
        return Path(hf_hub_download(hub_id[1], _WEIGHTS, revision=hub_id[2]))


def _read(path: Path, source: str, use_ema: bool) -> dict[str, Tensor]:
    """The state dict in a file, without executing anything in it."""
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{source} is empty")
    if (unpacked := _unpacked_size(path)) > size:
        raise ValueError(f"{source} is compressed: {size:,} bytes for {unpacked:,}; save it again with torch.save")
    try:
        # timm < 1.0.26 does not admit the Namespace of arguments that its train.py stores.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state_dict: dict[str, Tensor] = load_state_dict(str(path), use_ema=use_ema, weights_only=True)
    except Exception as error:  # on arbitrary bytes torch and pickle raise nearly anything
        raise ValueError(f"{source} {_why_unreadable(path, error)}") from error
    odd = [f"entry {name!r} {why}" for name, value in state_dict.items() if (why := _why_odd(value))]
    if odd or not state_dict:
        raise ValueError(f"{source} has no state dict that timm knows: {_line((odd or ['it has no entries'])[0])}")
    for name, value in state_dict.items():
        if name.endswith(".gate") and value.isnan().any():
            raise ValueError(f"{source} is broken: {name} has gates that are nan; take a checkpoint from before")
    return state_dict


def _unpacked_size(path: Path) -> int:
    """Number of bytes in an archive, 0 for another file; torch writes them as they are."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError):  # torch says what it is
        return 0


def _why_odd(value: Any) -> str | None:
    """Why this cannot be a weight: of other kinds torch loads some, and some only in part."""
    if not torch.is_tensor(value):
        return f"is a {type(value).__name__}"
    if value.layout != torch.strided or value.is_nested or value.is_quantized or value.is_complex() or value.is_meta:
        kind = "meta" if value.is_meta else "nested" if value.is_nested else f"{value.layout}, {value.dtype}"
        return f"is a tensor of another kind ({kind}); expected plain numbers"
    if value.numel() > value.untyped_storage().nbytes() // value.element_size():
        return f"has {value.numel():,} numbers, of which the file has {len(value.untyped_storage()):,} bytes"
    return None


def _why_unreadable(path: Path, error: BaseException) -> str:
    while error.__cause__ is not None:  # timm wraps some
        error = error.__cause__
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):
        code = re.search(r"GLOBAL ([\w.]+)", text)
        with path.open("rb") as file:
            pickled = file.read(2).startswith((b"PK", b"\x80"))
        if code is not None or pickled:
            wants = f"run {code[1]}" if code is not None else "run code"
            return f"wants to {wants} when it is loaded: refused, not executed; a state dict of tensors needs no code"
    if isinstance(error, EOFError | safetensors.SafetensorError) or re.search("PytorchStreamReader|EOF", text):
        return f"is truncated or damaged: {_first_line(error)}"
    return f"is no checkpoint: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return _line(str(error).strip() or type(error).__name__)


def _line(text: str) -> str:
    """One printable line of a text that may have come from a file."""
    line = text.splitlines()[0]
    line = line if len(line) <= 300 else f"{line[:300]}..."
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def _outputs(model: nn.Module) -> Tensor:
    """Outputs for two images of noise, always the same."""
    size = timm.data.resolve_model_data_config(model)["input_size"]
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model.eval()(images)


def _reload(folder: Path) -> nn.Module:
    """The model that timm loads from the folder."""
    if tuple(int(number) for number in re.findall(r"\d+", timm.__version__)[:3]) >= (1, 0, 26):
        return timm.create_model(f"local-dir:{folder}", pretrained=True)
    # Before, timm's loader of folders took a safetensors file for a pickle; its loader of files does not.
    cfg, architecture, model_args = load_model_config_from_path(folder)
    cfg = {**cfg, "source": None, "file": str(folder / _WEIGHTS)}
    return timm.create_model(architecture, pretrained=True, pretrained_cfg=cfg, **model_args)


def _check_folder(folder: Path, model_name: str | None) -> str:
    """The name of the model in a folder that timm can load."""
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}; name a folder that timm-dgconv convert wrote")
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        found = f"{config['architecture']}.{config['pretrained_cfg']['tag']}"
        _reload(folder)
    except Exception as error:  # of a folder that anybody may have edited
        raise ValueError(f"timm cannot load {folder}: {_first_line(error)}") from error
    if model_name not in (None, found):
        raise ValueError(f"{folder} is {found}, not {model_name}; leave out --model, or convert it again")
    return found


def _files(folder: Path) -> list[File]:
    paths = [folder / name for name in (_CONFIG, _WEIGHTS, _CARD) if (folder / name).is_file()]
    return [File(path.name, path.stat().st_size, sha256(path)) for path in paths]


# What the client's HTTP library raises without a response: requests, httpx or httpx2, by the client's version.
_HTTP_ERROR: Any = HfHubHTTPError.__bases__[0]
_LOG_IN = "run `hf auth login`, or set HF_TOKEN, with a token that may write (https://huggingface.co/settings/tokens)"


@contextmanager
def _hub_errors(hub_id: str) -> Iterator[None]:
    """Say in one line what the Hub's client could not do and the way out."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise RuntimeError(f"no token for the Hub: {_LOG_IN}") from error
    except OfflineModeIsEnabled as error:
        raise RuntimeError("HF_HUB_OFFLINE is set: unset it, this needs the Hub") from error
    except (OSError, _HTTP_ERROR) as error:
        if getattr(error, "errno", None) is not None and not isinstance(error, ConnectionError | TimeoutError):
            raise  # of this machine: no space, no permission
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is None:
            problem = f"cannot reach {constants.ENDPOINT}, check the connection ({_first_line(error)})"
        elif isinstance(error, RevisionNotFoundError):
            problem = f"{hub_id} has no such revision"
        elif isinstance(error, EntryNotFoundError):
            problem = f"{hub_id} has no {_WEIGHTS}"
        elif isinstance(error, RepositoryNotFoundError):
            problem = f"there is no file and no repository {hub_id}, or it is private: check the name, or {_LOG_IN}"
        elif status == 401:
            problem = f"the Hub does not know the token: {_LOG_IN}"
        elif status == 403:
            problem = (
                f"the token may not write to {hub_id}: name a --repo of your own account or organisation, or {_LOG_IN}"
            )
        else:
            problem = f"the Hub answered with status {status}: {_first_line(error)}"
        raise RuntimeError(problem) from error


def _describe(model: nn.Module, folder: Path) -> None:
    """Write config.json and model card."""
    groups = card.fixed_groups(model)
    save_config_for_hf(model, folder / _CONFIG, model_args={"groups": groups} if groups else None)
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    # timm >= 1.0.31 has it there a second time, and transformers, which passes it itself, would pass it twice.
    config.get("model_args", {}).pop("num_classes", None)
    (folder / _CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / _CARD).write_text(card.model_card(model), encoding="utf-8")
