"""Figures of the learned groups."""

import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import Capture, Patch, assert_refused, layers
from torch import nn

from timm_dgconv import DGConv2d, group_report, plots
from timm_dgconv.cli import main
from timm_dgconv.report import GroupHistory

TINY = "test_g_resnext"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    paths = [str(tmp_path_factory.mktemp("run") / f"checkpoint-{epoch}.pth.tar") for epoch in range(3)]
    for epoch, path in enumerate(paths):
        torch.save({"epoch": epoch, "state_dict": timm.create_model(TINY).state_dict()}, path)
    return paths


@pytest.mark.parametrize(
    ("count", "suffix", "signature"), [(1, ".png", b"\x89PNG"), (1, ".svg", b"<?xml"), (3, ".pdf", b"%PDF")]
)
def test_a_plot_is_written_in_the_format_of_its_name(
    run: list[str], count: int, suffix: str, signature: bytes, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / f"groups{suffix}"
    path.write_bytes(b"is replaced")
    assert main(["inspect", *run[:count], "--model", TINY, "--plot", str(path), "--layers", "layer3.0.conv2"]) == 0
    assert path.read_bytes().startswith(signature)
    assert list(tmp_path.iterdir()) == [path]
    assert "layer4.0.conv2" in capsys.readouterr().out, "the table has all layers"


def test_many_layers_and_checkpoints_are_drawn(tmp_path: Path) -> None:
    """Wide layers, names without room, and layers outside of a G-ResNeXt."""
    model = timm.create_model("g_resnext101", device="meta")
    for conv in layers(model):
        conv.sorted_gate = nn.Parameter(torch.randn(conv.gate.shape))
    wide = group_report(model)
    plots.draw(wide, tmp_path / "wide.png", ["layer4.0.conv2", *(f"layer3.{n}.conv2" for n in range(4))])
    count = 60
    history = GroupHistory((wide,) * count, tuple(f"checkpoint-{n}.pth.tar" for n in range(count)), (None,) * count)
    plots.draw(history, tmp_path / "many.svg")
    other = nn.Sequential(DGConv2d(6, 12, 1), nn.Sequential(DGConv2d(12, 300, 1)))
    plots.draw(group_report(other, (6, 4, 4)), tmp_path / "other.pdf")
    assert len(list(tmp_path.iterdir())) == 3


def test_missing_matplotlib_is_reported_before_a_checkpoint_is_read(monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = "timm-dgconv inspect: plots need matplotlib: pip install 'timm-dgconv[plot]'\n"
    assert_refused(["inspect", "absent.pt", "--model", TINY, "--plot", "groups.png"], said)
