"""The scripts in examples/ reach their targets, on small images."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import Capture, Patch

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = ["--model", "test_g_resnet", "--img-size", "32", "--epochs", "2", "--target", "0.8"]


def run(name: str, args: list[str], monkeypatch: Patch, folder: Path) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *args])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_a_network_is_fine_tuned_to_a_target(monkeypatch: Patch, tmp_path: Path, capsys: Capture) -> None:
    run("finetune", TINY, monkeypatch, tmp_path)
    *_, last, load = capsys.readouterr().out.splitlines()
    accuracy, share = map(float, re.findall(r"0\.\d+", last))
    assert accuracy > 0.2
    assert 0.7 < share <= 0.8
    model = eval(load.removeprefix("load it with "), {"timm": timm})
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)


@pytest.mark.client("lightning")
def test_lightning_fine_tunes_a_network_to_a_target(monkeypatch: Patch, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed; pip install 'timm-dgconv[clients]'")
    run("finetune_lightning", TINY, monkeypatch, tmp_path)
    (macs,) = re.findall(r"multiply-adds, % of dense +([\d.]+)", capsys.readouterr().out)
    assert 70 < float(macs) <= 80


def test_your_own_network_is_trained_to_a_measured_target(monkeypatch: Patch, tmp_path: Path, capsys: Capture) -> None:
    monkeypatch.setattr("timm_dgconv.measure._MOST", 1e9)  # other tests take the cores
    args = ["--width", "64", "--img-size", "32", "--rounds", "3", "--epochs", "2"]
    run("own_network", args, monkeypatch, tmp_path)
    (target,) = re.findall(r"the target ([\d.]+)", capsys.readouterr().out)
    assert (tmp_path / "costs.json").exists()
    model = torch.load(tmp_path / "own_network.pt", weights_only=False)
    run("own_network", [*args, "--epochs", "1"], monkeypatch, tmp_path)  # reads the table
    assert f"the target {target}" in capsys.readouterr().out
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)
