"""The scripts in benchmarks/."""

import importlib
import json
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import timm
import torch

from timm_dgconv.layers import dgconv_op

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ["--model", "test_g_resnext", "--batch-size", "2", "--img-size", "32", "--rounds", "2", "--groups", "4"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("bench")

    def run(*args: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "bench.py"), *args])
        module.main()

    monkeypatch.setattr(module, "run", run, raising=False)
    return module


@pytest.mark.parametrize("what", ["train", "sgd", "infer"])
def test_networks(bench: Any, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    bench.run(what, *TINY, "--device", "cpu", "--format", "nhwc", "--permuted", "--json", str(path))
    written = json.loads(path.read_text())
    assert written["command"].startswith(f"python benchmarks/bench.py {what} --model test_g_resnext")
    assert written["torch"] == torch.__version__
    baseline, *rows = written["rows"]
    assert baseline["model"] == "test_resnet"
    assert baseline["ratio"] == 1
    forms = {row["model"].partition(", ")[2] for row in rows}
    assert forms == {"learnable", "frozen", "masked dense"} | ({"compact", "deployed"} if what == "infer" else set())
    for row in rows:
        assert row["ms"] > 0
        assert row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1]
        assert row["permuted"]
        if what == "infer":
            assert row["largest_difference"] < 1e-5
    assert "| test_g_resnext, learnable |" in capsys.readouterr().out


@pytest.mark.parametrize("permuted", [False, True])
def test_networks_have_the_groups(bench: Any, permuted: bool) -> None:
    torch.manual_seed(0)
    layers = bench.build("test_g_resnext", "frozen", 4, permuted).modules()
    convs = [module for module in layers if hasattr(module, "num_groups")]
    assert [conv.num_groups for conv in convs] == [4] * len(convs)
    assert all(conv.closed[:2] == (True, True) for conv in convs) != permuted
    assert not any(conv.gate.requires_grad for conv in convs)


@pytest.mark.parametrize("compiled", [False, True])
def test_masked_dense_does_not_use_the_operator(bench: Any, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 32, 32)
    nets = []
    for form in ("learnable", "masked dense"):
        torch.manual_seed(0)
        nets.append(bench.build("test_g_resnext", form, 4).eval())
    expected = nets[0](x)
    monkeypatch.setattr(dgconv_op, "dgconv2d", None)
    net = torch.compile(nets[1], backend="eager") if compiled else nets[1]
    torch.testing.assert_close(net(x), expected)
    with pytest.raises(TypeError, match="not callable"):
        nets[0](x)


def test_layers_with_a_plot(bench: Any, tmp_path: Path) -> None:
    path = tmp_path / "layers.png"
    json_path = tmp_path / "layers.json"
    files = ["--plot", str(path), "--json", str(json_path)]
    bench.run("layers", "--device", "cpu", "--widths", "8", "12", *TINY, "--format", "nchw", *files)
    assert path.read_bytes().startswith(b"\x89PNG")
    found: dict[tuple[int, int], list[str]] = {}
    for row in json.loads(json_path.read_text())["rows"]:
        found.setdefault((row["width"], row["groups"]), []).append(row["way"])
    spans = {(8, 1): 1, (8, 2): 2, (8, 4): 3, (8, 8): 4, (12, 1): 1, (12, 2): 2, (12, 4): 3}
    assert found == {key: ["fixed", "policy", *map(str, range(n)), "masked dense"] for key, n in spans.items()}


def test_memory_as_a_script(tmp_path: Path) -> None:
    """In another folder, since the script starts processes that must find it."""
    command = [sys.executable, BENCHMARKS / "bench.py", "memory", *TINY, "--forms", "learnable", "--device", "cpu"]
    subprocess.run([*command, "--json", "rows.json"], cwd=tmp_path, check=True)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["test_resnet", "test_g_resnext, learnable"]
    assert all(row["MiB"] > 0 for row in rows)


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1 << 10), ("darwin", 1 << 20)])
def test_unit_of_memory(bench: Any, platform: str, unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    peaks = iter([300 * unit, 500 * unit])
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=next(peaks)))
    monkeypatch.setattr(sys, "platform", platform)
    assert bench.memory("test_resnet", "cpu", "", 2, 32, 1) == 200


def test_memory_without_the_module_resource() -> None:
    """As on Windows: everything else works."""
    code = """
import sys
sys.modules["resource"] = None
sys.path.insert(0, sys.argv[1])
import bench
try:
    bench.memory("test_resnet", "cpu", "", 2, 32, 1)
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, BENCHMARKS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "peak memory on a CPU is not available on Windows, which has no module resource\n"


@pytest.mark.parametrize(("device", "expected"), [("cpu", 0), ("cuda", 10), ("cuda:0", 10)])
def test_every_call_synchronizes(bench: Any, device: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: calls.append("synchronize"))
    functions = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    times = bench.interleave(functions, 3, device, "")
    assert [len(seconds) for seconds in times.values()] == [3, 3]
    assert calls.count("synchronize") == expected
    assert [call for call in calls if call != "synchronize"] == [*"aabb", *"ababab"]
    assert not expected or calls[1::2] == ["synchronize"] * expected


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_versions_name_the_gpu(bench: Any, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    assert bench.versions(device)["device"] == "a GPU"
    assert bench.versions("cpu")["device"].endswith("CPU")


@pytest.mark.parametrize("device", ["cpu:0", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_autocast_gets_the_type_of_the_device(
    bench: Any, device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    autocast, used = torch.autocast, set()

    def record(device_type: str, dtype: torch.dtype | None = None, enabled: bool = True) -> Any:
        if enabled:  # the operator disables it
            used.add((device_type, dtype))
        return autocast(device_type, dtype, enabled)

    monkeypatch.setattr(torch, "autocast", record)
    forms = ["--forms", "learnable", "frozen"]
    bench.run("infer", *TINY, "--device", device, "--dtype", "bfloat16", "--format", "nchw", *forms)
    assert used == {(torch.device(device).type, torch.bfloat16)}
    assert "| test_g_resnext, frozen | infer | nchw | bfloat16 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--groups", "3"], "groups=3 must be a power of two"),
        (["--forms", "thawed"], "invalid choice: 'thawed'"),
        (["--plot", "x.png"], "--plot draws layers only"),
    ],
)
def test_errors_before_anything_is_measured(
    bench: Any, args: list[str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "interleave", None)
    with pytest.raises(SystemExit) as stop:
        bench.run("infer", "--device", "cpu", *TINY, *args)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_training_refuses_runtimes_for_inference(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.run("train", *TINY, "--runtimes", "eager", "openvino")
    assert "--runtimes eager openvino is not for training" in capsys.readouterr().err


def test_gate_margin_and_weight(bench: Any) -> None:
    """The scripts read the networks that they train."""
    gate_margin, weight = (importlib.import_module(name) for name in ("gate_margin", "weight"))
    model = timm.create_model("g_resnext50", init_groups=32, **weight.NET)
    assert gate_margin.signs(model).sum() == 16 * 5
    assert weight.density(model) == 1 / 32
    row = {"training": "x", "weight": 0.1, "target": "resnext", "steps_per_epoch": 2, "top1": [90, 92]}
    table = weight.table([{**row, "densities": [1, 0.5, 0.04, 0.03, 0.03]}])
    assert "| x | 0.1 | 1.50 | 4.00, 3.00 | 90.0, 92.0 |" in table


def test_study(bench: Any, tmp_path: Path) -> None:
    """The networks that are compared have the same density, and a finished run is not repeated."""
    study = importlib.import_module("study")
    run = study.Run("g_resnext50", "scratch", "fixed", 1 / 8, 0)
    shares = {n: study.snapshot(study.build(run._replace(variant=n), {}, 1))["density"] for n in study.COMPARED}
    assert shares["fixed"] == 1 / 8 < shares["held"]
    assert shares["random"] == pytest.approx(1 / 8, rel=0.02)
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind, shape in (("images-idx3", (128, 28, 28)), ("labels-idx1", (128,))):
            header = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)
            values = torch.randint(0, 10, shape, dtype=torch.uint8)
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + values.numpy().tobytes())
    command = [
        sys.executable,
        str(BENCHMARKS / "study.py"),
        f"--data-dir={tmp_path}",
        f"--output={tmp_path}",
        "--quick",
    ]
    command += ["--images=128", "--epochs=2", "--seeds=0", "--workers=1", "--variants", "dense", "paper"]
    for _ in range(2):
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert "| scratch | 1/8 | paper | 1 |" in printed
    rows = json.loads((tmp_path / "study.json").read_text())["rows"]
    assert [(row["variant"], len(row["history"])) for row in rows] == [("dense", 3), ("paper", 3)]
    assert (tmp_path / "study.png").exists()
