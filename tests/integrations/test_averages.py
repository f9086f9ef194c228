"""Averages of models by timm and torch: EMA and SWA."""

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import gates, outputs, sorted_or_not, trained
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.testing import assert_close

from timm_dgconv import compact, layer_groups

Average = Callable[[list[nn.Module]], nn.Module]


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


@sorted_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("average", [by_timm, by_torch])
def test_an_average_has_the_groups_of_the_mean_gates(
    average: Average, dtype: torch.dtype, form: dict[str, bool]
) -> None:
    """Equal gates keep their signs, and opposite gates open."""
    model = trained(num_classes=3, **form).to(dtype)
    with torch.no_grad():
        for gate in gates(model):
            gate.copy_(torch.where(gate < 0, -1e-8, 1e-8))
    same = average([model] * 4)
    assert layer_groups(same) == layer_groups(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for gate in gates(other):
            gate.neg_()
    mean = average([model, other]).float()
    assert set(layer_groups(mean)) == {1}
    assert_close(outputs(compact(mean)), outputs(mean), rtol=1e-4, atol=1e-4)


def test_a_steered_training_is_averaged() -> None:
    """Stochastic weight averaging, with a copy of the average half-way, until the averaged weights are in the model."""
    model = trained(num_classes=3, complexity_weight=0.1)
    with torch.no_grad():
        for gate in gates(model):
            gate.mul_(0.01)
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
