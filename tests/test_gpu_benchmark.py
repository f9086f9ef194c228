"""benchmarks/gpu.py on the CPU."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

import pytest
import torch
from timm_dgconv.layers.spans import Spans, choose_spans, lowest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


class Results(NamedTuple):
    """The folder of a dry run, and the rows of its stages."""

    folder: Path
    rows: dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """A dry run of the quick stages."""
    folder = tmp_path_factory.mktemp("dry") / "out"
    stages = ["gates", "sweep", "networks", "profile", "scripts"]
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


def test_gates(results: Results) -> None:
    rows = {row["change"]: row for row in results.rows["gates"]}
    assert rows.pop("replay of a CUDA graph")["skipped"] == "needs CUDA"
    assert rows.keys() == {".data.copy_", "SGD, fused", "Adam, fused", "AdamW, fused", "Adagrad, fused"}
    for row in rows.values():
        assert "skipped" in row or (row["flips"] > 0 and row["wrong_outputs"] == 0)


@pytest.mark.slow
def test_gates_that_are_read_once_fail(tmp_path: Path) -> None:
    code = """
        import sys

        sys.path.insert(0, sys.argv[1])
        import gpu
        from timm_dgconv.layers.gate_cache import LayerReader, closed_on_host, state

        def closed(self, layer):
            readings = self.__dict__.setdefault("readings", {})
            if state(layer.gate) not in readings:
                readings[state(layer.gate)] = closed_on_host(layer.gate)
            return readings[state(layer.gate)]

        LayerReader.closed = closed
        sys.exit(gpu.main(["gates", "--dry-run", "--here", "--out", sys.argv[2]]))
    """
    assert subprocess.run([sys.executable, "-c", dedent(code), BENCHMARKS, tmp_path]).returncode == 1
    file = json.loads((tmp_path / "gates.json").read_text())
    rows = {row["change"]: row for row in file["rows"]}
    assert file["result"] == "failed"
    assert rows[".data.copy_"]["error"] == "wrong outputs"
    assert rows[".data.copy_"]["wrong_outputs"] > 20


def test_sweep(results: Results) -> None:
    widths = {f"group convolution, width {width}" for width in (2, 16, 32, 64)}
    rows = results.rows["sweep"]
    assert {row["form"] for row in rows if "permuted" not in row} == widths
    for permuted in (False, True):
        these = [row for row in rows if row.get("permuted") is permuted]
        spans = [row for row in these if row["form"] == "spans"]
        assert [[row[f"{name}_bits"] for name in Spans._fields] for row in spans] == [[n] * 3 for n in range(6)]
        others = {row["form"]: row for row in these if row["form"] != "spans"}
        assert others.keys() == {"masked dense", "static", "tuned", "frozen, tuned"}
        static = choose_spans((True,) * 5 + (False,), 64, "cpu", torch.bfloat16)
        assert [others["static"][f"{name}_bits"] for name in Spans._fields] == [span.bit_count() for span in static]
        for form in ("tuned", "frozen, tuned"):
            assert all(others[form][f"{name}_bits"] in range(6) for name in Spans._fields)
    for row in rows:
        assert all(row[f"{part}_ms"] > 0 for part in ("output", "input_grad", "weight_grad", "backward"))


def test_suggestion_of_the_sweep(results: Results, script: Any) -> None:
    suggestion = json.loads((results.folder / "suggestion.json").read_text())
    assert suggestion == script.suggest(results.rows["sweep"])
    for name in Spans._fields:
        assert suggestion[name]["width"] in script.WIDTHS
        assert suggestion[name]["to_today"] <= 1
        assert suggestion[name]["to_best"] >= 1
    assert "\n".join(suggestion["code"]) in (results.folder / "summary.md").read_text()


@pytest.mark.parametrize("widths", [(1, 1, 1), (1, 8, 64), (2048, 32, 1)])
def test_suggest(widths: tuple[int, int, int], script: Any) -> None:
    """The code chooses the fastest spans if they have widths."""
    rows: list[dict[str, Any]] = [{"form": "tuned", "error": "out of memory"}]
    fastest = {}
    for channels, num_closed in [(128, 5), (256, 5), (2048, 5), (64, 3)]:
        layer = dict(batch=1, channels=channels, side=7, permuted=False, closed_bits=num_closed)
        per_group = channels >> num_closed
        best = [min(num_closed, ((width - 1) // per_group).bit_length()) for width in widths]
        fastest[channels, (True,) * num_closed + (False,) * 2] = best
        for n in range(num_closed + 1):
            row = {**layer, "form": "spans"}
            for name, bits in zip(Spans._fields, best, strict=True):
                row |= {f"{name}_bits": n, f"{name}_ms": 1 + abs(n - bits)}
            rows.append(row)
        rows.append({**layer, "form": "static", **{f"{name}_bits": 0 for name in Spans._fields}})
    unfinished = [{**row, "channels": 512, "output_ms": 0} for row in rows[1:4]]
    assert script.suggest(unfinished) == {}
    suggestion = script.suggest(rows + unfinished)
    assert [suggestion[name]["to_best"] for name in Spans._fields] == [1, 1, 1]
    body = "\n".join(f"    {line}" for line in suggestion["code"])
    scope: dict[str, Any] = {"Spans": Spans, "lowest": lowest}
    exec(f"def choose(closed, in_channels):\n{body}", scope)
    for (channels, closed), best in fastest.items():
        assert [span.bit_count() for span in scope["choose"](closed, channels)] == best


def test_networks(results: Results, script: Any) -> None:
    *rows, compiled = results.rows["networks"]
    assert "skipped" in compiled
    cases = {(row["form"], row["what"]) for row in rows}
    forms = {(form, what) for form in ("test_resnet", *script.FORMS) for what in ("train", "infer")}
    assert cases == forms - {("deployed", "train")}
    for row in rows:
        assert row["ms"] > 0
        assert row["host_ms"] > 0
        assert row["ratio"] == 1 or row["form"] != "test_resnet"
        assert row["kernels"] is row["kernel_ms"] is row["peak_MiB"] is None  # need CUDA


def test_profile(results: Results) -> None:
    names = [row["file"] for row in results.rows["profile"]]
    assert names == [
        f"profile_{net}_{what}.txt" for net in ("test_resnet", "test_g_resnext") for what in ("train", "infer")
    ]
    assert all("Self CPU time total" in (results.folder / name).read_text() for name in names)


def test_summary(results: Results) -> None:
    summary = (results.folder / "summary.md").read_text()
    assert "| sweep | passed | 24 | 0 | 0 |" in summary
    assert "| networks | passed | 14 | 0 | 1 |" in summary
    assert "set TIMM_SCRIPTS_DIR" in summary
    assert "| .data.copy_ |" in summary


@pytest.mark.slow
def test_stages_that_fail(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One stage hangs, one fails, one crashes, one passes."""
    monkeypatch.setenv("TIMM_SCRIPTS_DIR", str(tmp_path / "nothing"))
    monkeypatch.setitem(script.LIMITS, "gates", 0.1)
    assert script.main(["scripts", "gates", "profile", "--dry-run", "--out", str(tmp_path)]) == 1
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert script.main(["sweep", "--dry-run", "--out", str(tmp_path)]) == 1
    stages = ("scripts", "gates", "profile", "sweep")
    files = {stage: json.loads((tmp_path / f"{stage}.json").read_text()) for stage in stages}
    found = {stage: file["result"] for stage, file in files.items()}
    stopped = {"gates": "stopped after 0.1 s", "sweep": "ended with exit code 1"}
    assert found == {"scripts": "failed", "profile": "passed", **stopped}
    errors = [row["error"] for row in files["scripts"]["rows"] if "skipped" not in row]
    assert len(errors) == 7
    assert all("No such file" in error for error in errors)
    assert not (tmp_path / "work").exists()
    assert "gates: stopped after 0.1 s" in capsys.readouterr().out
    assert "| sweep | ended with exit code 1 | 0 |" in (tmp_path / "summary.md").read_text()


def test_stage_of_the_tests(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    path = tmp_path / "tests" / "test_some.py"
    path.write_text(
        dedent("""
            import pytest

            pytestmark = pytest.mark.gpu

            def test_passes(): pass
            def test_fails(): assert False
            def test_is_skipped(): pytest.skip("needs two GPUs")
        """)
    )
    monkeypatch.setattr(script, "REPOSITORY", tmp_path)
    stage = script.Stage("tests", tmp_path, dry_run=True)
    script.tests(stage)
    assert stage.rows == [dict(tests=3, failed=1, not_run=1, error="pytest returns 1, see tests.log")]


def test_without_a_gpu(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        script.main(["sweep"])
    assert stop.value.code == 2
    assert "--dry-run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif("TIMM_SCRIPTS_DIR" not in os.environ, reason="TIMM_SCRIPTS_DIR is not set")
def test_scripts(script: Any, tmp_path: Path) -> None:
    assert script.main(["scripts", "--dry-run", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "scripts.json").read_text())["rows"]
    assert [row["script"] for row in rows] == list(script.SCRIPTS)
    for row in rows:
        assert "top1" in row["scores"] if "--torchcompile" not in row["command"] else "skipped" in row
