"""group_report: counts against torch's own counter, the table, and any module with DGConv2d layers."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import layers, set_gates
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import timm_dgconv
from timm_dgconv import DGConv2d, group_report
from timm_dgconv.layers.checkpoints import GATE_NAMES
from timm_dgconv.report import Cost

TINY = "test_g_resnext"


def without_weights(name: str, seed: int = 0, p: float = 0.5, **kwargs: Any) -> nn.Module:
    """A model on the meta device with gates on the CPU that are open with probability p."""
    model = timm.create_model(name, device="meta", **kwargs)
    generator = torch.Generator().manual_seed(seed)
    for conv in layers(model):
        gate = torch.where(torch.rand(conv.gate.shape, generator=generator) < p, 0.01, -0.01)
        setattr(conv, GATE_NAMES[conv.sort], nn.Parameter(gate))
    return model


def counted(model: nn.Module, size: tuple[int, int, int]) -> Cost:
    model = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(torch.empty(1, *size, device="meta"))
    return Cost(sum(p.numel() for p in model.parameters()), flops.get_total_flops() // 2)


@pytest.mark.parametrize(
    ("name", "size", "kwargs"),
    [
        (TINY, None, {}),
        (TINY, (3, 96, 64), {"num_classes": 7}),
        (TINY, (3, 75, 81), {"output_stride": 8, "num_classes": 0}),
        (TINY, (1, 64, 64), {"in_chans": 1, "stem_type": "deep", "stem_width": 8, "avg_down": True}),
        (TINY, None, {"sort": False, "block_args": {"attn_layer": "se"}}),
        ("g_resnext50", None, {}),
        ("g_resnext50", (3, 288, 288), {"output_stride": 16}),
    ],
    ids=str,
)
def test_counts_are_those_of_torch(name: str, size: tuple[int, int, int] | None, kwargs: dict[str, Any]) -> None:
    for seed in range(3 if name == TINY else 1):
        model = without_weights(name, seed, **kwargs)
        report = group_report(model, size)
        assert size is None or report.input_size == size
        compact = timm_dgconv.compact(model)
        assert report.learned == counted(compact, report.input_size)
        assert [layer.groups for layer in report.layers] == timm_dgconv.layer_groups(model)
        assert report.complexity == timm_dgconv.complexity(model).item()

        dense = without_weights(name, p=1, **kwargs)
        assert report.dense == counted(timm_dgconv.compact(dense), report.input_size)
        assert report.density == pytest.approx(report.complexity / timm_dgconv.complexity(dense).item())
        assert group_report(dense, size).learned == report.dense

        fixed = timm.create_model(name, groups=[c.resnext_groups for c in report.layers], device="meta", **kwargs)
        assert report.resnext == counted(fixed, report.input_size)

        again = group_report(compact, size)
        assert (again.learned, again.dense, again.resnext) == (report.learned, report.dense, report.resnext)
        assert [(c.groups, c.learned) for c in again.layers] == [(c.groups, c.learned) for c in report.layers]
        assert {c.bits for c in again.layers} == {None}
        for layer, shape in zip(report.layers, again.layers, strict=True):
            conv = model.get_submodule(layer.name)
            assert isinstance(conv, DGConv2d)
            assert layer.resolution == shape.resolution
            assert torch.equal(layer.connectivity(), conv.connectivity().detach())
            assert shape.connectivity().sum() == layer.connectivity().sum()


def test_the_table_and_the_dict_have_the_numbers() -> None:
    model = without_weights(TINY, num_classes=10, sort=False)
    set_gates(model, lambda gate: torch.tensor([-1.0, 1, -1, 1, 1][: len(gate)]))
    report = group_report(model)
    assert str(report).splitlines()[:5] == [
        "test_g_resnext, input 3 x 160 x 160",
        "",
        "layer           channels  resolution  groups   channels  open bits  parameters                   MACs, M",
        "                                              per group                learned   dense  ResNeXt  "
        "learned  dense  ResNeXt",
        "layer1.0.conv2        16     40 x 40       4          4       0101         576   2,304      576  "
        "   0.92   3.69     0.92",
    ]
    assert f"{report.learned.params:,}" in str(report)
    assert {layer.resnext_groups for layer in report.layers} == {4}
    assert "ResNeXt, 4 groups" in str(report)
    assert str(report).splitlines()[-1].split()[-3:] == [f"{100 * report.density:.2f}", "100.00", "25.00"]
    written = json.loads(json.dumps(report.as_dict()))
    first = dict(name="layer1.0.conv2", resolution=[40, 40], bits="0101", learned={"params": 576, "macs": 921600})
    assert first.items() <= written["layers"][0].items()
    assert (written["complexity"], written["density"]) == (report.complexity, report.density)


def test_measured_costs_are_in_the_report(tmp_path: Path) -> None:
    """Of a learnable and of a compact model."""
    model = without_weights(TINY, num_classes=10)
    tables = {
        f"layer{stage}.0.conv2": [8.0 / 2**m for m in range(bits + 1)] for stage, bits in enumerate((4, 5, 4, 5), 1)
    }
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"whole": 40.0, "layers": tables}))
    groups = timm_dgconv.layer_groups(model)
    learned = 8 + sum(8 / number for number in groups)
    for net in (model, timm_dgconv.compact(model)):
        report = group_report(net, costs=str(path))
        *rows, whole, share = str(report).splitlines()[-6:]
        assert rows[0].split() == ["layer1.0.conv2", f"{8 / groups[0]:.3f}", "8.000"]
        assert whole.split() == ["whole", "network", f"{learned:.3f}", "40.000"]
        assert share.split()[-2:] == [f"{100 * learned / 40:.2f}", "100.00"]
        assert report.as_dict()["costs"]["rest"] == 8
        macs = next(line for line in str(report).splitlines() if line.startswith("multiply-adds, %"))
        assert macs.split()[-3] == f"{100 * report.learned.macs / report.dense.macs:.2f}"
    path.write_text(json.dumps({"whole": 40.0, "layers": {"stem": [1.0]}}))
    with pytest.raises(ValueError, match="is a table of another network"):
        group_report(model, costs=str(path))
    thirds = timm.create_model(TINY, groups=3, channels=(24, 48, 48, 96), base_width=96, device="meta")
    with pytest.raises(ValueError, match=r"layer1.0.conv2 has 3 groups, which no table of costs has"):
        group_report(thirds, costs=str(path))


def test_the_report_looks_into_wrappers() -> None:
    model = without_weights(TINY)
    expected = group_report(model)
    assert group_report(AveragedModel(model)) == expected
    assert group_report(torch.compile(AveragedModel(model))) == expected  # type: ignore[arg-type]
    sequence = group_report(nn.Sequential(model, nn.Identity()))
    assert (sequence.learned, sequence.model) == (expected.learned, expected.model)
    assert [layer.name for layer in sequence.layers] == [f"0.{layer.name}" for layer in expected.layers]


@pytest.mark.parametrize("kwargs", [{}, {"feature_cls": "hook"}, {"feature_cls": "getter", "out_indices": (1, 3)}])
def test_feature_extractors_have_a_report(kwargs: dict[str, Any]) -> None:
    model = timm.create_model(TINY, features_only=True, **kwargs)
    report = group_report(model)
    assert report.learned == counted(timm_dgconv.compact(model), report.input_size)
    assert all(layer.resnext is not None and layer.resolution is not None for layer in report.layers)


def test_other_networks_have_a_report_without_a_resnext() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = DGConv2d(6, 12, 3, stride=2, padding=1)
            self.again = DGConv2d(12, 12, (1, 3), padding="same", bias=False)
            self.head = nn.Linear(12, 5)
            self.unused = DGConv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.again(self.again(self.first(x)))
            return self.head(x.mean((2, 3)))

    net = Net()
    with torch.no_grad():
        net.first.gate.fill_(-1)
        net.again.gate.copy_(torch.tensor([1.0, -1.0]))
    report = group_report(net, (6, 9, 8))
    first, again, unused = report.layers
    assert (first.in_channels, first.out_channels, first.resolution, first.groups) == (6, 12, (5, 4), 2)
    assert first.learned == Cost(6 * 12 * 9 // 2 + 12, 5 * 4 * 6 * 12 * 9 // 2)
    assert again.learned == Cost(12 * 12 * 3 // 2, 2 * 5 * 4 * 12 * 12 * 3 // 2), "it runs twice"
    assert again.dense == Cost(12 * 12 * 3, 2 * 5 * 4 * 12 * 12 * 3)
    assert (unused.resolution, unused.learned.macs) == (None, 0)
    head = Cost(12 * 5 + 5, 12 * 5)
    assert report.learned == first.learned + again.learned + unused.learned + head
    assert report.resnext is report.resnext_density is None
    assert "-" in str(report)
    assert report.model == "Net"


def test_tied_weights_count_once() -> None:
    model: Any = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3))
    model[1].weight = model[0].weight
    timm_dgconv.groupable(model)[0].reset_gate(4)  # type: ignore[operator, union-attr]
    report = group_report(model, (16, 8, 8))
    assert report.learned.params == sum(p.numel() for p in timm_dgconv.compact(model).parameters())
    assert report.dense.params == 16 * 16 * 9 + 2 * 16


def test_the_model_does_not_change() -> None:
    model = timm.create_model(TINY, drop_path_rate=0.5, drop_rate=0.5).train()
    calls: list[Any] = []
    model.layer1.register_forward_hook(lambda *args: calls.append(args))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    group_report(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert calls == []
    assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model", "size", "error", "named"),
    [
        (nn.Conv2d(4, 4, 1), None, ValueError, ["Conv2d has no DGConv2d", "timm_dgconv.groupable"]),
        (nn.Sequential(DGConv2d(4, 4, 1)), None, ValueError, ["Sequential has no pretrained_cfg", "input_size="]),
        (nn.Sequential(DGConv2d(4, 4, 1)), (3, 8, 8), ValueError, ["does not run on an image of 3 x 8 x 8", "size"]),
        (nn.Sequential(DGConv2d(4, 4, 1)), (4, 8), ValueError, ["(4, 8)", "(channels, height, width)"]),
        (nn.Sequential(DGConv2d(4, 4, 1)), (4, 0, 8), ValueError, ["(4, 0, 8)", "positive"]),
        (nn.Sequential(DGConv2d(4, 4, 1)), 224, TypeError, ["input_size=224", "three integers"]),
        (nn.Sequential(DGConv2d(4, 4, 1, device="meta")), (4, 8, 8), RuntimeError, ["meta device", "load weights"]),
    ],
)
def test_wrong_arguments_are_named(model: nn.Module, size: Any, error: type[Exception], named: list[str]) -> None:
    with pytest.raises(error) as caught:
        group_report(model, size)
    assert all(word in str(caught.value) for word in named), caught.value
