"""Gates that are nan, after a training has diverged: an error where the host can read them.

The outputs of graphs are nan, see test_dgconv.py.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from conftest import HAS_OPERATOR, forms, gates, trained
from torch import Tensor

from timm_dgconv import DGConv2d, compact, group_report, layer_groups

nan_gates_raise = pytest.raises(RuntimeError, match=r"gates of a DGConv2d are nan: .*diverged")


def loss(conv: DGConv2d, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.func.functional_call(conv, parameters, (x,)).square().sum()


EAGER: dict[str, Callable[[DGConv2d, Tensor], Any]] = {
    "forward": lambda conv, x: conv(x),
    "grad": lambda conv, x: torch.func.grad(loss, 1)(conv, dict(conv.named_parameters()), x),
    "vmap": lambda conv, x: torch.func.vmap(conv)(x.unsqueeze(1)),
    "jvp": lambda conv, x: torch.func.jvp(conv, (x,), (x,)),
    "group_report": lambda conv, x: group_report(conv, (16, 5, 5)),
}


@pytest.mark.usefixtures("gate_reads")
@pytest.mark.parametrize("how", list(EAGER))
@forms
def test_the_host_raises_in_every_use_of_the_layer(form: dict[str, Any], how: str) -> None:
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    conv = DGConv2d(16, 16, 3, dtype=torch.float64, **form)
    EAGER[how](conv, x)
    conv.gate.data[1] = math.nan
    with nan_gates_raise:
        EAGER[how](conv, x)


def test_models_with_nan_gates_load_and_are_not_converted() -> None:
    """torch checks no values when it loads, and reading them would wait for the device."""
    state_dict = trained().state_dict()
    state_dict["layer3.0.conv2.sorted_gate"][2] = math.nan
    model = timm.create_model("test_g_resnext")
    model.load_state_dict(state_dict)
    for form in (compact, layer_groups, timm.utils.reparameterize_model):
        with nan_gates_raise:
            form(model)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_diverged_training_is_noticed(compiled: bool) -> None:
    model = trained(num_classes=3, complexity_target=0.1)
    run: Any = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x = torch.randn(2, 3, 32, 32)
    (run(x).sum() * math.inf).backward()
    for _ in range(2):
        optimizer.step()  # steering must not fail
    assert torch.cat(gates(model)).isnan().any()
    if compiled and not HAS_OPERATOR:
        assert run(x).isnan().all()
    else:
        with nan_gates_raise:
            run(x)
