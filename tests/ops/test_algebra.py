"""The algebra, by property."""

from functools import reduce

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from timm_dgconv.layers import grouping

open_gates = st.lists(st.booleans(), min_size=1, max_size=5)
factors = st.integers(1, 3)


def gates(is_open: list[bool], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor([0.25 if o else -0.75 for o in is_open], dtype=dtype)


def kronecker(gate: torch.Tensor, q_out: int, q_in: int) -> torch.Tensor:
    """The definition in the paper, a Kronecker product of 2x2 matrices."""
    factors = [g * torch.ones(2, 2, dtype=gate.dtype) + (1 - g) * torch.eye(2, dtype=gate.dtype) for g in gate]
    return torch.kron(reduce(torch.kron, factors), torch.ones(q_out, q_in, dtype=gate.dtype))


@given(open_gates, factors, factors)
def test_connectivity_is_the_kronecker_product(is_open: list[bool], q_out: int, q_in: int) -> None:
    gate, n = gates(is_open), 2 ** len(is_open)
    binary = torch.tensor(is_open, dtype=torch.float64)
    assert torch.equal(grouping.connectivity(gate, q_out * n, q_in * n), kronecker(binary, q_out, q_in))


@given(open_gates, factors, factors, st.integers(0, 2**31))
def test_gradient_is_that_of_the_kronecker_product_at_binary_gates(
    is_open: list[bool], q_out: int, q_in: int, seed: int
) -> None:
    torch.manual_seed(seed)
    gate, n = gates(is_open).requires_grad_(), 2 ** len(is_open)
    binary = torch.tensor(is_open, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(q_out * n, q_in * n, dtype=torch.float64)
    grouping.connectivity(gate, q_out * n, q_in * n).backward(upstream)
    kronecker(binary, q_out, q_in).backward(upstream)
    torch.testing.assert_close(gate.grad, binary.grad)


@given(open_gates, factors, factors)
def test_groups(is_open: list[bool], q_out: int, q_in: int) -> None:
    gate, n = gates(is_open), 2 ** len(is_open)
    groups = 1 << is_open.count(False)
    matrix = grouping.connectivity(gate, q_out * n, q_in * n)
    assert len({tuple(row) for row in matrix.tolist()}) == groups
    assert (matrix.sum(1) == q_in * n // groups).all()
    assert (matrix.sum(0) == q_out * n // groups).all()
    assert grouping.complexity(gate, q_out * n, q_in * n) == matrix.sum()


@given(open_gates, factors, factors, st.booleans())
def test_channel_order_makes_groups_contiguous(is_open: list[bool], q_out: int, q_in: int, sort: bool) -> None:
    gate, n = gates(is_open), 2 ** len(is_open)
    groups = 1 << is_open.count(False)
    out_order, in_order = (grouping.channel_order(gate, q * n, sort) for q in (q_out, q_in))
    if sort:
        assert out_order.tolist() == list(range(q_out * n))
    matrix = grouping.connectivity(gate, q_out * n, q_in * n, sort)[out_order][:, in_order]
    block = torch.ones(q_out * n // groups, q_in * n // groups, dtype=torch.float64)
    assert torch.equal(matrix, torch.block_diag(*[block] * groups))
    blocks = grouping.group_blocks(matrix[:, :, None, None], groups)
    assert torch.equal(blocks, block[:, :, None, None].expand(groups, -1, -1, 1, 1))


def test_sorted_gradient_keeps_the_order_of_equal_gates() -> None:
    gate = torch.tensor([1.0, -1.0, 2.0, -2.0], requires_grad=True)
    upstream = torch.randn(16, 16)
    grouping.connectivity(gate, 16, 16, sort=True).backward(upstream)
    by_hand = torch.tensor([-1.0, -2.0, 1.0, 2.0], requires_grad=True)
    grouping.connectivity(by_hand, 16, 16).backward(upstream)
    torch.testing.assert_close(gate.grad, by_hand.grad[[2, 0, 3, 1]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_special_gates(dtype: torch.dtype) -> None:
    gate = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-45, -1e-8], dtype=dtype, requires_grad=True)
    assert grouping.closed_gates(gate).tolist() == [False, True, False, True, False, True]
    matrix = grouping.connectivity(gate, 64, 64)
    assert set(matrix.unique().tolist()) == {0.0, 1.0}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert matrix.dtype == grouping.complexity(gate, 64, 64).dtype == wide
    matrix.sum().backward()
    assert gate.grad.isfinite().all()


@pytest.mark.parametrize(("channels", "bits"), [((64, 64), 6), ((96, 48), 4), ((2, 6), 1), ((1024, 1024), 10)])
def test_num_bits(channels: tuple[int, int], bits: int) -> None:
    assert grouping.num_bits(*channels) == bits


@pytest.mark.parametrize(
    ("channels", "named"), [((3, 64), "in_channels=3"), ((64, 5), "out_channels=5"), ((0, 2), "0")]
)
def test_num_bits_refuses(channels: tuple[int, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        grouping.num_bits(*channels)
