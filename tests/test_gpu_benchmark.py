"""benchmarks/gpu.py on the CPU."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Capture, Patch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: Patch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def test_a_dry_run_measures_everything_right(script: Any, tmp_path: Path) -> None:
    stages = ["networks", "scripts"]
    env = {key: value for key, value in os.environ.items() if key != "TIMM_SCRIPTS_DIR"}
    command = [sys.executable, BENCHMARKS / "gpu.py", *stages, "--dry-run", "--here", "--out", tmp_path]
    subprocess.run(command, env={**env, "OMP_NUM_THREADS": "1"}, check=True)
    files = {stage: json.loads((tmp_path / f"{stage}.json").read_text()) for stage in stages}
    assert {file["result"] for file in files.values()} == {"passed"}

    *rows, compiled = files["networks"]["rows"]
    assert "skipped" in compiled
    forms = {(form, what) for form in ("test_resnet", *script.FORMS) for what in ("train", "infer")}
    assert {(row["form"], row["what"]) for row in rows if row["ms"] > 0} == forms - {
        ("compact", "train"),
        ("deployed", "train"),
    }

    summary = (tmp_path / "summary.md").read_text()
    assert "| networks | passed |" in summary
    assert "set TIMM_SCRIPTS_DIR" in summary
    assert "| test_g_resnext | learnable | train |" in summary


def test_without_a_gpu_it_asks_for_a_dry_run(script: Any, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        script.main(["networks"])
    assert stop.value.code == 2
    assert "--dry-run" in capsys.readouterr().err
