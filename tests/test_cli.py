"""The command line, through the installed program's entry point."""

import json
from pathlib import Path

import pytest
import timm
import torch

from timm_dgconv.cli import main

TINY = ["demo", "--model", "test_g_resnext", "--epochs", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    assert main([*TINY, "--output", str(folder)]) == 0
    return folder


def test_demo_writes_a_model_that_timm_loads(demo_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((demo_folder / "summary.json").read_text())
    assert summary["top1"] == summary["top1_reloaded"] > 10
    assert {p.name for p in demo_folder.iterdir()} == {"config.json", "model.safetensors", "summary.json"}
    assert [p.name for p in demo_folder.parent.iterdir()] == ["run"], "no partial folder is left"
    model = timm.create_model("test_g_resnext", num_classes=10, checkpoint_path=demo_folder / "model.safetensors")
    assert {name: model.get_submodule(name).num_groups for name in summary["groups"]} == summary["groups"]
    config = json.loads((demo_folder / "config.json").read_text())
    assert config["architecture"] == "test_g_resnext"
    assert config["num_classes"] == 10
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]


def test_demo_is_reproducible_and_replaces_when_told(demo_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((demo_folder / "summary.json").read_text())
    assert main([*TINY, "--output", str(demo_folder), "--overwrite"]) == 0
    after = json.loads((demo_folder / "summary.json").read_text())
    assert after["history"] == before["history"]
    out = capsys.readouterr().out
    assert f"held-out accuracy {after['top1']:.2f} % (reloaded: {after['top1']:.2f} %)" in out
    for name, groups in after["groups"].items():
        assert any(line.split()[:1] == [name] and line.split()[-1] == str(groups) for line in out.splitlines())


def test_demo_does_not_overwrite(demo_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (demo_folder / "summary.json").read_bytes()
    assert main([*TINY, "--output", str(demo_folder)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"timm-dgconv demo: {demo_folder} exists; name another folder with --output, or replace it with --overwrite"
    ]
    assert (demo_folder / "summary.json").read_bytes() == before


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--img-size", "-3"], "image size must be at least 1, got -3"),
        (["--model", "g_resnext5"], "unknown model 'g_resnext5'"),
        (["--model", "test_resnet"], "test_resnet has no DGConv2d"),
        (["--device", "nonsense"], "device 'nonsense'"),
        (["--complexity-weight", "-1"], "complexity_weight=-1.0"),
        (["--complexity-target", "0.5"], "complexity_target=0.5 needs a complexity_weight"),
    ],
)
def test_demo_refuses(args: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--output", str(tmp_path / "out"), *args]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("args", [["--help"], ["demo", "--help"]])
def test_help(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 0
    assert "digits" in capsys.readouterr().out


BENCH = ["--model", "test_g_resnext", "--device", "cpu", "--batch-size", "2", "--img-size", "32", "--rounds", "2"]


@pytest.mark.parametrize("what", ["train", "sgd", "infer"])
def test_bench_of_networks(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    assert main(["bench", what, *BENCH, "--format", "nhwc", "--scattered", "--groups", "4", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert written["command"].startswith(f"timm-dgconv bench {what} --model test_g_resnext")
    assert written["torch"] == torch.__version__
    baseline, *rows = written["rows"]
    assert baseline["model"] == "test_resnet"
    assert baseline["ratio"] == 1
    forms = {row["model"]: row for row in rows}
    assert {name.partition(", ")[2] for name in forms} == {"learnable", "frozen", "masked dense"} | (
        {"deployed"} if what == "infer" else set()
    )
    assert all(row["ms"] > 0 and row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1] for row in rows)
    if what == "infer":
        assert all(row["largest_difference"] < 1e-5 for row in rows)
    assert "| test_g_resnext, learnable |" in capsys.readouterr().out


def test_bench_of_layers_with_a_plot(tmp_path: Path) -> None:
    path = tmp_path / "layers.png"
    assert main(["bench", "layers", "--device", "cpu", "--widths", "4", "8", *BENCH[4:], "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_bench_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "infer", *BENCH, "--groups", "3"]) == 2
    assert "groups=3 must be a power of two" in capsys.readouterr().err
