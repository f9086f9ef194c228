"""Files that are damaged, odd or malicious: a model or one line, and nothing else happens."""

import contextlib
import gzip
import io
import itertools
import json
import os
import pickle
import random
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from timm_dgconv.cli import main

TINY = "test_g_resnext.mine"

State = dict[str, Any]


def state_dict() -> State:
    """Of a tiny model, every time the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("test_g_resnext", num_classes=5)
        return {name: value.clone() for name, value in model.state_dict().items()}


def saved(contents: Any, **kwargs: Any) -> bytes:
    file = io.BytesIO()
    torch.save(contents, file, **kwargs)
    return file.getvalue()


class Files:
    """The good files that are damaged, by suffix."""

    def __init__(self) -> None:
        self.state = state_dict()
        checkpoint = {"epoch": 3, "state_dict": self.state}
        self.good = {
            ".safetensors": safetensors.torch.save(self.state),
            ".pth": saved(checkpoint),
            ".pth.tar": saved(checkpoint, _use_new_zipfile_serialization=False),
        }


# Bytes.


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    """A few bits, half of the time in what is not weights."""
    changed = bytearray(data)
    reach = len(data) if rng.random() < 0.5 else min(len(data), 20_000)
    for _ in range(rng.choice([1, 1, 3, 30])):
        place = rng.randrange(reach) if rng.random() < 0.5 else len(data) - 1 - rng.randrange(reach)
        changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(rng: random.Random, data: bytes) -> bytes:
    if len(data) < 8:
        return data[:1]
    header = struct.unpack("<Q", data[:8])[0] + 8
    places = [1, 2, 4, 7, 8, 9, header - 1, header, header + 1, len(data) - 1, len(data) - 22, len(data) - 23]
    places += [data.find(b"PK\1\2"), data.find(b"PK\5\6"), rng.randrange(len(data)), rng.randrange(2000)]
    return data[: rng.choice([place for place in places if 0 < place < len(data)])]


def splice(rng: random.Random, data: bytes) -> bytes:
    start, length = rng.randrange(len(data)), rng.choice([1, 8, 100, 5000])
    middle = rng.choice([b"", rng.randbytes(length), bytes(length), data[start : start + length] * 2])
    return data[:start] + middle + data[start + length :]


def append(rng: random.Random, data: bytes) -> bytes:
    return data + rng.choice([b"\0", rng.randbytes(100), data[: rng.randrange(len(data))], b"PK\5\6" + bytes(18)])


BYTES = [flip_bits, flip_bits, truncate, splice, append]


# The header of safetensors.


def edit_header(rng: random.Random, data: bytes) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = rng.choice(list(header))
    entry = header[name]
    edit = rng.randrange(12)
    if edit == 0:
        entry["shape"] = rng.choice([[1 << 40], [1 << 62, 8], [0], [], [-1], [2**64], [1.5], "3", None, [[1]]])
    elif edit == 1:
        entry["dtype"] = rng.choice(["I8", "F16", "BF16", "F64", "BOOL", "F8_E4M3", "F4", "X", None, 3])
    elif edit == 2:
        start, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            [[end, start], [start, end + 4], [0, 1 << 50], [-4, 0], [start], [0, 0], "a"]
        )
    elif edit == 3:
        header[rng.choice(["", "fc", "a.b", "module.", "\0", "é" * 1000])] = header.pop(name)
    elif edit == 4:
        del header[name]
    elif edit == 5:
        header["__metadata__"] = rng.choice([{"format": "pt"}, {"format": "np"}, {"a": 1}, [], "pt", {"a": {"b": "c"}}])
    elif edit == 6:
        header[name] = rng.choice([None, [], {}, "text", 7])
    elif edit == 7:
        entry["more"] = 1
    text = json.dumps(header).encode()
    if edit == 8:
        text = b"[" * rng.choice([10, 100_000])
    elif edit == 9:
        text = text.replace(name.encode(), b"\xff\xfe", 1)
    elif edit == 10:
        text = text[:-1] + b"," + text[1:]  # every name twice
    size = (
        len(text) if edit != 11 else rng.choice([0, 1, len(text) - 1, len(text) + 1, 1 << 30, 1 << 62, (1 << 64) - 1])
    )
    return struct.pack("<Q", size) + text + body


# Archives.


def members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive_of(contents: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, value in contents.items():
            archive.writestr(name, value)
    return file.getvalue()


def tar_of(contents: dict[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        for name, value in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(value)
            archive.addfile(info, io.BytesIO(value))
    return file.getvalue()


def edit_archive(rng: random.Random, data: bytes) -> bytes:
    contents = members(data)
    root = next(iter(contents)).split("/")[0]
    records = [name for name in contents if "/data/" in name]
    name = rng.choice(list(contents))
    edit = rng.randrange(10)
    if edit == 0:
        del contents[name]
    elif edit == 1:
        contents[name] = flip_bits(rng, contents[name] or b"x")
    elif edit == 2:
        contents[name] = contents[name][: rng.randrange(len(contents[name]) + 1)]
    elif edit == 3:
        contents[name] += rng.randbytes(10)
    elif edit == 4:
        a, b = rng.sample(records, 2)
        contents[a], contents[b] = contents[b], contents[a]
    elif edit == 5:
        contents = {
            key.replace(root, rng.choice(["..", "", "a/b", "x" * 300])): value for key, value in contents.items()
        }
    elif edit == 6:
        contents[f"{root}/data.pkl"] = flip_bits(rng, contents[f"{root}/data.pkl"])
    elif edit == 7:
        contents[f"{root}/byteorder"] = rng.choice([b"big", b"", b"middle"])
    elif edit == 8:
        return archive_of(contents, zipfile.ZIP_DEFLATED)
    else:
        return rng.choice(
            [
                archive_of({"inner.pth": data}),
                archive_of({f"{root}/data.pkl": data}),
                tar_of({"inner.pth": data}),
                tar_of({"pickle": data, "tensors": data, "storages": data}),
                tar_of({"inner.tar.gz": tar_of({"inner.pth": data}, "w:gz")}, "w:gz"),
                gzip.compress(data),
            ]
        )
    return archive_of(contents)


# Entries.


def odd_values(value: torch.Tensor) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flat = torch.ones(max(1, value.numel()))
        return [
            None,
            3,
            "text",
            b"bytes",
            [1.0],
            {"weight": value},
            value.int(),
            value.bool(),
            value.to(torch.complex64),
            value.half(),
            value.double(),
            value.to(torch.float8_e4m3fn),
            value.float().to_sparse(),
            torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
            torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            value.to("meta"),
            torch.nn.Parameter(value.float()),
            value.unsqueeze(0),
            value.flatten()[:1],
            value[:0] if value.ndim else value,
            flat.flip(0),
            torch.ones(()).expand(1 << 40),
            torch.ones(()).expand(value.shape),
            torch.full_like(value, -1) if not value.is_floating_point() else value * float("nan"),
            value * float("inf") if value.is_floating_point() else value,
            value.float().to_sparse_csr() if value.ndim == 2 else value,
            torch.empty(1 << 40, device="meta"),
            torch.empty(0, 1 << 40),
        ]


def edit_entries(rng: random.Random, state: State) -> Any:
    state = dict(state)
    gate = rng.choice([name for name in state if name.endswith(".gate")])
    name = rng.choice([*state, "fc.weight", gate, gate.replace("gate", "weight")])
    edit = rng.randrange(10)
    if edit < 5:
        state[name] = rng.choice(odd_values(state[name]))
    elif edit == 5:
        for name in rng.sample(list(state), rng.choice([1, 2, 20])):
            del state[name]
    elif edit == 6:
        state[rng.choice(["more", "fc.weight.more", 3, "", "layer1.0.conv2.D", None, "a" * 10_000])] = torch.ones(1)
    elif edit == 7:
        old, new = rng.sample(list(state), 2)
        state[new] = state.pop(old)
    elif edit == 8:
        items = list(state.items())
        rng.shuffle(items)
        state = dict(items)
    else:
        state = {f"{rng.choice(['module.', '_orig_mod.', 'model.'])}{name}": value for name, value in state.items()}
    around: list[Any] = [
        state,
        {"state_dict": state, "epoch": rng.choice([3, None, "x", -1, 2**80, [1], torch.ones(1)])},
        {"model": state, "model_ema": None},
        {"state_dict_ema": state, "state_dict": None},
        {"state_dict": {"state_dict": state}},
        {"state_dict": list(state.values())},
        {"state_dict_ema": torch.ones(3)},
        [state],
        torch.ones(3),
        Counter("abc"),
    ]
    return around[rng.randrange(4)] if rng.random() < 0.9 else rng.choice(around)


def write_entries(rng: random.Random, state: State) -> tuple[str, bytes]:
    contents = edit_entries(rng, state)
    if rng.random() < 0.2 and isinstance(contents, dict):
        with contextlib.suppress(Exception):  # what safetensors cannot hold
            return ".safetensors", safetensors.torch.save(
                {name: value.contiguous() for name, value in contents.items()}
            )
    with contextlib.suppress(Exception):  # what torch cannot save
        return ".pth", saved(contents, _use_new_zipfile_serialization=rng.random() < 0.7)
    return write_entries(rng, state)


# Code.


class Call:
    """A pickle that calls something when it is loaded."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def opcodes(marker: Path) -> dict[str, bytes]:
    """Pickles that run ``touch marker``, by the opcode that does it."""
    command = f"touch {marker}".encode()
    text = b"V" + command + b"\n"
    name = lambda value: b"\x8c" + bytes([len(value)]) + value  # noqa: E731
    return {
        "GLOBAL and REDUCE": b"\x80\x02cos\nsystem\n" + text + b"\x85R.",
        "STACK_GLOBAL": b"\x80\x04" + name(b"os") + name(b"system") + b"\x93" + text + b"\x85R.",
        "INST": b"(" + text + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + text + b"o.",
        "NEWOBJ": b"\x80\x02csubprocess\nPopen\n((V/bin/sh\nV-c\n" + text + b"lt\x81.",
        "BUILD": b"\x80\x02cargparse\nNamespace\n)R" + b"cos\nsystem\n" + text + b"\x85R" + b"b.",
        "EXT": b"\x80\x02\x82\x01" + text + b"\x85R.",
        "eval": b"\x80\x02cbuiltins\neval\nV__import__('os').system('" + command + b"')\n\x85R.",
        "getattr": b"\x80\x02cbuiltins\ngetattr\ncbuiltins\ngetattr\ncos\npath\nVos\n\x86RVsystem\n\x86R"
        + text
        + b"\x85R.",
        "numpy": b"\x80\x02cnumpy.testing._private.utils\nrunstring\n"
        + b"Vimport os; os.system('"
        + command
        + b"')\n}\x86R.",
        "in a set": b"\x80\x04\x8f(cos\nsystem\n" + text + b"\x85R\x90.",
        "PERSID": b"P" + command + b"\n.",
        "dotted": b"\x80\x04" + name(b"torch") + name(b"os.system") + b"\x93" + text + b"\x85R.",
        "cloudpickle": pickle.dumps(Call(os.system, command.decode()), protocol=5),
    }


def around(pickled: bytes, good: bytes) -> dict[str, bytes]:
    """The places of a pickle in the files that torch reads."""
    contents = members(good)
    root = next(iter(contents)).split("/")[0]
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(1001, protocol=2)
    info = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, protocol=2)
    return {
        "alone": pickled,
        "in an archive": archive_of({**contents, f"{root}/data.pkl": pickled}),
        "of 2019": magic + info + pickled + pickle.dumps([], protocol=2),
        "in the place of the keys of 2019": magic + info + pickle.dumps({}, protocol=2) + pickled,
        "in the place of the magic number": pickled + magic,
        "in a tar": tar_of({"sys_info": info, "storages": pickled, "tensors": pickled, "pickle": pickled}),
        "as TorchScript": archive_of({**contents, f"{root}/constants.pkl": pickled, f"{root}/data.pkl": pickled}),
    }


# What happens.


def run(command: str, source: Path, out: Path) -> bool:
    """Whether the command takes the file; one line if not, and neither warnings nor leftovers."""
    options = {"convert": ["--out", str(out)], "publish": ["--repo", "owner/name", "--dry-run"]}.get(command, [])
    before = sorted(os.listdir(out.parent))
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as stderr,
        warnings.catch_warnings(record=True) as noise,
    ):
        warnings.simplefilter("always")
        status = main([command, str(source), "--model", TINY, *options])
    said = stderr.getvalue()
    assert status in (0, 2)
    if status == 0:
        assert not said
        return True
    assert said.startswith(f"timm-dgconv {command}: "), said
    assert str(source) in said, said
    assert len(said.splitlines()) == 1, said
    assert len(said) < 1000, said
    assert not noise, [str(warning.message) for warning in noise]
    assert sorted(os.listdir(out.parent)) == before
    return False


def cases(files: Files, seed: int) -> Iterator[tuple[str, bytes]]:
    """Suffix and bytes of files without end."""
    rng = random.Random(seed)
    while True:
        suffix = rng.choice(list(files.good))
        kind = rng.randrange(4)
        if kind == 0:
            data = rng.choice(BYTES)(rng, files.good[suffix])
        elif kind == 1:
            suffix, data = write_entries(rng, files.state)
        elif kind == 2:
            suffix, data = ".safetensors", edit_header(rng, files.good[".safetensors"])
        else:
            suffix, data = ".pth", edit_archive(rng, files.good[".pth"])
        if rng.random() < 0.05:
            suffix = rng.choice([".pth", ".pt", ".bin", ".tar", ".safetensors"])
        if rng.random() < 0.1:
            data = rng.choice(BYTES)(rng, data)
        yield suffix, data


@pytest.fixture(scope="module")
def files() -> Files:
    return Files()


def fuzz(files: Files, seed: int, count: int, folder: Path) -> Counter[bool]:
    """How many commands took a file, and how many refused it."""
    found: Counter[bool] = Counter()
    for number, (suffix, data) in enumerate(itertools.islice(cases(files, seed), count)):
        source = folder / f"source{suffix}"
        source.write_bytes(data)
        for command in ("convert", "inspect"):
            try:
                found[run(command, source, folder / "out")] += 1
            except BaseException as error:
                raise AssertionError(f"{command} of file {number} ({suffix}) of seed {seed}") from error
            shutil.rmtree(folder / "out", ignore_errors=True)
        source.unlink()
    return found


def test_damaged_and_odd_files(files: Files, tmp_path: Path) -> None:
    found = fuzz(files, seed=0, count=40, folder=tmp_path)
    assert found[True] > 10
    assert found[False] > 10


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 4))
def test_damaged_and_odd_files_more(files: Files, seed: int, tmp_path: Path) -> None:
    found = fuzz(files, seed, count=400, folder=tmp_path)
    print(
        f"seed {seed}: {found[True]} commands took a file, {found[False]} refused one, {peak_memory():.0f} MB at most"
    )
    assert found[True] > 50
    assert found[False] > 50


def peak_memory() -> float:
    """Of this process until now, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def edit_config(rng: random.Random, data: bytes) -> bytes:
    config = json.loads(data)
    place = rng.choice([config, config["pretrained_cfg"]])
    name = rng.choice(list(place))
    edit = rng.randrange(4)
    if edit == 0:
        return rng.choice(BYTES[2:])(rng, struct.pack("<Q", 30) + data)[8:]
    if edit == 1:
        del place[name]
    else:
        place[name] = rng.choice([None, [], {}, "x", "../x", -1, 0, 7, 1.5, True, {"groups": [1, 2]}, {"depth": "x"}])
    return json.dumps(config).encode()


def test_damaged_folders(files: Files, tmp_path: Path) -> None:
    (tmp_path / "good.pth").write_bytes(files.good[".pth"])
    assert run("convert", tmp_path / "good.pth", tmp_path / "good")
    rng, found = random.Random(0), Counter[bool]()
    for number in range(60):
        folder = tmp_path / f"folder{number}"
        shutil.copytree(tmp_path / "good", folder)
        name, edit = rng.choice([("config.json", edit_config), ("model.safetensors", edit_header)])
        (folder / name).write_bytes(edit(rng, (folder / name).read_bytes()))
        found[run("publish", folder, tmp_path / "none")] += 1
    assert found[True] > 5
    assert found[False] > 5


@pytest.mark.parametrize("opcode", list(opcodes(Path("marker"))))
def test_code_is_not_run(opcode: str, files: Files, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    for data in around(opcodes(marker)[opcode], files.good[".pth"]).values():
        for suffix in (".pth", ".tar"):
            source = tmp_path / f"source{suffix}"
            source.write_bytes(data)
            assert not run("convert", source, tmp_path / "out")
            assert not run("inspect", source, tmp_path / "out")
            assert not marker.exists()


def test_pickles_do_run_code(tmp_path: Path) -> None:
    """Those of the test above, where nothing keeps them from it."""
    marker, kept = tmp_path / "executed", []
    for opcode, data in opcodes(marker).items():
        with contextlib.suppress(Exception):
            pickle.loads(data)
        if marker.exists():
            marker.unlink()
        else:
            kept.append(opcode)
    assert kept == ["NEWOBJ", "EXT", "PERSID"]  # they need somebody who helps them


@pytest.mark.parametrize("kind", ["fifo", "to fifo", "to folder", "to nothing", "to itself", "to /dev/zero", "socket"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
def test_what_is_no_file(kind: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would it wait, the time limit says so; without a suffix it looks like a repository."""
    monkeypatch.chdir(tmp_path.parent)
    source = Path(tmp_path.name, f"source{suffix}")
    if kind == "fifo":
        os.mkfifo(source)
    elif kind == "to fifo":
        os.mkfifo(tmp_path / "fifo")
        source.symlink_to(tmp_path / "fifo")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(source))
    else:
        targets = {"to folder": tmp_path, "to nothing": tmp_path / "none", "to itself": tmp_path / source.name}
        source.symlink_to(targets.get(kind, Path("/dev/zero")))
    for command in ("convert", "inspect"):
        assert not run(command, source, tmp_path / "out")
    with pytest.raises((OSError, RuntimeError, ValueError)):
        timm.create_model("test_g_resnext", checkpoint_path=str(source))


def bombs(files: Files) -> dict[str, bytes]:
    """Small files that declare terabytes."""
    state, contents = files.state, members(files.good[".pth"])
    root = next(iter(contents)).split("/")[0]
    one = torch.ones(())
    pickled = contents[f"{root}/data.pkl"]
    size = struct.pack("<i", 2**31 - 1)
    compressed = io.BytesIO()
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in contents.items():
            archive.writestr(name, value + bytes(1 << 28) * name.endswith("data/0"))
    header = json.dumps({"fc.weight": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}).encode()
    return {
        "gate.pth": saved({**state, "layer1.0.conv2.gate": one.expand(1 << 34)}),
        "classes.pth": saved({**state, "fc.weight": one.expand(1 << 26, 96), "fc.bias": one.expand(1 << 26)}),
        "narrow.pth": saved(
            {**state, "fc.weight": torch.ones(1 << 20, 1).char(), "fc.bias": torch.ones(1 << 20).char()}
        ),
        "empty.pth": saved({**state, "fc.weight": torch.ones(1 << 26, 0)}),
        "compressed.pth": compressed.getvalue(),
        "storages.pth": archive_of(
            {**contents, f"{root}/data.pkl": re.sub(rb"(cpuq.)M..", rb"\1J" + size, pickled, flags=re.DOTALL)}
        ),
        "shape.safetensors": struct.pack("<Q", len(header)) + header + b"weights",
        "header.safetensors": struct.pack("<Q", 99_000_000) + header,
    }


def test_declared_sizes_take_no_memory(files: Files, tmp_path: Path) -> None:
    """In a process of its own, which may not have more than 4 GB above what it starts with."""
    code = """
        import json, resource, shutil, sys
        import timm, torch
        from timm_dgconv.cli import main

        timm.create_model("test_g_resnext")
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (4 << 30),) * 2)
        grown = {}
        for source in sys.argv[1:]:
            for command in (["convert", source, "--out", source + ".out"], ["inspect", source]):
                refused = main([*command, "--model", "test_g_resnext.mine"]) == 2
                # torch 2.5 believes what a storage says about its size, and does not use it.
                assert refused or source.endswith("storages.pth")
                shutil.rmtree(source + ".out", ignore_errors=True)
            grown[source] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024
        print(json.dumps(grown))
    """
    for name, data in bombs(files).items():
        (tmp_path / name).write_bytes(data)
    sources = [str(path) for path in sorted(tmp_path.iterdir())]
    # Threads reserve addresses; an old timm makes a new torch warn.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "PYTHONWARNINGS": "ignore::FutureWarning"}
    command = [sys.executable, "-c", dedent(code), *sources]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stderr
    assert len(result.stderr.splitlines()) in (2 * len(sources), 2 * len(sources) - 2), result.stderr
    assert "allocate" not in result.stderr
    grown = json.loads(result.stdout.splitlines()[-1])
    assert all(megabytes < 200 for megabytes in grown.values()), grown


def test_timm_alone(files: Files, tmp_path: Path) -> None:
    """What timm's own loading does with files of which it takes some: it raises, or the model is there."""
    for suffix, data in itertools.islice(cases(files, seed=1000), 80):
        source = tmp_path / f"source{suffix}"
        source.write_bytes(data)
        before = files.state
        model = timm.create_model("test_g_resnext", num_classes=5)
        model.load_state_dict(before)
        try:
            state = timm.models.load_state_dict(str(source), weights_only=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.load_state_dict(state)
        except Exception:
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
