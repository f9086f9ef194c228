"""timm-dgconv demo: it trains, writes a model that timm loads, and replaces nothing but the output of a demo."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import Capture, Patch, assert_refused
from timm.models import save_for_hf

from timm_dgconv import demo
from timm_dgconv.cli import main

TINY = ["demo", "--model", "test_g_resnext", "--epochs", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "run"
    assert main([*TINY, "--output", str(path)]) == 0
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_timm_loads_the_model(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["top1_reloaded"] == pytest.approx(summary["top1"], abs=0.5)
    assert summary["top1"] > 10
    assert sorted(contents(folder.parent)) == ["run/config.json", "run/model.safetensors", "run/summary.json"]
    model = timm.create_model("test_g_resnext", num_classes=10, checkpoint_path=folder / "model.safetensors")
    assert {name: model.get_submodule(name).num_groups for name in summary["groups"]} == summary["groups"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_classes"], config["pretrained_cfg"]["input_size"]) == (10, [3, 32, 32])


def test_overwrite_replaces_a_demo_and_the_run_is_reproducible(folder: Path, capsys: Capture) -> None:
    before = json.loads((folder / "summary.json").read_text())
    (folder / "model.safetensors").write_bytes(b"damaged")
    assert main([*TINY, "--output", str(folder), "--overwrite"]) == 0
    after = json.loads((folder / "summary.json").read_text())
    assert after["history"] == before["history"]
    assert (folder / "model.safetensors").stat().st_size > 1e6
    out = capsys.readouterr().out
    assert f"held-out accuracy {after['top1']:.2f} % (reloaded: {after['top1_reloaded']:.2f} %)" in out
    for name, groups in after["groups"].items():
        assert any(line.split()[:1] == [name] and line.split()[-1] == str(groups) for line in out.splitlines())


@pytest.mark.parametrize(
    "names", [["summary.json", "notes.txt"], ["summary.json", "run/checkpoint.pth"], ["config.json"], []]
)
def test_overwrite_keeps_what_is_not_the_output_of_a_demo(names: list[str], tmp_path: Path) -> None:
    """Without names the output is a file."""
    output = tmp_path / "mine"
    if not names:
        output.write_text("a thesis")
    for name in names:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("{}")
    before = contents(tmp_path)
    assert_refused([*TINY, "--output", str(output)], f"{output} exists; use another --output, or --overwrite")
    said = f"timm-dgconv demo: {output} is not the output of a demo, so --overwrite does not replace it; use another "
    assert_refused([*TINY, "--output", str(output), "--overwrite"], said)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("factor", "status"), [(1 + 1e-6, 0), (1.1, 2)], ids=["rounding", "another"])
def test_other_outputs_of_the_reloaded_model_are_an_error(
    factor: float, status: int, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    def save(model: Any, folder: str, **kwargs: Any) -> None:
        with torch.no_grad():
            model.fc.weight.mul_(factor)
            model.fc.bias.mul_(factor)
        save_for_hf(model, folder, **kwargs)

    monkeypatch.setattr(demo, "save_for_hf", save)
    output = tmp_path / "out"
    assert main([*TINY, "--output", str(output)]) == status
    assert ("the outputs of the reloaded model differ by 1.0e-01" in capsys.readouterr().err) == bool(status)
    assert output.exists() != bool(status)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--img-size", "-3"], "image size must be at least 1, got -3"),
        (["--model", "test_resnet"], "'test_resnet' is not a model of this package; use g_resnet18, g_resnet34, "),
        (["--device", "nonsense"], "device 'nonsense'"),
        (["--complexity-target", "0"], "complexity_target=0.0 must be a share"),
    ],
)
def test_wrong_options_are_named_in_one_line(args: list[str], said: str, tmp_path: Path) -> None:
    assert_refused([*TINY, "--output", str(tmp_path / "out"), *args], said)
    assert not list(tmp_path.iterdir())
