"""What CUDA does differently, simulated with fake tensors on a device "cuda", which need no GPU.

A fake tensor has a shape, strides, a dtype and a device, and no values. So the operator cannot read gates here, and
each test says which gates are closed.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from conftest import SORT_NESTED
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from timm_dgconv.ops import autograd
from timm_dgconv.ops.grouped import in_format, is_channels_last


@pytest.fixture
def simulation() -> Iterator[None]:
    """Simulate CUDA."""
    with FakeTensorMode():
        try:
            tensor((1, 2, 2, 2), torch.float32, "channels_last")
        except RuntimeError as error:  # in torch 2.5
            pytest.skip(f"fake tensors need CUDA: {error}".splitlines()[0])
        yield


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
    def dimensions(self) -> int:
        """The largest number of dimensions of a kernel. Torch merges neighbouring dimensions that have one stride."""
        kernels = [inputs + outputs for func, inputs, outputs in self.calls if outputs and not func.is_view]
        shapes = [(tensors, {tensor.shape for tensor in tensors}) for tensors in kernels]
        return max(merged_dimensions([t for t in ts if t.shape == shape]) for ts, found in shapes for shape in found)

    @property
    def launches(self) -> int:
        """The number of kernels that the operators launch. A convolution counts as one."""
        return sum(
            2 if func.overloadpacket is torch.ops.aten.masked_fill else 1  # it copies and then fills
            for func, _, outputs in self.calls
            if any(output.is_cuda for output in outputs) and not func.is_view and func.overloadpacket not in NO_KERNEL
        )


def merged_dimensions(tensors: list[Tensor]) -> int:
    """Return the number of dimensions above 1 of tensors of one shape, after those of one stride are merged."""
    shape = tensors[0].shape
    dims = [dim for dim, size in enumerate(shape) if size > 1]
    merged = [all(t.stride(a) == t.stride(b) * shape[b] for t in tensors) for a, b in itertools.pairwise(dims)]
    return len(dims) - sum(merged)


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
    form: tuple[bool, bool] = (True, True)
    mask: tuple[bool, bool, bool] = (True, True, True)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Input, weight and gates."""
        x = tensor((2, self.channels[0], self.size, self.size + 1), self.input_dtype, self.input_format)
        weight = tensor((*self.channels[::-1], *[self.kernel_size] * 2), self.weight_dtype, self.weight_format)
        return x, weight, tensor((len(self.closed),), self.weight_dtype)

    @property
    def options(self) -> tuple[Any, ...]:
        padding = self.dilation * (self.kernel_size // 2)
        values = [-1.0 if bit == "1" else 1.0 for bit in self.closed]
        return values, [self.stride] * 2, [padding] * 2, [self.dilation] * 2, *self.form


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "slice": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "expanded": lambda x: x[:1, :1, :1, :1].expand(x.shape),
}


def tensor(shape: Sequence[int], dtype: torch.dtype, memory_format: str = "contiguous") -> Tensor:
    return FORMATS[memory_format](torch.empty(*shape, dtype=dtype, device="cuda"))


def run(case: Case) -> tuple[Operators, Operators]:
    """The operators of one forward and one backward pass."""
    x, weight, gate = case.tensors()
    with Operators() as forward:
        y = autograd._output(x, weight, None, gate, *case.options)
    grad = tensor(y.shape, y.dtype, case.grad_format)
    with Operators() as backward:
        autograd._gradients(grad, x, weight, gate, *case.options, case.mask)
    return forward, backward


AXES: dict[str, list[Any]] = dict(
    channels=[(16, 32), (32, 16), (48, 16)],
    closed=["1100", "0101", "0011", "0000", "1111"],
    kernel_size=[3, 1],
    stride=[1, 2],
    dilation=[1, 2],
    input_format=["contiguous", "channels_last", "slice"],
    weight_format=["contiguous", "channels_last", "slice"],
    grad_format=["contiguous", "channels_last", "expanded"],
    form=SORT_NESTED,
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
def test_results_are_what_fake_operators_say(input_dtype: torch.dtype, weight_dtype: torch.dtype, number: int) -> None:
    generator = random.Random(f"{input_dtype} {weight_dtype}")
    columns = [generator.sample((values * number)[:number], number) for values in AXES.values()]
    for values in zip(*columns, strict=True):
        case = Case(input_dtype=input_dtype, weight_dtype=weight_dtype, **dict(zip(AXES, values, strict=True)))
        x, weight, gate = case.tensors()
        with Operators():
            y = autograd._output(x, weight, None, gate, *case.options)
        expected = autograd._fake_output(x, weight, None, gate, *case.options)
        assert description(y) == description(expected), case
        grad = tensor(y.shape, y.dtype, case.grad_format)
        args = (grad, x, weight, gate, *case.options, case.mask)
        with Operators():
            grads = autograd._gradients(*args)
        assert list(map(description, grads)) == list(map(description, autograd._fake_gradients(*args))), case


@pytest.mark.usefixtures("simulation")
def test_no_more_kernels_are_launched_than_needed() -> None:
    """Of a layer in bfloat16 with 32 groups: forward, backward, and backward with frozen gates."""
    limits = {"nested": (2, 10, 5), "sorted": (2, 19, 5), "unsorted": (5, 25, 9)}
    for (name, limit), form in zip(limits.items(), SORT_NESTED, strict=True):
        for channels in (128, 512, 2048):
            case = Case((channels, channels), "11111".rjust(channels.bit_length() - 1, "0"), form=form)
            forward, backward = run(case)
            _, frozen = run(case._replace(mask=(True, True, False)))
            row = (forward.launches, backward.launches, frozen.launches)
            assert all(count <= most for count, most in zip(row, limit, strict=True)), (name, channels, row)


@pytest.mark.usefixtures("simulation")
@pytest.mark.parametrize("form", SORT_NESTED)
@pytest.mark.parametrize("closed", ["01" * 5, "10" * 5, "01" * 6, "10" * 6])
def test_kernels_take_few_dimensions(closed: str, form: tuple[bool, bool]) -> None:
    """A kernel of CUDA takes tensors of up to 25 dimensions."""
    for memory_format in ("contiguous", "channels_last"):
        case = Case((1 << len(closed),) * 2, closed, 7, 1, input_format=memory_format, weight_format=memory_format)
        for operators in run(case._replace(form=form)):
            assert operators.dimensions <= (8 if form[0] else 25)


@pytest.mark.usefixtures("simulation")
@pytest.mark.parametrize("form", SORT_NESTED)
@pytest.mark.parametrize("closed", ["1100", "0101", "0011", "0000", "1111"])
def test_nothing_comes_from_the_host_and_nothing_is_read(closed: str, form: tuple[bool, bool]) -> None:
    for operators in run(Case(closed=closed, form=form)):
        assert not any(tensor.is_cpu for tensor in operators.tensors)
        names = {func.overloadpacket for func, _, _ in operators.calls}
        assert not names & {torch.ops.aten.arange, torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero}
