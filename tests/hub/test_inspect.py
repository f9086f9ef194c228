"""timm-dgconv inspect: the groups in checkpoints and folders, and over the checkpoints of a run."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import Capture, Patch, assert_refused, original_state_dict, set_gates
from torch import nn

from timm_dgconv import compact, group_report
from timm_dgconv.cli import main

TINY = "test_g_resnext"


def with_open_gates(seed: int, p: float = 0.5) -> nn.Module:
    """A model whose gates are open with probability p."""
    torch.manual_seed(seed)
    model = timm.create_model(TINY, num_classes=10)
    set_gates(model, lambda gate: torch.where(torch.rand_like(gate) < p, 0.01, -0.01))
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Checkpoints of timm's train.py at the epochs 0, 4 and 8. The averaged weights of the last have one group."""
    folder = tmp_path_factory.mktemp("run")
    paths = []
    for epoch in (0, 4, 8):
        state_dict = with_open_gates(seed=epoch).state_dict()
        checkpoint = {"epoch": epoch, "arch": TINY, "state_dict": state_dict, "args": argparse.Namespace(lr=1)}
        if epoch == 8:
            checkpoint["state_dict_ema"] = with_open_gates(seed=0, p=1).state_dict()
        paths.append(str(folder / f"checkpoint-{epoch}.pth.tar"))
        torch.save(checkpoint, paths[-1])
    return paths


def inspected(capsys: Capture, *args: str) -> list[dict[str, Any]]:
    assert main(["inspect", *args, "--model", TINY, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_checkpoint_has_the_report_of_its_model(tmp_path: Path, capsys: Capture) -> None:
    """Of the original release, and in one file. test_convert.py inspects the other forms."""
    model, source = timm.create_model(TINY, num_classes=10), tmp_path / "original.pth"
    state_dict = original_state_dict(model, 7)
    model.load_state_dict(state_dict, strict=False)
    torch.save({"state_dict": {f"module.{name}": value for name, value in state_dict.items()}}, source)
    state = torch.get_rng_state()
    (found,) = inspected(capsys, str(source))
    report = group_report(model).as_dict()
    assert found == json.loads(json.dumps({"source": str(source), "epoch": None, **report}))
    assert torch.equal(torch.get_rng_state(), state)
    torch.save(compact(model).state_dict(), source)
    (found,) = inspected(capsys, str(source))
    assert {(layer["groups"] > 1, layer["bits"]) for layer in found["layers"]} == {(True, None)}


def test_the_checkpoints_of_a_run_are_columns_sorted_by_epoch(run: list[str], capsys: Capture) -> None:
    reports = inspected(capsys, *reversed(run), "--no-ema")
    assert [report["epoch"] for report in reports] == [0, 4, 8]
    assert [report["source"] for report in reports] == run
    assert main(["inspect", *run, "--no-ema", "--model", f"{TINY}.dgconv_in1k"]) == 0
    title, _, head, *rows, densities, macs = capsys.readouterr().out.splitlines()
    assert title == "test_g_resnext, groups by epoch"
    assert head.split() == ["layer", "channels", "0", "4", "8"]
    for n, row in enumerate(rows):
        layers = [report["layers"][n] for report in reports]
        groups = [str(layer["groups"]) for layer in layers]
        assert row.split() == [layers[0]["name"], str(layers[0]["in_channels"]), *groups]
    assert densities.split()[4:] == [f"{100 * report['density']:.2f}" for report in reports]
    assert macs.split()[4:] == [f"{100 * r['learned']['macs'] / r['dense']['macs']:.2f}" for r in reports]

    (averaged,) = inspected(capsys, run[-1])
    assert (averaged["density"], averaged["epoch"]) == (1, 8)


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


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["RUN", "--model", "g_resnext5"], "unknown model 'g_resnext5'; use g_resnet18, g_resnet34"),
        (["RUN", "--model", TINY, "--img-size", "0"], "image size must be at least 1, got 0"),
        (["RUN", "HEAD", "--model", TINY], "is of another network than"),
        ([".", "--model", TINY], ". has no model.safetensors or pytorch_model.bin; use the path of"),
        (["RUN", "--model", TINY, "--layers", "layer1.0.conv2"], "--layers selects the layers of a plot; add --plot"),
        (["RUN", "--model", TINY, "--plot", "x.png", "--layers", "layer9"], "no layer 'layer9' that learns groups; it"),
        (["absent.pt", "--model", TINY, "--plot", "x.jpeg"], "x.jpeg must end in .pdf, .png or .svg"),
        (["absent.pt", "--model", TINY, "--plot", "no/x.png"], "no is not a folder; create it"),
    ],
)
def test_wrong_options_are_named_in_one_line(
    args: list[str], said: str, run: list[str], tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "HEAD" in args:
        torch.save(timm.create_model(TINY, num_classes=11).state_dict(), "HEAD")
    before = sorted(tmp_path.iterdir())
    assert_refused(["inspect", *(run[0] if arg == "RUN" else arg for arg in args)], said)
    assert sorted(tmp_path.iterdir()) == before
