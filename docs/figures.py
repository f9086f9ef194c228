"""Draw the figures of docs/how-it-works.md: ``python docs/figures.py`` (extra ``plot``)."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from timm_dgconv.layers.grouping import channel_order
from torch import Tensor

from timm_dgconv import DGConv2d

DOCS = Path(__file__).parent
STYLE: dict[str, Any] = {"font.size": 8, "axes.linewidth": 0.6, "savefig.dpi": 200, "savefig.bbox": "tight"}


def connectivity(gates: Sequence[int]) -> Tensor:
    """Return which input channels (columns) feed which output channels (rows), one gate per bit."""
    channels = 1 << len(gates)
    conv = DGConv2d(channels, channels, 1)
    with torch.no_grad():
        conv.gate.copy_(torch.tensor(gates) - 0.5)
    return conv.connectivity().detach()


def matrix(axis: Any, values: Tensor, codes: Sequence[str], title: str) -> None:
    """Draw a matrix of channel pairs with the codes of its channels."""
    size = len(codes)
    axis.imshow(values, cmap="gray_r", vmin=0, vmax=1, extent=(0, size, size, 0), interpolation="none")
    places = [n + 0.5 for n in range(size)]
    axis.set_xticks(places, codes, rotation=90)
    axis.set_yticks(places, codes)
    axis.set_xticks(range(size), minor=True)
    axis.set_yticks(range(size), minor=True)
    axis.grid(which="minor", color="0.8", linewidth=0.4)
    axis.tick_params(which="both", length=0, labelsize=6.5)
    axis.set_title(title)


def binary(bits: int) -> list[str]:
    """Return the codes of all channels."""
    return [f"{channel:0{bits}b}" for channel in range(1 << bits)]


def patterns() -> Figure:
    """Draw the connectivity of eight channels for all settings of their three gates."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    settings = sorted(product((0, 1), repeat=3), key=lambda gates: (sum(gates), gates[::-1]))
    for axis, gates in zip(figure.subplots(2, 4).flat, settings, strict=True):
        count = 1 << (3 - sum(gates))
        title = f"gates {gates[0]} {gates[1]} {gates[2]}: {count} group{'s' * (count > 1)}"
        matrix(axis, connectivity(gates), binary(3), title)
    figure.supylabel("output channel")
    figure.supxlabel("input channel")
    return figure


def exchange() -> Figure:
    """Draw the connectivity of eight channels in their order, and in the order of their groups."""
    gates = (1, 0, 0)
    codes = binary(3)
    order = channel_order(torch.tensor(gates) - 0.5, 8)
    before = connectivity(gates)
    figure = Figure(figsize=(7.2, 2.7), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 0.7, 1])
    matrix(left, before, codes, "channels in order")
    sorted_codes = [codes[channel] for channel in order]
    matrix(right, before[order][:, order], sorted_codes, "channels by group: 4 groups of 2")
    for axis in (left, right):
        axis.set(xlabel="input channel", ylabel="output channel")
    for channel, new in enumerate(order.argsort().tolist()):
        middle.plot([0, 1], [channel + 0.5, new + 0.5], color="black", linewidth=0.8)
        middle.text(-0.06, channel + 0.5, codes[channel], ha="right", va="center", fontsize=6.5)
        middle.text(1.06, new + 0.5, codes[channel], ha="left", va="center", fontsize=6.5)
    middle.set(xlim=(-0.4, 1.4), ylim=(8, 0), title="the open bit comes last")
    middle.set_axis_off()
    return figure


def gradients() -> Figure:
    """Draw which channel pairs have a part in the gradients of weights and gates."""
    gates = (0, 0, 1, 1)
    codes = binary(4)
    channels = torch.arange(16)
    differ = channels[:, None] ^ channels  # the bits in which two channels differ
    closed = differ >> 2  # the two highest bits
    values = torch.tensor([1.0, 0.6, 0.3, 0.0])[closed]
    assert torch.equal(values == 1, connectivity(gates) == 1)
    figure = Figure(figsize=(7.2, 3.7), layout="constrained")
    axis, key = figure.subplots(1, 2, width_ratios=[1, 0.9])
    matrix(axis, values, codes, "gates 0 0 1 1: 4 groups of 4")
    axis.set(xlabel="input channel", ylabel="output channel")
    texts = [
        (1.0, "connected: output, input gradient, weight gradient,\nand the gradients of the open gates"),
        (0.6, "partners across the lowest closed bit: the gradient\nof its gate"),
        (0.3, "partners across the highest closed bit: the gradient\nof its gate"),
        (0.0, "differ in both closed bits: no part in any gradient"),
    ]
    for row, (shade, text) in enumerate(texts):
        key.add_patch(swatch(row, shade))
        key.text(0.13, 0.875 - 0.2 * row, text, va="center", fontsize=8)
    key.set(xlim=(0, 1), ylim=(0, 1))
    key.set_axis_off()
    return figure


def swatch(row: int, shade: float) -> Any:
    """Return the square of a row of the key."""
    return Rectangle((0.02, 0.84 - 0.2 * row), 0.07, 0.07, facecolor=str(1 - shade), edgecolor="0.6", linewidth=0.6)


if __name__ == "__main__":
    with rc_context(STYLE):
        for draw in (patterns, exchange, gradients):
            draw().savefig(DOCS / f"{draw.__name__}.png")
