"""Checkpoint files: no code in them runs, and files that do not fit are refused in one line."""

import contextlib
import functools
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from conftest import assert_refused, trained
from hypothesis import given
from hypothesis import strategies as st

GATE, WEIGHT = "layer3.0.conv2.sorted_gate", "layer3.0.conv2.weight"


@functools.cache
def good() -> dict[str, torch.Tensor]:
    return trained(num_classes=5).state_dict()


def without(*words: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in good().items() if not any(word in name for word in words)}


def under(prefix: str, *without_words: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value for name, value in without(*without_words).items()}


def saved(contents: Any, **kwargs: Any) -> bytes:
    file = io.BytesIO()
    torch.save(contents, file, **kwargs)
    return file.getvalue()


class Code:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def assert_file_refused(command: str, source: Path, said: str = "") -> None:
    """The command names the file in its error, and writes nothing."""
    words = [command, str(source), "--model", "test_g_resnext.mine"]
    words += ["--out", str(source.parent / "out")] if command == "convert" else []
    before = sorted(source.parent.iterdir())
    assert_refused(words, f"timm-dgconv {command}: {source} ", said)
    assert sorted(source.parent.iterdir()) == before


REFUSED: dict[str, tuple[str, Callable[[], Any], str]] = {
    "empty": (".pth", lambda: b"", "is truncated or damaged"),
    "web page": (".pth", lambda: b"<!DOCTYPE html><html>virus scan", "is not a checkpoint"),
    "no entries": (".pth", dict, "has no state dict"),
    "no dict": (".pth", lambda: [good()], "has no state dict; use a file that torch.save(model.state_dict(), FILE)"),
    "an optimizer": (".pth", lambda: {"state": {0: good()}, "param_groups": []}, "has no state dict"),
    "two entries": (".pth", lambda: {"net": good(), "best": good()}, "has several state dicts, net, best; use a file"),
    "two networks": (".pth", lambda: under("net.") | under("ema."), "has several networks, ema., net.; use a file"),
    "another classifier": (
        ".ckpt",
        lambda: {"state_dict": under("net.", "fc.") | {"head.weight": torch.ones(5, 384)}},
        "has head.weight, and no classifier in net.*; use a file that",
    ),
    "a pointer": (
        ".safetensors",
        lambda: b"version https://git-lfs.github.com/spec/v1\noid",
        "is a pointer of Git LFS",
    ),
    "a model": (".pt", lambda: torch.nn.Linear(1, 1), "would run torch.nn.modules.linear.Linear when it is loaded"),
    "another network": (".pth", lambda: timm.create_model("test_resnet").state_dict(), "size mismatch for bn1.weight"),
    "missing weights": (".pth", lambda: without("bn1"), "than test_g_resnext: it has no bn1.weight (and 19 more)"),
    "three groups": (
        ".pth",
        lambda: without(GATE) | {WEIGHT: good()[WEIGHT][:, :16].clone()},
        "layer3.0.conv2: the checkpoint has a group convolution with 3 groups",
    ),
    "nan gates": (".pth", lambda: good() | {GATE: good()[GATE] * float("nan")}, f"has nan gates in {GATE}"),
    "orders of channels": (
        ".pth",
        lambda: good() | {"layer3.0.conv2.in_order": torch.arange(48)},
        "is the compact form of timm-dgconv 0.2 with orders of channels",
    ),
    "name of two lines": (
        ".pth",
        lambda: good() | {"more\n\x1b[31m" + "x" * 5000: torch.ones(1)},
        "test_g_resnext has no more ?[31mxxx",
    ),
    "code": (
        ".pth",
        lambda: {"state_dict": good(), "more": Code("false")},
        "would run posix.system when it is loaded; refused, not executed",
    ),
}


@pytest.mark.parametrize("command", ["convert", "inspect"])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_does_not_fit_is_refused_in_one_line(kind: str, command: str, tmp_path: Path) -> None:
    suffix, contents, said = REFUSED[kind]
    source, data = tmp_path / f"source{suffix}", contents()
    source.write_bytes(data if isinstance(data, bytes) else saved(data))
    assert_file_refused(command, source, said)


@pytest.mark.parametrize("form", [".safetensors", ".pth", ".pth.tar"])
def test_a_truncated_file_is_refused(form: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A prefix of a file is not a checkpoint, wherever it ends. Before torch 1.6 the files were not zip archives."""
    if form == ".safetensors":
        data = safetensors.torch.save(good())
    else:
        data = saved(good(), _use_new_zipfile_serialization=form == ".pth")
    source = tmp_path_factory.mktemp("truncated") / f"source{form}"

    @given(st.integers(0, 300) | st.integers(len(data) - 300, len(data) - 1) | st.just(len(data) // 2))
    def check(length: int) -> None:
        source.write_bytes(data[:length])
        assert_file_refused("inspect", source, "is truncated or damaged" if length == len(data) // 2 else "")

    check()


def pickles(marker: Path) -> dict[str, bytes]:
    """Pickles that run ``touch marker``: as one does, and through the class that checkpoints of timm may have."""
    command = f"touch {marker}"
    called = b"cos\nsystem\nV" + command.encode() + b"\n\x85R"
    return {
        "REDUCE": pickle.dumps(Code(command), protocol=2),
        "STACK_GLOBAL": pickle.dumps(Code(command), protocol=4),
        "BUILD": b"\x80\x02cargparse\nNamespace\n)R" + called + b"b.",
        "attribute of torch": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93V" + command.encode() + b"\n\x85R.",
    }


def files_with(pickled: bytes) -> list[bytes]:
    """Files with this pickle: alone, in an archive, and in the form before torch 1.6."""
    with zipfile.ZipFile(io.BytesIO(saved(good()))) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    root, file = next(iter(contents)).split("/")[0], io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, value in (contents | {f"{root}/data.pkl": pickled}).items():
            archive.writestr(name, value)
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    return [pickled, file.getvalue(), b"".join(pickle.dumps(part, protocol=2) for part in head) + pickled]


@pytest.mark.parametrize("opcode", pickles(Path()))
def test_no_code_runs(opcode: str, tmp_path: Path) -> None:
    marker, source = tmp_path / "executed", tmp_path / "source.pth"
    pickled = pickles(marker)[opcode]
    for data in files_with(pickled):
        source.write_bytes(data)
        assert_file_refused("inspect", source)
    assert not marker.exists()
    with contextlib.suppress(pickle.UnpicklingError):  # the state of a Namespace is a dictionary
        pickle.loads(pickled)
    assert marker.exists(), "the pickle does run code where nothing keeps it from that"
