"""Checkpoint files: no code in them runs, and files that do not fit are refused in one line."""

import contextlib
import functools
import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from conftest import trained
from hypothesis import given
from hypothesis import strategies as st

from timm_dgconv.cli import main

GATE, WEIGHT = "layer3.0.conv2.sorted_gate", "layer3.0.conv2.weight"


@functools.cache
def good() -> dict[str, torch.Tensor]:
    return trained(num_classes=5).state_dict()


def without(*words: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in good().items() if not any(word in name for word in words)}


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


def assert_refused(command: str, source: Path, said: str = "") -> None:
    """The command exits with status 2 and one line that names the file, and writes nothing."""
    options = ["--out", str(source.parent / "out")] if command == "convert" else []
    before = sorted(source.parent.iterdir())
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        assert main([command, str(source), "--model", "test_g_resnext.mine", *options]) == 2
    error = err.getvalue()
    assert error.startswith(f"timm-dgconv {command}: {source} ")
    assert said in error
    assert len(error.splitlines()) == 1
    assert out.getvalue() == ""
    assert sorted(source.parent.iterdir()) == before


# Files without code.

REFUSED: dict[str, tuple[str, Callable[[], Any], str]] = {
    "empty": (".pth", lambda: b"", "is truncated or damaged"),
    "empty safetensors": (".safetensors", lambda: b"", "is truncated or damaged"),
    "web page": (".pth", lambda: b"<!DOCTYPE html><html>virus scan", "is not a checkpoint"),
    "noise": (".bin", lambda: bytes(range(256)) * 9, "is not a checkpoint"),
    "no entries": (".pth", dict, "has no state dict"),
    "unknown entry": (".pth", lambda: {"net": good()}, "has no state dict"),
    "another network": (".pth", lambda: timm.create_model("test_resnet").state_dict(), "size mismatch for bn1.weight"),
    "missing weights": (".pth", lambda: without("bn1"), "than test_g_resnext: it has no bn1.weight (and 19 more)"),
    "three groups": (
        ".pth",
        lambda: without(GATE) | {WEIGHT: good()[WEIGHT][:, :16].clone()},
        "layer3.0.conv2: the checkpoint has a group convolution with 3 groups",
    ),
    "nan gates": (".pth", lambda: good() | {GATE: good()[GATE] * float("nan")}, f"has nan gates in {GATE}"),
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
    assert_refused(command, source, said)


@pytest.mark.parametrize("form", [".safetensors", ".pth", ".pth.tar"])
def test_a_truncated_file_is_refused(form: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A prefix of a file is not a checkpoint, wherever it ends. Before torch 1.6 the files were not zip archives."""
    if form == ".safetensors":
        data = safetensors.torch.save(good())
    else:
        data = saved(good(), _use_new_zipfile_serialization=form == ".pth")
    source = tmp_path_factory.mktemp("truncated") / f"source{form}"
    near_the_ends = st.integers(0, 300) | st.integers(len(data) - 300, len(data) - 1)

    @given(near_the_ends | st.integers(0, len(data) - 1))
    def check(length: int) -> None:
        source.write_bytes(data[:length])
        assert_refused("inspect", source)

    check()
    source.write_bytes(data[: len(data) // 2])
    assert_refused("convert", source, "is truncated or damaged")


# Files with code.


def pickles(marker: Path) -> dict[str, bytes]:
    """Pickles that run ``touch marker``, by the opcode or function that runs it."""
    command = f"touch {marker}".encode()
    text = b"V" + command + b"\n"
    return {
        "REDUCE": b"\x80\x02cos\nsystem\n" + text + b"\x85R.",
        "STACK_GLOBAL": pickle.dumps(Code(command.decode()), protocol=4),
        "INST": b"(" + text + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + text + b"o.",
        "BUILD": b"\x80\x02cargparse\nNamespace\n)Rcos\nsystem\n" + text + b"\x85Rb.",
        "set": b"\x80\x04\x8f(cos\nsystem\n" + text + b"\x85R\x90.",
        "eval": b"\x80\x02cbuiltins\neval\nV__import__('os').system('" + command + b"')\n\x85R.",
        "getattr": b"\x80\x02cbuiltins\ngetattr\n(cbuiltins\n__import__\nVos\n\x85RVsystem\ntR" + text + b"\x85R.",
        "attribute of torch": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93" + text + b"\x85R.",
    }


def zip_of(contents: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, value in contents.items():
            archive.writestr(name, value)
    return file.getvalue()


def tar_of(contents: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, value in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(value)
            archive.addfile(info, io.BytesIO(value))
    return file.getvalue()


def files_around(pickled: bytes) -> dict[str, bytes]:
    """Files with a pickle in every place where torch.load looks for one."""
    with zipfile.ZipFile(io.BytesIO(saved(good()))) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(contents)).split("/")[0]
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(1001, protocol=2)
    info = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, protocol=2)
    return {
        "alone": pickled,
        "zip archive": zip_of(contents | {f"{root}/data.pkl": pickled}),
        "before torch 1.6": magic + info + pickled + pickle.dumps([], protocol=2),
        "before torch 1.6, keys": magic + info + pickle.dumps({}, protocol=2) + pickled,
        "before torch 1.6, magic number": pickled + magic,
        "tar archive": tar_of({"sys_info": info, "storages": pickled, "tensors": pickled, "pickle": pickled}),
    }


@pytest.mark.parametrize("opcode", pickles(Path()))
def test_no_code_runs(opcode: str, tmp_path: Path) -> None:
    marker, source = tmp_path / "executed", tmp_path / "source.pth"
    pickled = pickles(marker)[opcode]
    for data in files_around(pickled).values():
        source.write_bytes(data)
        assert_refused("inspect", source)
    assert not marker.exists()
    with contextlib.suppress(Exception):  # some of them fail after the call
        pickle.loads(pickled)
    assert marker.exists(), "the pickle does run code where nothing keeps it from that"
