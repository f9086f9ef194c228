"""The algebra of layouts, by property, against `grouping` and against indexing one channel at a time."""

from typing import NamedTuple

import torch
from hypothesis import given
from hypothesis import strategies as st
from timm_dgconv.layers.layout import (
    Layout,
    gate_gradients,
    gather_blocks,
    get_layout,
    in_format,
    is_channels_last,
    place,
    select_channels,
    weight_gradient,
)
from torch import Tensor
from torch.testing import assert_close

from timm_dgconv.layers import grouping


class Problem(NamedTuple):
    """A layer and a span of it."""

    closed: tuple[bool, ...]
    span: int
    q_out: int
    q_in: int
    kernel_size: tuple[int, int]
    channels_last: bool

    @property
    def layout(self) -> Layout:
        return get_layout(self.closed, self.span)

    @property
    def out_channels(self) -> int:
        return self.q_out << len(self.closed)

    @property
    def in_channels(self) -> int:
        return self.q_in << len(self.closed)

    @property
    def outside(self) -> list[bool]:
        """Which bits are closed and outside the span."""
        return [bit and not self.span >> shift & 1 for shift, bit in zip(self.shifts, self.closed, strict=True)]

    @property
    def shifts(self) -> list[int]:
        return list(reversed(range(len(self.closed))))

    def order(self, channels: int) -> Tensor:
        """The channels in the order of the layout."""
        return grouping.channel_order(gates(self.outside), channels)

    def partner(self, order: Tensor, slot: int) -> Tensor:
        """The channels of the partners: slot 0 is the group itself, and slot 1 + n flips the n-th bit outside."""
        flips = [0, *(1 << shift for shift, bit in zip(self.shifts, self.outside, strict=True) if bit)]
        q = len(order) >> len(self.closed)
        return (order // q ^ flips[slot]) * q + order % q

    def random(self, *shape: int) -> Tensor:
        return in_format(torch.randn(shape, dtype=torch.float64), self.channels_last)

    def weight(self) -> Tensor:
        return self.random(self.out_channels, self.in_channels, *self.kernel_size)

    def connectivity(self) -> Tensor:
        gate = gates(list(self.closed))
        return grouping.connectivity(gate, self.out_channels, self.in_channels)[:, :, None, None]


def gates(closed: list[bool]) -> Tensor:
    return torch.tensor([-0.5 if bit else 0.5 for bit in closed], dtype=torch.float64)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    closed = draw(st.lists(st.booleans(), min_size=1, max_size=5))
    span = draw(st.just(0) | st.integers(0, (1 << len(closed)) - 1))
    q_out, q_in, *kernel_size = (draw(st.integers(1, 3)) for _ in range(4))
    torch.manual_seed(draw(st.integers(0, 1000)))
    return Problem(tuple(closed), span, q_out, q_in, (kernel_size[0], kernel_size[1]), draw(st.booleans()))


# Layouts.


@given(problems())
def test_bits(problem: Problem) -> None:
    layout, bits = problem.layout, range(len(problem.closed))
    assert [k in layout.far for k in bits] == problem.outside
    assert sorted((*layout.far, *layout.near)) == [k for k in bits if problem.closed[k]]
    assert layout.groups == 1 << sum(problem.outside)
    assert layout.order == tuple(sorted(bits, key=lambda k: not problem.outside[k]))
    assert layout.order[layout.num_moved :] == tuple(bits[layout.num_moved :])
    closed_bits = sum(1 << shift for shift, bit in zip(problem.shifts, problem.closed, strict=True) if bit)
    assert layout == get_layout(problem.closed, problem.span & closed_bits)


# Channels.


def images(problem: Problem) -> Tensor:
    return problem.random(2, problem.in_channels, 3, 2)


@given(problems())
def test_channels_are_in_the_order_of_the_groups(problem: Problem) -> None:
    x = images(problem)
    y = select_channels(x, problem.layout, place(x))
    assert torch.equal(y, x[:, problem.order(problem.in_channels)])
    assert is_channels_last(y) == is_channels_last(x)
    if problem.span == 0:
        assert torch.equal(y, x[:, grouping.channel_order(gates(list(problem.closed)), problem.in_channels)])


@given(problems())
def test_channels_in_order_are_not_copied(problem: Problem) -> None:
    x = images(problem)
    in_order = torch.equal(problem.order(problem.in_channels), torch.arange(problem.in_channels))
    assert (select_channels(x, problem.layout, place(x)) is x) == in_order


@given(problems())
def test_channels_come_back(problem: Problem) -> None:
    x = images(problem)
    y = select_channels(select_channels(x, problem.layout, place(x)), problem.layout, place(x), inverse=True)
    assert torch.equal(y, x)
    assert is_channels_last(y) == is_channels_last(x)


@given(problems())
def test_channels_of_partners(problem: Problem) -> None:
    x = images(problem)
    order, groups = problem.order(problem.in_channels), problem.layout.groups
    slots = range(1 + sum(problem.outside))
    partners = torch.stack([problem.partner(order, slot).unflatten(0, (groups, -1)) for slot in slots], 1)
    y = select_channels(x, problem.layout, place(x), partners=True)
    assert torch.equal(y, x[:, partners.flatten()])
    assert is_channels_last(y) == is_channels_last(x)


# Weights.


def check_format(blocks: Tensor, weight: Tensor) -> None:
    """Compare the memory format of each block with that of the weight, unless both formats are the same."""
    if weight[0, 0].numel() > 1 and blocks.shape[-3] > 1 and weight.shape[1] > 1:
        assert is_channels_last(blocks.flatten(0, 2)) == is_channels_last(weight)


@given(problems())
def test_blocks_are_the_diagonal_of_the_masked_weight(problem: Problem) -> None:
    weight = problem.weight()
    masked = weight * problem.connectivity()
    masked = masked[problem.order(problem.out_channels)][:, problem.order(problem.in_channels)]
    groups = problem.layout.groups
    blocks = gather_blocks(weight, problem.layout, place(weight))
    assert torch.equal(blocks.squeeze(1), grouping.group_blocks(masked, groups))
    assert blocks.count_nonzero() == masked.count_nonzero()  # nothing is outside the diagonal
    check_format(blocks, weight)


@given(problems())
def test_blocks_of_partners(problem: Problem) -> None:
    weight = problem.weight()
    groups = problem.layout.groups
    in_order = problem.order(problem.in_channels).view(groups, 1, -1)
    out_order = problem.order(problem.out_channels)
    blocks = gather_blocks(weight, problem.layout, place(weight), partners=True)
    assert blocks.shape[:2] == (groups, 1 + sum(problem.outside))
    for slot in range(blocks.shape[1]):
        partners = problem.partner(out_order, slot).view(groups, -1, 1)
        assert torch.equal(blocks[:, slot], weight[partners, in_order])
    check_format(blocks, weight)


@given(problems())
def test_weight_gradient_is_the_adjoint_of_the_blocks(problem: Problem) -> None:
    weight = problem.weight()
    blocks = gather_blocks(weight, problem.layout, place(weight))
    grad_blocks = torch.randn_like(blocks)
    grad = weight_gradient(grad_blocks[:, 0], weight, problem.layout, place(weight))
    assert_close((grad * weight).sum(), (grad_blocks * blocks).sum())
    assert not (grad * (1 - problem.connectivity())).any()
    assert grad.stride() == weight.stride()


@given(problems())
def test_weight_gradient_has_the_dtype_of_the_weight(problem: Problem) -> None:
    weight = problem.weight()
    blocks = gather_blocks(weight, problem.layout, place(weight))[:, 0]
    for dtype in (torch.float32, torch.bfloat16):
        grad = weight_gradient(blocks.to(dtype), weight, problem.layout, place(weight))
        assert torch.equal(grad, (weight * problem.connectivity()).to(dtype).double())


# Gates.


@given(problems(), st.booleans())
def test_gate_gradients_are_those_of_the_connectivity(problem: Problem, sort: bool) -> None:
    by_gate = list(problem.closed)
    order = grouping.closed_first(gates(by_gate)).tolist() if sort else list(range(len(by_gate)))
    problem = problem._replace(closed=tuple(by_gate[k] for k in order))
    weight, upstream = problem.weight(), problem.weight()
    gate = gates(by_gate).requires_grad_()
    u = grouping.connectivity(gate, problem.out_channels, problem.in_channels, sort)
    (u[:, :, None, None] * weight * upstream).sum().backward()

    where = place(weight)
    products = gather_blocks(weight * upstream, problem.layout, where, partners=True)
    bits = tuple(order.index(k) for k in range(len(by_gate)))
    assert_close(gate_gradients(products, problem.layout, bits, where), gate.grad)
