"""What CUDA does differently, simulated with fake tensors on a device "cuda", which need no GPU.

A fake tensor has a shape, strides, a dtype and a device, and no values. So the operator cannot read gates here, and
each test says which gates are closed.
"""

import ast
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from conftest import conv_with
from timm_dgconv.layers.layout import in_format, is_channels_last
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from timm_dgconv.layers import dgconv_op, layout, spans

CACHES = [value for value in vars(layout).values() if hasattr(value, "cache_clear")]
ALL = (True, True, True)


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Simulate CUDA, without streams and without the tuner. Fake index tensors must not outlive the mode."""
    monkeypatch.setattr(dgconv_op, "place", lambda tensor: (tensor.device, 0))
    monkeypatch.setattr(spans, "TUNE", False)
    for cache in CACHES:
        cache.cache_clear()
    with FakeTensorMode():
        try:
            tensor((1, 2, 2, 2), torch.float32, "channels_last")
        except RuntimeError as error:  # in torch 2.5
            pytest.skip(f"fake tensors need CUDA: {error}".splitlines()[0])
        yield
    for cache in CACHES:
        cache.cache_clear()


class Operators(TorchDispatchMode):
    """Records the operators that run. Its convolutions have the memory formats of cuDNN's convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[Tensor], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            result = in_format(result, is_channels_last(*args[:2]))
        elif func is torch.ops.aten.convolution_backward.default:
            channels_last = is_channels_last(*args[1:3])
            result = tree_map_only(Tensor, lambda grad: in_format(grad, channels_last), result)
        inputs, outputs = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), result))
        self.calls.append((func, inputs, outputs))
        return result

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that the operators have read or returned."""
        return [tensor for _, inputs, outputs in self.calls for tensor in (*inputs, *outputs)]

    @property
    def launches(self) -> int:
        """The number of kernels that the operators launch. A convolution counts as one."""
        return sum(
            2 if func.overloadpacket is torch.ops.aten.masked_fill else 1  # it copies and then fills
            for func, _, outputs in self.calls
            if any(output.is_cuda for output in outputs) and not func.is_view and func.overloadpacket not in NO_KERNEL
        )


NO_KERNEL = [
    getattr(torch.ops.aten, name)
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")
]


class Case(NamedTuple):
    """A layer and its input."""

    channels: tuple[int, int] = (16, 32)
    closed: str = "1100"
    size: int = 7
    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1
    input_dtype: torch.dtype = torch.bfloat16
    weight_dtype: torch.dtype = torch.float32
    input_format: str = "channels_last"
    weight_format: str = "channels_last"
    grad_format: str = "channels_last"
    sort: bool = False
    spans: tuple[int, int, int] | None = None
    mask: tuple[bool, bool, bool] = ALL

    def tensors(self, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
        """Input, weight and gates."""
        x = tensor((batch, self.channels[0], self.size, self.size + 1), self.input_dtype, self.input_format)
        weight = tensor((*self.channels[::-1], *[self.kernel_size] * 2), self.weight_dtype, self.weight_format)
        return x, weight, tensor((len(self.closed),), self.weight_dtype)

    @property
    def options(self) -> tuple[Any, ...]:
        padding = self.dilation * (self.kernel_size // 2)
        return [self.stride] * 2, [padding] * 2, [self.dilation] * 2, self.sort, self.spans

    def forward(self, x: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
        closed = [bit == "1" for bit in self.closed]
        return dgconv_op._forward(x, weight, None, gate, *self.options, closed=closed)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        closed = [bit == "1" for bit in self.closed]
        return dgconv_op._backward(grad, x, weight, gate, *self.options, self.mask, closed=closed)


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "slice": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "expanded": lambda x: x[:1, :1, :1, :1].expand(x.shape),
}


def tensor(shape: Sequence[int], dtype: torch.dtype, memory_format: str = "contiguous") -> Tensor:
    return FORMATS[memory_format](torch.empty(*shape, dtype=dtype, device="cuda"))


def run(case: Case, batch: int = 2) -> tuple[Operators, Operators]:
    """The operators of one forward and one backward pass."""
    tensors = case.tensors(batch)
    with Operators() as forward:
        y = case.forward(*tensors)
    grad = tensor(y.shape, y.dtype, case.grad_format)
    with Operators() as backward:
        case.backward(grad, *tensors)
    return forward, backward


# Shapes, dtypes, devices and strides.

AXES: dict[str, list[Any]] = dict(
    channels=[(16, 32), (32, 16), (48, 16)],
    closed=["1100", "0101", "0011", "0000", "1111"],
    kernel_size=[3, 1],
    stride=[1, 2],
    dilation=[1, 2],
    input_format=["contiguous", "channels_last", "slice"],
    weight_format=["contiguous", "channels_last", "slice"],
    grad_format=["contiguous", "channels_last", "expanded"],
    sort=[False, True],
    spans=[None, (0, 0, 0), (5, 3, 12), (15, 15, 15)],
    mask=list(itertools.product([False, True], repeat=3)),
)
DTYPES = [
    (torch.float32, torch.float32),
    *itertools.product([torch.float16, torch.bfloat16], [torch.float32]),
    *((dtype, dtype) for dtype in (torch.float16, torch.bfloat16)),
]


def description(x: Tensor) -> tuple[Any, ...]:
    """What a compiled graph relies on. The stride of a dimension of size 1 does not matter."""
    strides = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
    return tuple(x.shape), strides, x.dtype, x.device


@pytest.mark.usefixtures("simulation")
@pytest.mark.parametrize("number", [50, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("input_dtype", "weight_dtype"), DTYPES, ids=str)
def test_results_are_as_the_fake_operators_say(
    input_dtype: torch.dtype, weight_dtype: torch.dtype, number: int
) -> None:
    generator = random.Random(f"{input_dtype} {weight_dtype}")
    columns = [generator.sample((values * number)[:number], number) for values in AXES.values()]
    for values in zip(*columns, strict=True):
        case = Case(input_dtype=input_dtype, weight_dtype=weight_dtype, **dict(zip(AXES, values, strict=True)))
        tensors = case.tensors()
        with Operators():
            y = case.forward(*tensors)
        expected = dgconv_op._fake_forward(*tensors[:2], None, tensors[2], *case.options)
        assert description(y) == description(expected), case
        grad = tensor(y.shape, y.dtype, case.grad_format)
        with Operators():
            grads = case.backward(grad, *tensors)
        fake_grads = dgconv_op._fake_backward(grad, *tensors, *case.options, case.mask)
        assert list(map(description, grads)) == list(map(description, fake_grads)), case


# Kernels.


def five_closed(groups: str, num_bits: int) -> str:
    """Close five gates: those of the most significant bits, or those of the least significant bits."""
    return "11111".ljust(num_bits, "0") if groups == "contiguous" else "11111".rjust(num_bits, "0")


@pytest.mark.usefixtures("simulation")
def test_launches() -> None:
    """Count the kernels of a layer in bfloat16 with 32 groups, after the first pass."""
    rows: list[tuple[Any, ...]] = []
    for groups, channels in itertools.product(["contiguous", "permuted"], [128, 256, 512, 1024, 2048]):
        case = Case((channels, channels), five_closed(groups, channels.bit_length() - 1))
        counts = []
        for variant in (case, case._replace(mask=(True, True, False)), case._replace(spans=(0, 0, 0))):
            run(variant)
            counts.append([operators.launches for operators in run(variant)])
        (forward, backward), (_, frozen), (_, narrow) = counts
        rows.append((groups, channels, forward, backward, frozen, narrow))
    header = ("groups", "channels", "forward", "backward", "backward, frozen gates", "backward, spans of 0")
    lines = [header, ["---"] * len(header), *rows]
    print("", *(f"| {' | '.join(map(str, line))} |" for line in lines), sep="\n")
    limits = {"contiguous": (3, 24, 16, 24), "permuted": (8, 28, 24, 28)}
    for groups, channels, *row in rows:
        assert all(count <= limit for count, limit in zip(row, limits[groups], strict=True)), (groups, channels, row)


@pytest.mark.usefixtures("simulation")
@pytest.mark.parametrize("spans", [None, (0, 0, 0)], ids=["static spans", "spans of 0"])
@pytest.mark.parametrize("closed", ["01" * 5, "10" * 5, "01" * 6, "10" * 6])
def test_number_of_dimensions(closed: str, spans: tuple[int, int, int] | None) -> None:
    """A kernel of CUDA takes tensors of up to 25 dimensions, a kernel of ROCm 16."""
    for memory_format in ("contiguous", "channels_last"):
        case = Case((1 << len(closed),) * 2, closed, input_format=memory_format, weight_format=memory_format)
        for operators in run(case._replace(spans=spans)):
            assert max(tensor.ndim for tensor in operators.tensors if tensor.is_cuda) <= 8


@pytest.mark.usefixtures("simulation")
@pytest.mark.parametrize("spans", [None, (0, 0, 0), (5, 3, 12)], ids=str)
@pytest.mark.parametrize("closed", ["1100", "0101", "0011", "0000", "1111"])
def test_nothing_comes_from_the_host_after_the_first_pass(closed: str, spans: tuple[int, int, int] | None) -> None:
    case = Case(closed=closed, spans=spans)
    first = run(case)
    assert closed == "0000" or any(tensor.is_cpu for operators in first for tensor in operators.tensors)
    for batch in (2, 3):
        for operators in run(case, batch):
            assert not any(tensor.is_cpu for tensor in operators.tensors)
            assert torch.ops.aten.arange not in [func.overloadpacket for func, _, _ in operators.calls]


# CUDA graphs.


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="torch has no such tag")
def test_operators_are_unsafe_in_cuda_graphs() -> None:
    for operator in (torch.ops.timm_dgconv.dgconv2d, torch.ops.timm_dgconv.dgconv2d_backward):
        assert torch.Tag.cudagraph_unsafe in operator.default.tags


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="torch has no such tag")
def test_compiled_cuda_graphs_exclude_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the code for mode="reduce-overhead", in which each function partition_* becomes a CUDA graph."""
    inductor = pytest.importorskip("torch._inductor.config")
    functorch = pytest.importorskip("torch._functorch.config")
    scheduler = pytest.importorskip("torch._inductor.scheduler")
    get_code = getattr(pytest.importorskip("torch._inductor.utils"), "get_code", None)
    node = getattr(scheduler, "BaseSchedulerNode", None)
    known = hasattr(node, "is_gpu") and hasattr(inductor, "graph_partition")
    if not known or get_code is None or not hasattr(functorch, "force_non_lazy_backward_lowering"):
        pytest.skip("torch has other internals")
    monkeypatch.setattr(node, "is_gpu", lambda self: True)
    conv = conv_with("1010", padding=1)
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), conv, nn.ReLU(), nn.Conv2d(16, 4, 1))
    options = {"triton.cudagraphs": True, "graph_partition": True, "fx_graph_cache": False}
    with inductor.patch(options), functorch.patch(force_non_lazy_backward_lowering=True):
        codes = [code for code in get_code(torch.compile(model, fullgraph=True), torch.randn(2, 16, 5, 5)) if code]
    torch._dynamo.reset()
    for code, name in zip(codes, ["dgconv2d", "dgconv2d_backward"], strict=True):
        partitions = [
            ast.get_source_segment(code, function) or ""
            for function in ast.walk(ast.parse(code))
            if isinstance(function, ast.FunctionDef) and function.name.startswith("partition_")
        ]
        call = f"torch.ops.timm_dgconv.{name}.default("
        assert call in code
        assert len(partitions) == 2
        assert not any(call in partition for partition in partitions)
