"""Draw the figures of docs/how-it-works.md: ``python docs/figures.py`` (extra ``plot``)."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.autograd.functional import jacobian

from timm_dgconv.ops import naive
from timm_dgconv.ops.algebra import channel_order

DOCS = Path(__file__).parent
STYLE: dict[str, Any] = {"font.size": 8, "axes.linewidth": 0.6, "savefig.dpi": 200, "savefig.bbox": "tight"}


def connectivity(gates: Sequence[int]) -> Tensor:
    """Return which input channels (columns) feed which output channels (rows), one gate per bit."""
    channels = 1 << len(gates)
    return naive.connectivity(torch.tensor(gates) - 0.5, channels, channels, sort=False, nested=False)


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
    order = channel_order([not gate for gate in gates], 8)
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


def nested() -> Figure:
    """Draw the nested groups of eight channels, and which pairs the gates learn from."""
    figure = Figure(figsize=(7.2, 3.1), layout="constrained")
    grid = figure.add_gridspec(2, 4, height_ratios=[1, 0.34])
    for closed in range(4):
        gate = torch.tensor([-1.0] * closed + [1.0] * (3 - closed))

        def connected(gate: Tensor) -> Tensor:
            return naive.connectivity(gate, 8, 8, sort=True, nested=True)

        slopes = jacobian(connected, gate)  # (output channels, input channels, gates)
        opens, closes = slopes[..., :closed].sum(-1), slopes[..., closed:].sum(-1)
        groups = 1 << closed
        title = f"m = {closed}: {groups} group{'s' * (groups > 1)}"
        matrix(figure.add_subplot(grid[0, closed]), connected(gate) - 0.45 * closes + 0.25 * opens, binary(3), title)
    key = figure.add_subplot(grid[1, :])
    texts = [
        (1.0, "connected"),
        (0.55, "connected, and bit m differs: the open gate nearest to zero learns from these pairs"),
        (0.25, "not connected, and only bit m - 1 of the closed bits differs: the closed gate nearest to zero learns"),
        (0.0, "no part in any gradient: outside of the groups of the weight gradient"),
    ]
    for row, (shade, text) in enumerate(texts):
        key.add_patch(swatch(row, shade))
        key.text(0.05, 0.86 - 0.25 * row, text, va="center", fontsize=8)
    key.set(xlim=(0, 1), ylim=(0, 1))
    key.set_axis_off()
    return figure


def swatch(row: int, shade: float) -> Any:
    """Return the square of a row of the key."""
    place = (0.02, 0.78 - 0.25 * row)
    return Rectangle(place, 0.02, 0.16, facecolor=str(1 - shade), edgecolor="0.6", linewidth=0.6)


if __name__ == "__main__":
    with rc_context(STYLE):
        for draw in (patterns, nested, exchange):
            draw().savefig(DOCS / f"{draw.__name__}.png")
