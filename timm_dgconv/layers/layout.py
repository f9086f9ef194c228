"""Layout: the order of channels in which the groups of a convolution are contiguous, and its index tensors.

A layout has one span (see `timm_dgconv.layers.spans`). The closed bits outside the span identify a group, and the
layout sorts the channels by them. Inside a group the channels keep their order. So there is nothing to permute if the
bits of the groups are the most significant bits, or if the span has all bits.

Two groups whose codes differ in one bit are partners. The channel pairs between partners give the gradient of this
bit's gate.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from timm_dgconv.layers.grad_memory import zeros_like

Place = tuple[torch.device, int]
"""A device and its current stream. Streams do not wait for each other, so they do not share index tensors."""


class Layout(NamedTuple):
    """The layout for one set of closed bits and one span. Bit 0 is the most significant bit of a channel code."""

    num_bits: int
    far: tuple[int, ...]
    """The closed bits outside the span. They identify a group."""
    near: tuple[int, ...]
    """The closed bits inside the span. They divide the channels of a group."""
    order: tuple[int, ...]
    """All bits, the bits of the groups first."""
    num_moved: int
    """The first `num_moved` bits of `order` are a permutation, the other bits are in place."""

    @property
    def groups(self) -> int:
        """Number of groups of the convolution."""
        return 1 << len(self.far)

    @property
    def run_bits(self) -> int:
        """Number of bits that identify a run: neighbouring channels of one group that stay together."""
        return max(len(self.far), self.num_moved)


@functools.lru_cache(maxsize=1024)
def get_layout(closed: tuple[bool, ...], span: int) -> Layout:
    """Return the layout.

    Args:
        closed: Which bits are closed, the most significant bit first.
        span: The mask of the closed bits in the span. Bit 0 of the mask is the least significant bit of a channel code.
    """
    num_bits = len(closed)
    in_span = [bool(span >> shift & 1) for shift in reversed(range(num_bits))]
    far, near = (tuple(k for k in range(num_bits) if closed[k] and in_span[k] == side) for side in (False, True))
    order = (*far, *(k for k in range(num_bits) if k not in far))
    num_moved = 1 + max((k for k in range(num_bits) if order[k] != k), default=-1)
    return Layout(num_bits, far, near, order, num_moved)


def place(tensor: Tensor) -> Place:
    """Return the place at which a tensor is computed with."""
    return tensor.device, torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def select_channels(x: Tensor, layout: Layout, where: Place, partners: bool = False, inverse: bool = False) -> Tensor:
    """Permute the channels into the order of a layout, or back.

    Args:
        x: Tensor of shape (N, C, H, W), contiguous or channels_last.
        layout: The layout.
        where: The place of `x`.
        partners: Insert the channels of its partners after the channels of each group, in the order of the far bits.
        inverse: Permute back.

    Returns:
        Tensor of shape (N, C, H, W), or (N, C * (1 + number of far bits), H, W), in the memory format of `x`.
    """
    if layout.num_moved:
        x = _select_runs(x, _run_index(layout, inverse, where), 1 << layout.run_bits)
    if partners and layout.far:
        x = _select_runs(x, _partner_index(layout, where), layout.groups)
    return x


def _select_runs(x: Tensor, index: Tensor, num_runs: int) -> Tensor:
    """Select runs of channels."""
    channels_last = is_channels_last(x)
    dim = 3 if channels_last else 1
    x = (x.movedim(1, 3) if channels_last else x).unflatten(dim, (num_runs, -1))
    run = x.shape[-1]
    # On a CPU, index_select is slow along all dimensions but the first, and gather is faster for short runs.
    if channels_last and x.is_cpu and run < 8:
        index = (index.unsqueeze(1) * run + torch.arange(run)).flatten()
        y = x.flatten(3).gather(3, index.expand(*x.shape[:3], len(index)))
    elif channels_last and x.is_cpu:
        rows = torch.arange(0, x[..., 0].numel(), x.shape[3]).unsqueeze(1) + index
        y = x.flatten(0, 3).index_select(0, rows.flatten()).view(*x.shape[:3], len(index) * run)
    else:
        y = x.index_select(dim, index).flatten(dim, dim + 1)
    return y.movedim(3, 1) if channels_last else y


def gather_blocks(weight: Tensor, layout: Layout, where: Place, partners: bool = False) -> Tensor:
    """Return the weight of the group convolution as blocks.

    Args:
        weight: Dense weight of shape (C_out, C_in, kernel height, kernel width), contiguous or channels_last.
        layout: The layout.
        where: The place of `weight`.
        partners: Return all pairs inside the groups, and the pairs between the inputs of each group and the outputs of
            its partners. Otherwise the result is zero for pairs that the gates do not connect.

    Returns:
        Tensor of shape (groups, 1 + number of far bits, C_out / groups, C_in / groups, kernel height, kernel width),
        without `partners` of shape (groups, 1, ...), in the memory format of `weight`.
    """
    blocks = weight[None, None]
    if layout.far:
        out_channels, in_channels, *kernel_size = weight.shape
        channels_last = is_channels_last(weight)
        sizes = (out_channels // layout.groups, in_channels // layout.groups, *kernel_size)
        sizes = (sizes[0], *kernel_size, sizes[1]) if channels_last else sizes
        blocks = _as_rows(weight, layout).index_select(0, _rows(weight, layout, partners, where))
        blocks = blocks.view(layout.groups, 1 + len(layout.far) if partners else 1, *sizes)
        blocks = blocks.movedim(-1, 3) if channels_last else blocks
    return blocks if partners else _mask(blocks, layout, where)


def weight_gradient(blocks: Tensor, weight: Tensor, layout: Layout, where: Place) -> Tensor:
    """Return the gradient of a dense weight.

    Args:
        blocks: Gradient of the pairs inside the groups, of shape (groups, C_out / groups, C_in / groups, kernel height,
            kernel width).
        weight: The weight, of shape (C_out, C_in, kernel height, kernel width), contiguous or channels_last.
        layout: The layout.
        where: The place of both.

    Returns:
        Tensor in the shape and memory format of `weight`. It is zero for pairs that the gates do not connect.
    """
    channels_last = is_channels_last(weight)
    blocks = _mask(blocks, layout, where).to(weight.dtype)
    if not layout.far:
        return in_format(blocks[0], channels_last)
    grad = zeros_like(weight)
    rows = _rows(weight, layout, False, where)
    blocks = blocks.movedim(2, -1) if channels_last else blocks
    _as_rows(grad, layout).index_copy_(0, rows, blocks.reshape(len(rows), -1).squeeze(1))
    return grad


def gate_gradients(products: Tensor, layout: Layout, gates: tuple[int, ...], where: Place) -> Tensor:
    """Return the gradients of all gates.

    Args:
        products: Products of weight and weight gradient, as blocks with partners (see `gather_blocks`).
        layout: The layout.
        gates: The bit on which each gate acts.
        where: The place of `products`.

    Returns:
        Tensor of shape (K,).
    """
    num_codes = 1 << layout.num_bits - len(layout.far)
    kernel = (-2, -1)
    if not products.is_contiguous():  # torch sums several times faster in the order of the memory
        products, kernel = products.movedim(3, -1), (-3, -2)
    sums = products.sum(0) if layout.far else products[0]  # two sums are faster than one over the same dimensions
    sums = sums.sum(kernel).unflatten(2, (num_codes, -1)).unflatten(1, (num_codes, -1))
    sums = sums.flatten(1) if sums.shape[2] == sums.shape[4] == 1 else sums.sum((2, 4)).flatten(1)
    # r[p, x] is the sum over the pairs of slot p for which (code of the output) XOR (code of the input) is x.
    r = sums.index_select(1, _pairs_by_xor(num_codes, where)).unflatten(1, (num_codes, num_codes)).sum(2)
    return _gates_by_xor(layout, gates, r.dtype, where) @ r.flatten()


def _runs(layout: Layout) -> Tensor:
    """Return the index of each run, of shape (groups, runs per group), in the order of the layout."""
    bits = layout.order[: layout.run_bits]
    return torch.arange(1 << len(bits), device="cpu").view([2] * len(bits)).permute(bits).reshape(layout.groups, -1)


def _partners(layout: Layout) -> Tensor:
    """Return the index of each group and its partners, of shape (groups, 1 + number of far bits)."""
    bits = torch.tensor([0, *(layout.groups >> n + 1 for n in range(len(layout.far)))])
    return torch.arange(layout.groups).unsqueeze(1) ^ bits


@functools.lru_cache(maxsize=1024)
def _run_index(layout: Layout, inverse: bool, where: Place) -> Tensor:
    index = _runs(layout).flatten()
    return (index.argsort() if inverse else index).to(where[0])


@functools.lru_cache(maxsize=1024)
def _partner_index(layout: Layout, where: Place) -> Tensor:
    return _partners(layout).flatten().to(where[0])


def _as_rows(weight: Tensor, layout: Layout) -> Tensor:
    """View a weight as rows that are inside one run of input channels, without a copy, or as elements."""
    if is_channels_last(weight):
        rows = weight.movedim(1, -1).view(-1, weight.shape[1] >> layout.run_bits)
    else:
        rows = weight.view(-1, weight[0].numel() >> layout.run_bits)
    return rows.squeeze(1)  # torch selects elements twice as fast as rows of one element


def _rows(weight: Tensor, layout: Layout, partners: bool, where: Place) -> Tensor:
    """Return the index of the rows of a weight that are in the blocks, in their order."""
    kernel_rows = weight[0, 0].numel() if is_channels_last(weight) else 1
    first, runs = _row_index(layout, weight.shape[0], kernel_rows, partners, where)
    return first if runs is None else (first + runs).flatten()


@functools.lru_cache(maxsize=1024)
def _row_index(
    layout: Layout, out_channels: int, kernel_rows: int, partners: bool, where: Place
) -> tuple[Tensor, Tensor | None]:
    """Return the index of the rows, or two tensors whose sum it is: permuted layouts have too many rows to keep."""
    runs = _runs(layout)
    run = out_channels >> layout.run_bits
    out = (runs.unsqueeze(2) * run + torch.arange(run)).flatten(1)
    out = out[_partners(layout)] if partners else out.unsqueeze(1)
    first = (out.unsqueeze(3) * kernel_rows + torch.arange(kernel_rows)).unsqueeze(4) << layout.run_bits
    runs = runs[:, None, None, None]
    dtype = torch.int32 if partners else torch.int64  # index_copy_ takes no int32
    if runs.shape[-1] == 1:
        return (first + runs).flatten().to(where[0], dtype), None
    return first.to(where[0], dtype), runs.to(where[0], dtype)


def _mask(blocks: Tensor, layout: Layout, where: Place) -> Tensor:
    """Write zeros for the pairs inside groups that the gates do not connect."""
    if not layout.near:
        return blocks
    disconnected = _disconnected(layout, blocks.shape[-4], blocks.shape[-3], where)
    return torch.where(disconnected, 0, blocks)  # masked_fill returns contiguous blocks in either format


@functools.lru_cache(maxsize=64)
def _disconnected(layout: Layout, out_channels: int, in_channels: int, where: Place) -> Tensor:
    num_codes = 1 << layout.num_bits - len(layout.far)
    codes = torch.arange(num_codes) & _inside(layout, layout.near)
    disconnected = codes.unsqueeze(1) != codes
    disconnected = disconnected.repeat_interleave(out_channels // num_codes, 0)
    return disconnected.repeat_interleave(in_channels // num_codes, 1)[:, :, None, None].to(where[0])


def _inside(layout: Layout, bits: tuple[int, ...]) -> int:
    """Return the mask of some bits in the code of a channel inside its group."""
    inside = layout.order[len(layout.far) :]
    return sum(1 << shift for shift, k in enumerate(reversed(inside)) if k in bits)


@functools.lru_cache(maxsize=64)
def _pairs_by_xor(num_codes: int, where: Place) -> Tensor:
    """Return the pairs of codes (a, a XOR x) as flat indices, sorted by x."""
    codes = torch.arange(num_codes)
    return (codes * num_codes + (codes ^ codes.unsqueeze(1))).flatten().to(where[0], torch.int32)


@functools.lru_cache(maxsize=1024)
def _gates_by_xor(layout: Layout, gates: tuple[int, ...], dtype: torch.dtype, where: Place) -> Tensor:
    """Return a 0/1 matrix of shape (K, slots * codes): 1 where a pair has the bit of the gate and no other closed bit.

    The pairs of slot 0 are inside a group. The pairs of slot 1 + n also differ in the far bit n.
    """
    codes = torch.arange(1 << layout.num_bits - len(layout.far))
    near = _inside(layout, layout.near)
    matrix = torch.zeros(len(gates), 1 + len(layout.far), len(codes), dtype=dtype)
    for row, k in zip(matrix, gates, strict=True):
        if k in layout.far:
            row[1 + layout.far.index(k)] = codes & near == 0
        else:
            bit = _inside(layout, (k,))
            row[0] = (codes & bit != 0) & (codes & near & ~bit == 0)
    return matrix.flatten(1).to(where[0])


def in_format(x: Tensor, channels_last: bool) -> Tensor:
    """Return a tensor in one of the two memory formats, without a copy if it is in that format."""
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def is_channels_last(*tensors: Tensor) -> bool:
    """Return whether torch's convolution of these tensors has a channels_last output."""
    for tensor in tensors:  # a generator takes several times as long, and each layer asks 16 times per step
        if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
            return True
    return False
