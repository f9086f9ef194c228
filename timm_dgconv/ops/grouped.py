"""The fast form: output and gradients as group convolutions. README.md has the derivation, `plan.py` the views.

Inputs and outputs have their groups in contiguous ranges of channels. `exchange_bits` brings those of an unsorted layer
into this order. The weights of all groups are a strided view of the dense weight. The neighbour of a group across a
closed bit is a swap of halves. So there are no index tensors except in `exchange_bits`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from timm_dgconv.ops.algebra import Bits, channel_order, closed_first
from timm_dgconv.ops.plan import Plan, View, make_plan

Size = Sequence[int]
Geometry = tuple[Size, Size, Size]
"""Vertical and horizontal stride, zero padding, and dilation."""

MIN_CHANNELS = {("cpu", False): 16, ("cpu", True): 16, ("cuda", False): 64, ("cuda", True): 2048}
"""Device type and whether the dtype has 16 bits -> channels per group from which a weight gradient is fast.

`python benchmarks/bench.py layers` measures it. benchmarks/results/gpu.md has the figures of 16 bits on CUDA.
"""


def plan_layer(weight: Tensor, dtype: torch.dtype, bits: Bits, needs_gate: bool) -> Plan:
    """Return the plan of a layer.

    Args:
        weight: Dense weight of shape (C_out, C_in, kernel height, kernel width) in one of the two memory formats.
        dtype: Dtype of input and output.
        bits: The bits of the layer.
        needs_gate: Whether the gates need gradients.
    """
    min_channels = MIN_CHANNELS[weight.device.type, dtype.itemsize == 2]
    learns = tuple(gate >= 0 for gate in bits.gates) if needs_gate else (False,) * len(bits.gates)
    return make_plan(bits.closed, learns, tuple(weight.shape), is_channels_last(weight), min_channels)


def wide_weight(weight: Tensor, plan: Plan) -> Tensor | None:
    """Return the weights inside of the wide groups, of shape `plan.wide_shape`, or None if no gate learns from them."""
    return _gather(weight, plan.wide_weights, plan, plan.wide_shape, weight.dtype) if plan.inside else None


def group_weight(weight: Tensor, wide_weight: Tensor | None, plan: Plan, dtype: torch.dtype) -> Tensor:
    """Return the weights inside of the groups, of shape `plan.shape`.

    Args:
        weight: Dense weight.
        wide_weight: See `wide_weight`. Its elements are near to each other in memory.
        plan: The plan of the layer.
        dtype: Dtype of input and output.
    """
    source, view = (weight, plan.weights) if wide_weight is None else (wide_weight, plan.blocks)
    return _gather(source, view if plan.weights else None, plan, plan.shape, dtype)


def output(input: Tensor, kernel: Tensor, bias: Tensor | None, plan: Plan, geometry: Geometry) -> Tensor:
    """Compute the output of a layer.

    Args:
        input: Input of shape (N, C_in, H, W).
        kernel: The weights inside of the groups, see `group_weight`.
        bias: Bias of shape (C_out,) or None.
        plan: The plan of the layer.
        geometry: Stride, padding and dilation.

    Returns:
        Output of shape (N, C_out, H_out, W_out).
    """
    bias = None if bias is None else bias.to(input.dtype)
    # Counters of operations replace F.conv2d (DeepSpeed, calflops). They take no lists.
    stride, padding, dilation = map(tuple, geometry)
    y = F.conv2d(input, kernel, bias, stride, padding, dilation, plan.groups)
    return in_format(y, plan.channels_last or is_channels_last(input))


def convolution_gradients(
    grad: Tensor, x: Tensor, kernel: Tensor, plan: Plan, geometry: Geometry, needs_input: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of the input, and of the weights inside of the wide groups, if they are needed.

    Args:
        grad: Gradient of the output. Here and below, it has the memory format of the output.
        x: Input, in the same memory format.
        kernel: The weights inside of the groups, see `group_weight`.
        plan: The plan of the layer.
        geometry: Stride, padding and dilation.
        needs_input: Whether to compute the gradient of the input.
        needs_weight: Whether to compute that of the weights.
    """
    if plan.groups == plan.wide_groups:  # torch reads `grad` once
        grad_input, grad_wide = _backward(grad, x, kernel, geometry, plan.groups, needs_input, needs_weight)
    else:
        grad_input, _ = _backward(grad, x, kernel, geometry, plan.groups, needs_input, False)
        grad_wide = None
        if needs_weight:
            like = _empty(kernel, plan, plan.wide_shape, grad.dtype)  # only its shape and memory format matter
            _, grad_wide = _backward(grad, x, like, geometry, plan.wide_groups, False, True)
    return (
        None if grad_input is None else in_format(grad_input, plan.channels_last or is_channels_last(x)),
        None if grad_wide is None else in_format(grad_wide, plan.channels_last),
    )


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, groups: int, needs_input: bool, needs_weight: bool
) -> Sequence[Tensor | None]:
    """Return the gradients of the input and of the weight of a group convolution, or None."""
    if not (needs_input or needs_weight):
        return None, None
    args = (None, *geometry, False, (0, 0), groups, (needs_input, needs_weight, False))
    return torch.ops.aten.convolution_backward.default(grad, x, weight, *args)[:2]


def dense_gradient(grad_wide: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """Return the gradient of the dense weight: that of the weights inside of the groups, and zeros elsewhere."""
    if plan.weights is None:
        return grad_wide.to(weight.dtype)
    result = torch.zeros_like(weight)
    plan.weights.of(result).copy_(plan.blocks.of(grad_wide))
    return result


def gate_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    wide_weight: Tensor | None,
    grad_wide: Tensor,
    bits: Bits,
    plan: Plan,
    geometry: Geometry,
) -> Tensor:
    """Compute the gradients of the gates.

    The slope of a bit inside of the wide groups is a sum over weights times their gradients. Another one costs a group
    convolution: the output that each group would get from its neighbour, times the output gradient.

    Args:
        grad: Gradient of the output.
        x: Input.
        weight: Dense weight.
        wide_weight: The weights inside of the wide groups, see `wide_weight`.
        grad_wide: Their gradient.
        bits: The bits of the layer.
        plan: The plan of the layer.
        geometry: Stride, padding and dilation.

    Returns:
        Gradient of shape (K,), in single precision at least.
    """
    # A slope is a sum over many values, for which half precision is too coarse.
    dtype = torch.promote_types(torch.promote_types(weight.dtype, grad.dtype), torch.float32)
    slopes = torch.zeros(len(bits.gates), dtype=dtype, device=weight.device)
    if wide_weight is not None:
        w = wide_weight.to(dtype)
        sums = (w * grad_wide).sum((2, 3), keepdim=True) if plan.sum_kernel else None
        for bit, pairs in plan.inside:
            _sum(pairs.of(w) * pairs.of(grad_wide) if sums is None else pairs.of(sums), slopes[bits.gates[bit]])
    for bit, position, pairs in plan.outside:
        kernel = _gather(weight, pairs, plan, plan.shape, x.dtype)
        y = torch.conv2d(swap_halves(x, position), kernel, None, *geometry, plan.groups)
        _sum(y.to(dtype) * grad, slopes[bits.gates[bit]])
    return slopes


def diagonal_blocks(weight: Tensor, groups: int) -> Tensor:
    """Return the diagonal blocks of a dense weight, a view of shape (groups, C_out / groups, C_in / groups, ...)."""
    blocks = weight.unflatten(1, (groups, -1)).unflatten(0, (groups, -1))
    return blocks.diagonal(0, 0, 2).movedim(-1, 0)


def _sum(x: Tensor, out: Tensor) -> None:
    """Write the sum of all elements, in one operation."""
    torch.sum(x, tuple(range(x.ndim)), out=out)


def _gather(weight: Tensor, view: View | None, plan: Plan, shape: Size, dtype: torch.dtype) -> Tensor:
    """Return a view of a weight as the weight of a group convolution, in the memory format of the dense weight."""
    if view is None:
        return weight.to(dtype)
    result, source = _empty(weight, plan, shape, dtype), view.of(weight)
    if plan.channels_last and not plan.is_sorted:
        source = source.contiguous()  # an inner loop over the kernel is faster than one over a bit
    result.view(view.size).copy_(source)
    return result


def _empty(weight: Tensor, plan: Plan, shape: Size, dtype: torch.dtype) -> Tensor:
    memory_format = torch.channels_last if plan.channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=weight.device, memory_format=memory_format)


def swap_halves(x: Tensor, bit: int) -> Tensor:
    """Exchange the channels whose groups are neighbours across a bit, in the memory format of `x`."""
    result = torch.empty_like(x)
    source, target = (t.unflatten(1, (1 << bit, 2, -1)) for t in (x, result))
    for half in (0, 1):
        target[:, :, half] = source[:, :, 1 - half]
    return result


def exchange_bits(x: Tensor, closed: Sequence[bool], dim: int = 1, inverse: bool = False) -> Tensor:
    """Order channels by their closed bits, or back, in the memory format of `x`. Then the groups are contiguous.

    Args:
        x: Tensor in one of the two memory formats.
        closed: Whether each bit is closed, the most significant bit first.
        dim: The dimension of the channels.
        inverse: Whether to go back.
    """
    result = torch.empty_like(x)  # a user may change an output in place, so it is not a view
    if x.device.type == "cpu" and dim == 1 and is_channels_last(x):  # gather is up to six times as fast
        index = channel_order(closed, x.shape[1])
        rows, target = x.permute(0, 2, 3, 1), result.permute(0, 2, 3, 1)
        torch.gather(rows, 3, (index.argsort() if inverse else index).expand(rows.shape), out=target)
        return result
    num_bits = len(closed)
    dims = [*range(dim), *(dim + k for k in closed_first(closed)), *range(dim + num_bits, x.ndim + num_bits)]
    unsorted, ordered = (t.unflatten(dim, (*[2] * num_bits, -1)) for t in ((result, x) if inverse else (x, result)))
    unsorted = unsorted.permute(dims)
    (unsorted if inverse else ordered).copy_(ordered if inverse else unsorted)
    return result


def in_format(x: Tensor, channels_last: bool) -> Tensor:
    """Return a tensor in one of the two memory formats, without a copy if it is in that format."""
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def is_channels_last(*tensors: Tensor) -> bool:
    """Return whether torch's convolution of these tensors has a channels_last output."""
    for tensor in tensors:  # a generator takes several times as long, and each layer asks several times per step
        if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
            return True
    return False
