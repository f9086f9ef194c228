"""Every span against the masked dense convolution, and how autograd and torch's tools use the operator."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from conftest import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from timm_dgconv import DGConv2d, group_conv

EXACT = dict(rtol=1e-10, atol=1e-10)


def conv_with(closed: list[bool], *args: int, **kwargs: object) -> DGConv2d:
    conv = DGConv2d(*args, **kwargs)
    with torch.no_grad():
        conv.gate.copy_(torch.where(torch.tensor(closed), -0.5, 0.5))
    return conv


def masked_dense(conv: DGConv2d, x: Tensor) -> Tensor:
    weight = conv.weight * conv.connectivity()[:, :, None, None]
    return nn.functional.conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation)


def gradients(conv: DGConv2d, y: Tensor, x: Tensor) -> list[Tensor]:
    grad_y = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    return [y, *torch.autograd.grad(y, [x, *conv.parameters()], grad_y)]


@pytest.mark.parametrize("closed", list(itertools.product([False, True], repeat=4)), ids=str)
def test_all_spans_of_sixteen_channels(closed: tuple[bool, ...]) -> None:
    conv = conv_with(list(closed), 16, 16, 3, padding=1, dtype=torch.float64)
    x = torch.randn(2, 16, 4, 3, dtype=torch.float64, requires_grad=True)
    expected = gradients(conv, masked_dense(conv, x), x)
    for conv.spans in [None, *itertools.product(range(16), repeat=2)]:
        assert_close(gradients(conv, conv(x), x), expected, **EXACT)


@settings(max_examples=60)
@given(data=st.data())
def test_random_layers(data: st.DataObject) -> None:
    draw = data.draw
    num_bits = draw(st.integers(1, 10))
    widest = 1024 >> num_bits
    q_in, q_out = (draw(st.integers(1, max(1, min(5, widest)))) for _ in range(2))
    if (q_in | q_out) & 1 == 0:
        q_out += 1
    kernel, stride, dilation = (draw(st.tuples(st.integers(1, 3), st.integers(1, 3))) for _ in range(3))
    closed = draw(st.lists(st.booleans(), min_size=num_bits, max_size=num_bits))
    conv = conv_with(
        closed,
        q_in << num_bits,
        q_out << num_bits,
        kernel,
        stride=stride,
        padding=draw(st.tuples(st.integers(0, 2), st.integers(0, 2))),
        dilation=dilation,
        bias=draw(st.booleans()),
        sort=draw(st.booleans()),
        dtype=torch.float64,
    )
    x = torch.randn(
        draw(st.integers(1, 2)), conv.in_channels, draw(st.integers(7, 9)), draw(st.integers(7, 9))
    ).double()
    if draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    if draw(st.booleans()):
        conv = conv.to(memory_format=torch.channels_last)
    x.requires_grad_()
    span = st.integers(0, (1 << num_bits) - 1)
    conv.spans = draw(st.none() | st.tuples(span, span))
    y = conv(x)
    assert_close(gradients(conv, y, x), gradients(conv, masked_dense(conv, x), x), rtol=1e-10, atol=1e-9)
    assert y.stride() == masked_dense(conv, x).stride() or 1 in y.shape


def test_channel_counts_that_are_no_powers_of_two() -> None:
    conv = conv_with([True, False, True], 24, 40, 3, padding=1, dtype=torch.float64)
    x = torch.randn(2, 24, 4, 4, dtype=torch.float64, requires_grad=True)
    expected = gradients(conv, masked_dense(conv, x), x)
    for conv.spans in itertools.product(range(8), repeat=2):
        assert_close(gradients(conv, conv(x), x), expected, **EXACT)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)), ids=str)
def test_gradients_of_some(needs: tuple[bool, ...]) -> None:
    conv = conv_with([True, False, True, False], 16, 16, 3, dtype=torch.float64)
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    tensors = [x, conv.weight, conv.bias, conv.gate]
    for tensor, need in zip(tensors, needs, strict=True):
        tensor.requires_grad_(need)
    y = conv(x)
    assert y.requires_grad == any(needs)
    if any(needs):
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        grad_y = torch.randn_like(y)
        expected = torch.autograd.grad(masked_dense(conv, x), wanted, grad_y)
        assert_close(torch.autograd.grad(y, wanted, grad_y), expected, **EXACT)
    with torch.no_grad():
        assert_close(conv(x), y, **EXACT)
    with torch.inference_mode():
        assert_close(conv(x), y, **EXACT)


def test_twice_in_one_forward_checkpointed_and_accumulated() -> None:
    conv = conv_with([True, False, True, False], 16, 16, 3, padding=1, dtype=torch.float64)
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64, requires_grad=True)
    expected = gradients(conv, masked_dense(conv, masked_dense(conv, x).relu()), x)
    assert_close(gradients(conv, conv(conv(x).relu()), x), expected, **EXACT)
    y = checkpoint(lambda x: conv(conv(x).relu()), x, use_reentrant=False)
    assert_close(gradients(conv, y, x), expected, **EXACT)
    for _ in range(3):
        conv(conv(x).relu()).square().sum().backward()
    once = torch.autograd.grad(conv(conv(x).relu()).square().sum(), list(conv.parameters()))
    for parameter, grad in zip(conv.parameters(), once, strict=True):
        assert_close(parameter.grad, 3 * grad, **EXACT)


def test_gradients_can_be_differentiated() -> None:
    conv = conv_with([True, False], 4, 4, 2, dtype=torch.float64)
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)

    def penalty(layer: object) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(layer(x).square().sum(), [x, *conv.parameters()], create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), [x, conv.weight, conv.bias])

    assert_close(penalty(conv), penalty(lambda x: masked_dense(conv, x)), **EXACT)


def test_function_transforms() -> None:
    conv = conv_with([True, False, True, False], 16, 16, 3, bias=False, dtype=torch.float64)
    x = torch.randn(3, 16, 5, 5, dtype=torch.float64)
    parameters = {name: value.detach() for name, value in conv.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(conv, parameters, (x,)).square().sum()

    expected = torch.autograd.grad(masked_dense(conv, x).square().sum(), list(conv.parameters()))
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x.unsqueeze(1))
    for name, grad in zip(dict(conv.named_parameters()), expected, strict=True):
        assert_close(torch.func.grad(loss)(parameters, x)[name], grad, **EXACT)
        assert_close(each[name].sum(0), grad, **EXACT)
    assert_close(torch.func.jvp(conv, (x,), (x,))[1], conv(x), **EXACT)  # it is linear in x
    with torch.autograd.forward_ad.dual_level():
        dual = conv(torch.autograd.forward_ad.make_dual(x, x))
        assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, conv(x), **EXACT)


def test_a_gradient_that_somebody_holds_is_not_written_to() -> None:
    conv = conv_with([True, False, True, False], 16, 16, 3)
    x = torch.randn(2, 16, 5, 5)
    conv(x).sum().backward()
    held, before = conv.weight.grad, conv.weight.grad.clone()
    conv.zero_grad()
    conv(2 * x).sum().backward()
    assert torch.equal(held, before)
    assert_close(conv.weight.grad, 2 * before)
    held.add_(1)
    del held
    conv.zero_grad()
    with torch.no_grad():
        conv.gate.neg_()
    conv(x).sum().backward()  # may use the memory of the first
    expected = copy.deepcopy(conv).double()
    expected.zero_grad()
    masked_dense(expected, x.double()).sum().backward()
    assert_close(conv.weight.grad.double(), expected.weight.grad, rtol=1e-4, atol=1e-4)


def test_empty_batch() -> None:
    conv = conv_with([True, False, True, False], 16, 16, 3)
    x = torch.randn(0, 16, 5, 5, requires_grad=True)
    conv(x).sum().backward()
    assert x.grad.shape == x.shape
    assert not conv.gate.grad.any()
    assert not conv.weight.grad.any()


@pytest.mark.parametrize("frozen", [False, True])
def test_compile_does_not_depend_on_the_open_set(frozen: bool) -> None:
    conv = conv_with([True, False, True, False], 16, 16, 3)
    conv.gate.requires_grad_(not frozen)
    x = torch.randn(2, 16, 5, 5, requires_grad=True)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(conv, backend=backend, fullgraph=True)
    for flip in ([0], [1, 2], [0, 1, 2, 3]):
        with torch.no_grad():
            conv.gate[flip] *= -1
        conv.zero_grad()
        compiled(x).sum().backward()
        assert_close(compiled(x), masked_dense(conv, x))
    assert len(graphs) == 1
    if hasattr(torch.compiler, "is_exporting"):
        ops = {node.target for node in graphs[0].graph.nodes}
        assert torch.ops.timm_dgconv.dgconv2d in ops or torch.ops.timm_dgconv.dgconv2d.default in ops


def test_the_operator_keeps_torchs_rules() -> None:
    conv = conv_with([True, False, True, False], 16, 16, 3)
    x = torch.randn(2, 16, 5, 5, requires_grad=True)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        args = (
            x.to(memory_format=memory_format),
            conv.weight,
            conv.bias,
            conv.gate,
            [1, 1],
            [1, 1],
            [1, 1],
            False,
            None,
        )
        torch.library.opcheck(torch.ops.timm_dgconv.dgconv2d.default, args)


def test_one_transfer_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where gates are not on the CPU, which this test plays."""
    reads = []
    tolist = Tensor.tolist
    monkeypatch.setattr(group_conv, "_READ_DIRECTLY", set())
    monkeypatch.setattr(Tensor, "tolist", lambda self: reads.append(self) or tolist(self))
    model = nn.Sequential(*(DGConv2d(16, 16, 1) for _ in range(4)))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x = torch.randn(2, 16, 3, 3)
    model(x)  # the layers become known
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        reads.clear()
        y = model(x)
        assert len(reads) == 1
        model.eval()(x)
        assert len(reads) == 1
        expected = x
        for layer in model:
            expected = masked_dense(layer, expected)
        assert_close(y, expected)
    model[0].gate.data = -model[0].gate.data  # other memory, the same version
    assert_close(model[0](x), masked_dense(model[0], x))


def test_nan_gates_are_an_error() -> None:
    conv = conv_with([True, False, True, False], 16, 16, 3)
    with torch.no_grad():
        conv.gate[1] = float("nan")
    with pytest.raises(RuntimeError, match=r"gates of a DGConv2d are nan: .*diverged"):
        conv(torch.randn(1, 16, 5, 5))


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    run_ranks(
        tmp_path,
        """
        from torch.nn.parallel import DistributedDataParallel
        from timm_dgconv import DGConv2d

        torch.manual_seed(rank)  # gates that the broadcast must replace
        conv = DGConv2d(16, 16, 3, dtype=torch.float64)
        model = DistributedDataParallel(conv)
        x = torch.sin(torch.arange(4 * 16 * 25, dtype=torch.float64)).view(4, 16, 5, 5)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(10):
            optimizer.zero_grad()
            model(x[2 * rank : 2 * rank + 2]).square().mean().backward()
            grads = [p.grad.clone() for p in conv.parameters()]
            whole = torch.autograd.grad(conv(x).square().mean(), list(conv.parameters()))
            for grad, expected in zip(grads, whole):
                torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-10)
            optimizer.step()
        torch.save(conv.gate.detach(), f"{folder}/gate{rank}.pt")
        """,
    )
    assert torch.equal(*(torch.load(tmp_path / f"gate{rank}.pt") for rank in range(2)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
class TestCuda:
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
    def test_all_spans(self, memory_format: torch.memory_format) -> None:
        conv = conv_with([True, False, True, False], 16, 16, 3, padding=1, dtype=torch.float64)
        x = torch.randn(2, 16, 4, 3, dtype=torch.float64, requires_grad=True)
        expected = gradients(conv, masked_dense(conv, x), x)
        on_gpu = copy.deepcopy(conv).cuda()
        x = x.detach().to("cuda", memory_format=memory_format).requires_grad_()
        for on_gpu.spans in [None, *itertools.product(range(16), repeat=2)]:
            y = on_gpu(x)
            grad_y = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape).cuda()
            got = [y, *torch.autograd.grad(y, [x, *on_gpu.parameters()], grad_y)]
            assert_close([value.cpu() for value in got], expected, **EXACT)

    def test_one_transfer_a_step(self) -> None:
        model = nn.Sequential(*(DGConv2d(16, 16, 1) for _ in range(4))).cuda()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        x = torch.randn(2, 16, 3, 3, device="cuda")
        model(x)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
            model[0](x)  # reads all gates
            torch.cuda.set_sync_debug_mode("error")
            try:
                model(x).square().sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def test_compiled_with_cuda_graphs(self) -> None:
        conv = conv_with([True, False, True, False], 16, 16, 3).cuda()
        x = torch.randn(2, 16, 5, 5, device="cuda", requires_grad=True)
        compiled = torch.compile(conv, mode="reduce-overhead", fullgraph=True)
        for _ in range(5):
            assert_close(compiled(x), masked_dense(conv, x), rtol=1e-3, atol=1e-3)
            with torch.no_grad():
                conv.gate.neg_()

    def test_captured_in_a_cuda_graph(self) -> None:
        conv = conv_with([True, False, True, False], 16, 16, 3).cuda()
        x = torch.randn(2, 16, 5, 5, device="cuda")
        with torch.no_grad():
            conv(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = conv(x)
            conv.gate.neg_()
            graph.replay()
            assert_close(y, masked_dense(conv, x), rtol=1e-3, atol=1e-3)


def test_another_dtype_and_shape_of_the_same_parameter() -> None:
    """model.double() keeps the Parameter, whose last gradient had another size."""
    conv = DGConv2d(16, 16, 3, bias=False)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        conv.to(dtype)
        conv.zero_grad()
        x = torch.randn(1, 16, 4, 4, dtype=dtype)
        conv(x).square().sum().backward()
        expected = torch.autograd.grad(conv._masked_dense(x).square().sum(), conv.weight)[0]
        torch.testing.assert_close(conv.weight.grad, expected)
    expanded = nn.Parameter(torch.randn(16, 1, 1, 1).double().expand(16, 16, 1, 1))
    assert not expanded.is_contiguous()
    y = group_conv.dgconv2d(x.double(), expanded, None, conv.gate.detach().double(), (1, 1), (0, 0), (1, 1))
    y.sum().backward()
    assert expanded.grad is not None
    assert expanded.grad.shape == expanded.shape
