"""Averages of models by timm and torch (EMA and SWA), and training that goes on from a checkpoint of timm."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import outputs, set_gates, sorted_or_not, trained
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3
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


class Training:
    """A model near its target, an optimizer and an average."""

    def __init__(self, opt: str, seed: int, **kwargs: Any) -> None:
        torch.manual_seed(seed)
        self.model = trained(num_classes=3, drop_path_rate=0.1, complexity_target=0.3, **kwargs)
        set_gates(self.model, lambda gate: 1e-5 * torch.randn_like(gate))
        self.model.fc.reset_parameters()
        rate = 0.002 if opt == "adamw" else 0.1
        self.optimizer = create_optimizer_v2(self.model, opt=opt, lr=rate, weight_decay=0.01)
        self.average = ModelEmaV3(self.model, decay=0.8)

    def run(self, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            x, y = torch.randn(4, 3, 32, 32), torch.randint(3, (4,))
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model.train()(x), y).backward()
            self.optimizer.step()
            self.average.update(self.model)

    def state(self) -> Any:
        return [self.model.state_dict(), self.optimizer.state_dict(), self.average.state_dict()]


@sorted_or_not
@pytest.mark.parametrize("opt", ["momentum", "adamw", pytest.param("lookahead_momentum", marks=pytest.mark.slow)])
def test_a_resumed_training_ends_as_if_uninterrupted(opt: str, form: dict[str, bool], tmp_path: Path) -> None:
    """Parameters, buffers, gates, the state of the optimizer and the average are the same to the last bit."""
    whole, resumed = Training(opt, 0, **form), Training(opt, 1)
    whole.run(range(10))
    saver = CheckpointSaver(whole.model, whole.optimizer, model_ema=whole.average, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0)
    whole.run(range(10, 20))
    file = str(tmp_path / "last.pth.tar")
    assert resume_checkpoint(resumed.model, file, resumed.optimizer, log_info=False) == 1
    load_checkpoint(resumed.average.module, file, use_ema=True)
    resumed.run(range(10, 20))
    assert_close(resumed.state(), whole.state(), rtol=0, atol=0)
