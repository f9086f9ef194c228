"""The group convolution that a DGConv2d computes."""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm_dgconv.layers.group_conv import GroupConv2d
from torch import nn
from torch.testing import assert_close

from timm_dgconv import DGConv2d


def dgconv(gate: list[int], factors: tuple[int, int] = (1, 1), **kwargs: object) -> DGConv2d:
    c_in, c_out = (factor << len(gate) for factor in factors)
    conv = DGConv2d(c_in, c_out, 3, padding=1, dtype=torch.float64, **kwargs)  # type: ignore[arg-type]
    with torch.no_grad():
        conv.gate.copy_(torch.tensor(gate))
    return conv


@given(
    gate=st.lists(st.sampled_from([-1, 1]), min_size=1, max_size=4),
    factors=st.tuples(st.integers(1, 3).map(lambda n: 2 * n - 1), st.integers(1, 3).map(lambda n: 2 * n - 1)),
    bias=st.booleans(),
    sort=st.booleans(),
)
def test_computes_the_same(gate: list[int], factors: tuple[int, int], bias: bool, sort: bool) -> None:
    conv = dgconv(gate, factors, bias=bias, sort=sort)
    group = conv.to_group_conv()
    x = torch.randn(2, conv.in_channels, 4, 5, dtype=torch.float64)
    assert_close(group(x), conv(x))
    assert_close(group(x[0]), conv(x[0]))
    assert_close(conv.fuse()(x), conv(x))
    assert group.groups == conv.num_groups
    assert group.weight.numel() == conv.weight.numel() // conv.num_groups
    is_contiguous = sorted(gate) == gate or sort
    assert group.num_orders() == (0 if is_contiguous else 2)
    assert (type(group.fuse()) is nn.Conv2d) == is_contiguous


def test_orders_are_saved() -> None:
    moved, plain = (dgconv(gate).to_group_conv() for gate in ([1, -1, 1], [-1, 1, 1]))
    other = GroupConv2d(8, 8, 3, padding=1, groups=2, dtype=torch.float64)
    x = torch.randn(1, 8, 4, 4, dtype=torch.float64)
    for source in (moved, plain, moved):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file))
        assert_close(other(x), source(x))
    assert set(plain.state_dict()) == {"weight", "bias"}
    assert_close(copy.deepcopy(moved).bfloat16()(x.bfloat16()).double(), moved(x), rtol=0.1, atol=0.1)


def test_a_dgconv_refuses_orders() -> None:
    with pytest.raises(RuntimeError, match="the checkpoint is compact and has no weights between its groups"):
        dgconv([1, -1, 1]).load_state_dict(dgconv([1, -1, 1]).to_group_conv().state_dict())


def test_fixed_groups() -> None:
    conv = DGConv2d(12, 24, 3, device="meta")
    assert conv.to_group_conv(6).weight.shape == (24, 2, 3, 3)
    with pytest.raises(ValueError, match="groups=5 does not divide the 12 -> 24 channels"):
        conv.to_group_conv(5)
