"""The algebra of dynamic grouping convolution: binary gates, connectivity, groups.

A DGConv multiplies its weight by a 0/1 matrix ``U = U_1 (x) ... (x) U_K``, where (x) is the Kronecker product and
``U_k = g_k * ones(2, 2) + (1 - g_k) * eye(2)`` (https://arxiv.org/abs/1908.05867). There is one binary gate g_k per bit
of the channel index. An entry of U_k is 1 where row and column agree, and g_k where they differ. Therefore

    U[i, j] = product of g_k over the bits k in which i and j differ = u[i XOR j]

Two channels are connected exactly if their indices differ in open bits only. The code below looks U up in the vector u
and never forms a Kronecker product.

With C_in = q_in * 2^K and C_out = q_out * 2^K, the code of channel i is ``i // q``: q neighbouring channels share their
connections. The first gate belongs to the most significant bit.
"""

import math

import torch
from torch import Tensor


def num_bits(in_channels: int, out_channels: int) -> int:
    """Return the number of gates K: 2^K is the largest power of two that divides both channel counts.

    Raises:
        ValueError: If a count is not positive or not even.

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
            f"in_channels={in_channels} and out_channels={out_channels} must both be even to learn groups; use even "
            "channel counts, or torch.nn.Conv2d"
        )
    return bits


def closed_gates(gate: Tensor) -> Tensor:
    """Return which gates are closed: the gates whose sign bit is set.

    The sign bit survives every cast. float16 rounds the initial values +-1e-8 to +-0.0, so a comparison with zero would
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
    """Return zeros of shape (K,) with the gradient of the gates (the straight-through estimator of the paper).

    A nan gate gives nan, so that a diverged training run is visible. An infinite gate has no gradient, since no
    optimizer step can move it.
    """
    return torch.where(gate.isinf(), torch.zeros_like(gate), gate - gate.detach())


def closed_first(gate: Tensor) -> Tensor:
    """Return the order of the gates for `sort=True`, of shape (K,): closed gates first, otherwise in place."""
    return torch.sort(closed_gates(gate).int(), dim=0, descending=True, stable=True)[1]


def connectivity(gate: Tensor, out_channels: int, in_channels: int, sort: bool = False) -> Tensor:
    """Return the connectivity matrix U, differentiable in the gates by the straight-through estimator.

    Args:
        gate: Real-valued gates of shape (K,), with K from `num_bits`.
        out_channels: Number of output channels.
        in_channels: Number of input channels.
        sort: Apply the closed gates to the most significant bits, so that each group is a range of channels. The sort
            is stable.

    Returns:
        Tensor of shape (out_channels, in_channels): 1 where an input channel feeds an output channel, 0 elsewhere. The
        dtype is float64 for float64 gates and float32 otherwise.

    Examples:
        >>> connectivity(torch.tensor([-1.0, 1.0]), 4, 4)
        tensor([[1., 1., 0., 0.],
                [1., 1., 0., 0.],
                [0., 0., 1., 1.],
                [0., 0., 1., 1.]])
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        pass
    elif torch.onnx.is_in_onnx_export():  # torch.jit.script does not compile this branch
        return _connectivity_in_onnx(gate, out_channels, in_channels, sort)
    num_codes = 1 << gate.shape[0]
    # A gate's gradient is a sum over many channel pairs, for which half precision is too coarse.
    gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
    if sort:
        gate = gate[closed_first(gate)]
    shifts = torch.arange(gate.shape[0] - 1, -1, -1, device=gate.device)
    codes = torch.arange(num_codes, device=gate.device)
    # (2^K, K): which bits are set in a code. A code here is the XOR of two channel codes.
    bits = torch.bitwise_right_shift(codes.unsqueeze(1), shifts) & 1 == 1
    blocked = bits & closed_gates(gate)
    num_blocked = blocked.sum(dim=1, keepdim=True)
    # u is the product of the gates over the bits of a code. At binary gates its derivative with respect to a gate is 1
    # where the code has the gate's bit and all its other bits are open.
    slope = bits & (num_blocked == blocked.int())
    u = (num_blocked == 0).to(gate.dtype).squeeze(1) + (slope.to(gate.dtype) * straight_through(gate)).sum(dim=1)
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


def complexity(gate: Tensor, out_channels: int, in_channels: int) -> Tensor:
    """Return the number of connected (output, input) channel pairs, differentiable in the gates.

    The number is ``q_out * q_in * 2^(K + number of open gates)``. For C_in = C_out = 2^K it is the "U regularizer" of
    the original release.

    Args:
        gate: Real-valued gates of shape (K,).
        out_channels: Number of output channels.
        in_channels: Number of input channels.

    Returns:
        Scalar tensor. The dtype is float64 for float64 gates and float32 otherwise, since half precision cannot hold
        the counts.

    Examples:
        >>> complexity(torch.tensor([-1.0, 1.0]), 4, 4)
        tensor(8.)
    """
    gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
    num_open = ((~closed_gates(gate)).to(gate.dtype) + straight_through(gate)).sum()
    dense = out_channels * in_channels  # = q_out * q_in * 2^(2 K)
    return dense * torch.exp2(num_open - gate.shape[0])


def channel_order(gate: Tensor, channels: int, sort: bool = False) -> Tensor:
    """Return the permutation of channels that makes each group a range of channels.

    It orders the channels by their closed bits and is stable.

    Args:
        gate: Real-valued gates of shape (K,).
        channels: Number of channels, a multiple of 2^K.
        sort: See `connectivity`. With `sort=True` the permutation is the identity.

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
    """Return a view of the diagonal blocks of a dense weight, the weight of a group convolution.

    Args:
        weight: Dense weight of shape (C_out, C_in, kernel height, kernel width).
        groups: Number of groups. Each group is a range of channels.

    Returns:
        View of shape (groups, C_out / groups, C_in / groups, kernel height, kernel width).
    """
    blocks = weight.unflatten(1, (groups, -1)).unflatten(0, (groups, -1))
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
