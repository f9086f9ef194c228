"""The plan of a layer: how many groups its convolutions have, and where the weights of these groups are.

A plan holds no tensors, so one plan serves all passes, layers and threads with the same bits and shapes. README.md has
the derivation.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from timm_dgconv.ops.algebra import closed_first


class View(NamedTuple):
    """A strided view. Its offset is relative to the first element of the tensor."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return this view of a tensor."""
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)


class Plan(NamedTuple):
    """What the convolutions of a layer need to know about its bits and its weight.

    The weight gradient of a group convolution with wider groups has the slopes of all bits inside of its groups. So the
    last closed bits are merged into the groups: those that nested gates need, and more if the groups are too narrow to
    be fast. Only the paper's forms need the slope of a closed bit that still separates groups.

    Attributes:
        is_sorted: Whether each group is a range of channels.
        channels_last: Whether the weight is in channels_last, and not contiguous.
        groups: Number of groups of the output and of the input gradient.
        shape: Shape of the weights inside of the groups (C_out, C_in / groups, kernel height, kernel width).
        wide_groups: Number of groups of the weight gradient.
        wide_shape: Shape of the weights inside of the wide groups.
        weights: The weights inside of the groups, a view of the dense weight. None if there is one group.
        wide_weights: The weights inside of the wide groups, a view of the dense weight. None if these are all weights,
            in their order.
        blocks: The weights inside of the groups, a view of the wide weights.
        sum_kernel: Whether gates learn from more than two bits inside of the wide groups. Then the products of wide
            weights and their gradients are summed over the kernel first.
        inside: The bits inside of the wide groups from which gates learn. Each has a view of the pairs of channels that
            differ in it. This is a view of the wide weights, or of the sums.
        outside: The other bits from which gates learn. Each has its position among the closed bits, and a view of the
            dense weight.
    """

    is_sorted: bool
    channels_last: bool
    groups: int
    shape: tuple[int, ...]
    wide_groups: int
    wide_shape: tuple[int, ...]
    weights: View | None
    wide_weights: View | None
    blocks: View
    sum_kernel: bool
    inside: tuple[tuple[int, View], ...]
    outside: tuple[tuple[int, int, View], ...]


@lru_cache(maxsize=1024)
def make_plan(
    is_closed: tuple[bool, ...],
    learns: tuple[bool, ...],
    shape: tuple[int, ...],
    channels_last: bool,
    min_channels: int,
) -> Plan:
    """Return the plan of a layer.

    Args:
        is_closed: Whether each bit is closed.
        learns: Whether a gate needs the slope of each bit.
        shape: Shape of the dense weight (C_out, C_in, kernel height, kernel width).
        channels_last: Whether the weight is in channels_last, and not contiguous.
        min_channels: Number of channels per group from which a weight gradient is fast.
    """
    order, num_closed = closed_first(is_closed), sum(is_closed)
    closed, opened = order[:num_closed], order[num_closed:]
    fast = (shape[1] // min_channels).bit_length() - 1
    num_outer = max(min(num_closed - any(learns), fast), 0)
    outer, merged = closed[:num_outer], closed[num_outer:]
    wide_shape = (shape[0], shape[1] >> num_outer, *shape[2:])
    positions = range(len(order))  # of the channels of wide weights, which have their closed bits first
    slopes = [(bit, position) for position, bit in enumerate(order) if learns[bit]]
    # A bit needs at most half of the products, so one or two bits do not need all of them.
    sum_kernel = sum(position >= num_outer for _, position in slopes) > 2
    products = ((*wide_shape[:2], 1, 1), False) if sum_kernel else (wide_shape, channels_last)
    inside, outside = [], []
    for bit, position in slopes:
        if position >= num_outer:
            agree = sorted({*positions[:num_closed], position})
            free = [other for other in positions[num_closed:] if other != position]
            inside.append((bit, _pairs(*products, agree, free, position, num_outer)))
        else:
            outside.append((bit, position, _pairs(shape, channels_last, closed, opened, bit)))
    is_sorted = order == sorted(order)
    return Plan(
        is_sorted=is_sorted,
        channels_last=channels_last,
        groups=1 << num_closed,
        shape=(shape[0], shape[1] >> num_closed, *shape[2:]),
        wide_groups=1 << num_outer,
        wide_shape=wide_shape,
        weights=_pairs(shape, channels_last, closed, opened) if closed else None,
        wide_weights=None if not outer and is_sorted else _pairs(shape, channels_last, outer, [*merged, *opened]),
        blocks=_pairs(wide_shape, channels_last, positions[:num_closed], positions[num_closed:], num_outer=num_outer),
        sum_kernel=sum_kernel,
        inside=tuple(inside),
        outside=tuple(outside),
    )


def _pairs(
    shape: Sequence[int],
    channels_last: bool,
    agree: Sequence[int],
    free: Sequence[int],
    across: int | None = None,
    num_outer: int = 0,
) -> View:
    """Return certain pairs of an output and an input channel as a view of a weight, with a dimension for each bit.

    Args:
        shape: Shape of the weight (C_out, C_in / 2^num_outer, kernel height, kernel width).
        channels_last: Memory format of the weight.
        agree: Bits of the weight's channels in which a pair agrees. Wide weights have the closed bits first.
        free: All other bits.
        across: One of the bits in `agree`, in which the channels of a pair differ instead.
        num_outer: Number of bits before those of the input channels. They identify the group of a group convolution.

    Returns:
        View with these dimensions: the bits of `agree` of the output; the bits of `free` and q of the output; the same
        of the input; kernel height; kernel width.
    """
    out_channels, in_channels, height, width = shape
    out_stride = in_channels * height * width
    in_stride, *kernel_strides = (1, width * in_channels, in_channels) if channels_last else (height * width, width, 1)
    last = len(agree) + len(free) - 1
    q_out, q_in = out_channels >> last + 1, in_channels >> last + 1 - num_outer
    out_step, in_step = q_out * out_stride, q_in * in_stride
    size, stride, offset = [], [], 0
    for bit in agree:
        size.append(2)
        stride.append(out_step + (in_step if bit >= num_outer else 0) << last - bit)
    if across is not None:  # output bit 0 with input bit 1, then output bit 1 with input bit 0
        stride[agree.index(across)] = out_step - in_step << last - across
        offset = in_step << last - across
    for q, step, q_stride in ((q_out, out_step, out_stride), (q_in, in_step, in_stride)):
        size += [*(2 for _ in free), q]
        stride += [*(step << last - bit for bit in free), q_stride]
    return View((*size, height, width), (*stride, *kernel_strides), offset)
