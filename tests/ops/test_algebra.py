"""The algebra of gates, by property."""

import math
from functools import partial

import pytest
import torch
from conftest import SORT_NESTED
from hypothesis import example, given
from hypothesis import strategies as st
from torch.testing import assert_close

from timm_dgconv import DGConv2d
from timm_dgconv.ops import algebra
from timm_dgconv.ops.naive import connectivity

SPECIAL = [0.0, -0.0, math.inf, -math.inf, 1e-45, -1e-8]

forms = st.sampled_from(SORT_NESTED)
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
    assert learning_gates(gate, slopes) == list(bits.gates)
    assert bits.groups == 1 << sum(math.copysign(1, value) < 0 for value in values)
    assert hash(bits) == hash(algebra.read_bits(list(values), *form))
    if form != (True, True):
        finite = [k for k, value in enumerate(values) if math.isfinite(value)]  # no step moves an infinite gate
        assert sorted(k for k in bits.gates if k >= 0) == finite
    if form[0]:
        assert bits.prefix == sum(bits.closed)


@given(gate_values, forms)
def test_settled_values_keep_the_bits_and_no_gate_learns(values: list[float], form: tuple[bool, bool]) -> None:
    settled = algebra.settle(values)
    bits = algebra.read_bits(settled, *form)
    assert bits.closed == algebra.read_bits(values, *form).closed
    assert max(bits.gates) == -1
    assert algebra.settle(torch.tensor(values)).tolist() == settled
    assert math.isnan(algebra.settle([math.nan])[0])


@pytest.mark.parametrize("form", SORT_NESTED)
def test_nan_gates_are_refused_on_the_host_and_visible_in_a_graph(form: tuple[bool, bool]) -> None:
    for place in range(3):
        values = [0.5, -0.5, 0.25]
        values[place] = math.nan
        with pytest.raises(RuntimeError, match=r"gates of a DGConv2d are nan: .*diverged"):
            algebra.read_bits(values, *form)
        assert connectivity(torch.tensor(values), 8, 8, *form).isnan().any()
        assert algebra.complexity(torch.tensor(values), 8, 8, *form).isnan()


@given(gate_values, st.integers(1, 3), st.integers(1, 3), forms)
def test_complexity_counts_connections(values: list[float], q_out: int, q_in: int, form: tuple[bool, bool]) -> None:
    gate, num_codes = torch.tensor(values, requires_grad=True), 1 << len(values)
    channels = (q_out * num_codes, q_in * num_codes)
    pairs = algebra.complexity(gate, *channels, *form)
    assert pairs == connectivity(gate, *channels, *form).sum()
    (grad,) = torch.autograd.grad(pairs, gate)
    learning = {k for k in algebra.read_bits(values, *form).gates if k >= 0 and math.isfinite(values[k])}
    expected = [math.log(2) * pairs.item() if k in learning else 0.0 for k in range(len(values))]
    assert_close(grad, torch.tensor(expected))


@pytest.mark.parametrize(
    ("channels", "named"),
    [((3, 64), "in_channels=3 .*even"), ((64, 5), "out_channels=5 .*even"), ((0, 2), "=0"), ((4, -4), "=-4")],
)
def test_channel_counts_without_gates_are_refused(channels: tuple[int, int], named: str) -> None:
    for function in (algebra.num_bits, partial(DGConv2d, kernel_size=3)):
        with pytest.raises(ValueError, match=named):
            function(*channels)
