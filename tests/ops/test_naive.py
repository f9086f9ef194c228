"""The definition of the layer against an explicit product of Kronecker factors, which torch differentiates."""

import math
from functools import reduce

import torch
from conftest import SORT_NESTED
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from timm_dgconv.ops.naive import connectivity

EXACT = dict(rtol=1e-12, atol=1e-12)

forms = st.sampled_from(SORT_NESTED)
gate_values = st.lists(
    st.sampled_from([0.25, -0.25, 0.5, -0.5, 0.0, -0.0]) | st.floats(-2, 2, allow_subnormal=False),
    min_size=1,
    max_size=5,
)
factors = st.integers(1, 3)


def kronecker(bits: Tensor, q_out: int, q_in: int) -> Tensor:
    """The definition in the paper, a Kronecker product of 2x2 matrices. A bit is 1 if it is open."""
    ones, eye = torch.ones(2, 2, dtype=bits.dtype), torch.eye(2, dtype=bits.dtype)
    return torch.kron(
        reduce(torch.kron, [bit * ones + (1 - bit) * eye for bit in bits]), torch.ones(q_out, q_in, dtype=bits.dtype)
    )


def reference(values: list[float], form: tuple[bool, bool]) -> tuple[Tensor, list[tuple[int, int]]]:
    """The bits as a leaf of the graph, and which gate learns the slope of which bit, written out."""
    sort, nested = form
    closed = [k for k, value in enumerate(values) if math.copysign(1, value) < 0]
    opened = [k for k in range(len(values)) if k not in closed]
    if not sort:
        is_open, learns = [k in opened for k in range(len(values))], [(k, k) for k in range(len(values))]
    else:
        is_open = [False] * len(closed) + [True] * len(opened)
        learns = [(k, bit) for bit, k in enumerate(closed + opened)]
    if nested:
        ends = [(closed, len(closed) - 1), (opened, len(closed))]
        learns = [(min(gates, key=lambda k: (abs(values[k]), k)), bit) for gates, bit in ends if gates]
    return torch.tensor(is_open, dtype=torch.float64, requires_grad=True), learns


@given(gate_values, factors, factors, forms, st.integers(0, 2**31))
def test_connectivity_is_the_kronecker_product_with_its_slopes(
    values: list[float], q_out: int, q_in: int, form: tuple[bool, bool], seed: int
) -> None:
    generator, num_codes = torch.Generator().manual_seed(seed), 1 << len(values)
    gate = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    bits, learns = reference(values, form)
    u, expected = connectivity(gate, q_out * num_codes, q_in * num_codes, *form), kronecker(bits, q_out, q_in)
    assert torch.equal(u, expected)
    upstream = torch.randn(u.shape, dtype=torch.float64, generator=generator)
    (slopes,) = torch.autograd.grad(expected, bits, upstream)
    wanted = torch.zeros_like(gate)
    for k, bit in learns:
        wanted[k] = slopes[bit]
    assert_close(torch.autograd.grad(u, gate, upstream)[0], wanted, **EXACT)


@given(gate_values.filter(lambda values: 0.0 not in values), st.integers(0, 2**31))
def test_the_gradient_of_a_nested_gate_is_what_its_flip_does(values: list[float], seed: int) -> None:
    upstream = torch.randn((1 << len(values),) * 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def value(gate: Tensor) -> Tensor:
        return (connectivity(gate, *upstream.shape, sort=True, nested=True) * upstream).sum()

    gate = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(value(gate), gate)
    for k, _ in reference(values, (True, True))[1]:
        flipped = gate.detach().clone()
        flipped[k] *= -1
        assert_close(torch.sign(flipped[k]) * grad[k], value(flipped) - value(gate).detach(), rtol=1e-9, atol=1e-9)
