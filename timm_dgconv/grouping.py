"""The algebra of dynamic grouping convolution: binary gates, connectivity, groups.

A DGConv multiplies its weight by a 0/1 matrix ``U = U_1 (x) ... (x) U_K`` (Kronecker product, as in
https://arxiv.org/abs/1908.05867), ``U_k = g_k * ones(2, 2) + (1 - g_k) * eye(2)``, with one binary gate g_k a bit of
the channel number. An entry of U_k is 1 where row and column agree and g_k where they differ, therefore

    U[i, j] = product of g_k over the bits k in which i and j differ = u[i XOR j]

and no product of matrices is ever formed. Channels are connected exactly if they differ in open bits only.

With C_in = q_in * 2^K and C_out = q_out * 2^K channels the number of a channel is ``i // q``: blocks of q neighbours
share their connections. The first gate belongs to the most significant bit.
"""

import math

import torch
from torch import Tensor


def num_bits(in_channels: int, out_channels: int) -> int:
    """Number of gates K: the powers of two that both channel counts have in common.

    Raises:
        ValueError: If the counts are not positive, or have no common factor two (there is nothing to learn then).

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
            f"in_channels={in_channels} and out_channels={out_channels} have no common factor two, so there are no "
            "groups to learn; use even channel counts, or torch.nn.Conv2d here"
        )
    return bits


def closed_gates(gate: Tensor) -> Tensor:
    """Which gates are closed: those whose sign bit is set.

    The sign bit survives every cast. The initial values +-1e-8 become +-0.0 in float16, where comparing with zero would
    lose them.

    Args:
        gate: Real-valued gates of shape (K,).

    Returns:
        Boolean tensor of shape (K,).

    Examples:
        >>> closed_gates(torch.tensor([1e-8, -1e-8], dtype=torch.float16))
        tensor([False,  True])
    """
    return torch.signbit(gate)


def straight_through(gate: Tensor) -> Tensor:
    """Zeros with the gradient of the gates, shape (K,) (the straight-through estimator of the paper).

    Nan gates stay nan, so that a broken training run shows. Infinite gates, which no step moves, have no gradient.
    """
    return torch.where(gate.isinf(), torch.zeros_like(gate), gate - gate.detach())


def closed_first(gate: Tensor) -> Tensor:
    """Indices of shape (K,) that put closed gates before open ones and keep the order among each (`sort=True`)."""
    return torch.sort(closed_gates(gate).int(), dim=0, descending=True, stable=True)[1]


def connectivity(gate: Tensor, out_channels: int, in_channels: int, sort: bool = False) -> Tensor:
    """The connectivity matrix U, differentiable in the gates by the straight-through estimator.

    Args:
        gate: Real-valued gates of shape (K,), K as `num_bits` gives it for the channel counts.
        out_channels: Number of output channels.
        in_channels: Number of input channels.
        sort: Put closed gates before open ones (in the most significant bits), so that groups are contiguous channels.
            Gates of one kind keep their order.

    Returns:
        Tensor of shape (out_channels, in_channels) in float32 (float64 for float64 gates), 1 where an input channel
        feeds an output channel and 0 elsewhere.

    Examples:
        >>> connectivity(torch.tensor([-1.0, 1.0]), 4, 4)
        tensor([[1., 1., 0., 0.],
                [1., 1., 0., 0.],
                [0., 0., 1., 1.],
                [0., 0., 1., 1.]])
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        pass
    elif torch.onnx.is_in_onnx_export():  # torch.jit.script does not look at this branch
        return _connectivity_in_onnx(gate, out_channels, in_channels, sort)
    num_codes = 1 << gate.shape[0]
    # Half precision is too coarse for the sums over channel pairs that are the gates' gradients.
    gate = gate.to(torch.float64) if gate.dtype == torch.float64 else gate.to(torch.float32)
    if sort:
        gate = gate[closed_first(gate)]
    shifts = torch.arange(gate.shape[0] - 1, -1, -1, device=gate.device)
    codes = torch.arange(num_codes, device=gate.device)
    # (2^K, K): which bits are set in a code, the XOR of two channel numbers.
    bits = torch.bitwise_right_shift(codes.unsqueeze(1), shifts) & 1 == 1
    blocked = bits & closed_gates(gate)
    num_blocked = blocked.sum(dim=1, keepdim=True)
    # u = product of the gates over the bits of a code. At binary gates its derivative for a gate is 1 where the code
    # has that bit and no other bit of it is closed.
    slope = bits & (num_blocked == blocked.int())
    u = (num_blocked == 0).to(gate.dtype).squeeze(1) + (slope.to(gate.dtype) * straight_through(gate)).sum(dim=1)
    out_codes = torch.arange(out_channels, device=gate.device) // (out_channels // num_codes)
    in_codes = torch.arange(in_channels, device=gate.device) // (in_channels // num_codes)
    return u[out_codes.unsqueeze(1) ^ in_codes]


def _connectivity_in_onnx(gate: Tensor, out_channels: int, in_channels: int, sort: bool) -> Tensor:
    """Values of `connectivity` in operations that ONNX has: it knows no sign bit, and torch puts -0.0 with the open."""
    gate = gate.to(torch.float64) if gate.dtype == torch.float64 else gate.to(torch.float32)
    closed = ((gate < 0) | (gate.reciprocal() < 0)).to(gate.dtype)
    if sort:
        closed = torch.sort(closed, dim=0, descending=True)[0]
    num_codes = 1 << gate.shape[0]
    codes = torch.arange(num_codes, dtype=gate.dtype, device=gate.device).unsqueeze(1)
    group = torch.zeros_like(codes)  # the number that the closed bits of a code make
    for k in range(gate.shape[0]):
        place = num_codes >> k + 1
        group = group + (codes / place).floor() % 2 * place * closed[k]
    out_group, in_group = (group.expand(-1, c // num_codes).flatten() for c in (out_channels, in_channels))
    nan_shows = torch.where(gate.isnan(), gate, torch.ones_like(gate)).prod()
    return (out_group.unsqueeze(1) == in_group).to(gate.dtype) * nan_shows


def complexity(gate: Tensor, out_channels: int, in_channels: int) -> Tensor:
    """Number of connected (output, input) channel pairs, differentiable in the gates.

    ``q_out * q_in * 2^(K + number of open gates)``, for C_in = C_out = 2^K the "U regularizer" of the original release.

    Args:
        gate: Real-valued gates of shape (K,).
        out_channels: Number of output channels.
        in_channels: Number of input channels.

    Returns:
        Scalar tensor in float32 (float64 for float64 gates); half precision could not hold the counts.

    Examples:
        >>> complexity(torch.tensor([-1.0, 1.0]), 4, 4)
        tensor(8.)
    """
    gate = gate.to(torch.float64) if gate.dtype == torch.float64 else gate.to(torch.float32)
    num_open = ((~closed_gates(gate)).to(gate.dtype) + straight_through(gate)).sum()
    dense = out_channels * in_channels  # = q_out * q_in * 2^(2 K)
    return dense * torch.exp2(num_open - gate.shape[0])


def channel_order(gate: Tensor, channels: int, sort: bool = False) -> Tensor:
    """The permutation of channels after which the groups are contiguous: ordered by closed bits, then as they were.

    Args:
        gate: Real-valued gates of shape (K,).
        channels: Number of channels, a multiple of 2^K.
        sort: As in `connectivity`; the permutation is the identity then.

    Returns:
        Indices of shape (channels,).

    Examples:
        >>> channel_order(torch.tensor([1.0, -1.0]), 4)
        tensor([0, 2, 1, 3])
    """
    closed = closed_gates(gate[closed_first(gate)] if sort else gate)
    bits = torch.arange(gate.shape[0] - 1, -1, -1, device=gate.device)
    mask = (closed.long() << bits).sum()
    codes = torch.arange(channels, device=gate.device) // (channels >> gate.shape[0])
    return torch.argsort(codes & mask, stable=True)


def group_blocks(weight: Tensor, groups: int) -> Tensor:
    """The diagonal blocks of a dense weight, as a group convolution has them; a view.

    Args:
        weight: Dense weight of shape (C_out, C_in, kernel height, kernel width).
        groups: Number of groups of contiguous channels.

    Returns:
        View of shape (groups, C_out / groups, C_in / groups, kernel height, kernel width).
    """
    blocks = weight.unflatten(1, (groups, -1)).unflatten(0, (groups, -1))
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
