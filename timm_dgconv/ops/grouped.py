"""The fast form: output and gradients of the layer as group convolutions. README.md has the derivation.

A group convolution needs contiguous groups. So the closed bits come first in the order of channels: with `sort=True`
they do, otherwise the channels are permuted. The blocks of a weight are strided views of it. There are no index tensors
and no caches.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from timm_dgconv.ops.algebra import Bits

Size = Sequence[int]

_GROUP, _OUTPUT, _INPUT, _KERNEL = range(4)
"""The roles of the dimensions of a weight that is split into blocks, in the order in which they are sorted."""


class Run(NamedTuple):
    """Neighbouring bits of one kind.

    Attributes:
        kind: "group" for closed bits that identify a group of the convolution, "merged" for closed bits inside of the
            groups, "open", or "across" for the closed bit that joins each group to its neighbour.
        size: Number of codes, 2^(number of bits).
    """

    kind: str
    size: int


def split(closed: Sequence[bool], count: int, across: int = -1) -> list[Run]:
    """Return the runs of the bits for a convolution whose groups are identified by the first `count` closed bits.

    Args:
        closed: Whether each bit is closed, the most significant bit first.
        count: Number of closed bits that identify a group. The others are merged into the groups.
        across: A bit in which each group differs from its neighbour, or -1.
    """
    runs: list[Run] = []
    num_closed = 0
    for k, is_closed in enumerate(closed):
        num_closed += is_closed
        kind = "open" if not is_closed else "merged" if num_closed > count else "group"
        kind = "across" if k == across else kind
        if runs and runs[-1].kind == kind:
            runs[-1] = Run(kind, 2 * runs[-1].size)
        else:
            runs.append(Run(kind, 2))
    if not runs or runs[-1].kind != "open":
        runs.append(Run("open", 1))  # the channels with the same code
    return runs


def blocks(weight: Tensor, runs: Sequence[Run], kinds: Sequence[str]) -> Tensor:
    """Return a view of the blocks of a dense weight, or a copy for neighbours across a bit.

    Args:
        weight: Weight of shape (C_out, C_in, kernel height, kernel width).
        runs: The runs of the bits of the channels.
        kinds: The kinds of runs in which an output and an input of a block agree (for "across": differ).

    Returns:
        Tensor with one dimension per run of a chosen kind, one per other run of the outputs and of the inputs, and the
        two dimensions of the kernel.
    """
    sizes = [*(run.size for run in runs[:-1]), -1]
    labels = [(role, n) for role in (_OUTPUT, _INPUT) for n in range(len(runs))] + [(_KERNEL, 0), (_KERNEL, 1)]
    return _diagonals(weight.unflatten(1, sizes).unflatten(0, sizes), labels, runs, kinds)


def inner_blocks(grad: Tensor, runs: Sequence[Run], kinds: Sequence[str] = ()) -> Tensor:
    """Return a view of the blocks inside of the groups of a group convolution.

    Args:
        grad: Weight gradient of the group convolution, (C_out, C_in / groups, kernel height, kernel width).
        runs: The runs of the bits of the channels.
        kinds: The kinds of runs, beside those of the groups, in which an output and an input of a block agree.

    Returns:
        View in the shape of ``blocks(weight, runs, ("group", "across", *kinds))``.
    """
    groups = [n for n, run in enumerate(runs) if run.kind in ("group", "across")]
    others = [n for n in range(len(runs)) if n not in groups]
    sizes = [*(runs[n].size for n in (*groups, *others[:-1])), -1]
    labels = [(_GROUP, n) for n in groups] + [(role, n) for role in (_OUTPUT, _INPUT) for n in others]
    view = grad.unflatten(1, sizes[len(groups) :]).unflatten(0, sizes)
    return _diagonals(view, [*labels, (_KERNEL, 0), (_KERNEL, 1)], runs, kinds)


def _diagonals(view: Tensor, labels: list[tuple[int, int]], runs: Sequence[Run], kinds: Sequence[str]) -> Tensor:
    """Take the diagonal over outputs and inputs of the runs of some kinds, and sort the dimensions by role and run."""
    for n, run in sorted(enumerate(runs), key=lambda entry: entry[1].kind == "across"):
        if run.kind in kinds:
            output, input = labels.index((_OUTPUT, n)), labels.index((_INPUT, n))
            if run.kind == "across":
                halves = [view.select(input, half).select(output, 1 - half) for half in (0, 1)]
                view = torch.stack(halves, -1)
            else:
                view = view.diagonal(0, output, input)
            labels = [label for label in labels if label not in ((_OUTPUT, n), (_INPUT, n))] + [(_GROUP, n)]
    return view.permute(sorted(range(len(labels)), key=labels.__getitem__))


def group_weight(weight: Tensor, closed: Sequence[bool], dtype: torch.dtype) -> Tensor:
    """Return the weight of the group convolution with the groups of all closed bits.

    Args:
        weight: Dense weight of shape (C_out, C_in, kernel height, kernel width), contiguous or channels_last.
        closed: Whether each bit is closed.
        dtype: Dtype of the result.

    Returns:
        Weight of shape (C_out, C_in / groups, kernel height, kernel width), in the memory format of `weight`.
    """
    if not any(closed):
        return weight.to(dtype)
    runs = split(closed, len(closed))
    view = blocks(weight, runs, ("group",))
    num_inputs = sum(run.kind == "open" for run in runs)
    result = _empty_weight(weight, sum(closed), dtype)
    result.unflatten(1, view.shape[-2 - num_inputs : -2]).unflatten(0, view.shape[: -2 - num_inputs]).copy_(view)
    return result


def _empty_weight(weight: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return the uninitialised weight of a group convolution with 2^count groups."""
    out_channels, in_channels, *kernel_size = weight.shape
    memory_format = torch.channels_last if is_channels_last(weight) else torch.contiguous_format
    size = (out_channels, in_channels >> count, *kernel_size)
    return torch.empty(size, dtype=dtype, device=weight.device, memory_format=memory_format)


def closed_first(x: Tensor, closed: Sequence[bool], inverse: bool = False) -> Tensor:
    """Permute the channels so that closed bits come first, or back. Sorted bits leave the tensor as it is.

    Args:
        x: Tensor of shape (N, C, H, W), contiguous or channels_last.
        closed: Whether each bit is closed.
        inverse: Permute back.

    Returns:
        Tensor of the same shape and memory format.
    """
    if all(closed[: sum(closed)]):
        return x
    runs = split(closed, len(closed))
    order = sorted(range(len(runs)), key=lambda n: runs[n].kind != "group")
    sizes = [*(run.size for run in runs[:-1]), x.shape[1] // (1 << len(closed)) * runs[-1].size]
    dims = (0, *(1 + n for n in order), -2, -1)
    result = torch.empty_like(x)  # not reshape, which returns a contiguous tensor
    before, after = (result, x) if inverse else (x, result)
    before = before.unflatten(1, sizes).permute(dims)
    after = after.unflatten(1, [sizes[n] for n in order])
    (before if inverse else after).copy_(after if inverse else before)
    return result


def swap_halves(x: Tensor, bit: int) -> Tensor:
    """Exchange the channels that differ in one bit, in the memory format of `x`."""
    result = torch.empty_like(x)
    source, target = (t.unflatten(1, (1 << bit, 2, -1)) for t in (x, result))
    for half in (0, 1):
        target[:, :, half] = source[:, :, 1 - half]
    return result


def output(
    input: Tensor, weight: Tensor, bias: Tensor | None, bits: Bits, stride: Size, padding: Size, dilation: Size
) -> Tensor:
    """Compute the output of the layer.

    Args:
        input: Input of shape (N, C_in, H, W).
        weight: Dense weight of shape (C_out, C_in, kernel height, kernel width).
        bias: Bias of shape (C_out,) or None.
        bits: The bits of the layer.
        stride: Vertical and horizontal stride.
        padding: Vertical and horizontal zero padding.
        dilation: Vertical and horizontal dilation.

    Returns:
        Output of shape (N, C_out, H_out, W_out).
    """
    channels_last = is_channels_last(input, weight)
    x = closed_first(input, bits.closed)
    kernel = group_weight(dense(weight), bits.closed, x.dtype)
    if bias is not None:
        bias = closed_first(bias.to(x.dtype)[None, :, None, None], bits.closed).flatten()
    y = torch.conv2d(x, kernel, bias, stride, padding, dilation, bits.groups)
    return closed_first(in_format(y, channels_last), bits.closed, inverse=True)


def input_gradient(
    grad_output: Tensor, input: Tensor, weight: Tensor, bits: Bits, stride: Size, padding: Size, dilation: Size
) -> Tensor:
    """Compute the gradient of the input, see `output`. The values of `input` do not matter."""
    channels_last = is_channels_last(input, weight)
    grad = closed_first(in_format(grad_output, channels_last), bits.closed)
    kernel = group_weight(dense(weight), bits.closed, grad.dtype)
    x = in_format(input, channels_last)
    grad_input = _convolution_backward(grad, x, kernel, stride, padding, dilation, bits.groups, 0)
    return closed_first(in_format(grad_input, channels_last), bits.closed, inverse=True)


def weight_and_gate_gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    bits: Bits,
    stride: Size,
    padding: Size,
    dilation: Size,
) -> tuple[Tensor, Tensor | None]:
    """Compute the gradients of the dense weight and of the gates, see `output`.

    The weight gradient of a group convolution with wider groups has the slopes of all bits inside of its groups. So the
    groups are merged until they have the bits that nested gates need, and are wide enough to be fast. Bits that are not
    inside, which only the paper's forms need, cost one more group convolution each.

    Args:
        grad_output: Gradient of the output.
        input: Input.
        weight: Weight.
        gate: Gates of shape (K,), or None to compute no gradient for them. Only their dtype matters.
        bits: The bits of the layer.
        stride: Stride.
        padding: Padding.
        dilation: Dilation.

    Returns:
        Gradient of the weight, which is zero for pairs that are not connected, and gradient of the gates or None.
    """
    channels_last = is_channels_last(input, weight)
    grad, x, w = in_format(grad_output, channels_last), in_format(input, channels_last), dense(weight)
    closed = bits.closed
    outer = _outer_bits(w, grad.dtype, closed, gate is not None)
    inner = [k for k in range(len(closed)) if k not in outer]
    inner_closed = [closed[k] for k in inner]
    count, runs = len(outer), split(closed, len(outer))
    groups_first = [k in outer for k in range(len(closed))]
    grad, x = closed_first(grad, groups_first), closed_first(x, groups_first)
    like = _empty_weight(w, count, grad.dtype)  # only its shape and memory format matter

    def weight_gradient(grad: Tensor) -> Tensor:
        return _convolution_backward(grad, x, like, stride, padding, dilation, 1 << count, 1)

    wide = weight_gradient(grad)
    grad_gate = None
    if gate is not None:
        # A gradient is a sum over many values, for which half precision is too coarse.
        dtype = torch.promote_types(torch.promote_types(weight.dtype, grad.dtype), torch.float32)
        slopes = torch.zeros(len(closed), dtype=dtype, device=gate.device)
        products = _products(w, wide, runs, dtype)
        for n, k in enumerate(inner):
            if bits.gates[k] >= 0:
                slopes[bits.gates[k]] = _sum_connected(products, split(inner_closed, 0, across=n))
        for n, k in enumerate(outer):
            if bits.gates[k] >= 0:
                neighbours = weight_gradient(swap_halves(grad, n))
                products = _products(w, neighbours, split(closed, count, across=k), dtype)
                slopes[bits.gates[k]] = _sum_connected(products, split(inner_closed, 0))
        grad_gate = slopes.to(gate.dtype)
    if any(closed):
        grad_weight = torch.zeros_like(w)
        blocks(grad_weight, runs, ("group", "merged")).copy_(inner_blocks(wide, runs, ("merged",)))
    else:
        grad_weight = in_format(wide, is_channels_last(w)).to(w.dtype)
    return grad_weight if w is weight else torch.empty_like(weight).copy_(grad_weight), grad_gate


MIN_CHANNELS = {("cpu", False): 16, ("cpu", True): 8, ("cuda", False): 64, ("cuda", True): 2048}
"""Device type and whether the dtype has 16 bits -> channels per group from which a weight gradient is fast.

Source: benchmarks/results/speed.md and benchmarks/results/gpu.md.
"""


def _outer_bits(weight: Tensor, dtype: torch.dtype, closed: Sequence[bool], needs_gate: bool) -> list[int]:
    """Return the closed bits that identify a group in the convolution for the weight gradient."""
    positions = [k for k, is_closed in enumerate(closed) if is_closed]
    width = MIN_CHANNELS[weight.device.type, dtype.itemsize == 2]
    widest = max((weight.shape[1] // width).bit_length() - 1, 0)
    return positions[: max(min(len(positions) - needs_gate, widest), 0)]


def weight_gradient_groups(weight: Tensor, dtype: torch.dtype, bits: Bits, needs_gate: bool) -> list[int]:
    """Return the number of groups of each convolution for the weight gradient, see `weight_and_gate_gradients`."""
    outer = _outer_bits(weight, dtype, bits.closed, needs_gate)
    return [1 << len(outer)] * (1 + needs_gate * sum(bits.gates[k] >= 0 for k in outer))


def _products(weight: Tensor, grad: Tensor, runs: Sequence[Run], dtype: torch.dtype) -> Tensor:
    """Return weight times gradient, summed over groups and kernel, of shape (outputs, inputs) of a group."""
    view = blocks(weight, runs, ("group", "across"))
    products = view.to(dtype) * inner_blocks(grad, runs)
    groups = [n for n, run in enumerate(runs) if run.kind in ("group", "across")]
    return products.sum((*range(len(groups)), -2, -1)).reshape(
        grad.shape[0] // math.prod(runs[n].size for n in groups), -1
    )


def _sum_connected(products: Tensor, runs: Sequence[Run]) -> Tensor:
    """Sum the products of the pairs that agree in all closed bits, and differ in the bit of kind "across" if any."""
    return blocks(products[:, :, None, None], runs, ("merged", "across")).sum()


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Size, padding: Size, dilation: Size, groups: int, which: int
) -> Tensor:
    """Return the gradient of the input (0) or of the weight (1) of a group convolution."""
    mask = [which == n for n in range(3)]
    args = (None, stride, padding, dilation, False, [0], groups, mask)
    return torch.ops.aten.convolution_backward(grad, x, weight, *args)[which]


def dense(weight: Tensor) -> Tensor:
    """Return a weight in one of the two memory formats, without a copy if it is in one."""
    return weight if weight.is_contiguous(memory_format=torch.channels_last) else weight.contiguous()


def in_format(x: Tensor, channels_last: bool) -> Tensor:
    """Return a tensor in one of the two memory formats, without a copy if it is in that format."""
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def is_channels_last(*tensors: Tensor) -> bool:
    """Return whether torch's convolution of these tensors has a channels_last output."""
    for tensor in tensors:  # a generator takes several times as long, and each layer asks several times per step
        if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
            return True
    return False


def group_blocks(weight: Tensor, groups: int) -> Tensor:
    """Return a view of the diagonal blocks of a dense weight, the weight of a convolution with contiguous groups.

    Args:
        weight: Dense weight of shape (C_out, C_in, kernel height, kernel width).
        groups: Number of groups. Each group is a range of channels.

    Returns:
        View of shape (groups, C_out / groups, C_in / groups, kernel height, kernel width).
    """
    return weight.unflatten(1, (groups, -1)).unflatten(0, (groups, -1)).diagonal(0, 0, 2).movedim(-1, 0)
