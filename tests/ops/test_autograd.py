"""The operator against the masked dense convolution, and how autograd and torch's tools use it."""

import contextlib
import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEVICES, FORMS, HAS_OPERATOR, Patch, attempt, conv_with, forms
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.functional import hessian, jacobian
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from timm_dgconv import DGConv2d, compact
from timm_dgconv.ops import grouped

EXACT = dict(rtol=1e-10, atol=1e-10)


def results(conv: DGConv2d, x: Tensor, create_graph: bool = False) -> list[Tensor]:
    y = conv(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *conv.parameters()], create_graph=create_graph)]


GATES = [0.0, -0.0, math.inf, -math.inf, 1e-8, -1e-8, 0.5, -0.5, 1e30, -1e30, 5e-324, -5e-324, 1e-40, -1e-40]
ARRANGEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "with an offset": lambda x: torch.cat([torch.zeros(3, dtype=x.dtype), x.flatten()])[3:].view(x.shape),
    "slice": lambda x: nn.functional.pad(x, (1, 2, 2, 1))[..., 2 : 2 + x.shape[2], 1 : 1 + x.shape[3]],
    "every second column": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "transposed image": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "channels first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}
even_kernels = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
arrangements = st.sampled_from(list(ARRANGEMENTS))


@st.composite
def layers(
    draw: st.DrawFn, dtype: torch.dtype = torch.float64, max_bits: int = 10, usual_padding: bool = False
) -> DGConv2d:
    num_bits = draw(st.integers(1, max_bits))
    widths = [(1, 1), (1, 2), (2, 1), (1, 3), (3, 2), (5, 1), (3, 5)]
    q_in, q_out = draw(st.sampled_from([q for q in widths if max(q) << num_bits <= 1024]))
    numbers = st.integers(1, 3)
    sizes = st.integers(1, 5 if num_bits < 6 else 3)
    kernel_size = draw(sizes | st.tuples(sizes, sizes))
    stride, dilation = draw(numbers | st.tuples(numbers, numbers)), draw(numbers | st.tuples(numbers, numbers))
    paddings = [st.just("valid"), st.integers(0, 2), st.tuples(st.integers(0, 3), st.integers(0, 3))]
    if stride in (1, (1, 1)):
        paddings.append(st.just("same"))
    if usual_padding:
        reach = torch.tensor(kernel_size).sub(1).mul(torch.tensor(dilation)).expand(2)
        paddings = [st.just(tuple(reach.div(2, rounding_mode="floor").tolist()))]
    conv = DGConv2d(
        q_in << num_bits,
        q_out << num_bits,
        kernel_size,
        stride=stride,
        padding=draw(st.one_of(*paddings)),
        padding_mode=draw(st.sampled_from(["zeros", "zeros", "circular", "reflect", "replicate"])),
        dilation=dilation,
        bias=draw(st.booleans()),
        **draw(st.sampled_from(FORMS)),
        dtype=dtype,
    )
    gates = draw(st.lists(st.sampled_from(GATES), min_size=num_bits, max_size=num_bits))
    torch.manual_seed(draw(st.integers(0, 1000)))
    conv.reset_parameters()
    with torch.no_grad():
        conv.gate.copy_(torch.tensor(gates, dtype=torch.float64))
    return conv


@st.composite
def inputs(draw: st.DrawFn, conv: DGConv2d) -> Tensor:
    shape = (draw(st.integers(0, 2)), conv.in_channels, draw(st.integers(1, 12)), draw(st.integers(1, 12)))
    if draw(st.integers(0, 9)) == 0:
        return torch.randn(1, 1, *shape[2:], dtype=conv.weight.dtype).expand(shape)
    return ARRANGEMENTS[draw(arrangements)](torch.randn(shape, dtype=conv.weight.dtype))


@even_kernels
@pytest.mark.parametrize("examples", [100, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_random_layers(examples: int) -> None:
    settings(max_examples=examples)(given(data=st.data())(check_layer))()


def check_layer(data: st.DataObject) -> None:
    draw = data.draw
    conv = draw(layers())
    x = draw(inputs(conv)).requires_grad_(draw(st.booleans()))
    if (arrangement := draw(arrangements)) != "contiguous":
        conv.weight = nn.Parameter(ARRANGEMENTS[arrangement](conv.weight.detach()))
    for parameter in conv.parameters():
        parameter.requires_grad_(draw(st.booleans()))
    expected = attempt(lambda: conv.masked_dense(x))
    y = attempt(lambda: conv(x))
    if not isinstance(expected, Tensor):
        assert y is expected, "torch's error, for example for an input smaller than the kernel"
        return
    assert_close(y, expected, rtol=1e-10, atol=1e-9)
    dense = [t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last) for t in (x, conv.weight)]
    assert y.stride() == expected.stride() or y.numel() == 0 or 1 in y.shape or not all(dense)
    assert y.requires_grad == expected.requires_grad
    assert conv.closed == tuple(math.copysign(1, gate) < 0 for gate in conv.gate.tolist())
    assert conv.num_groups == 2 ** sum(conv.closed)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_close(conv(x), expected.detach(), rtol=1e-10, atol=1e-9)
    wanted = [t for t in (x, conv.weight, conv.bias, conv.gate) if t is not None and t.requires_grad]
    if not wanted:
        return
    if draw(st.integers(0, 9)) == 0:
        grad_y = torch.ones((), dtype=y.dtype).expand(y.shape)
    else:
        grad_y = ARRANGEMENTS[draw(arrangements)](torch.randn_like(y))
    got = torch.autograd.grad(y, wanted, grad_y)
    for tensor, grad, same in zip(wanted, got, torch.autograd.grad(expected, wanted, grad_y), strict=True):
        assert grad.shape == tensor.shape
        assert grad.isfinite().all()
        assert_close(grad, same, rtol=1e-9, atol=1e-9)


@even_kernels
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [*itertools.product([torch.float16, torch.bfloat16], [False, True]), (torch.float32, False)],
    ids=str,
)
@settings(max_examples=40)
@given(data=st.data())
def test_random_layers_in_lower_precision(dtype: torch.dtype, autocast: bool, data: st.DataObject) -> None:
    # On CPUs with AVX512-FP16, torch's float16 convolutions end the process for some layers that no network has.
    usual = dtype is torch.float16
    conv = data.draw(layers(torch.float32 if autocast else dtype, max_bits=5, usual_padding=usual))
    assume(conv.padding_mode == "zeros" or dtype is not torch.float16)  # torch 2.5 cannot pad it otherwise on a CPU
    with torch.no_grad():
        conv.weight.mul_(conv.weight[0].numel() ** 0.5 / 2)
    x = data.draw(inputs(conv)).requires_grad_()
    precise, y0 = copy.deepcopy(conv).double(), None
    with contextlib.suppress(RuntimeError):
        y0 = precise.masked_dense(x.detach().double()).detach()
    assume(y0 is not None)
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = conv(x)
    assert y.dtype == dtype
    assert conv.closed == precise.closed
    eps = torch.finfo(dtype).eps
    tolerance = 8 * eps * max(1.0, float(y0.abs().sum() / max(1, y0.numel()))) * conv.weight[0].numel() ** 0.5
    assert_close(y.double(), y0, rtol=8 * eps, atol=tolerance)
    grads = torch.autograd.grad(y, [x, *conv.parameters()], torch.ones_like(y))
    assert [grad.dtype for grad in grads] == [x.dtype, *(p.dtype for p in conv.parameters())]


@forms
@pytest.mark.parametrize("groups", [1, 2, 16, 64])
@pytest.mark.parametrize("formats", [("channels_last", "contiguous"), ("contiguous", "channels_last")])
def test_saved_tensors_may_return_in_another_memory_format(
    formats: tuple[str, str], groups: int, form: dict[str, Any]
) -> None:
    """torch.autograd.graph.save_on_cpu(pin_memory=True) loses the format. `model.to` changes it between the passes."""
    before, after = (ARRANGEMENTS[name] for name in formats)
    conv = DGConv2d(64, 64, 3, dtype=torch.float64, **form)
    conv.reset_gate(groups)
    conv.weight.data = before(conv.weight.data)
    x = torch.randn(2, 64, 6, 6, dtype=torch.float64, requires_grad=True)
    expected = results(conv, x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: after(t) if t.ndim == 4 else t):
        found = results(conv, x)
    assert_close(found, expected, **EXACT)
    y = conv(x)
    conv.weight.data = after(conv.weight.data)
    found = [y, *torch.autograd.grad(y.square().sum(), [x, *conv.parameters()])]
    assert_close(found, expected, **EXACT)


@forms
@pytest.mark.parametrize("groups", [1, 2, 4, 8, 16, 64])
def test_little_more_is_kept_for_the_backward_pass_than_a_convolution_keeps(groups: int, form: dict[str, Any]) -> None:
    conv = DGConv2d(64, 64, 3, **form)
    conv.reset_gate(groups)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        conv(torch.randn(2, 64, 6, 6))
    numbers = [t.numel() for t in kept if t.ndim == 4]
    assert max(numbers) == conv.weight.numel()
    assert sum(numbers) <= conv.weight.numel() * (1 + 3 / 8) + 2 * 64 * 6 * 6


@forms
@pytest.mark.filterwarnings("error:timm_dgconv")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_can_be_differentiated(compiled: bool, form: dict[str, Any]) -> None:
    """Also if the gates change after the forward pass."""
    conv = conv_with("010", 8, 8, 2, dtype=torch.float64, **form)
    x = torch.randn(1, 8, 3, 3, dtype=torch.float64, requires_grad=True)

    def penalty(layer: Callable[[Tensor], Tensor], change: float) -> tuple[Tensor, ...]:
        y = layer(x)
        conv.gate.data.mul_(change)
        first = torch.autograd.grad(y.square().sum(), [x, *conv.parameters()], create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), [x, *conv.parameters()])

    layer: Any = torch.compile(conv, backend="eager", fullgraph=True) if compiled else conv
    expected = penalty(conv.masked_dense, 1)
    assert_close(penalty(layer, -1), expected, **EXACT)


@forms
@pytest.mark.parametrize("derivatives", [jacobian, hessian])
def test_gradients_can_be_batched(derivatives: Callable[..., Any], form: dict[str, Any]) -> None:
    torch.manual_seed(0)
    conv = conv_with("010", 8, 8, 2, dtype=torch.float64, **form)
    names, parameters = zip(*conv.named_parameters(), strict=True)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        y = torch.func.functional_call(conv, dict(zip(names, parameters, strict=True)), (x,))
        return y.sigmoid().sum() if derivatives is hessian else y

    inputs = (torch.randn(1, 8, 3, 3, dtype=torch.float64), *parameters)
    assert_close(derivatives(function, inputs, vectorize=True), derivatives(function, inputs))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32 forward", "autocast forward"])
@forms
def test_autocast_around_a_backward_pass_does_not_round_the_gradients(
    form: dict[str, Any], autocast: bool, create_graph: bool, device: str
) -> None:
    torch.manual_seed(0)
    conv = conv_with("101010", 64, 64, padding=1, **form).to(device)
    x, grad_y = (torch.randn(4, 64, 8, 8, device=device, requires_grad=True) for _ in range(2))

    def backward(inside: bool) -> tuple[Tensor, ...]:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            y = conv(x).float()
        with torch.autocast(device, torch.bfloat16, enabled=inside):
            return torch.autograd.grad(y, [x, *conv.parameters()], grad_y, create_graph=create_graph)

    for grad, expected in zip(backward(inside=True), backward(inside=False), strict=True):
        assert_close(grad, expected, rtol=0, atol=2e-4 * expected.abs().max().item())


@forms
def test_function_transforms(form: dict[str, Any]) -> None:
    conv = conv_with("1010", bias=False, dtype=torch.float64, **form)
    x = torch.randn(3, 16, 5, 5, dtype=torch.float64)
    parameters = {name: value.detach() for name, value in conv.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(conv, parameters, (x,)).square().sum()

    expected = torch.autograd.grad(conv.masked_dense(x).square().sum(), list(conv.parameters()))
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x.unsqueeze(1))
    for name, grad in zip(dict(conv.named_parameters()), expected, strict=True):
        assert_close(torch.func.grad(loss)(parameters, x)[name], grad, **EXACT)
        assert_close(each[name].sum(0), grad, **EXACT)
    for jvp in (torch.func.jvp, torch.compile(torch.func.jvp, backend="aot_eager")):
        assert_close(jvp(conv, (x,), (x,))[1], conv(x), **EXACT)  # the layer is linear in x
    with torch.autograd.forward_ad.dual_level():
        dual = conv(torch.autograd.forward_ad.make_dual(x, x))
        assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, conv(x), **EXACT)


@forms
@pytest.mark.parametrize("create_graph", [False, True])
def test_the_default_device_of_new_tensors_does_not_matter(create_graph: bool, form: dict[str, Any]) -> None:
    """`torch.set_default_device("cuda")` in a script must not move what a layer on the CPU computes with."""
    conv = conv_with("1010", padding=1, dtype=torch.float64, **form)
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64, requires_grad=True)
    expected = results(conv, x, create_graph)
    torch.set_default_device("meta")
    try:
        got, groups, small = results(conv, x, create_graph), conv.num_groups, compact(conv)
    finally:
        torch.set_default_device(None)
    assert groups == 4
    assert_close(got, expected, **EXACT)
    assert_close(small(x), expected[0], **EXACT)


@forms
@pytest.mark.parametrize("closed", ["0000", "1000", "0110", "1111"])
def test_counted_operations_are_those_of_the_group_convolution(closed: str, form: dict[str, Any]) -> None:
    conv, x = conv_with(closed, 16, 32, padding=1, **form), torch.randn(2, 16, 5, 5, requires_grad=True)
    small = nn.Conv2d(16, 32, 3, padding=1, groups=conv.num_groups)
    with FlopCounterMode(display=False) as one:
        small(x)
    with FlopCounterMode(display=False) as forward:
        conv(x)
    assert forward.get_total_flops() == one.get_total_flops()
    conv.gate.requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as whole:
        patch.setattr(grouped, "MIN_CHANNELS", dict.fromkeys(grouped.MIN_CHANNELS, 1))
        conv(x).sum().backward()
    assert whole.get_total_flops() == 3 * one.get_total_flops()  # torch counts too much for groups in backward


@forms
def test_all_counters_of_operations_see_the_group_convolution(form: dict[str, Any], monkeypatch: Patch) -> None:
    """Those that are a TorchDispatchMode see its operator. Others replace the function, and take no lists."""
    conv, x = conv_with("0110", padding=1, **form), torch.randn(2, 16, 5, 5)
    calls: list[Any] = []
    function = nn.functional.conv2d
    monkeypatch.setattr(nn.functional, "conv2d", lambda *args: calls.append(args) or function(*args))
    with FlopCounterMode(display=False) as counter:
        conv(x)
    values, options = conv.gate.detach().double(), ([1, 1], [1, 1], [1, 1], conv.sort, conv.nested)
    with FlopCounterMode(display=False) as compiled:
        torch.ops.timm_dgconv.dgconv2d(x, conv.weight, conv.bias, conv.gate, values, *options)
    assert list(counter.get_flop_counts()["Global"]) == [torch.ops.aten.convolution]
    assert [args[3:] for args in calls] == 2 * [((1, 1), (1, 1), (1, 1), 4)]
    assert compiled.get_total_flops() == counter.get_total_flops()


@forms
@pytest.mark.filterwarnings("error:timm_dgconv")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "frozen"), [("inductor", False), ("aot_eager", False), ("aot_eager", True)])
def test_a_compiled_graph_holds_no_open_bits(name: str, frozen: bool, device: str, form: dict[str, Any]) -> None:
    torch._dynamo.reset()
    conv = conv_with("1010", padding=1, **form).to(device)
    conv.gate.requires_grad_(not frozen)
    x = torch.randn(2, 16, 5, 5, device=device, requires_grad=True)
    backend = CompileCounterWithBackend(name)
    compiled = torch.compile(conv, backend=backend, fullgraph=True)
    for flip in ([0], [1, 2], [0, 1, 2, 3]):
        with torch.no_grad():
            conv.gate[flip] *= -1
        wanted = [p for p in (x, *conv.parameters()) if p.requires_grad]
        y, expected = compiled(x), conv.masked_dense(x)
        assert_close(y, expected, rtol=1e-3, atol=1e-3)
        same = torch.autograd.grad(expected.square().sum(), wanted)
        if HAS_OPERATOR:
            conv.gate.data.neg_()  # backward has the gates of forward
        assert_close(torch.autograd.grad(y.square().sum(), wanted), same, rtol=1e-3, atol=1e-3)
    assert backend.frame_count == 1
    if HAS_OPERATOR:
        ops = [str(node.target) for node in backend.graphs[0].graph.nodes if "timm_dgconv" in str(node.target)]
        assert len(ops) == 2, "one reading and one convolution"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("device", DEVICES[1:])
def test_flipped_gates_show_in_cuda_graphs_of_torch_compile(device: str, training: bool) -> None:
    """With mode="reduce-overhead" torch may capture parts of the network."""
    torch._dynamo.reset()
    conv = conv_with("1010", padding=1)
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), conv, nn.ReLU(), nn.Conv2d(16, 4, 1)).to(device)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    x = torch.randn(2, 16, 5, 5, device=device)
    for flip in ([0], [1, 2], [0, 1, 2, 3], [3], [0, 2], [1]):  # the first calls warm up and capture
        torch.compiler.cudagraph_mark_step_begin()
        with torch.set_grad_enabled(training):
            y, expected = compiled(x), model[3:](conv.masked_dense(model[:2](x)))
        assert_close(y, expected, rtol=1e-3, atol=1e-3)
        if training:
            got, wanted = (torch.autograd.grad(z.square().sum(), list(model.parameters())) for z in (y, expected))
            assert_close(got, wanted, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            conv.gate[flip] *= -1


@pytest.mark.parametrize("device", DEVICES[1:])
def test_flipped_gates_show_in_a_captured_cuda_graph(device: str) -> None:
    conv = conv_with("1010").to(device)
    x = torch.randn(2, 16, 5, 5, device=device)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels must be loaded before the capture
            conv.masked_dense(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = conv(x)
        conv.gate.neg_()
        graph.replay()
        assert_close(y, conv.masked_dense(x), rtol=1e-3, atol=1e-3)


@forms
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_the_operators_keep_the_rules_of_torch(memory_format: torch.memory_format, form: dict[str, Any]) -> None:
    conv = conv_with("1010", **form)
    x = torch.randn(2, 16, 5, 5, requires_grad=True).to(memory_format=memory_format)
    values = conv.gate.detach().double()
    options = (values, [1, 1], [1, 1], [1, 1], conv.sort, conv.nested)
    torch.library.opcheck(torch.ops.timm_dgconv.dgconv2d.default, (x, conv.weight, conv.bias, conv.gate, *options))
    tensors = [tensor.detach() for tensor in (torch.randn(2, 16, 5, 5), x, conv.weight, conv.gate)]
    torch.library.opcheck(torch.ops.timm_dgconv.dgconv2d_backward.default, (*tensors, *options, [True, True, True]))
    torch.library.opcheck(torch.ops.timm_dgconv.read_gates.default, ([tensors[3], tensors[3]],))
