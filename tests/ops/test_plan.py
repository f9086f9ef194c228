"""The plan: which pairs of channels its views hold."""

import torch
from conftest import SORT_NESTED
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from timm_dgconv.ops.algebra import read_bits
from timm_dgconv.ops.naive import connectivity
from timm_dgconv.ops.plan import View, make_plan


def held(view: View, shape: tuple[int, ...]) -> Tensor:
    """Return how often a view holds each pair of channels of a weight with a kernel of one pixel."""
    numbers = view.of(torch.arange(shape[0] * shape[1])).flatten()
    return torch.bincount(numbers, minlength=shape[0] * shape[1]).view(shape[:2])


@given(
    st.lists(st.sampled_from([-0.5, -0.25, 0.25, 0.5]), min_size=1, max_size=5),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from(SORT_NESTED),
    st.sampled_from([1, 2, 4, 1024]),
)
def test_views_hold_the_pairs_of_the_definition(
    gate: list[float], q_out: int, q_in: int, form: tuple[bool, bool], width: int
) -> None:
    shape = (q_out << len(gate), q_in << len(gate), 1, 1)
    bits = read_bits(gate, *form)
    plan = make_plan(bits.closed, tuple(index >= 0 for index in bits.gates), shape, False, width)
    u = connectivity(torch.tensor(gate), shape[0], shape[1], *form)
    assert u.all() if plan.weights is None else torch.equal(held(plan.weights, shape), u.long())
    assert held(plan.blocks, plan.wide_shape).sum() == u.sum()
    assert sorted(bits.gates[bit] for bit, *_ in (*plan.inside, *plan.outside)) == sorted({*bits.gates} - {-1})
    differ = (torch.arange(shape[0]) // q_out).unsqueeze(1) ^ torch.arange(shape[1]) // q_in
    places = [1 << len(gate) - 1 - k for k in range(len(gate))]
    closed = sum(place for place, is_closed in zip(places, bits.closed, strict=True) if is_closed)
    for bit, _, view in plan.outside:
        assert torch.equal(held(view, shape).bool(), differ & closed == places[bit])


def test_both_slopes_of_a_nested_layer_are_inside_of_groups_that_are_twice_as_wide() -> None:
    closed, shape = (True,) * 5 + (False,) * 5, (1024, 1024, 3, 3)
    plan = make_plan(closed, tuple(bit in (4, 5) for bit in range(10)), shape, False, 16)
    assert (plan.groups, plan.wide_groups, plan.wide_shape) == (32, 16, (1024, 64, 3, 3))
    assert ([bit for bit, _ in plan.inside], plan.outside) == ([4, 5], ())
    frozen = make_plan(closed, (False,) * 10, shape, False, 16)
    assert (frozen.wide_groups, frozen.inside) == (32, ())
