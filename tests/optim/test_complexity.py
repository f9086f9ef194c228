"""The complexity of a model, and frozen groups."""

import pytest
import timm
import torch
from conftest import gates, trained
from timm.optim import create_optimizer_v2
from torch import nn

from timm_dgconv import block_groups, complexity, freeze_groups


def loss_of(model: nn.Module) -> torch.Tensor:
    x = torch.sin(torch.arange(8 * 3 * 32 * 32.0)).view(8, 3, 32, 32)
    return nn.functional.cross_entropy(model.eval()(x), torch.arange(8) % 3)


def test_complexity_in_a_loss_closes_gates() -> None:
    model = trained(num_classes=3)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (loss_of(model) + complexity(model)).backward()
        optimizer.step()
    assert block_groups(model) == [2 ** len(gate) for gate in gates(model)]
    assert complexity(model) == sum(
        conv.in_channels * conv.out_channels / 2 ** len(conv.gate)
        for conv in (stage[0].conv2 for stage in (model.layer1, model.layer2, model.layer3, model.layer4))
    )


@pytest.mark.parametrize("opt", ["momentum", "adamw", "lamb"])
def test_frozen(opt: str) -> None:
    model = trained(num_classes=3)
    optimizer = create_optimizer_v2(model, opt=opt, lr=0.1, weight_decay=0.1, filter_bias_and_bn=False)

    def step() -> None:
        loss_of(model).backward()
        optimizer.step()

    step()  # momentum, and gradients that are not cleared
    freeze_groups(model)
    before = [gate.detach().clone() for gate in gates(model)]
    step()
    assert all(torch.equal(gate, start) for gate, start in zip(gates(model), before, strict=True))
    freeze_groups(model, frozen=False)
    optimizer.zero_grad()
    step()
    assert not any(torch.equal(gate, start) for gate, start in zip(gates(model), before, strict=True))


def test_frozen_from_the_start() -> None:
    model = timm.create_model("test_g_resnext", freeze_groups=True)
    assert not any(gate.requires_grad for gate in gates(model))
    assert all(p.requires_grad for name, p in model.named_parameters() if not name.endswith("gate"))


@pytest.mark.parametrize("function", [complexity, freeze_groups])
def test_refuses_models_without_dgconv(function: object) -> None:
    with pytest.raises(ValueError, match="Linear has no DGConv2d"):
        function(nn.Linear(2, 2))
