"""The algebra of gates: closed bits, the gate that learns the slope of each bit, counts. README.md has the derivation.

There are two copies of each rule, on the host and in a graph: `read_bits` takes numbers, `bits` takes a tensor. An
optimizer step has the rule for many layers at once, in `timm_dgconv.optim.steered_model.add_term`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Bits(NamedTuple):
    """The bits of a layer, the most significant bit first. It is hashable.

    Attributes:
        closed: Whether each bit is closed.
        gates: The index of the gate that learns the slope of each bit, or -1. An infinite gate learns nothing, since no
            optimizer step can move it. Gates that stand still after `gate_steps` are read as infinite.
    """

    closed: tuple[bool, ...]
    gates: tuple[int, ...]

    @property
    def groups(self) -> int:
        """Number of groups."""
        return 1 << sum(self.closed)

    @property
    def prefix(self) -> int:
        """Number of closed bits before the first open bit."""
        return [*self.closed, False].index(False)

    @property
    def is_sorted(self) -> bool:
        """Whether all closed bits come first, so that each group is a range of channels."""
        return self.prefix == sum(self.closed)


def closed_first(closed: Sequence[bool]) -> list[int]:
    """Return the bits, or gates, in the order that makes groups contiguous: the closed ones first.

    Examples:
        >>> closed_first([False, True, False, True])
        [1, 3, 0, 2]
    """
    return sorted(range(len(closed)), key=lambda k: not closed[k])


def num_bits(in_channels: int, out_channels: int) -> int:
    """Return the number of gates K: 2^K is the largest power of two that divides both channel counts.

    Raises:
        ValueError: If a count is not positive or not even.

    Examples:
        >>> num_bits(64, 64), num_bits(96, 48)
        (6, 4)
    """
    if in_channels < 1 or out_channels < 1:
        raise ValueError(f"channel counts must be positive, got in_channels={in_channels}, out_channels={out_channels}")
    common = math.gcd(in_channels, out_channels)
    bits = (common & -common).bit_length() - 1
    if bits == 0:
        raise ValueError(
            f"in_channels={in_channels} and out_channels={out_channels} must both be even to learn groups; use even "
            "channel counts, or torch.nn.Conv2d"
        )
    return bits


def is_closed(value: float) -> bool:
    """Return whether a gate with this value is closed. Its sign bit decides, as in `closed_gates`."""
    return math.copysign(1, value) < 0


def closed_gates(gate: Tensor) -> Tensor:
    """Return which gates are closed: the gates whose sign bit is set.

    The sign bit survives every cast. float16 rounds the initial values +-1e-8 to +-0.0, so a comparison with zero would
    lose them.

    Args:
        gate: Gates of any shape.

    Returns:
        Boolean tensor of the same shape.

    Examples:
        >>> closed_gates(torch.tensor([1e-8, -1e-8], dtype=torch.float16))
        tensor([False,  True])
    """
    return torch.signbit(gate)


def read_bits(gate: Sequence[float], sort: bool, nested: bool) -> Bits:
    """Return the bits of a layer whose gates have these values.

    Args:
        gate: The values of the gates.
        sort: Whether the closed gates act on the most significant bits.
        nested: Whether only the closed and the open gate nearest to zero learn: the gates that can flip next.

    Raises:
        RuntimeError: If a gate is nan.

    Examples:
        >>> read_bits([0.1, -0.3, 0.2, -0.1], sort=False, nested=False)
        Bits(closed=(False, True, False, True), gates=(0, 1, 2, 3))
        >>> read_bits([0.1, -0.3, 0.2, -0.1], sort=True, nested=False)
        Bits(closed=(True, True, False, False), gates=(1, 3, 0, 2))
        >>> read_bits([0.1, -0.3, 0.2, -0.1], sort=True, nested=True)
        Bits(closed=(True, True, False, False), gates=(-1, 3, 0, -1))
    """
    if any(map(math.isnan, gate)):
        raise RuntimeError(
            f"gates of a DGConv2d are nan: {list(gate)}; the training has diverged: go back to an earlier checkpoint "
            "and use a smaller learning rate or gradient clipping"
        )
    closed = [is_closed(value) for value in gate]
    learns = [-1 if math.isinf(value) else k for k, value in enumerate(gate)]
    if not sort:
        return Bits(tuple(closed), tuple(learns))
    num_closed, num_bits = sum(closed), len(gate)
    bits = (True,) * num_closed + (False,) * (num_bits - num_closed)
    if not nested:
        return Bits(bits, tuple(learns[k] for k in closed_first(closed)))
    gates = [-1] * num_bits
    if num_closed:
        gates[num_closed - 1] = learns[_nearest_to_zero(gate, closed, True)]
    if num_closed < num_bits:
        gates[num_closed] = learns[_nearest_to_zero(gate, closed, False)]
    return Bits(bits, tuple(gates))


def _nearest_to_zero(gate: Sequence[float], closed: Sequence[bool], side: bool) -> int:
    """Return the index of the closed or the open gate nearest to zero, the first one if there are several."""
    return min((abs(value), k) for k, value in enumerate(gate) if closed[k] is side)[1]


def settle(values: Any) -> Any:
    """Return infinite values of gates, numbers or a tensor, with the same signs: those of gates that learn nothing."""
    if isinstance(values, Tensor):
        return values + torch.copysign(torch.full_like(values, math.inf), values)  # nan stays nan
    return [value + math.copysign(math.inf, value) for value in values]


def straight_through(gate: Tensor, values: Tensor) -> Tensor:
    """Return zeros of shape (K,) with the gradient of the gates (the straight-through estimator of the paper).

    A nan gate gives nan, so that a diverged training run is visible. A gate that is read as infinite has no gradient.
    """
    return torch.where(values.isinf(), torch.zeros_like(gate), gate - gate.detach())


def bits(gate: Tensor, values: Tensor, sort: bool, nested: bool) -> tuple[Tensor, Tensor]:
    """Return the bits of a layer in a graph, see `read_bits`.

    Args:
        gate: Gates of shape (K,).
        values: The values by which they are read, of shape (K,).
        sort: See `read_bits`.
        nested: See `read_bits`.

    Returns:
        Which bits are closed, boolean of shape (K,), and zeros of shape (K,) with the gradients of the gates that learn
        the slopes of the bits.
    """
    closed = closed_gates(values)
    slopes = straight_through(gate, values)
    if not sort:
        return closed, slopes
    if not nested:
        order = torch.sort(closed.int(), dim=0, descending=True, stable=True)[1]
        return closed[order], slopes[order]
    position = torch.arange(gate.shape[0], device=gate.device)
    num_closed = closed.sum()
    distance = values.abs()
    far = torch.full_like(distance, float("inf"))
    zeros = torch.zeros_like(slopes)  # if no gate of a side is finite, the nearest one may be of the other side
    of_closed = torch.where(closed, slopes, zeros).index_select(0, torch.where(closed, distance, far).argmin().view(1))
    of_open = torch.where(closed, zeros, slopes).index_select(0, torch.where(closed, far, distance).argmin().view(1))
    slopes = (position == num_closed - 1) * of_closed + (position == num_closed) * of_open
    return position < num_closed, slopes


def complexity(gate: Tensor, out_channels: int, in_channels: int, sort: bool, nested: bool) -> Tensor:
    """Return the number of connected (output, input) channel pairs, differentiable in the gates that learn.

    The number is ``q_out * q_in * 2^(K + number of open gates)``. For C_in = C_out = 2^K it is the "U regularizer" of
    the original release.

    Args:
        gate: Gates of shape (K,).
        out_channels: Number of output channels.
        in_channels: Number of input channels.
        sort: See `read_bits`.
        nested: See `read_bits`.

    Returns:
        Scalar tensor. The dtype is float64 for float64 gates and float32 otherwise, since half precision cannot hold
        the counts.

    Examples:
        >>> complexity(torch.tensor([-1.0, 1.0]), 4, 4, sort=True, nested=True)
        tensor(8.)
    """
    gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
    closed, slopes = bits(gate, gate.detach(), sort, nested)
    dense = out_channels * in_channels  # = q_out * q_in * 2^(2 K)
    return dense * torch.exp2(slopes.sum() - closed.sum())


def channel_order(closed: Sequence[bool], channels: int) -> Tensor:
    """Return the permutation of channels, of shape (channels,), that makes each group a range of channels.

    It orders the channels by their closed bits and is stable.

    Args:
        closed: Whether each bit is closed, the most significant bit first.
        channels: Number of channels, a multiple of 2^K.

    Examples:
        >>> channel_order([False, True], 4)
        tensor([0, 2, 1, 3])
    """
    index = torch.arange(channels, device="cpu").view(*[2] * len(closed), -1)
    return index.permute(*closed_first(closed), len(closed)).flatten()
