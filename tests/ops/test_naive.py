"""The definition of the layer against an explicit product of Kronecker factors, which torch differentiates."""

import itertools
import math
from functools import reduce
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from timm_dgconv.ops.naive import connectivity, masked_conv2d

FORMS = [(True, True), (True, False), (False, False)]  # sort, nested
EXACT = dict(rtol=1e-12, atol=1e-12)

forms = st.sampled_from(FORMS)
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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("closed", list(itertools.product([1.0, -1.0], repeat=3)))
def test_the_layer_is_a_convolution_with_a_masked_weight(closed: tuple[float, ...], form: tuple[bool, bool]) -> None:
    """Written with the independent product. The other tests of the package rely on this form."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)

    x, weight, bias = leaf(2, 8, 5, 6), leaf(24, 8, 3, 2), leaf(24)
    values = [sign * (1 + k % 2) for k, sign in enumerate(closed)]
    gate = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    bits, learns = reference(values, form)
    geometry: Any = ([2, 1], [1, 0], [1, 2])
    y = masked_conv2d(x, weight, bias, gate, *geometry, *form)
    expected = F.conv2d(x, weight * kronecker(bits, 3, 1)[:, :, None, None], bias, *geometry)
    assert_close(y, expected, **EXACT)
    *grads, grad_gate = torch.autograd.grad(y.square().sum(), [x, weight, bias, gate])
    *same, slopes = torch.autograd.grad(expected.square().sum(), [x, weight, bias, bits])
    assert_close(grads, same, rtol=1e-9, atol=1e-9)
    assert_close([grad_gate[k] for k, _ in learns], [slopes[bit] for _, bit in learns], rtol=1e-9, atol=1e-9)
    assert grad_gate.count_nonzero() <= len(learns)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_special_gates_give_ones_zeros_and_finite_gradients(dtype: torch.dtype, form: tuple[bool, bool]) -> None:
    gate = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-45, -1e-8], dtype=dtype, requires_grad=True)
    u = connectivity(gate, 64, 64, *form)
    assert set(u.unique().tolist()) == {0.0, 1.0}
    assert u.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    u.sum().backward()
    assert gate.grad.isfinite().all()
    assert not gate.grad[gate.detach().isinf()].any()


@given(gate_values, forms)
def test_gates_can_be_read_from_other_values(values: list[float], form: tuple[bool, bool]) -> None:
    """Second derivatives use the values that the forward pass has read."""
    gate = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    now = (-gate.detach()).requires_grad_()
    num_codes = 1 << len(values)
    expected = connectivity(gate, num_codes, num_codes, *form)
    u = connectivity(now, num_codes, num_codes, *form, gate.detach())
    assert torch.equal(u, expected)
    assert_close(*(torch.autograd.grad(value.cumsum(0).sum(), leaf) for value, leaf in ((u, now), (expected, gate))))
