"""The algebra of gates, by property."""

import math
from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.testing import assert_close

from timm_dgconv import DGConv2d
from timm_dgconv.ops import algebra
from timm_dgconv.ops.naive import connectivity

FORMS = [(True, True), (True, False), (False, False)]  # sort, nested
SPECIAL = [0.0, -0.0, math.inf, -math.inf, 1e-45, -1e-8]

forms = st.sampled_from(FORMS)
gate_values = st.lists(
    st.sampled_from([*SPECIAL, 1e-8, 0.5, -0.5, 2.0, -2.0]) | st.floats(-3, 3, width=32, allow_subnormal=False),
    min_size=1,
    max_size=6,
).map(lambda values: torch.tensor(values).tolist())  # as float32


def learning_gates(gate: torch.Tensor, slopes: torch.Tensor) -> list[int]:
    """The gate that has the gradient of each bit, or -1."""
    rows = [torch.autograd.grad(slope, gate, retain_graph=True)[0] for slope in slopes]
    return [row.nonzero().flatten().tolist()[0] if row.any() else -1 for row in rows]


@given(gate_values, forms)
@example([0.5, -math.inf], (True, True))
@example([math.inf, -0.5], (True, True))
def test_bits_are_the_same_on_the_host_and_in_a_graph(values: list[float], form: tuple[bool, bool]) -> None:
    """And gates that are not nested learn one bit each."""
    gate = torch.tensor(values, requires_grad=True)
    closed, slopes = algebra.bits(gate, gate.detach(), *form)
    bits = algebra.read_bits(values, *form)
    assert tuple(closed.tolist()) == bits.closed
    assert not slopes.any()
    finite = [k if k >= 0 and math.isfinite(values[k]) else -1 for k in bits.gates]  # no step moves an infinite gate
    assert learning_gates(gate, slopes) == finite
    assert bits.groups == 1 << sum(math.copysign(1, value) < 0 for value in values)
    assert hash(bits) == hash(algebra.read_bits(list(values), *form))
    if form != (True, True):
        assert sorted(bits.gates) == list(range(len(values)))
    if form[0]:
        assert bits.prefix == sum(bits.closed)


@given(gate_values)
def test_a_nested_gate_learns_if_it_can_flip_next(values: list[float]) -> None:
    """The first of several gates at the same distance from zero learns, so no step flips two of them."""
    bits = algebra.read_bits(values, sort=True, nested=True)
    for is_closed in (True, False):
        same = [k for k, value in enumerate(values) if algebra.is_closed(value) == is_closed]
        nearest = [k for k in same if abs(values[k]) == min(abs(values[other]) for other in same)]
        bit = sum(bits.closed) - is_closed  # the last closed bit, and the first open bit
        assert same == [] or bits.gates[bit] == nearest[0]
    assert sum(k >= 0 for k in bits.gates) == len(set(bits.closed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_sign_bit_closes_a_gate_in_every_dtype(dtype: torch.dtype) -> None:
    gate = torch.tensor(SPECIAL, dtype=dtype)
    expected = [False, True, False, True, False, True]
    assert algebra.closed_gates(gate).tolist() == [algebra.is_closed(value) for value in gate.tolist()] == expected


@pytest.mark.parametrize("form", FORMS)
def test_nan_gates_are_refused_on_the_host_and_visible_in_a_graph(form: tuple[bool, bool]) -> None:
    for place in range(3):
        values = [0.5, -0.5, 0.25]
        values[place] = math.nan
        with pytest.raises(RuntimeError, match=r"gates of a DGConv2d are nan: .*diverged"):
            algebra.read_bits(values, *form)
        assert connectivity(torch.tensor(values), 8, 8, *form).isnan().any()
        assert algebra.complexity(torch.tensor(values), 8, 8, *form).isnan()


@given(gate_values, st.integers(1, 3), st.integers(1, 3), forms)
def test_complexity_is_the_number_of_connected_pairs(
    values: list[float], q_out: int, q_in: int, form: tuple[bool, bool]
) -> None:
    gate, num_codes = torch.tensor(values, requires_grad=True), 1 << len(values)
    channels = (q_out * num_codes, q_in * num_codes)
    pairs = algebra.complexity(gate, *channels, *form)
    assert pairs == connectivity(gate, *channels, *form).sum()
    (grad,) = torch.autograd.grad(pairs, gate)
    learning = {k for k in algebra.read_bits(values, *form).gates if k >= 0 and math.isfinite(values[k])}
    expected = [math.log(2) * pairs.item() if k in learning else 0.0 for k in range(len(values))]
    assert_close(grad, torch.tensor(expected))


@given(st.lists(st.booleans(), min_size=1, max_size=5), st.integers(1, 3), st.integers(1, 3))
def test_groups_are_ranges_in_the_order_of_channels(closed: list[bool], q_out: int, q_in: int) -> None:
    gate, groups = torch.tensor([-1.0 if is_closed else 1.0 for is_closed in closed]), 1 << sum(closed)
    out_channels, in_channels = (q << len(closed) for q in (q_out, q_in))
    matrix = connectivity(gate, out_channels, in_channels, sort=False, nested=False)
    matrix = matrix[algebra.channel_order(closed, out_channels)][:, algebra.channel_order(closed, in_channels)]
    assert torch.equal(matrix, torch.block_diag(*[torch.ones(out_channels // groups, in_channels // groups)] * groups))
    for nested in (True, False):
        assert torch.equal(connectivity(gate, out_channels, in_channels, True, nested), matrix)


@pytest.mark.parametrize(("channels", "bits"), [((64, 64), 6), ((96, 48), 4), ((2, 6), 1), ((1024, 1024), 10)])
def test_there_is_a_gate_for_each_power_of_two_that_divides_both_channel_counts(
    channels: tuple[int, int], bits: int
) -> None:
    assert algebra.num_bits(*channels) == bits


@pytest.mark.parametrize(
    ("channels", "named"),
    [((3, 64), "in_channels=3 .*even"), ((64, 5), "out_channels=5 .*even"), ((0, 2), "=0"), ((4, -4), "=-4")],
)
def test_channel_counts_without_gates_are_refused(channels: tuple[int, int], named: str) -> None:
    for function in (algebra.num_bits, partial(DGConv2d, kernel_size=3)):
        with pytest.raises(ValueError, match=named):
            function(*channels)
