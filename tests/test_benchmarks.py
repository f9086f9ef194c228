"""The scripts in benchmarks/."""

import importlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import Patch, layers

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ["--model", "test_g_resnext", "--batch-size", "2", "--img-size", "32", "--rounds", "2", "--groups", "4"]


@pytest.fixture
def bench(monkeypatch: Patch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("bench")

    def run(*args: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "bench.py"), *args])
        module.main()

    monkeypatch.setattr(module, "run", run, raising=False)
    return module


@pytest.mark.parametrize("what", ["train", "infer"])
def test_forms_of_a_network_are_measured(bench: Any, what: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    bench.run(what, *TINY, "--device", "cpu", "--format", "nhwc", "--permuted", "--json", str(path))
    baseline, *rows = json.loads(path.read_text())["rows"]
    assert (baseline["model"], baseline["ratio"]) == ("test_resnet", 1)
    forms = {row["model"].partition(", ")[2] for row in rows}
    assert {"learnable", "frozen"} <= forms
    assert ({"compact", "deployed"} <= forms) == (what == "infer")
    for row in rows:
        assert row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1]
        assert what == "train" or row["largest_difference"] < 1e-5


@pytest.mark.parametrize("form", ["learnable", "sorted", "unsorted", "frozen"])
def test_measured_networks_have_the_groups(bench: Any, form: str) -> None:
    convs = layers(bench.build("test_g_resnext", form, 4, permuted=True))
    assert [conv.num_groups for conv in convs] == [4] * 4
    assert {(conv.sort, conv.nested) for conv in convs} == {(form != "unsorted", form != "sorted")}
    assert {conv.gate.requires_grad for conv in convs} == {form != "frozen"}


def test_layers_are_measured(bench: Any, tmp_path: Path) -> None:
    file = ["--json", str(tmp_path / "layers.json")]
    bench.run("layers", "--device", "cpu", "--widths", "8", "12", *TINY, "--format", "nchw", *file)
    rows = json.loads((tmp_path / "layers.json").read_text())["rows"]
    groups = {8: (1, 2, 4, 8), 12: (1, 2, 4)}
    assert {(row["width"], row["groups"]) for row in rows} == {(width, n) for width in groups for n in groups[width]}


def test_memory_is_measured_by_a_script_in_another_folder(tmp_path: Path) -> None:
    """It starts processes that must find it."""
    command = [sys.executable, BENCHMARKS / "bench.py", "memory", *TINY, "--forms", "learnable", "--device", "cpu"]
    subprocess.run([*command, "--json", "rows.json"], cwd=tmp_path, check=True)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["model"] for row in rows if row["MiB"] > 0] == ["test_resnet", "test_g_resnext, learnable"]


def test_the_study_trains_each_run_once(bench: Any, tmp_path: Path) -> None:
    """And compares networks of the same density."""
    study = importlib.import_module("study")
    run = study.Run("g_resnext50", "scratch", "fixed", 1 / 8, 0)
    shares = {n: study.snapshot(study.build(run._replace(variant=n), {}, 1))["density"] for n in study.COMPARED}
    assert shares["fixed"] == 1 / 8 != shares["held"]
    assert shares["random"] == pytest.approx(1 / 8, rel=0.02)
    macs = {n: study.multiply_adds(study.build(run._replace(target=n), {}, 1)) for n in (1, 3 / 4, 1 / 2)}
    assert all(0.97 * n <= found / macs[1] <= n for n, found in macs.items()), "with --costs"
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind, shape in (("images-idx3", (128, 28, 28)), ("labels-idx1", (128,))):
            header = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)
            values = torch.randint(0, 10, shape, dtype=torch.uint8)
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + values.numpy().tobytes())
    command = [sys.executable, BENCHMARKS / "study.py", f"--data-dir={tmp_path}", f"--output={tmp_path}", "--quick"]
    command += ["--images=128", "--epochs=2", "--seeds=0", "--workers=1", "--variants", "dense", "paper"]
    for _ in range(2):
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert "| scratch | 1/8 | paper | 1 |" in printed
    path = tmp_path / "study.json"
    dense, paper = json.loads(path.read_text())["rows"]
    assert len(path.read_text().splitlines()) == 4, "one line per row"
    assert (dense["variant"], paper["variant"]) == ("dense", "paper")
    assert dense["flips"] == [0, 0] != paper["flips"]
    assert len(dense["top1"]) == len(paper["top1"]) == 2
    assert dense["groups"] == [1] * 8
    assert (tmp_path / "study.png").exists()


def test_a_dry_run_of_the_gpu_benchmark_measures_everything_right(bench: Any, tmp_path: Path) -> None:
    """On the CPU."""
    stages = ["networks", "scripts"]
    env = {key: value for key, value in os.environ.items() if key != "TIMM_SCRIPTS_DIR"}
    command = [sys.executable, BENCHMARKS / "gpu.py", *stages, "--dry-run", "--here", "--out", tmp_path]
    subprocess.run(command, env={**env, "OMP_NUM_THREADS": "1"}, check=True)
    files = {stage: json.loads((tmp_path / f"{stage}.json").read_text()) for stage in stages}
    assert {file["result"] for file in files.values()} == {"passed"}
    *rows, compiled = files["networks"]["rows"]
    assert "skipped" in compiled
    gpu = importlib.import_module("gpu")
    forms = {(form, what) for form in ("test_resnet", *gpu.FORMS) for what in ("train", "infer")}
    forms -= {("compact", "train"), ("deployed", "train")}
    assert {(row["form"], row["what"]) for row in rows if row["ms"] > 0} == forms
    summary = (tmp_path / "summary.md").read_text()
    assert "| networks | passed |" in summary
    assert "set TIMM_SCRIPTS_DIR" in summary
    assert "| test_g_resnext | learnable | train |" in summary
