"""benchmarks/gpu.py on the CPU."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


class Results(NamedTuple):
    """The folder of a dry run, and the rows of its stages."""

    folder: Path
    rows: dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """A dry run of the quick stages."""
    folder = tmp_path_factory.mktemp("dry") / "out"
    stages = ["gates", "networks", "profile", "scripts"]
    env = {key: value for key, value in os.environ.items() if key != "TIMM_SCRIPTS_DIR"}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *stages, "--dry-run", "--here", "--out", str(folder)]
    done = subprocess.run(command, env={**env, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"summary in {folder / 'summary.md'}"
    files = {stage: json.loads((folder / f"{stage}.json").read_text()) for stage in stages}
    for stage, file in files.items():
        assert file["command"] == f"python benchmarks/gpu.py {stage} --dry-run"
        assert file["result"] == "passed"
        assert file["torch"] == torch.__version__
    return Results(folder, {stage: file["rows"] for stage, file in files.items()})


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def test_outputs_are_right_after_every_way_to_change_gates(results: Results) -> None:
    rows = {row["change"]: row for row in results.rows["gates"]}
    assert rows.pop("replay of a CUDA graph")["skipped"] == "needs CUDA"
    assert {".data.copy_", "AdamW, fused"} <= rows.keys()
    for row in rows.values():
        assert "skipped" in row or (row["flips"] > 0 and row["wrong_outputs"] == 0)


def test_every_form_of_a_network_is_measured(results: Results, script: Any) -> None:
    *rows, compiled = results.rows["networks"]
    assert "skipped" in compiled
    cases = {(row["form"], row["what"]) for row in rows}
    forms = {(form, what) for form in ("test_resnet", *script.FORMS) for what in ("train", "infer")}
    assert cases == forms - {("deployed", "train")}
    for row in rows:
        assert row["ms"] > 0
        assert row["ratio"] == 1 or row["form"] != "test_resnet"
        assert row["kernels"] is row["kernel_ms"] is row["peak_MiB"] is None  # need CUDA


def test_the_summary_and_the_profiles_are_written(results: Results) -> None:
    summary = (results.folder / "summary.md").read_text()
    assert "| networks | passed |" in summary
    assert "set TIMM_SCRIPTS_DIR" in summary
    assert "| .data.copy_ |" in summary
    for row in results.rows["profile"]:
        assert "Self CPU time total" in (results.folder / row["file"]).read_text()


def test_without_a_gpu_it_asks_for_a_dry_run(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        script.main(["networks"])
    assert stop.value.code == 2
    assert "--dry-run" in capsys.readouterr().err
