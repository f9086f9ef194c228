"""Averages of models by timm and torch: EMA and SWA."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import gates, sorted_or_not, trained
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.testing import assert_close

from timm_dgconv import DGConv2d, compact, layer_groups

Average = Callable[[list[nn.Module]], nn.Module]


def network(name: str = "test_g_resnext", **kwargs: Any) -> nn.Module:
    """A tiny network, the same in each call, with gates near zero."""
    model = trained(name, num_classes=3, **kwargs)
    with torch.no_grad():
        for gate in gates(model):
            gate.mul_(0.01)
    return model


def other(model: nn.Module, gate_values: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """Another model of the same training, with gates of these values."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        for gate, start in zip(gates(result), gates(model), strict=True):
            gate.copy_(gate_values(start))
    return result


def by_timm(models: list[nn.Module]) -> nn.Module:
    average = ModelEmaV3(models[0])
    for n, model in enumerate(models):
        average.decay = n / (n + 1)
        average.update(model)
    return average.module


def by_torch(models: list[nn.Module]) -> nn.Module:
    average = AveragedModel(models[0])
    for model in models:
        average.update_parameters(model)
    return average.module


AVERAGES = [by_timm, by_torch]


@sorted_or_not
@pytest.mark.parametrize("average", AVERAGES)
def test_the_values_of_gates_are_averaged_and_their_signs_decide(average: Average, form: dict[str, bool]) -> None:
    """And all weights, including those of unconnected pairs."""
    first = network(**form)
    models = [first, other(first, torch.neg), other(first, lambda gate: torch.randn_like(gate))]
    averaged = average(models).eval()
    expected = network(**form).eval()
    with torch.no_grad():
        for target, *values in zip(*(model.parameters() for model in [expected, *models]), strict=True):
            target.copy_(sum(values) / 3)
    for layer, like in zip(averaged.modules(), expected.modules(), strict=True):
        if isinstance(layer, DGConv2d):
            assert_close(layer.gate, like.gate)
            assert_close(layer.weight, like.weight)
    x = torch.randn(2, 3, 32, 32)
    assert_close(averaged(x), expected(x), rtol=1e-4, atol=1e-4)
    assert_close(compact(averaged)(x), expected(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("average", AVERAGES)
def test_equal_gates_keep_their_signs_and_opposite_gates_open(average: Average, dtype: torch.dtype) -> None:
    model = network().to(dtype)
    with torch.no_grad():
        for gate in gates(model):
            gate.copy_(torch.where(torch.rand_like(gate) < 0.5, -1e-8, 1e-8))
    same = torch.cat(gates(average([model] * 4)))
    assert torch.equal(same.signbit(), torch.cat(gates(model)).signbit())
    averaged = average([model, other(model, torch.neg)])
    assert not torch.cat(gates(averaged)).any()
    assert set(layer_groups(averaged)) == {1}, "groups of its own"


@sorted_or_not
@pytest.mark.parametrize(
    "average",
    [
        lambda model: ModelEma(model, decay=0.9999),
        lambda model: ModelEmaV2(model, decay=0.9999),
        lambda model: AveragedModel(model, use_buffers=True),
        lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=True),
    ],
    ids=["ModelEma", "ModelEmaV2", "AveragedModel", "EMA of AveragedModel"],
)
@pytest.mark.parametrize("name", ["test_g_resnet", "test_g_resnext"])
def test_averages_of_buffers_keep_a_compact_model(
    name: str, average: Callable[[nn.Module], Any], form: dict[str, bool]
) -> None:
    model, x = compact(network(name, **form)).eval(), torch.randn(2, 3, 32, 32)
    averaged = average(model)
    for _ in range(3):
        (averaged.update_parameters if isinstance(averaged, AveragedModel) else averaged.update)(model)
    averaged = averaged.ema if isinstance(averaged, ModelEma) else averaged.module
    assert_close(averaged.eval()(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_steered_training_is_averaged() -> None:
    """Stochastic weight averaging, with a copy of the average half-way, until the averaged weights are in the model."""
    model = network(complexity_weight=0.1)
    averaged = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    batches = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(n)) for n in range(6)]
    signs = set()
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(batch), torch.arange(4) % 3).backward()
        optimizer.step()
        averaged.update_parameters(model)
        averaged = copy.deepcopy(averaged) if step == 2 else averaged
        signs.add(tuple(torch.cat(gates(model)).signbit().tolist()))
    assert len(signs) > 1, "no gate flipped"
    assert all(gate.grad is None for gate in gates(averaged))  # it is steered, and no optimizer has its gates

    update_bn(batches, averaged)
    model.load_state_dict(averaged.module.state_dict())
    assert torch.equal(model.eval()(batches[0]), averaged.eval()(batches[0]))
