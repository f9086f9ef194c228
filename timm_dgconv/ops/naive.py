"""The definition of the layer: a dense convolution with a masked weight, the form of the original release.

It is the reference of all tests. Traced, exported and scripted graphs contain it, since the gates are data there, and
torch differentiates it for second derivatives and function transforms. `grouped.py` computes the same faster.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from timm_dgconv.ops.algebra import bits

# A leaf of torch.fx: otherwise the graph would contain the construction of the connectivity.
torch.fx.wrap("connectivity")


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    sort: bool,
    nested: bool,
    values: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Convolve with ``weight * connectivity(gate)``.

    Args:
        input: Input of shape (N, C_in, H, W) or (C_in, H, W).
        weight: Weight of shape (C_out, C_in, kernel height, kernel width).
        bias: Bias of shape (C_out,) or None.
        gate: Gates of shape (K,).
        stride: Vertical and horizontal stride.
        padding: Vertical and horizontal zero padding.
        dilation: Vertical and horizontal dilation.
        sort: See `connectivity`.
        nested: See `connectivity`.
        values: See `connectivity`.
        dtype: Dtype of the masked weight. The default is the dtype of `weight`.
    """
    u = connectivity(gate, weight.shape[0], weight.shape[1], sort, nested, values).to(weight.dtype)
    masked = weight * u[:, :, None, None]
    return F.conv2d(input, masked if dtype is None else masked.to(dtype), bias, stride, padding, dilation)


def connectivity(
    gate: Tensor, out_channels: int, in_channels: int, sort: bool, nested: bool, values: Tensor | None = None
) -> Tensor:
    """Return the connectivity U, differentiable in the gates by the straight-through estimator.

    Args:
        gate: Gates of shape (K,).
        out_channels: Number of output channels.
        in_channels: Number of input channels.
        sort: See `timm_dgconv.ops.algebra.read_bits`.
        nested: See `timm_dgconv.ops.algebra.read_bits`.
        values: Values of shape (K,) by which the gates are read. The default are the values that they have now. A
            backward pass gives those that its forward pass has read, since gates may have changed.

    Returns:
        Tensor of shape (out_channels, in_channels): 1 where an input channel feeds an output channel, 0 elsewhere. The
        dtype is float64 for float64 gates and float32 otherwise.

    Examples:
        >>> connectivity(torch.tensor([-1.0, 1.0]), 4, 4, sort=False, nested=False)
        tensor([[1., 1., 0., 0.],
                [1., 1., 0., 0.],
                [0., 0., 1., 1.],
                [0., 0., 1., 1.]])
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        pass
    elif torch.onnx.is_in_onnx_export():  # torch.jit.script does not compile this branch
        return _connectivity_in_onnx(gate, out_channels, in_channels, sort)
    if values is None:
        values = gate.detach()
    # A gate's gradient is a sum over many channel pairs, for which half precision is too coarse.
    closed, slopes = bits(gate.to(torch.promote_types(gate.dtype, torch.float32)), values, sort, nested)
    num_codes = 1 << gate.shape[0]
    shifts = torch.arange(gate.shape[0] - 1, -1, -1, device=gate.device)
    codes = torch.arange(num_codes, device=gate.device)
    # (2^K, K): which bits are set in a code. A code here is the XOR of two channel codes.
    differ = torch.bitwise_right_shift(codes.unsqueeze(1), shifts) & 1 == 1
    blocked = differ & closed
    num_blocked = blocked.sum(dim=1, keepdim=True)
    # u is the product of the gates over the bits of a code. At binary gates its derivative with respect to a bit is 1
    # where the code has the bit and all its other bits are open: it has no blocked bit, or only this one. The slopes
    # have gradients, and the value 0.
    depends = differ & (num_blocked == blocked.int())
    u = (num_blocked == 0).to(slopes.dtype).squeeze(1) + (depends.to(slopes.dtype) * slopes).sum(dim=1)
    out_codes = torch.arange(out_channels, device=gate.device) // (out_channels // num_codes)
    in_codes = torch.arange(in_channels, device=gate.device) // (in_channels // num_codes)
    return u[out_codes.unsqueeze(1) ^ in_codes]


def _connectivity_in_onnx(gate: Tensor, out_channels: int, in_channels: int, sort: bool) -> Tensor:
    """Compute `connectivity` with operations that ONNX has. ONNX has no signbit, and `-0.0 < 0` is false."""
    gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
    closed = ((gate < 0) | (gate.reciprocal() < 0)).to(gate.dtype)
    if sort:
        closed = torch.sort(closed, dim=0, descending=True)[0]
    num_codes = 1 << gate.shape[0]
    codes = torch.arange(num_codes, dtype=gate.dtype, device=gate.device).unsqueeze(1)
    group = torch.zeros_like(codes)  # the closed bits of a code, which identify its group
    for k in range(gate.shape[0]):
        place = num_codes >> k + 1
        group = group + (codes / place).floor() % 2 * place * closed[k]
    out_group, in_group = (group.expand(-1, c // num_codes).flatten() for c in (out_channels, in_channels))
    propagate_nan = torch.where(gate.isnan(), gate, torch.ones_like(gate)).prod()
    return (out_group.unsqueeze(1) == in_group).to(gate.dtype) * propagate_nan
