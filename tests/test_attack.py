"""Layers of every shape, with every gate, input and dtype, against the masked dense convolution that torch computes."""

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from timm_dgconv import DGConv2d, block_groups, compact, group_report

GATES = [0.0, -0.0, math.inf, -math.inf, 1e-8, -1e-8, 0.5, -0.5, 1e30, -1e30, 5e-324, -5e-324, 1e-40, -1e-40]
NAN = float("nan")
HAS_OPERATOR = hasattr(torch.compiler, "is_exporting")  # before, torch.compile gets the masked dense form

numbers = st.integers(1, 3)
kernels = st.integers(1, 5) | st.tuples(st.integers(1, 5), st.integers(1, 5))


@st.composite
def layers(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> DGConv2d:
    num_bits = draw(st.integers(1, 5))
    q_in, q_out = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (1, 3), (3, 2), (5, 1), (3, 5)]))
    kernel, stride = draw(kernels), draw(numbers | st.tuples(numbers, numbers))
    paddings = [st.just("valid"), st.integers(0, 2), st.tuples(st.integers(0, 3), st.integers(0, 3))]
    conv = DGConv2d(
        q_in << num_bits,
        q_out << num_bits,
        kernel,
        stride=stride,
        padding=draw(st.one_of(*paddings, *([st.just("same")] if stride in (1, (1, 1)) else []))),
        dilation=draw(numbers | st.tuples(numbers, numbers)),
        bias=draw(st.booleans()),
        sort=draw(st.booleans()),
        dtype=dtype,
    )
    gates = draw(st.lists(st.sampled_from(GATES), min_size=num_bits, max_size=num_bits))
    torch.manual_seed(draw(st.integers(0, 1000)))
    conv.reset_parameters()
    with torch.no_grad():
        conv.gate.copy_(torch.tensor(gates, dtype=torch.float64))
    span = st.integers(0, (1 << num_bits) - 1)
    conv.spans = draw(st.none() | st.tuples(span, span))
    return conv


ARRANGEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "with an offset": lambda x: torch.cat([torch.zeros(3, dtype=x.dtype), x.flatten()])[3:].view(x.shape),
    "part of more": lambda x: nn.functional.pad(x, (1, 2, 2, 1))[..., 2 : 2 + x.shape[2], 1 : 1 + x.shape[3]],
    "every second": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "turned": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "another order": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "flipped": lambda x: x.flip(3).flip(3),
}


@st.composite
def inputs(draw: st.DrawFn, conv: DGConv2d) -> Tensor:
    shape = (draw(st.integers(0, 2)), conv.in_channels, draw(st.integers(1, 12)), draw(st.integers(1, 12)))
    if draw(st.integers(0, 9)) == 0:
        return torch.randn(1, 1, *shape[2:], dtype=conv.weight.dtype).expand(shape)
    return ARRANGEMENTS[draw(st.sampled_from(list(ARRANGEMENTS)))](torch.randn(shape, dtype=conv.weight.dtype))


def reference(conv: DGConv2d, x: Tensor) -> Tensor:
    weight = conv.weight * conv.connectivity()[:, :, None, None]
    return nn.functional.conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation)


def attempt(function: Callable[[], Any]) -> Any:
    """What it returns, or the kind of error."""
    try:
        return function()
    except RuntimeError as error:
        return type(error)


def check_layer(data: st.DataObject) -> None:
    draw = data.draw
    conv = draw(layers())
    x = draw(inputs(conv)).requires_grad_(draw(st.booleans()))
    if (arrangement := draw(st.sampled_from(list(ARRANGEMENTS)))) != "contiguous":
        conv.weight = nn.Parameter(ARRANGEMENTS[arrangement](conv.weight.detach()))
    for parameter in conv.parameters():
        parameter.requires_grad_(draw(st.booleans()))
    expected = attempt(lambda: reference(conv, x))
    y = attempt(lambda: conv(x))
    if not isinstance(expected, Tensor):
        assert y is expected, "torch's error for an input smaller than the kernel"
        return
    assert_close(y, expected, rtol=1e-10, atol=1e-9)
    assert y.requires_grad == expected.requires_grad
    assert conv.num_groups == 2 ** sum(math.copysign(1, gate) < 0 for gate in conv.gate.tolist())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_close(conv(x), expected.detach(), rtol=1e-10, atol=1e-9)
    wanted = [
        tensor for tensor in (x, conv.weight, conv.bias, conv.gate) if tensor is not None and tensor.requires_grad
    ]
    if not wanted:
        return
    if draw(st.integers(0, 9)) == 0:
        grad_y = torch.ones((), dtype=y.dtype).expand(y.shape)
    else:
        grad_y = ARRANGEMENTS[draw(st.sampled_from(list(ARRANGEMENTS)))](torch.randn_like(y))
    got = torch.autograd.grad(y, wanted, grad_y)
    for tensor, grad, same in zip(wanted, got, torch.autograd.grad(expected, wanted, grad_y), strict=True):
        assert grad.isfinite().all()
        finite = tensor.isfinite()  # no step moves an infinite gate
        assert_close(grad[finite], same[finite], rtol=1e-9, atol=1e-9)


@given(data=st.data())
def test_layers(data: st.DataObject) -> None:
    check_layer(data)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=2000)
@given(data=st.data())
def test_layers_more(data: st.DataObject) -> None:
    check_layer(data)


def check_dtype(data: st.DataObject, dtype: torch.dtype, autocast: bool) -> None:
    conv = data.draw(layers(torch.float32 if autocast else dtype))
    with torch.no_grad():
        conv.weight.mul_(conv.weight[0].numel() ** 0.5 / 2)
    x = data.draw(inputs(conv)).requires_grad_()
    precise, y0 = copy.deepcopy(conv).double(), None
    with contextlib.suppress(RuntimeError):
        y0 = reference(precise, x.detach().double())
    assume(y0 is not None)
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = conv(x)
    assert y.dtype == dtype
    assert conv.num_groups == precise.num_groups
    eps = torch.finfo(dtype).eps
    tolerance = 8 * eps * max(1.0, float(y0.abs().sum() / max(1, y0.numel()))) * conv.weight[0].numel() ** 0.5
    assert_close(y.double(), y0, rtol=8 * eps, atol=tolerance)
    grads = torch.autograd.grad(y, [x, *conv.parameters()], torch.ones_like(y))
    assert [grad.dtype for grad in grads] == [x.dtype, *(p.dtype for p in conv.parameters())]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@settings(max_examples=40)
@given(data=st.data())
def test_half_precision(dtype: torch.dtype, autocast: bool, data: st.DataObject) -> None:
    check_dtype(data, dtype, autocast)


@settings(max_examples=40)
@given(data=st.data())
def test_single_precision(data: st.DataObject) -> None:
    check_dtype(data, torch.float32, autocast=False)


DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.cfloat,
]


@pytest.mark.parametrize("weight", DTYPES[:4], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_mixed_dtypes_are_torchs_error(dtype: torch.dtype, weight: torch.dtype, autocast: bool) -> None:
    conv, plain = DGConv2d(4, 4, 3, dtype=weight), nn.Conv2d(4, 4, 3, dtype=weight)
    x = torch.ones(1, 4, 5, 5).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = attempt(lambda: conv(x)), attempt(lambda: plain(x))
    assert getattr(ours, "dtype", ours) == getattr(theirs, "dtype", theirs)


@pytest.mark.parametrize("shape", [(4,), (4, 5), (1, 1, 4, 5, 5), (1, 3, 5, 5), (1, 8, 5, 5), (0, 5, 5)])
def test_wrong_shapes_are_torchs_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError):
        nn.Conv2d(4, 4, 3)(torch.ones(shape))
    with pytest.raises(RuntimeError):
        DGConv2d(4, 4, 3)(torch.ones(shape))


# Gates that are nan.


def nan_layer(place: int = 1) -> DGConv2d:
    conv = DGConv2d(16, 16, 3, dtype=torch.float64)
    with torch.no_grad():
        conv.gate[place] = NAN
    return conv


def detached(conv: DGConv2d) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in conv.named_parameters()}


def loss(conv: DGConv2d, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.func.functional_call(conv, parameters, (x,)).square().sum()


def dual(conv: DGConv2d, x: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(conv(torch.autograd.forward_ad.make_dual(x, x))).tangent


def unsharded(conv: DGConv2d, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return conv(x.float())


EAGER: dict[str, Callable[[DGConv2d, Tensor], Any]] = {
    "forward": lambda conv, x: conv(x),
    "no_grad": lambda conv, x: torch.no_grad()(conv)(x),
    "inference_mode": lambda conv, x: torch.inference_mode()(conv)(x),
    "autocast": lambda conv, x: unsharded(copy.deepcopy(conv).float(), x),
    "grad": lambda conv, x: torch.func.grad(loss, 1)(conv, detached(conv), x),
    "vmap": lambda conv, x: torch.func.vmap(conv)(x.unsqueeze(1)),
    "an ensemble": lambda conv, x: torch.func.vmap(
        torch.func.grad(lambda parameters, x: loss(conv, parameters, x)), (0, None)
    )({name: torch.stack([value, value]) for name, value in detached(conv).items()}, x),
    "jvp": lambda conv, x: torch.func.jvp(conv, (x,), (x,)),
    "hessian": lambda conv, x: torch.func.hessian(lambda x: loss(conv, detached(conv), x))(x[:1, :, :3, :3]),
    "dual": dual,
    "num_groups": lambda conv, x: conv.num_groups,
    "group_report": lambda conv, x: group_report(conv, (16, 5, 5)),
}


@pytest.mark.parametrize("how", list(EAGER))
def test_nan_gates_are_an_error_in(how: str) -> None:
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    EAGER[how](DGConv2d(16, 16, 3, dtype=torch.float64), x)
    with pytest.raises(RuntimeError, match=r"gates of a DGConv2d are nan: .*diverged"):
        EAGER[how](nan_layer(), x)


@pytest.mark.parametrize("create_graph", [False, True])
def test_gates_that_become_nan_before_the_backward_pass(create_graph: bool) -> None:
    conv = DGConv2d(16, 16, 3)
    y = conv(torch.randn(1, 16, 5, 5))
    conv.gate.data[0] = NAN
    with pytest.raises(RuntimeError, match=r"gates of a DGConv2d are nan"):
        torch.autograd.grad(y.sum(), list(conv.parameters()), create_graph=create_graph)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("how", ["script", "trace", "fx", "export", "compile"])
@pytest.mark.parametrize("sort", [False, True])
def test_nan_gates_show_in_graphs(how: str, sort: bool) -> None:
    """In the output, or as an error of the operator that torch.compile calls."""
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
            (conv if how != "export" else graph).gate[place] = NAN
        if how == "compile" and HAS_OPERATOR:
            with pytest.raises(RuntimeError, match="gates of a DGConv2d are nan"):
                graph(x)
        else:
            assert graph(x).isnan().all()


def test_nan_gates_are_not_converted() -> None:
    model = timm.create_model("test_g_resnext")
    with torch.no_grad():
        model.layer3[0].conv2.gate[2] = NAN
    for form in (compact, block_groups, timm.utils.reparameterize_model, group_report):
        with pytest.raises(RuntimeError, match=r"gates of a DGConv2d are nan"):
            form(model)


# Gates that become nan in training.


def network(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_g_resnext", num_classes=3, **kwargs)


def nan_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    for module in model.modules():
        if isinstance(module, DGConv2d):
            module.gate.grad.fill_(NAN)
    optimizer.step()


def infinite_loss(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    (model(torch.randn(2, 3, 32, 32)).sum() * math.inf).backward()
    optimizer.step()


def optimizer_alone(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The gradients are fine, and the learning rate is not."""
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    for group in optimizer.param_groups:
        group["lr"] = NAN
    optimizer.step()


STEERING = [{}, {"complexity_weight": 1e-4}, {"complexity_weight": 1e-4, "complexity_target": 0.1}]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kwargs", STEERING, ids=["free", "weight", "target"])
@pytest.mark.parametrize("diverge", [nan_gradients, infinite_loss, optimizer_alone])
def test_diverged_training_is_noticed(
    diverge: Callable[[nn.Module, torch.optim.Optimizer], None], kwargs: dict[str, Any], compiled: bool
) -> None:
    model = network(**kwargs)
    run: Any = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    diverge(run, optimizer)
    assert any(module.gate.isnan().any() for module in model.modules() if isinstance(module, DGConv2d))
    x = torch.randn(2, 3, 32, 32)
    if compiled and not HAS_OPERATOR:
        assert run(x).isnan().all()
    else:
        with pytest.raises(RuntimeError, match="gates of a DGConv2d are nan"):
            run(x)
    optimizer.step()  # also of the steering
    with pytest.raises(RuntimeError, match="gates of a DGConv2d are nan"):
        model(x)


def test_loss_scaling_skips_an_infinite_loss() -> None:
    """As without gates: the step is not taken, and nothing is nan."""
    model = network(complexity_weight=1e-4, complexity_target=0.1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    loss = model(torch.randn(2, 3, 32, 32)).sum() * math.inf
    timm.utils.NativeScaler(device="cpu")(loss, optimizer, parameters=model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert model(torch.randn(2, 3, 32, 32)).isfinite().all()
