"""The fast form: output and gradients as group convolutions. README.md has the derivation.

Inputs and outputs have their groups in contiguous ranges of channels. `exchange_bits` brings those of an unsorted layer
into this order. The weight stays as it is: the blocks of all groups are a strided view of it. The neighbour of a group
across a closed bit is a swap of halves. So there are no caches, and no index tensors except in `exchange_bits`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from timm_dgconv.ops.algebra import Bits, channel_order, closed_first

Size = Sequence[int]

MIN_CHANNELS = {("cpu", False): 16, ("cpu", True): 8, ("cuda", False): 64, ("cuda", True): 2048}
"""Device type and whether the dtype has 16 bits -> channels per group from which a weight gradient is fast.

`python benchmarks/bench.py layers` measures it. benchmarks/results/gpu.md has the figures of 16 bits on CUDA.
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
    # Counters of operations replace F.conv2d (DeepSpeed, calflops). They take no lists.
    y = F.conv2d(input, kernel, bias, tuple(stride), tuple(padding), tuple(dilation), bits.groups)
    return in_format(y, is_channels_last(input, weight))


def input_gradient(
    grad_output: Tensor, input: Tensor, weight: Tensor, bits: Bits, stride: Size, padding: Size, dilation: Size
) -> Tensor:
    """Compute the gradient of the input, see `output`. The values of `input` do not matter.

    Here and below, output gradient and input are in the memory format of the output.
    """
    kernel = group_weight(weight, *bits.positions, grad_output.dtype)
    grad = _convolution_backward(0, grad_output, input, kernel, stride, padding, dilation, bits.groups)
    return in_format(grad, is_channels_last(input, weight))


def weight_and_gate_gradients(
    grad: Tensor,
    x: Tensor,
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
    be fast. Only the paper's forms need the slope of a closed bit that is not inside. It costs one more group
    convolution: the output that each group would get from its neighbour, times the output gradient.

    Args:
        grad: Gradient of the output.
        x: Input.
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
    closed, opened = bits.positions
    num_outer = _num_outer(weight, grad.dtype, bits, needs_gate)
    groups, outer, merged = 1 << num_outer, closed[:num_outer], closed[num_outer:]
    inner = [*merged, *opened]
    like = _empty_weight(weight, groups, grad.dtype)  # only its shape and memory format matter
    wide = _convolution_backward(1, grad, x, like, stride, padding, dilation, groups)
    grad_weight = torch.zeros_like(weight) if closed else wide.to(weight.dtype)
    num_bits = len(bits.closed)
    if closed:  # the channels of `wide` have their closed bits first
        blocks = _pairs(wide, range(len(closed)), range(len(closed), num_bits), num_outer=num_outer)
        _pairs(grad_weight, closed, opened).copy_(blocks)
    if not needs_gate:
        return grad_weight, None
    # A gradient is a sum over many values, for which half precision is too coarse.
    dtype = torch.promote_types(torch.promote_types(weight.dtype, grad.dtype), torch.float32)
    slopes = torch.zeros(num_bits, dtype=dtype, device=weight.device)
    if not bits.learn:
        return grad_weight, slopes
    products = (group_weight(weight, outer, inner, dtype) * wide).unflatten(0, (groups, -1))
    if groups == 1 or is_channels_last(wide):  # sums in the order of the memory are up to eight times as fast
        inside = products.sum((-2, -1), keepdim=True).sum(0)
    else:
        inside = products.sum(0).sum((-2, -1), keepdim=True)
    for position, bit in enumerate((*closed, *opened)):
        gate, place = bits.gates[bit], position - num_outer
        if gate >= 0 and place >= 0:
            agree = sorted({*range(len(merged)), place})
            free = [other for other in range(len(merged), len(inner)) if other != place]
            _sum(_pairs(inside, agree, free, across=place), slopes[gate])
        elif gate >= 0:
            kernel = group_weight(weight, closed, opened, x.dtype, across=bit)
            y = torch.conv2d(swap_halves(x, position), kernel, None, stride, padding, dilation, bits.groups)
            _sum(y.to(dtype) * grad, slopes[gate])
    return grad_weight, slopes


def weight_gradient_groups(weight: Tensor, dtype: torch.dtype, bits: Bits, needs_gate: bool) -> list[int]:
    """Return the number of groups of each convolution in `weight_and_gate_gradients`."""
    closed, _ = bits.positions
    outer = closed[: _num_outer(weight, dtype, bits, needs_gate)]
    return [1 << len(outer)] + [bits.groups] * (needs_gate * sum(bits.gates[bit] >= 0 for bit in outer))


def _num_outer(weight: Tensor, dtype: torch.dtype, bits: Bits, needs_gate: bool) -> int:
    """Return how many closed bits identify a group in the convolution for the weight gradient."""
    width = MIN_CHANNELS[weight.device.type, dtype.itemsize == 2]
    fast = (weight.shape[1] // width).bit_length() - 1
    return max(min(sum(bits.closed) - (needs_gate and bits.learn), fast), 0)


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


def _sum(x: Tensor, out: Tensor) -> None:
    """Write the sum of all elements, in one operation."""
    torch.sum(x, tuple(range(x.ndim)), out=out)


def _pairs(
    weight: Tensor, agree: Sequence[int], free: Sequence[int], across: int | None = None, num_outer: int = 0
) -> Tensor:
    """Return a view of certain pairs of an output and an input channel of a weight, with a dimension for each bit.

    Args:
        weight: Weight of shape (C_out, C_in / 2^num_outer, kernel height, kernel width).
        agree: Bits in which the channels of a pair agree.
        free: All other bits.
        across: One of the bits in `agree`, in which the channels of a pair differ instead.
        num_outer: Number of bits before those of the input channels. They identify the group of a group convolution.

    Returns:
        View with these dimensions: the bits of `agree` of the output; the bits of `free` and q of the output; the same
        of the input; kernel height; kernel width.
    """
    last = len(agree) + len(free) - 1
    (out_stride, in_stride), q_out = weight.stride()[:2], weight.shape[0] >> last + 1
    q_in = weight.shape[1] >> last + 1 - num_outer
    out_step, in_step = q_out * out_stride, q_in * in_stride
    size, stride, offset = [], [], weight.storage_offset()
    for bit in agree:
        size.append(2)
        stride.append(out_step + (in_step if bit >= num_outer else 0) << last - bit)
    if across is not None:  # output bit 0 with input bit 1, then output bit 1 with input bit 0
        stride[agree.index(across)] = out_step - in_step << last - across
        offset += in_step << last - across
    for q, step, q_stride in ((q_out, out_step, out_stride), (q_in, in_step, in_stride)):
        size += [*(2 for _ in free), q]
        stride += [*(step << last - bit for bit in free), q_stride]
    return weight.as_strided((*size, *weight.shape[2:]), (*stride, *weight.stride()[2:]), offset)


def group_weight(
    weight: Tensor, closed: Sequence[int], opened: Sequence[int], dtype: torch.dtype, across: int | None = None
) -> Tensor:
    """Return the weight of a group convolution, in the memory format of a dense weight.

    Args:
        weight: Weight of shape (C_out, C_in, kernel height, kernel width).
        closed: The bits that identify a group, the most significant one first.
        opened: The other bits, in the order of the channels of a group.
        dtype: Dtype of the result.
        across: One of the closed bits. Then the weights join the inputs of each group to the outputs of its neighbour
            across this bit.

    Returns:
        Weight of shape (C_out, C_in / groups, kernel height, kernel width).
    """
    if not closed and list(opened) == sorted(opened):
        return weight.to(dtype)
    result, pairs = _empty_weight(weight, 1 << len(closed), dtype), _pairs(weight, closed, opened, across)
    if pairs.stride(-1) > 1 and [*closed, *opened] != sorted((*closed, *opened)):
        pairs = pairs.contiguous()  # in channels_last an inner loop over the kernel is faster than one over a bit
    result.view(pairs.shape).copy_(pairs)
    return result


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
