"""timm-dgconv demo: it trains, writes a model that timm loads, and replaces nothing but the output of a demo."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import assert_refused

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
    assert sorted(contents(folder)) == ["config.json", "model.safetensors", "summary.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["run"], "no partial folder is left"
    model = timm.create_model("test_g_resnext", num_classes=10, checkpoint_path=folder / "model.safetensors")
    assert {name: model.get_submodule(name).num_groups for name in summary["groups"]} == summary["groups"]
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "test_g_resnext"
    assert config["num_classes"] == 10
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]


def test_overwrite_replaces_a_demo_and_the_run_is_reproducible(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_existing_output_needs_overwrite(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(folder)
    said = f"timm-dgconv demo: {folder} exists; use another --output, or --overwrite to replace the output of a demo\n"
    assert_refused(capsys, [*TINY, "--output", str(folder)], said)
    assert contents(folder) == before


@pytest.mark.parametrize(
    "names",
    [
        ["config.json", "model.safetensors", "summary.json", "notes.txt"],
        ["config.json", "model.safetensors", "summary.json", "run/checkpoint.pth"],
        ["config.json", "model.safetensors"],
        [],
    ],
    ids=["another file", "a folder in it", "no summary.json", "a file"],
)
def test_overwrite_keeps_what_is_not_the_output_of_a_demo(
    names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mine"
    if not names:
        output.write_text("a thesis")
    for name in names:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("{}")
    before = contents(tmp_path)
    said = f"timm-dgconv demo: {output} is not the output of a demo, so --overwrite does not replace it; use another "
    assert_refused(capsys, [*TINY, "--output", str(output), "--overwrite"], said)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("factor", "accepted"), [(1 + 1e-6, True), (1.1, False)], ids=["rounding", "another"])
def test_other_outputs_of_the_reloaded_model_are_an_error(
    factor: float, accepted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    create_model = timm.create_model

    def create(*args: Any, checkpoint_path: str = "", **kwargs: Any) -> Any:
        model = create_model(*args, checkpoint_path=checkpoint_path, **kwargs)
        if checkpoint_path:
            with torch.no_grad():
                model.fc.weight.mul_(factor)
                model.fc.bias.mul_(factor)
        return model

    monkeypatch.setattr(timm, "create_model", create)
    output = tmp_path / "out"
    assert main([*TINY, "--output", str(output)]) == (0 if accepted else 2)
    if not accepted:
        assert "the outputs of the reloaded model differ by 1.0e-01" in capsys.readouterr().err
    assert output.exists() is accepted


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--img-size", "-3"], "image size must be at least 1, got -3"),
        (["--model", "test_resnet"], "'test_resnet' is not a model of this package; use g_resnet18, g_resnet34, "),
        (["--device", "nonsense"], "device 'nonsense'"),
        (["--complexity-target", "0"], "complexity_target=0.0 must be a share"),
    ],
)
def test_wrong_options_are_named_in_one_line(
    args: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(capsys, [*TINY, "--output", str(tmp_path / "out"), *args], said)
    assert not list(tmp_path.iterdir())
