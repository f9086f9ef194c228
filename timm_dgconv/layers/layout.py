"""Layout: the order of channels in which the groups are contiguous, and where the elements of a weight are in it.

The layout orders the bits of a channel code: closed bits before open bits. The closed bits identify a group, the open
bits a channel inside it. Three kinds of closed bits differ in the spans that they belong to:

- far: in no span. Their gates get their gradients from a convolution of their own.
- mid: in the span of the weight gradient only.
- near: in the span of the output, too.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from timm_dgconv.layers.spans import Spans


class Layout:
    """The layout for one set of closed bits and one pair of spans. It computes with strides and has no index tensors.

    Args:
        closed: Which bits are closed, the most significant bit first.
        spans: The spans of the output and of the weight gradient.
    """

    def __init__(self, closed: Sequence[bool], spans: Spans) -> None:
        bits = range(len(closed))
        in_output_span, in_weight_span = ([bool(span >> shift & 1) for shift in reversed(bits)] for span in spans)
        self.bits = list(bits)
        self.open = [k for k in bits if not closed[k]]
        self.far = [k for k in bits if closed[k] and not in_output_span[k] and not in_weight_span[k]]
        self.mid = [k for k in bits if closed[k] and not in_output_span[k] and in_weight_span[k]]
        self.near = [k for k in bits if closed[k] and in_output_span[k]]
        self.closed = [*self.far, *self.mid, *self.near]
        self.order = [*self.closed, *self.open]

    def permute(self, x: Tensor, channels_last: bool, inverse: bool = False) -> Tensor:
        """Permute channels into the order of this layout, or back, and return them in the given memory format.

        Args:
            x: Tensor of shape (N, C, H, W).
            channels_last: Memory format of the result.
            inverse: Permute back.
        """
        order = self.order
        if order != self.bits:
            if inverse:
                order = [order.index(k) for k in self.bits]
            dim = 3 if channels_last else 1
            x = x.movedim(1, 3) if channels_last else x
            bits = x.unflatten(dim, (*(2 for _ in order), -1))
            before, after = range(dim), range(dim + len(order), bits.ndim)
            x = bits.permute(*before, *(dim + k for k in order), *after).reshape(x.shape)
            x = x.movedim(3, 1) if channels_last else x
        return in_format(x, channels_last)

    def pairs(self, weight: Tensor, groups: Sequence[int] | None = None, flip: int | None = None) -> list[Tensor]:
        """Return views of the elements for the channel pairs inside groups, or between groups that differ in one bit.

        Args:
            weight: A dense weight of shape (C_out, C_in, kernel height, kernel width), or blocks of shape (groups,
                C_out / groups, C_in / groups, kernel height, kernel width) in the order of this layout.
            groups: The bits that identify a group. The default is the closed bits: the pairs that the gates connect.
            flip: A bit of `groups`. The views then have the pairs whose codes differ in this bit.

        Returns:
            One view of shape (*(2 per bit of `groups`), *(2 per other bit), q_out, *(2 per other bit), q_in, kernel
            height, kernel width). With `flip` two views without that bit: the first for input channels whose code has a
            0 there, the second for input channels whose code has a 1.
        """
        dense = weight.ndim == 4
        shape, strides = (
            ((1, *weight.shape), (0, *weight.stride())) if dense else (tuple(weight.shape), weight.stride())
        )
        group_bits = tuple(self.closed if groups is None else groups)
        size, stride, offsets = self._pairs(shape, strides, dense, group_bits, flip)
        return [weight.as_strided(size, stride, weight.storage_offset() + offset) for offset in offsets]

    @functools.lru_cache(maxsize=8192)  # noqa: B019 (`get_layout` keeps the layouts alive anyway)
    def _pairs(
        self, shape: tuple[int, ...], strides: tuple[int, ...], dense: bool, groups: tuple[int, ...], flip: int | None
    ) -> tuple[list[int], list[int], list[int]]:
        """Return size, stride and storage offsets of the views of `pairs`."""
        bits = self.bits if dense else self.order
        num_block_bits = shape[0].bit_length() - 1
        outer, inner = bits[:num_block_bits], bits[num_block_bits:]  # bits of the block index, bits inside a block
        q_out, q_in = (channels >> len(inner) for channels in shape[1:3])
        block_stride, out_stride, in_stride, *kernel_strides = strides
        out_strides = {k: out_stride * q_out << shift for shift, k in enumerate(reversed(inner))}
        in_strides = {k: in_stride * q_in << shift for shift, k in enumerate(reversed(inner))}
        pair_strides = {k: block_stride << shift for shift, k in enumerate(reversed(outer))}
        pair_strides |= {k: out_strides[k] + in_strides[k] for k in inner}  # both channels have the same bit

        others = [k for k in self.order if k not in groups]
        size = [2 for k in groups if k != flip]
        stride = [pair_strides[k] for k in groups if k != flip]
        for bit_strides, q, channel_stride in ((out_strides, q_out, out_stride), (in_strides, q_in, in_stride)):
            size += [*(2 for _ in others), q]
            stride += [*(bit_strides[k] for k in others), channel_stride]
        if flip is None:
            offsets = [0]
        elif flip in outer:  # a block that joins two groups has the index of the input's group
            offsets = [0, pair_strides[flip]]
        else:
            offsets = [out_strides[flip], in_strides[flip]]
        return [*size, *shape[3:]], [*stride, *kernel_strides], offsets

    def blocks(self, weight: Tensor, num_group_bits: int, channels_last: bool, masked: bool = True) -> Tensor:
        """Return the weight of a group convolution whose groups are identified by the first bits of this layout.

        Args:
            weight: Dense weight of shape (C_out, C_in, kernel height, kernel width).
            num_group_bits: Number of bits that identify a group.
            channels_last: Memory format of the convolution.
            masked: Write zeros for the pairs that the gates do not connect.

        Returns:
            Blocks of shape (groups, C_out / groups, C_in / groups, kernel height, kernel width).
        """
        blocks = empty_blocks(weight, (1 << num_group_bits,), channels_last)
        groups = None if masked else self.closed[:num_group_bits]
        if masked and num_group_bits < len(self.closed):
            blocks.zero_()
        self.pairs(blocks, groups)[0].copy_(self.pairs(weight, groups)[0])
        return blocks

    def gate_gradients(self, products: Tensor) -> dict[int, Tensor]:
        """Return the gradients of the gates inside the span of the weight gradient, by bit.

        Args:
            products: The products of weight and weight gradient, as blocks of shape (groups, C_out / groups,
                C_in / groups, kernel height, kernel width).
        """
        inside = [*self.mid, *self.near, *self.open]
        if not inside:
            return {}
        n = 1 << len(inside)
        by_code = products.sum(0).unflatten(1, (n, -1)).unflatten(0, (n, -1)).flatten(3).sum((1, 3))
        codes = torch.arange(n, device=products.device)
        r = by_code.gather(1, codes.unsqueeze(1) ^ codes).sum(0)  # r[x] is the sum of by_code[a, a ^ x] over a
        # The gradient of a gate is the sum of r[x] over all x that have its bit and no other closed bit.
        bits = 1 << torch.arange(len(inside) - 1, -1, -1, device=products.device).unsqueeze(1)
        closed = n - (1 << len(self.open))
        counts = (codes & bits != 0) & (codes & ~bits & closed == 0)
        return dict(zip(inside, counts.to(r.dtype) @ r, strict=True))


get_layout = functools.lru_cache(maxsize=1024)(Layout)


def empty_blocks(weight: Tensor, shape: tuple[int, ...], channels_last: bool) -> Tensor:
    """Allocate blocks of shape (groups, ..., C_out / groups, C_in / groups, ...) for `shape` = (groups, ...)."""
    out_channels, in_channels, height, width = weight.shape
    shape, in_channels = (*shape, out_channels // shape[0]), in_channels // shape[0]
    if channels_last:
        return weight.new_empty(*shape, height, width, in_channels).movedim(-1, -3)
    return weight.new_empty(*shape, in_channels, height, width)


def flip_groups(x: Tensor, num_group_bits: int, bits: range, channels_last: bool) -> Tensor:
    """Return the channels of the groups whose codes differ from each group's in one bit, for several bits.

    Args:
        x: Tensor of shape (N, C, H, W) in the order of a layout.
        num_group_bits: Number of bits that identify a group.
        bits: Positions of the bits in the order of the layout.
        channels_last: Memory format of `x`.

    Returns:
        Tensor of shape (N, C * len(bits), H, W): per group its partner's channels for each of the bits.
    """
    groups = torch.arange(1 << num_group_bits, device=x.device).unsqueeze(1)
    masks = 1 << num_group_bits - 1 - torch.arange(bits.start, bits.stop, device=x.device)
    dim = 3 if channels_last else 1
    x = x.movedim(1, 3) if channels_last else x
    x = x.unflatten(dim, (1 << num_group_bits, -1)).index_select(dim, (groups ^ masks).flatten()).flatten(dim, dim + 1)
    return x.movedim(3, 1) if channels_last else x


def in_format(x: Tensor, channels_last: bool) -> Tensor:
    """Return a tensor in one of the two memory formats, without a copy if it is in that format."""
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def is_channels_last(*tensors: Tensor) -> bool:
    """Return whether torch's convolution of these tensors has a channels_last output."""
    return any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in tensors)
