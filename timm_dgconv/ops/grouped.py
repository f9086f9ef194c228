"""The fast form for contiguous groups: output and gradients as group convolutions. README.md has the derivation.

The blocks of a weight are views of its diagonal. The neighbour of a group across a closed bit is a swap of halves. So
there are no index tensors and no caches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from timm_dgconv.ops.algebra import Bits

Size = Sequence[int]

MIN_CHANNELS = {("cpu", False): 16, ("cpu", True): 8, ("cuda", False): 64, ("cuda", True): 2048}
"""Device type and whether the dtype has 16 bits -> channels per group from which a weight gradient is fast.

Source: benchmarks/results/speed.md and benchmarks/results/gpu.md.
"""


def output(
    input: Tensor, weight: Tensor, bias: Tensor | None, bits: Bits, stride: Size, padding: Size, dilation: Size
) -> Tensor:
    """Compute the output of a layer.

    Args:
        input: Input of shape (N, C_in, H, W).
        weight: Dense weight of shape (C_out, C_in, kernel height, kernel width).
        bias: Bias of shape (C_out,) or None.
        bits: The bits of the layer, the closed ones first.
        stride: Vertical and horizontal stride.
        padding: Vertical and horizontal zero padding.
        dilation: Vertical and horizontal dilation.

    Returns:
        Output of shape (N, C_out, H_out, W_out).
    """
    bias = None if bias is None else bias.to(input.dtype)
    kernel = group_weight(weight, bits.groups, input.dtype)
    y = torch.conv2d(input, kernel, bias, stride, padding, dilation, bits.groups)
    return in_format(y, is_channels_last(input, weight))


def input_gradient(
    grad_output: Tensor, input: Tensor, weight: Tensor, bits: Bits, stride: Size, padding: Size, dilation: Size
) -> Tensor:
    """Compute the gradient of the input, see `output`. The values of `input` do not matter."""
    channels_last = is_channels_last(input, weight)
    grad, x = in_format(grad_output, channels_last), in_format(input, channels_last)
    kernel = group_weight(weight, bits.groups, grad.dtype)
    return in_format(_convolution_backward(0, grad, x, kernel, stride, padding, dilation, bits.groups), channels_last)


def weight_and_gate_gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bits: Bits,
    needs_gate: bool,
    stride: Size,
    padding: Size,
    dilation: Size,
) -> tuple[Tensor, Tensor | None]:
    """Compute the gradients of the dense weight and of the gates, see `output`.

    The weight gradient of a group convolution with wider groups has the slopes of all bits inside of its groups. So the
    last closed bits are merged into the groups: those that nested gates need, and more if the groups are too narrow to
    be fast. The slope of a closed bit that is not inside, which only the paper's forms need, costs one more group
    convolution between neighbours.

    Args:
        grad_output: Gradient of the output.
        input: Input.
        weight: Weight.
        bits: The bits of the layer, the closed ones first.
        needs_gate: Whether to compute the gradient of the gates.
        stride: Stride.
        padding: Padding.
        dilation: Dilation.

    Returns:
        Gradient of the weight, which is zero for pairs that are not connected, and gradient of the gates of shape (K,),
        in single precision at least, or None.
    """
    channels_last = is_channels_last(input, weight)
    grad, x = in_format(grad_output, channels_last), in_format(input, channels_last)
    num_closed = sum(bits.closed)
    num_outer = _num_outer(weight, grad.dtype, num_closed, needs_gate)
    groups, merged = 1 << num_outer, 1 << num_closed - num_outer
    like = _empty_weight(weight, groups, grad.dtype)  # only its shape and memory format matter

    def weight_gradient(grad: Tensor) -> Tensor:
        blocks = _convolution_backward(1, grad, x, like, stride, padding, dilation, groups)
        return blocks.unflatten(0, (groups, -1))

    wide = weight_gradient(grad)
    grad_weight = torch.zeros_like(weight) if num_closed else torch.empty_like(weight)
    diagonal_blocks(grad_weight, bits.groups).unflatten(0, (groups, merged)).copy_(diagonal_blocks(wide, merged, 1))
    if not needs_gate:
        return grad_weight, None
    # A gradient is a sum over many values, for which half precision is too coarse.
    dtype = torch.promote_types(torch.promote_types(weight.dtype, grad.dtype), torch.float32)
    slopes = torch.zeros(len(bits.closed), dtype=dtype, device=weight.device)
    inside = (diagonal_blocks(weight, groups).to(dtype) * wide).sum(0).sum((-2, -1))
    for bit, gate in enumerate(bits.gates):
        if gate >= 0 and bit >= num_outer:
            slopes[gate] = _slope(inside, bit - num_outer, num_closed - num_outer)
        elif gate >= 0:
            products = neighbour_blocks(weight, groups, bit).to(dtype) * weight_gradient(swap_halves(grad, bit))
            slopes[gate] = diagonal_blocks(products.sum(0).sum((-2, -1)), merged).sum()
    return grad_weight, slopes


def weight_gradient_groups(weight: Tensor, dtype: torch.dtype, bits: Bits, needs_gate: bool) -> list[int]:
    """Return the number of groups of each convolution in `weight_and_gate_gradients`."""
    num_outer = _num_outer(weight, dtype, sum(bits.closed), needs_gate)
    return [1 << num_outer] * (1 + needs_gate * sum(gate >= 0 for gate in bits.gates[:num_outer]))


def _num_outer(weight: Tensor, dtype: torch.dtype, num_closed: int, needs_gate: bool) -> int:
    """Return how many closed bits identify a group in the convolution for the weight gradient."""
    width = MIN_CHANNELS[weight.device.type, dtype.itemsize == 2]
    fast = (weight.shape[1] // width).bit_length() - 1
    return max(min(num_closed - needs_gate, fast), 0)


def _slope(products: Tensor, bit: int, num_closed: int) -> Tensor:
    """Return the slope of a bit inside of the groups.

    Args:
        products: Weight times gradient of shape (outputs, inputs) of a group, summed over the groups.
        bit: The bit, counted from the first one inside of the groups.
        num_closed: Number of closed bits inside of the groups. The pairs agree in them, apart from the bit itself.
    """
    agree = diagonal_blocks(products, 1 << min(bit, num_closed))
    free = 1 << max(bit - num_closed, 0)  # codes of the open bits before this one, in which the pairs may differ
    pairs = agree.unflatten(2, (free, 2, -1)).unflatten(1, (free, 2, -1))
    halves = [pairs[:, :, half, :, :, 1 - half] for half in (0, 1)]
    if bit < num_closed - 1:  # closed bits after this one
        halves = [diagonal_blocks(half[:, 0, :, 0], 1 << num_closed - bit - 1, 1) for half in halves]
    return halves[0].sum() + halves[1].sum()


def diagonal_blocks(weight: Tensor, groups: int, dim: int = 0) -> Tensor:
    """Return a view of the diagonal blocks of a dense weight, the weight of a convolution with contiguous groups.

    Args:
        weight: Tensor with the dimensions (C_out, C_in) from `dim` on, for example a dense weight.
        groups: Number of groups. Each group is a range of channels.
        dim: The dimension of C_out.

    Returns:
        View with the dimensions (groups, C_out / groups, C_in / groups) there.
    """
    blocks = weight.unflatten(dim + 1, (groups, -1)).unflatten(dim, (groups, -1))
    return blocks.diagonal(0, dim, dim + 2).movedim(-1, dim)


def neighbour_blocks(weight: Tensor, groups: int, bit: int) -> Tensor:
    """Return the blocks of a dense weight that join the inputs of each group to the outputs of its neighbour.

    Args:
        weight: Weight of shape (C_out, C_in, kernel height, kernel width).
        groups: Number of groups.
        bit: The bit in which the numbers of neighbours differ, the most significant bit first.

    Returns:
        Tensor of shape (groups, C_out / groups, C_in / groups, kernel height, kernel width).
    """
    pairs = diagonal_blocks(weight, 1 << bit)
    pairs = pairs.unflatten(2, (2, -1)).unflatten(1, (2, -1))
    halves = [diagonal_blocks(pairs[:, 1 - half, :, half], groups >> bit + 1, 1) for half in (0, 1)]
    return torch.stack(halves, 1).flatten(0, 2)


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
    num_bits = len(closed)
    order = sorted(range(num_bits), key=lambda k: not closed[k])
    dims = [*range(dim), *(dim + k for k in order), *range(dim + num_bits, x.ndim + num_bits)]
    result = torch.empty_like(x)  # not reshape, which returns a contiguous tensor
    unsorted, ordered = (t.unflatten(dim, (*[2] * num_bits, -1)) for t in ((result, x) if inverse else (x, result)))
    unsorted = unsorted.permute(dims)
    (unsorted if inverse else ordered).copy_(ordered if inverse else unsorted)
    return result


def group_weight(weight: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Return the weight of a group convolution, in the memory format of a dense weight.

    Args:
        weight: Weight of shape (C_out, C_in, kernel height, kernel width).
        groups: Number of groups.
        dtype: Dtype of the result.

    Returns:
        Weight of shape (C_out, C_in / groups, kernel height, kernel width).
    """
    if groups == 1:
        return weight.to(dtype)
    result = _empty_weight(weight, groups, dtype)
    result.unflatten(0, (groups, -1)).copy_(diagonal_blocks(weight, groups))
    return result


def _empty_weight(weight: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    out_channels, in_channels, *kernel_size = weight.shape
    memory_format = torch.channels_last if is_channels_last(weight) else torch.contiguous_format
    size = (out_channels, in_channels // groups, *kernel_size)
    return torch.empty(size, dtype=dtype, device=weight.device, memory_format=memory_format)


def _convolution_backward(
    which: int, grad: Tensor, x: Tensor, weight: Tensor, stride: Size, padding: Size, dilation: Size, groups: int
) -> Tensor:
    """Return the gradient of the input (0) or of the weight (1) of a group convolution."""
    args = (None, stride, padding, dilation, False, [0], groups, [which == 0, which == 1, False])
    return torch.ops.aten.convolution_backward(grad, x, weight, *args)[which]


def in_format(x: Tensor, channels_last: bool) -> Tensor:
    """Return a tensor in one of the two memory formats, without a copy if it is in that format."""
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def is_channels_last(*tensors: Tensor) -> bool:
    """Return whether torch's convolution of these tensors has a channels_last output."""
    for tensor in tensors:  # a generator takes several times as long, and each layer asks several times per step
        if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
            return True
    return False
