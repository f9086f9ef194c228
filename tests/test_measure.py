"""Measured tables of costs: what is measured, what is written, and what is refused."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import Capture, Patch, assert_refused, layers
from torch import nn

from timm_dgconv import cost_table, groupable
from timm_dgconv.cli import main
from timm_dgconv.measure import RUNTIMES, measure, write

COMMAND = ["measure", "--model", "test_g_resnext", "--img-size", "64", "--rounds", "7"]


def test_a_measured_table_is_a_target(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "costs.json"
    wide = ["--model-kwargs", "base_width=64"]  # groups of these layers are faster on a busy machine, too
    assert main([*COMMAND, "--out", str(path), *wide]) == 0
    out = capsys.readouterr().out
    assert "its 4 layers that learn groups take" in out
    assert "train with --model-kwargs base_width=64 complexity_target=0." in out
    assert f"complexity_unit={path}" in out
    assert list(tmp_path.iterdir()) == [path]
    content = json.loads(path.read_text())
    wanted = dict(format=1, unit="ms", model="test_g_resnext", runtime="eager", batch_size=1, input_size=[3, 64, 64])
    assert wanted.items() <= content.items()
    assert torch.__version__.startswith(content["versions"]["torch"])
    model = timm.create_model("test_g_resnext", base_width=64, complexity_target=1.0, complexity_unit=str(path))
    cost = layers(model)[0].steered.steering.cost
    assert cost == cost_table(model, str(path))
    assert cost.dense == pytest.approx(content["whole"])
    assert [len(table) - 1 for table in cost.tables] == [layer.num_bits for layer in layers(model)]
    for name, costs in content["layers"].items():
        for ms, (low, high) in zip(costs, content["quartiles"]["layers"][name], strict=True):
            assert 0 <= low <= ms <= high
    assert len(path.read_text().splitlines()) < 40, "one line per layer"
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pth.tar")
    source = str(tmp_path / "model.pth.tar")
    assert main(["inspect", source, "--model", "test_g_resnext", *wide, "--costs", str(path)]) == 0
    assert "measured, ms" in capsys.readouterr().out


def test_layers_of_one_shape_have_one_table() -> None:
    """Also in a network that groupable has converted. A layer that runs twice costs twice as much."""
    conv = nn.Conv2d(8, 8, 3, padding=1)
    body = nn.Sequential(nn.Conv2d(3, 8, 3), conv, nn.Conv2d(8, 8, 3, padding=1), conv, *[nn.Conv2d(8, 8, 3)] * 24)
    model = groupable(body, lambda name, conv: name in "12")
    tables = measure(model, (3, 64, 64), rounds=7)["layers"]
    assert tables.keys() == {"1", "2"}
    assert tables["1"] == pytest.approx([2 * ms for ms in tables["2"]], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_runtime_is_measured(runtime: str) -> None:
    if runtime in ("onnxruntime", "openvino"):
        pytest.importorskip(runtime)
    model = timm.create_model("g_resnet18")
    assert measure(model, (3, 128, 128), runtime=runtime, rounds=15)["runtime"] == runtime


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--runtime", "tflite"], "runtime 'tflite' is not one of eager, compile, onnxruntime, openvino"),
        (["--runtime", "openvino", "--device", "cuda"], "openvino is measured on a CPU and not on cuda"),
        (["--runtime", "onnxruntime"], "onnxruntime needs onnxruntime; use pip install 'timm-dgconv[measure]'"),
        *(
            (["--device", device], f"device '{device}' cannot be measured; use cpu or cuda")
            for device in ("meta", "no")
        ),
        (["--batch-size", "0"], "batch_size=0 is not a number of at least 1"),
        (["--rounds", "1"], "rounds=1 is not a number of at least 2"),
        (["--img-size", "0"], "--img-size 0 is not a number of at least 1"),
        (["--model", "resnet18"], "ResNet has no DGConv2d"),
        (["--model", "g_resnet0"], "g_resnet0"),
        (["--model-kwargs", "colour=red"], "use another --model or other --model-kwargs"),
        (["--model-kwargs", "sort=false"], "{'sort': 'false'}: sort='false' is not a bool; use True or False"),
        (["--model-kwargs", "act_layer=none"], "cannot be built with {'act_layer': 'none'}"),
        (["--out", "missing/costs.json"], "the folder of missing/costs.json does not exist"),
    ],
    ids=str,
)
def test_wrong_arguments_are_one_line(args: list[str], said: str, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert_refused([*COMMAND, "--out", "costs.json", *args], said)
    assert not list(tmp_path.iterdir())


class Slow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return x


def test_layers_that_take_longer_than_the_network_are_refused(monkeypatch: Patch) -> None:
    monkeypatch.setattr("timm_dgconv.measure._deployed", lambda *args: Slow())
    with pytest.raises(RuntimeError, match=r"layers alone took [\d.]+ ms and the whole network .*: the machine was"):
        measure(timm.create_model("test_g_resnext"), (3, 32, 32), rounds=2)


def test_layers_that_take_a_little_longer_are_scaled(monkeypatch: Patch) -> None:
    monkeypatch.setattr("timm_dgconv.measure._deployed", lambda *args: Slow())
    monkeypatch.setattr("timm_dgconv.measure._MOST", 1e9)
    model = timm.create_model("test_g_resnext")
    content = measure(model, (3, 32, 32), rounds=2)
    assert 0.99 * content["whole"] < sum(costs[0] for costs in content["layers"].values()) <= content["whole"]


def test_a_table_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    content: dict[str, Any] = {"whole": object()}
    with pytest.raises(TypeError):
        write(content, tmp_path / "costs.json")
    assert not list(tmp_path.iterdir())


class CalledByName(nn.Module):
    """A convolution in bfloat16 whose input has a name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3)
        groupable(self, lambda name, conv: name == "conv").bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(input=self.stem(x))


def test_a_convolution_may_be_called_by_name(tmp_path: Path) -> None:
    content = measure(CalledByName(), (3, 64, 64), rounds=3)
    assert content["layers"]["conv"][0] > 0
    write(content, str(tmp_path / "costs.json"))
    assert cost_table(CalledByName(), str(tmp_path / "costs.json")).dense == pytest.approx(content["whole"])
