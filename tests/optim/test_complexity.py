"""The complexity of a model, and frozen groups."""

import math

import pytest
import torch
from conftest import gates, trained
from test_steering import loss_of
from timm.optim import create_optimizer_v2
from torch import nn
from torch.testing import assert_close

from timm_dgconv import DGConv2d, complexity, constrained_loss, freeze_groups


@pytest.mark.parametrize("opt", ["momentum", "adamw", "lamb"])
def test_frozen_gates_stay_and_learn_again(opt: str) -> None:
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
    with pytest.raises(TypeError, match="frozen='no' is not a bool"):
        freeze_groups(model, "no")  # type: ignore[arg-type]
    freeze_groups(model, frozen=False)
    optimizer.zero_grad()
    step()
    assert not any(torch.equal(gate, start) for gate, start in zip(gates(model), before, strict=True))


@pytest.mark.parametrize("function", [complexity, freeze_groups])
def test_refuses_models_without_dgconv(function: object) -> None:
    with pytest.raises(ValueError, match="Linear has no DGConv2d"):
        function(nn.Linear(2, 2))


@pytest.mark.parametrize("closed", [0, 2, 3], ids=["above", "at the target", "below"])
def test_the_constrained_loss_is_that_of_the_paper(closed: int) -> None:
    """Equations 9 and 10, with the target at two closed gates, against their derivatives by hand."""
    torch.manual_seed(0)
    conv = DGConv2d(16, 16, 3, sort=False, dtype=torch.float64)
    with torch.no_grad():
        conv.gate.fill_(0.5)[:closed] = -0.5
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    task = conv(x).square().mean()
    parameters = [conv.weight, conv.gate]
    d_task = torch.autograd.grad(task, parameters, retain_graph=True)
    loss = constrained_loss(task, conv, target=0.25, exponent=0.3)
    got = torch.autograd.grad(loss, parameters)
    zeta, o = 256 / 2**closed, 64
    factor = (zeta / o) ** 0.3 if zeta > o else 1.0
    d_zeta = 0.3 / zeta * zeta * math.log(2) if zeta > o else 0.0  # of log((zeta / o) ** 0.3), per gate
    assert_close(loss, factor * task, rtol=1e-12, atol=0)
    assert_close(got[0], factor * d_task[0], rtol=1e-10, atol=1e-12)
    assert_close(got[1], factor * (d_task[1] + task * d_zeta), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("kwargs", "words"), [(dict(target=0), "target=0 must"), (dict(target=0.5, exponent=-1), "exponent=-1 must")]
)
def test_wrong_arguments_of_the_constrained_loss_are_named(kwargs: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        constrained_loss(torch.ones(()), DGConv2d(4, 4, 1), **kwargs)
