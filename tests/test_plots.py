"""Figures of the learned groups."""

import sys
from pathlib import Path

import timm
import torch
from conftest import Patch, assert_refused, layers
from torch import nn

from timm_dgconv import DGConv2d, group_report, plots
from timm_dgconv.report import GroupHistory

TINY = "test_g_resnext"


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
