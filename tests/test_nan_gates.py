"""Gates that are nan, after a training has diverged: an error where the host can read them, nan outputs elsewhere."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from conftest import gates, trained
from torch import Tensor, nn

from timm_dgconv import DGConv2d, compact, group_report, layer_groups
from timm_dgconv.layers import grouping

HAS_OPERATOR = hasattr(torch.compiler, "is_exporting")  # before, torch.compile gets the masked dense form
nan_gates_raise = pytest.raises(RuntimeError, match=r"gates of a DGConv2d are nan: .*diverged")


def nan_layer() -> DGConv2d:
    conv = DGConv2d(16, 16, 3, dtype=torch.float64)
    with torch.no_grad():
        conv.gate[1] = math.nan
    return conv


def test_connectivity_and_complexity_are_nan() -> None:
    gate = torch.tensor([1.0, math.nan])
    assert grouping.connectivity(gate, 4, 4).isnan().any()
    assert grouping.complexity(gate, 4, 4).isnan()


def detached(conv: DGConv2d) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in conv.named_parameters()}


def loss(conv: DGConv2d, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.func.functional_call(conv, parameters, (x,)).square().sum()


def autocast(conv: DGConv2d, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return copy.deepcopy(conv).float()(x.float())


def dual(conv: DGConv2d, x: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(conv(torch.autograd.forward_ad.make_dual(x, x))).tangent


EAGER: dict[str, Callable[[DGConv2d, Tensor], Any]] = {
    "forward": lambda conv, x: conv(x),
    "no_grad": lambda conv, x: torch.no_grad()(conv)(x),
    "inference_mode": lambda conv, x: torch.inference_mode()(conv)(x),
    "autocast": autocast,
    "grad": lambda conv, x: torch.func.grad(loss, 1)(conv, detached(conv), x),
    "vmap": lambda conv, x: torch.func.vmap(conv)(x.unsqueeze(1)),
    "ensemble": lambda conv, x: torch.func.vmap(
        torch.func.grad(lambda parameters, x: loss(conv, parameters, x)), (0, None)
    )({name: torch.stack([value, value]) for name, value in detached(conv).items()}, x),
    "jvp": lambda conv, x: torch.func.jvp(conv, (x,), (x,)),
    "hessian": lambda conv, x: torch.func.hessian(lambda x: loss(conv, detached(conv), x))(x[:1, :, :3, :3]),
    "dual": dual,
    "num_groups": lambda conv, x: conv.num_groups,
    "group_report": lambda conv, x: group_report(conv, (16, 5, 5)),
}


@pytest.mark.usefixtures("gate_reads")
@pytest.mark.parametrize("how", list(EAGER))
def test_error_in(how: str) -> None:
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    EAGER[how](DGConv2d(16, 16, 3, dtype=torch.float64), x)
    with nan_gates_raise:
        EAGER[how](nan_layer(), x)


@pytest.mark.parametrize("create_graph", [False, True])
def test_error_in_the_backward_pass(create_graph: bool) -> None:
    conv = DGConv2d(16, 16, 3)
    y = conv(torch.randn(1, 16, 5, 5))
    conv.gate.data[0] = math.nan
    with nan_gates_raise:
        torch.autograd.grad(y.sum(), list(conv.parameters()), create_graph=create_graph)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("how", ["script", "trace", "fx", "export", "compile"])
@pytest.mark.parametrize("sort", [False, True])
def test_graphs(how: str, sort: bool) -> None:
    """The output is nan, or the operator that torch.compile calls raises."""
    x = torch.randn(1, 16, 5, 5)
    for place in range(4):
        conv = DGConv2d(16, 16, 3, sort=sort)
        graph: Any = {
            "script": lambda conv: torch.jit.script(conv),
            "trace": lambda conv: torch.jit.trace(conv, x),
            "fx": torch.fx.symbolic_trace,
            "export": lambda conv: torch.export.export(conv, (x,)).module(),
            "compile": lambda conv: torch.compile(conv, backend="aot_eager", fullgraph=True),
        }[how](conv)
        assert graph(x).isfinite().all()
        with torch.no_grad():
            (conv if how != "export" else graph).gate[place] = math.nan
        if how == "compile" and HAS_OPERATOR:
            with nan_gates_raise:
                graph(x)
        else:
            assert graph(x).isnan().all()


def test_models_with_nan_gates_load_and_are_not_converted() -> None:
    """torch checks no values when it loads, and reading them would wait for the device."""
    state_dict = trained().state_dict()
    state_dict["layer3.0.conv2.gate"][2] = math.nan
    model = timm.create_model("test_g_resnext")
    model.load_state_dict(state_dict)
    for form in (compact, layer_groups, timm.utils.reparameterize_model, group_report):
        with nan_gates_raise:
            form(model)
    with nan_gates_raise:
        model(torch.randn(1, 3, 32, 32))


# Training.


def nan_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    for gate in gates(model):
        gate.grad.fill_(math.nan)
    optimizer.step()


def infinite_loss(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    (model(torch.randn(2, 3, 32, 32)).sum() * math.inf).backward()
    optimizer.step()


def nan_learning_rate(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    for group in optimizer.param_groups:
        group["lr"] = math.nan
    optimizer.step()


STEERING = [{}, {"complexity_weight": 0.1}, {"complexity_target": 0.1}]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kwargs", STEERING, ids=["free", "weight", "target"])
@pytest.mark.parametrize("diverge", [nan_gradients, infinite_loss, nan_learning_rate])
def test_diverged_training_is_noticed(
    diverge: Callable[[nn.Module, torch.optim.Optimizer], None], kwargs: dict[str, Any], compiled: bool
) -> None:
    model = trained(num_classes=3, **kwargs)
    run: Any = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    diverge(run, optimizer)
    assert torch.cat(gates(model)).isnan().any()
    x = torch.randn(2, 3, 32, 32)
    if compiled and not HAS_OPERATOR:
        assert run(x).isnan().all()
    else:
        with nan_gates_raise:
            run(x)
    optimizer.step()  # steering must not fail
    with nan_gates_raise:
        model(x)


def test_loss_scaling_skips_an_infinite_loss() -> None:
    model = trained(num_classes=3, complexity_target=0.1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    loss = model(torch.randn(2, 3, 32, 32)).sum() * math.inf
    timm.utils.NativeScaler(device="cpu")(loss, optimizer, parameters=model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert model(torch.randn(2, 3, 32, 32)).isfinite().all()
