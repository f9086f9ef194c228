"""Spans: the sets of bits D' inside the groups of the convolutions that a DGConv computes.

A span contains all open bits. An integer mask lists the closed bits in it. Bit 0 is the least significant bit of a
channel code. Spans change the speed of a convolution and not its result.
"""

from collections.abc import Sequence

Spans = tuple[int, int]
"""The span of the output and the input gradient, and the span of the weight gradient."""


def choose_spans(closed: Sequence[bool], in_channels: int, device_type: str) -> Spans:
    """Choose the spans for a layer with learnable gates.

    On a CPU the output spans the open bits only. The weight gradient is fastest with one closed bit in its span, or, in
    narrow groups, with enough closed bits for 16 channels per group (benchmarks/results/speed.md).

    Args:
        closed: Which bits are closed, the most significant bit first.
        in_channels: Number of input channels.
        device_type: Type of the device, as in torch.device.

    Returns:
        The two spans.
    """
    width = in_channels >> sum(closed)  # input channels per group
    if device_type == "cpu":
        return 0, lowest(closed, max(1, (15 // width).bit_length()))
    # Not measured. Tensor cores need wide groups, and cuDNN's weight gradients of narrow groups are slow.
    return 0, lowest(closed, (63 // width).bit_length())


def lowest(closed: Sequence[bool], count: int) -> int:
    """Return the mask of the `count` least significant closed bits, or of all closed bits if there are fewer."""
    return sum([1 << shift for shift, bit in enumerate(reversed(closed)) if bit][:count])
