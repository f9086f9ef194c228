"""Averages of models: EMA and SWA."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import gates, trained
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.testing import assert_close

from timm_dgconv import DGConv2d, compact, group_report, layer_groups

Average = Callable[[list[nn.Module]], nn.Module]


def network(**kwargs: Any) -> nn.Module:
    """A tiny G-ResNeXt, the same in each call, with gates near zero."""
    model = trained(num_classes=3, **kwargs)
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


def train(model: nn.Module, steps: int, after_step: Callable[[int], Any]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model.train()(x), torch.arange(4) % 3).backward()
        optimizer.step()
        after_step(step)


def by_timm(models: list[nn.Module]) -> nn.Module:
    average = ModelEmaV3(models[0])
    for n, model in enumerate(models):
        average.decay = n / (n + 1)
        average.update(model)
    return average.module


def by_torch(models: list[nn.Module], **kwargs: Any) -> nn.Module:
    average = AveragedModel(models[0], **kwargs)
    for model in models:
        average.update_parameters(model)
    return average.module


def by_torch_exponentially(models: list[nn.Module]) -> nn.Module:
    return by_torch(models, multi_avg_fn=get_ema_multi_avg_fn(0.5))


AVERAGES = [by_timm, by_torch, by_torch_exponentially]


@pytest.mark.parametrize("average", AVERAGES)
def test_values_are_averaged(average: Average) -> None:
    """The values of the gates, whose signs then decide, and all weights, including those of unconnected pairs."""
    first = network()
    models = [first, other(first, torch.neg), other(first, lambda gate: torch.randn_like(gate))]
    averaged = average(models).eval()
    expected = network().eval()
    factors = [0.25, 0.25, 0.5] if average is by_torch_exponentially else [1 / 3] * 3
    with torch.no_grad():
        for target, *values in zip(*(model.parameters() for model in [expected, *models]), strict=True):
            target.copy_(sum(factor * value for factor, value in zip(factors, values, strict=True)))
    for layer, like in zip(averaged.modules(), expected.modules(), strict=True):
        if isinstance(layer, DGConv2d):
            assert_close(layer.gate, like.gate)
            assert torch.equal(layer.connectivity(), like.connectivity())
            assert_close(layer.weight, like.weight)
    x = torch.randn(2, 3, 32, 32)
    assert_close(averaged(x), expected(x), rtol=1e-4, atol=1e-4)
    assert_close(compact(averaged)(x), expected(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("average", AVERAGES)
def test_average_has_groups_of_its_own(average: Average) -> None:
    """All its gates are open here, above the target that both models keep."""
    first = network(complexity_target=0.3)
    with torch.no_grad():
        for gate in gates(first):
            gate.fill_(3.0)[::2] = -1.0
    second = other(first, lambda gate: 2 - gate)
    averaged = average([first, second])
    assert max(group_report(model).density for model in (first, second)) < 0.3
    assert layer_groups(first) != layer_groups(averaged) != layer_groups(second)
    assert group_report(averaged).density == 1


@pytest.mark.parametrize("size", [1e-8, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("average", AVERAGES)
def test_equal_and_opposite_gates(average: Average, dtype: torch.dtype, size: float) -> None:
    """Equal gates keep their signs, also at their initial size. Opposite gates average to 0.0, which is open."""
    model = network().to(dtype)
    with torch.no_grad():
        for gate in gates(model):
            gate.copy_(torch.where(torch.rand_like(gate) < 0.5, -size, size))
    start = torch.cat(gates(model))
    same = torch.cat(gates(average([model] * 4)))
    assert torch.equal(same.signbit(), start.signbit())
    averaged = average([model, other(model, torch.neg)]).eval()
    opposite = torch.cat(gates(averaged))
    assert not opposite.any()
    assert not opposite.signbit().any()
    x = torch.randn(2, 3, 32, 32).to(dtype)
    y = averaged(x)
    with torch.no_grad():
        for gate in gates(averaged):
            gate.fill_(1.0)
    assert torch.equal(averaged(x), y)


def test_average_of_a_training() -> None:
    """Stochastic weight averaging until the update of the batch norms, with a copy of the average half-way."""
    model = network(complexity_weight=0.1)
    averaged = AveragedModel(model)
    signs = set()

    def update(step: int) -> None:
        nonlocal averaged
        averaged.update_parameters(model)
        averaged = copy.deepcopy(averaged) if step == 2 else averaged
        signs.add(tuple(torch.cat(gates(model)).signbit().tolist()))

    train(model, 6, update)
    assert len(signs) > 1, "no gate flipped"
    assert int(averaged.n_averaged) == 6
    assert all(gate.grad is None for gate in gates(averaged))  # it is steered, and no optimizer has its gates

    expected = copy.deepcopy(averaged.module)
    batches = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    update_bn(batches, averaged)
    for layer in expected.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # the mean over all batches
    with torch.no_grad():
        for batch in batches:
            expected.train()(batch)
    assert torch.equal(averaged.eval()(batches[0]), expected.eval()(batches[0]))


def test_averaged_weights_in_the_model() -> None:
    model = network(complexity_weight=0.1)
    average = ModelEmaV3(model, decay=0.5)
    train(model, 5, lambda step: average.update(model))
    x = torch.randn(2, 3, 32, 32)
    assert any(not torch.equal(a, b) for a, b in zip(gates(model), gates(average), strict=True))
    own = copy.deepcopy(model.state_dict())
    before = model.eval()(x)
    average.eval()
    model.load_state_dict(average.module.state_dict())
    assert torch.equal(model(x), average(x))
    assert_close(compact(average)(x), average(x), rtol=1e-4, atol=1e-4)
    model.load_state_dict(own)  # and back
    assert torch.equal(model(x), before)
