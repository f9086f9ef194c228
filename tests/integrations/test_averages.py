"""Averages of models by timm and torch (EMA and SWA)."""

import copy
from typing import Any

import pytest
import torch
from conftest import outputs, set_gates, sorted_or_not, trained
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

from timm_dgconv import compact, layer_groups


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
def test_an_average_has_the_groups_of_the_mean_gates(average: Any, dtype: torch.dtype, form: dict[str, bool]) -> None:
    """Equal gates keep their signs, and opposite gates open."""
    model = trained(num_classes=3, **form).to(dtype)
    set_gates(model, lambda gate: torch.where(gate < 0, -1e-8, 1e-8))
    same = average([model] * 4)
    assert layer_groups(same) == layer_groups(model)
    other = copy.deepcopy(model)
    set_gates(other, torch.neg)
    mean = average([model, other]).float()
    assert set(layer_groups(mean)) == {1}
    assert_close(outputs(compact(mean)), outputs(mean), rtol=1e-4, atol=1e-4)
