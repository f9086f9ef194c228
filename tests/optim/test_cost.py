"""Tables of costs: counts against torch's own counter, measured tables, gradients, and how a target is held."""

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import forms, gates, layers, set_gates, trained
from hypothesis import given
from hypothesis import strategies as st
from timm.utils import ModelEmaV3, reparameterize_model
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from timm_dgconv import DGConv2d, compact, complexity, constrained_loss, cost_table, groupable, hold_target, steer
from timm_dgconv.optim.cost import CostTable, named_layers
from timm_dgconv.optim.steered_model import REACHED, hold

SIZE = (3, 64, 64)
DENSE = {"layer1.0.conv2": 4.0, "layer2.0.conv2": 3.0, "layer3.0.conv2": 2.0, "layer4.0.conv2": 1.0}


def g_resnet(**kwargs: Any) -> nn.Module:
    return timm.create_model("g_resnet18", channels=(64, 64, 64, 64), num_classes=10, img_size=64, **kwargs)


def g_resnext(**kwargs: Any) -> nn.Module:
    return timm.create_model("test_g_resnext", base_width=64, init_groups=1, img_size=64, **kwargs)


def groupable_resnet(complexity_target: float | None = None, gate_steps: int | None = None, **_: Any) -> nn.Module:
    model = groupable(timm.create_model("test_resnet", num_classes=10))
    if complexity_target:
        steer(model, target=complexity_target, steps=gate_steps, unit="macs", input_size=SIZE)
    return model


NETWORKS = [g_resnet, g_resnext, partial(g_resnext, pointwise=True), groupable_resnet]


def multiply_adds(model: nn.Module) -> int:
    """Those of the deployed form."""
    deployed = reparameterize_model(compact(model).eval()).to("meta")
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        deployed(torch.empty(1, *SIZE, device="meta"))
    return flops.get_total_flops() // 2


def closed(model: nn.Module) -> list[int]:
    return [sum(layer.closed) for layer in layers(model)]


def measured(path: Path, **changes: Any) -> str:
    """Write a table of test_g_resnext by hand."""
    tables = {
        name: [1.1 * ms / 1.4**m for m in range(bits + 1)]
        for (name, ms), bits in zip(DENSE.items(), (4, 5, 4, 5), strict=True)
    }
    path.write_text(json.dumps({"whole": 20.0, "layers": tables, **changes}))
    return str(path)


@pytest.mark.parametrize("network", NETWORKS)
def test_multiply_adds_are_those_of_torch(network: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = network()
    cost = cost_table(model, "macs", SIZE)
    for value in (1.0, -1.0, None):
        set_gates(model, lambda gate, value=value: torch.randn_like(gate) if value is None else value)
        assert cost.total(closed(model)) == multiply_adds(model)
        assert complexity(model, cost).item() == pytest.approx(cost.total(closed(model)))
    assert cost.dense == cost_table(model, "macs", SIZE).total([0] * len(layers(model)))


@forms
def test_a_table_of_connections_is_the_complexity(form: dict[str, bool]) -> None:
    model = trained(**form).double()
    cost = cost_table(model)
    found, expected = complexity(model, cost), complexity(model)
    assert found == expected
    assert_close(torch.autograd.grad(found, gates(model)), torch.autograd.grad(expected, gates(model)))


def test_gates_have_the_slopes_of_their_steps() -> None:
    """By hand: a gate counts its step as a halving table with this step would."""
    conv = DGConv2d(8, 8, 1)
    conv.gate.data.copy_(torch.tensor([0.3, -0.1, 0.2]))  # one is closed
    cost = CostTable("ms", ("",), ((7.0, 5.0, 4.5, 4.0),), 3.0)
    value = complexity(conv, cost)
    assert value == 8
    (grad,) = torch.autograd.grad(value, conv.gate)
    expected = math.log(2) * torch.tensor([0, 7.0 - 5, 2 * (5 - 4.5)])
    assert_close(grad, expected)
    loss = constrained_loss(torch.tensor(2.0), conv, target=0.4, exponent=1.0, cost=cost)
    assert_close(loss, torch.tensor(2 * 8 / 4))
    steer(conv, weight=1.0)
    conv.steered.steering.cost = cost
    torch.optim.SGD([conv.gate], 0.0).step()
    assert_close(conv.gate.grad, expected / 8)
    conv.steered.steering.cost, conv.gate.grad = CostTable("ms", ("",), ((0.0, 0.0, 0.0, 0.0),), 0.0), None
    torch.optim.SGD([conv.gate], 0.0).step()
    assert not conv.gate.grad.any(), "costs may be 0"


def rows(draw: Any, tables: list[list[float]], name: str) -> list[list[float]]:
    value = st.floats(-1, 1, width=32, allow_subnormal=False)
    return [draw(st.lists(value, min_size=len(t) - 1, max_size=len(t) - 1), label=name) for t in tables]


@given(st.data())
def test_a_hold_leaves_no_gate_closed_that_fits(data: st.DataObject) -> None:
    """Random tables that fall with the number of groups."""
    costs = st.lists(st.floats(0.001, 10), min_size=2, max_size=5, unique=True)
    tables = [sorted(t, reverse=True) for t in data.draw(st.lists(costs, min_size=1, max_size=4))]
    before, stepped = rows(data.draw, tables, "before"), rows(data.draw, tables, "stepped")
    rest = data.draw(st.floats(0, 5, allow_subnormal=False))
    least, dense = (rest + sum(t[n] for t in tables) for n in (-1, 0))
    budget = least + data.draw(st.floats(0, 1, allow_subnormal=False)) * (dense - least)
    floor = data.draw(st.sampled_from([0.0, REACHED * budget]))
    held = hold(before, stepped, [tuple(t) for t in tables], rest, budget, budget, floor)

    def total(values: list[list[float]]) -> float:
        counts = [sum(math.copysign(1, x) < 0 for x in row) for row in values]
        return rest + sum(t[m] for t, m in zip(tables, counts, strict=True))

    assert total(held) <= budget + 1e-9
    assert [[abs(x) for x in row] for row in held] == [[abs(x) for x in row] for row in stepped]
    for r, row in enumerate(held):
        for k, value in enumerate(row):
            was_open = math.copysign(1, before[r][k]) > 0
            if math.copysign(1, value) < 0 and (was_open or total(held) < floor):
                opened = [list(row) for row in held]
                opened[r][k] = -value
                assert total(opened) > budget


def test_a_hold_passes_a_step_that_costs_more() -> None:
    """Measured tables need not fall. Too many groups open again, and a layer crosses a slow number of groups."""
    few, many = hold([[1.0, 1.0]], [[0.1, 0.2]], [(3.0, 4.0, 1.0)], 0.0, 2.0, 2.0, 0.0), [[-0.1, -0.2]]
    assert few == many
    assert hold([[-1.0, -1.0]], [[-0.1, -0.2]], [(2.0, 1.0, 4.0)], 0.0, 2.0, 2.0, 0.0) == [[0.1, -0.2]]
    assert hold([[1.0]], [[0.1]], [(2.0, 2.0)], 0.0, 1.0, 1.0, 0.0) == [[0.1]], "it ends where nothing helps"


def test_a_hold_exchanges_gates_of_two_layers_if_none_alone_fits() -> None:
    before, stepped, tables = [[-1.0], [1.0, -1.0]], [[-0.1], [0.2, -0.05]], [(10.0, 4.0), (16.0, 10.0, 7.0)]
    assert hold(before, stepped, tables, 0.0, 17.5, 17.5, 16.0) == [[0.1], [-0.2, -0.05]]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("target", [0.75, 0.5])
def test_the_deployed_network_costs_the_target(network: Any, target: float) -> None:
    torch.manual_seed(0)
    model = network(complexity_target=target, complexity_unit="macs", gate_steps=6)
    images, labels = torch.randn(4, *SIZE), torch.arange(4)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert REACHED * target <= multiply_adds(model) / cost_table(model, "macs", SIZE).dense <= target


def test_the_input_size_is_that_of_the_model() -> None:
    default = timm.create_model("test_g_resnext", complexity_target=0.9, complexity_unit="macs")
    smaller = timm.create_model("test_g_resnext", complexity_target=0.9, complexity_unit="macs", img_size=(64, 64))
    costs = [layers(model)[0].steered.steering.cost for model in (default, smaller)]
    assert costs == [cost_table(default, "macs", (3, 160, 160)), cost_table(default, "macs", SIZE)]
    assert {"complexity_unit", "img_size"}.isdisjoint(default.__dict__.get("_model_args", {}))
    features = timm.create_model("test_g_resnext", features_only=True, complexity_target=0.9, complexity_unit="macs")
    torch.optim.SGD(features.parameters(), 0.1).step()


@pytest.mark.parametrize("unit", ["connections", "macs", "measured"])
def test_the_target_of_a_resnext_in_every_unit(unit: str, tmp_path: Path) -> None:
    unit = measured(tmp_path / "costs.json") if unit == "measured" else unit
    model = timm.create_model("test_g_resnext", complexity_target="resnext", complexity_unit=unit)
    steering = layers(model)[0].steered.steering
    assert steering.target == pytest.approx(steering.cost.total([2] * 4) / steering.cost.dense)


def test_the_schedule_ends_at_half_of_the_steps() -> None:
    """Cubic from the cost before the first step."""
    model = g_resnext(complexity_target=0.4, gate_steps=20)
    optimizer = torch.optim.SGD(gates(model), 1e-9)
    shares = []
    for _ in range(14):
        optimizer.step()
        shares.append(complexity(model).item() / cost_table(model).dense)
    for step, share in enumerate(shares, start=1):
        budget = 0.4 + 0.6 * max(0.0, 1 - step / 10) ** 3
        assert share <= budget
        assert step > 1 or share > 0.4, "not in the first step"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": None}, "is not a table of costs"),
        ({"format": 2}, "has format 2"),
        ({"layers": {"stem": [1.0]}}, "is a table of another network: stem is not a layer of this one"),
        ({"layers": {"layer1.0.conv2": [1.0]}}, "has no costs of 3 layers of this network, such as layer2.0.conv2"),
        ({"layers": {name: [1.0, 2.0] for name in DENSE}}, "for layer1.0.conv2, which is not a list of 5 costs"),
        (
            {"layers": {name: [-1.0] * bits for name, bits in zip(DENSE, (5, 6, 5, 6), strict=True)}},
            "has the cost -1.0 for layer1.0.conv2, which is not a finite number of at least 0",
        ),
        (
            {"whole": 0, "layers": {name: [0] * bits for name, bits in zip(DENSE, (5, 6, 5, 6), strict=True)}},
            "has the cost 0",
        ),
        ({"whole": math.nan}, "has the cost nan for whole, which is not a finite number"),
        ({"whole": "20 ms"}, "has the cost '20 ms' for whole"),
        ({"whole": 10.0}, "has the cost 10.0 for the whole network, which is less than 11 of its layers"),
    ],
    ids=str,
)
def test_wrong_tables_are_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = measured(tmp_path / "costs.json", **changes)
    with pytest.raises(ValueError, match=r"costs\.json") as error:
        timm.create_model("test_g_resnext", complexity_target=0.8, complexity_unit=path)
    assert said in str(error.value)
    assert "measure" in str(error.value)


def test_wrong_units_are_named(tmp_path: Path) -> None:
    model = timm.create_model("test_g_resnext")
    with pytest.raises(ValueError, match=r"'flops' is not a file of costs .*complexity_unit connections or macs"):
        cost_table(model, "flops")
    (tmp_path / "costs.json").write_text("{")
    with pytest.raises(ValueError, match=r"costs\.json is not a JSON file"):
        cost_table(model, str(tmp_path / "costs.json"))
    (tmp_path / "costs.json").write_text('{"layers": {}}')
    with pytest.raises(ValueError, match="it has no 'whole' and 'layers'"):
        cost_table(model, str(tmp_path / "costs.json"))
    with pytest.raises(ValueError, match="unit of a target; add complexity_target"):
        timm.create_model("test_g_resnext", complexity_unit="macs")
    with pytest.raises(ValueError, match="has no pretrained_cfg with an input size; use input_size="):
        steer(nn.Sequential(DGConv2d(4, 4, 1)), target=0.5, unit="macs")
    with pytest.raises(ValueError, match="cost is of another network, with 4 layers"):
        complexity(nn.Sequential(DGConv2d(4, 4, 1)), cost_table(model))
    with pytest.raises(ValueError, match="cannot have the 3 groups of a ResNeXt"):
        cost_table(model).share(3)
    with pytest.raises(TypeError, match=r"cost='macs' is not a CostTable; use timm_dgconv\.cost_table"):
        complexity(model, "macs")  # type: ignore[arg-type]


def test_a_network_without_an_input_size_cannot_train() -> None:
    model = timm.create_model("test_g_resnext", complexity_target=0.9, complexity_unit="macs")
    layers(model)[0].steered.steering.cost = None  # as if timm had not assigned a pretrained_cfg
    with pytest.raises(RuntimeError, match="build the model with img_size=N"):
        torch.optim.SGD(model.parameters(), 0.1).step()


def test_targets_that_cannot_be_reached_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"target=0.3 cannot be reached: .*macs is 0\.\d+, 0\.\d+ in the rest"
    ) as error:
        timm.create_model("test_g_resnet", complexity_target=0.3, complexity_unit="macs")
    (least,) = re.findall(r"macs is (0\.\d+)", str(error.value))
    timm.create_model("test_g_resnet", complexity_target=float(least), complexity_unit="macs")
    model: Any = timm.create_model("test_g_resnext", init_groups=1)
    model.layer4[0].conv2.gate.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"connections is 0\.\d+, 0\.\d+ in frozen layers and .*use a larger target or let"
    ):
        steer(model, target=0.1)
    steer(model, target=0.9)
    for gate in gates(model):
        gate.requires_grad_(False)
    torch.optim.SGD(model.parameters(), 0.1).step()  # frozen later: nothing can close
    assert closed(model) == [0] * 4


def test_a_unit_is_a_name_for_readers(tmp_path: Path) -> None:
    """Only the connections that are counted are an upper limit."""
    shares = []
    for unit in ("ms", "connections"):
        path = measured(tmp_path / "costs.json", unit=unit)
        model = timm.create_model("test_g_resnext", complexity_target=0.9, complexity_unit=path, init_groups=1)
        set_gates(model, lambda gate: -0.01)
        hold_target(model)
        cost = layers(model)[0].steered.steering.cost
        shares.append(complexity(model, cost).item() / cost.dense)
    assert shares[0] == shares[1] > REACHED * 0.9


def test_only_networks_with_the_widths_of_a_resnext_have_its_target() -> None:
    for name in ("test_g_resnet", "g_densenet121"):
        with pytest.raises(ValueError, match=r"complexity_target='resnext' is for .*use a number"):
            timm.create_model(name, complexity_target="resnext")


def test_a_deployed_form_that_costs_more_is_refused() -> None:
    timm.create_model("test_g_resnext", sort=False, complexity_target=0.9, complexity_unit="macs")  # bottlenecks
    with pytest.raises(
        ValueError, match=r"layer1\.0\.conv1 has sort=False, and its order .* cannot move.*use sort=True"
    ):
        timm.create_model("g_resnet18", sort=False, complexity_target=0.9, complexity_unit="macs")
    with pytest.raises(ValueError, match=r"layer1\.0\.conv2 has sort=False"):  # one slope per channel
        steer(timm.create_model("test_g_resnext", sort=False, act_layer="prelu"), target=0.9, unit="macs")


@pytest.mark.parametrize("unit", ["connections", "macs"])
def test_a_target_is_a_share_of_the_features_that_are_left(unit: str) -> None:
    options = dict(features_only=True, out_indices=(0, 1, 2), complexity_target=0.95, complexity_unit=unit, img_size=64)
    model = timm.create_model("test_g_resnext", init_groups=1, **options)
    hold_target(model)
    cost = cost_table(model, unit, (3, 64, 64))
    assert len(cost.tables) == 2
    assert complexity(model, cost) <= 0.95 * cost.dense
    assert layers(model)[0].steered.steering.cost == cost


def test_another_pretrained_cfg_does_not_start_again() -> None:
    model: Any = timm.create_model("test_g_resnext", complexity_target=0.95, complexity_unit="macs", gate_steps=8)
    steering = layers(model)[0].steered.steering
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32)}
    assert layers(model)[0].steered.steering is steering


class Normalized(nn.Sequential):
    """It makes tensors on the CPU: one that is no buffer, and one in each pass."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
        self.mean = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - self.mean) + torch.arange(2).sum()


def test_networks_may_have_tensors_of_their_own() -> None:
    model = groupable(Normalized())
    assert cost_table(model, "macs", SIZE).dense == multiply_adds(nn.Sequential(*model))  # type: ignore[misc]


class Wrapper(nn.Module):
    """A network in an attribute `module`, with or without something after it."""

    def __init__(self, *after: nn.Module) -> None:
        super().__init__()
        self.module = groupable(timm.create_model("test_resnet", num_classes=0))
        self.after = nn.Sequential(*after) if after else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x) if self.after is None else self.after(self.module(x))


def test_wrappers_cost_what_is_in_them() -> None:
    model, head = Wrapper(), Wrapper(nn.Linear(96, 1000))
    dense = cost_table(model.module, "macs", SIZE).dense
    wrappers = (nn.DataParallel(model.module), ModelEmaV3(model), AveragedModel(model), torch.compile(model))
    for wrapper in (model, *wrappers):
        assert cost_table(wrapper, "macs", SIZE).dense == dense
    assert cost_table(head, "macs", SIZE).dense == dense + 96 * 1000
    assert len(cost_table(head, "macs", SIZE).tables) == len(named_layers(head))


@pytest.mark.parametrize("size", [64.0, "64", (64,), 0], ids=str)
def test_wrong_image_sizes_are_named(size: Any) -> None:
    with pytest.raises(ValueError, match=r"img_size=.* must be one or two positive integers"):
        timm.create_model("test_g_resnext", img_size=size, complexity_target=0.9, complexity_unit="macs")
