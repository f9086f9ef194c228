"""The fast form: output and gradients as group convolutions. README.md has the derivation.

The groups are contiguous ranges of channels. `exchange_bits` brings inputs and outputs of an unsorted layer into this
order, and its weight stays as it is: the weights of all groups are a strided view of it, whichever bits are closed. The
neighbour of a group across a closed bit is a swap of halves. So there are no index tensors and no caches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from timm_dgconv.ops.algebra import Bits, channel_order

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
        weight: Dense weight of shape (C_out, C_in, kernel height, kernel width), in the order of the layer's channels.
        bias: Bias of shape (C_out,) or None.
        bits: The bits of the layer.
        stride: Vertical and horizontal stride.
        padding: Vertical and horizontal zero padding.
        dilation: Vertical and horizontal dilation.

    Returns:
        Output of shape (N, C_out, H_out, W_out).
    """
    bias = None if bias is None else bias.to(input.dtype)
    kernel = group_weight(weight, *bits.positions, input.dtype)
    y = torch.conv2d(input, kernel, bias, stride, padding, dilation, bits.groups)
    return in_format(y, is_channels_last(input, weight))


def input_gradient(
    grad_output: Tensor, input: Tensor, weight: Tensor, bits: Bits, stride: Size, padding: Size, dilation: Size
) -> Tensor:
    """Compute the gradient of the input, see `output`. The values of `input` do not matter."""
    channels_last = is_channels_last(input, weight)
    grad, x = in_format(grad_output, channels_last), in_format(input, channels_last)
    kernel = group_weight(weight, *bits.positions, grad.dtype)
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
    convolution: the product of the output gradient and the output that the inputs of the neighbours would give.

    Args:
        grad_output: Gradient of the output.
        input: Input.
        weight: Weight.
        bits: The bits of the layer.
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
    closed, opened = bits.positions
    num_outer = _num_outer(weight, grad.dtype, len(closed), needs_gate)
    groups, outer, merged = 1 << num_outer, closed[:num_outer], closed[num_outer:]
    inner = [*merged, *opened]
    like = _empty_weight(weight, groups, grad.dtype)  # only its shape and memory format matter
    wide = _convolution_backward(1, grad, x, like, stride, padding, dilation, groups)
    grad_weight = torch.zeros_like(weight) if closed else torch.empty_like(weight)
    blocks = _blocks(grad_weight, closed, opened)
    blocks.copy_(diagonal_blocks(wide.unflatten(0, (groups, -1)), 1 << len(merged), 1).view(blocks.shape))
    if not needs_gate:
        return grad_weight, None
    # A gradient is a sum over many values, for which half precision is too coarse.
    dtype = torch.promote_types(torch.promote_types(weight.dtype, grad.dtype), torch.float32)
    slopes = torch.zeros(len(bits.closed), dtype=dtype, device=weight.device)
    products = (group_weight(weight, outer, inner, dtype) * wide).unflatten(0, (groups, -1))
    inside = products.sum(0).sum((-2, -1))
    for position, gate in enumerate(bits.gates[bit] for bit in (*outer, *inner)):
        if gate >= 0 and position >= num_outer:
            slopes[gate] = _slope(inside, position - num_outer, len(merged))
        elif gate >= 0:
            kernel = neighbour_weight(weight, closed, opened, position, x.dtype)
            swapped = swap_halves(x, position)
            y = torch.conv2d(swapped, kernel, None, stride, padding, dilation, bits.groups)
            slopes[gate] = (y.to(dtype) * grad).sum()
    return grad_weight, slopes


def weight_gradient_groups(weight: Tensor, dtype: torch.dtype, bits: Bits, needs_gate: bool) -> list[int]:
    """Return the number of groups of each convolution in `weight_and_gate_gradients`."""
    closed, _ = bits.positions
    outer = closed[: _num_outer(weight, dtype, len(closed), needs_gate)]
    return [1 << len(outer)] + [bits.groups] * (needs_gate * sum(bits.gates[bit] >= 0 for bit in outer))


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


def diagonal_blocks(products: Tensor, groups: int, dim: int = 0) -> Tensor:
    """Return a view of the diagonal blocks of a tensor.

    Args:
        products: Tensor with the dimensions (C_out, C_in) from `dim` on.
        groups: Number of blocks.
        dim: The dimension of C_out.

    Returns:
        View with the dimensions (groups, C_out / groups, C_in / groups) there.
    """
    blocks = products.unflatten(dim + 1, (groups, -1)).unflatten(dim, (groups, -1))
    return blocks.diagonal(0, dim, dim + 2).movedim(-1, dim)


def _blocks(weight: Tensor, agree: Sequence[int], differ: Sequence[int]) -> Tensor:
    """Return a view of the pairs of a dense weight whose channels agree in certain bits, with a dimension for each bit.

    Args:
        weight: Weight of shape (C_out, C_in, kernel height, kernel width).
        agree: Bits in which the output and the input channel of a pair agree.
        differ: All other bits.

    Returns:
        View with these dimensions: the bits of `agree`; the bits of `differ` and q among the outputs; the same among
        the inputs; kernel height; kernel width.
    """
    last = len(agree) + len(differ) - 1
    (q_out, out_stride), (q_in, in_stride) = ((weight.shape[d] >> last + 1, weight.stride(d)) for d in (0, 1))
    size, stride = [2] * len(agree), [q_out * out_stride + q_in * in_stride << last - bit for bit in agree]
    for q, step in ((q_out, out_stride), (q_in, in_stride)):
        size += [2] * len(differ) + [q]
        stride += [*(q * step << last - bit for bit in differ), step]
    return weight.as_strided((*size, *weight.shape[2:]), (*stride, *weight.stride()[2:]))


def group_weight(weight: Tensor, closed: Sequence[int], opened: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the weight of a group convolution, in the memory format of a dense weight.

    Args:
        weight: Weight of shape (C_out, C_in, kernel height, kernel width).
        closed: The bits that identify a group, the most significant one first.
        opened: The other bits, in the order of the channels of a group.
        dtype: Dtype of the result.

    Returns:
        Weight of shape (C_out, C_in / groups, kernel height, kernel width).
    """
    if not closed and list(opened) == sorted(opened):
        return weight.to(dtype)
    result = _empty_weight(weight, 1 << len(closed), dtype)
    _copy_blocks(result, _blocks(weight, closed, opened), closed, opened)
    return result


def neighbour_weight(
    weight: Tensor, closed: Sequence[int], opened: Sequence[int], position: int, dtype: torch.dtype
) -> Tensor:
    """Return the weights that join the inputs of each group to the outputs of its neighbour, see `group_weight`.

    Args:
        weight: See `group_weight`.
        closed: See `group_weight`.
        opened: See `group_weight`.
        position: Index of the bit in `closed` in which neighbours differ.
        dtype: See `group_weight`.
    """
    before, bit, after = closed[:position], closed[position], closed[position + 1 :]
    pairs = _blocks(weight, [*before, *after], [bit, *opened])
    output, input = len(closed) - 1, len(closed) + len(opened) + 1  # the dimensions of the bit
    result = _empty_weight(weight, 1 << len(closed), dtype)
    halves = result.unflatten(0, (1 << len(before), 2, 1 << len(after), -1))
    for half in (0, 1):
        _copy_blocks(halves[:, half], pairs.select(input, 1 - half).select(output, half), closed, opened)
    return result


def _copy_blocks(target: Tensor, blocks: Tensor, closed: Sequence[int], opened: Sequence[int]) -> None:
    if [*closed, *opened] != sorted((*closed, *opened)):
        blocks = blocks.contiguous()  # a loop over the kernel is faster than one over a bit
    target.view(blocks.shape).copy_(blocks)


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
    if x.device.type == "cpu" and dim == 1 and is_channels_last(x):  # gather is up to six times as fast
        index = channel_order(closed, x.shape[1])
        rows = x.permute(0, 2, 3, 1)
        return rows.gather(3, (index.argsort() if inverse else index).expand(rows.shape)).permute(0, 3, 1, 2)
    num_bits = len(closed)
    order = sorted(range(num_bits), key=lambda k: not closed[k])
    dims = [*range(dim), *(dim + k for k in order), *range(dim + num_bits, x.ndim + num_bits)]
    result = torch.empty_like(x)  # not reshape, which returns a contiguous tensor
    unsorted, ordered = (t.unflatten(dim, (*[2] * num_bits, -1)) for t in ((result, x) if inverse else (x, result)))
    unsorted = unsorted.permute(dims)
    (unsorted if inverse else ordered).copy_(ordered if inverse else unsorted)
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
