"""Figures of what was learned, in greys, for screen and paper (.png, .svg, .pdf)."""

import importlib.util
import math
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.nn import functional as F

from timm_dgconv.report import GroupHistory, GroupReport, LayerReport

_SUFFIXES = (".pdf", ".png", ".svg")
_CELLS = 128
"""Rows of a drawn connectivity matrix; larger ones are averaged to as many."""
_WIDTH = 7.2
"""Of a figure in inches: both columns of a paper."""
_CHARACTER = 0.065
"""Of a letter at the size of a tick's label."""
_STYLE: dict[str, Any] = {
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7.5,
    "pdf.fonttype": 42,  # TrueType, which publishers ask for
}


def check(path: Path) -> None:
    """Find out before the work whether a figure can be drawn and written to this place.

    Raises:
        ValueError: If the folder is not there or cannot be written to, or the suffix is not that of a figure.
        RuntimeError: If matplotlib is missing.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"{path} must end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path.absolute().parent} is no folder; create it, or name another place for the plot")
    if not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(f"{path.absolute().parent} cannot be written to; name another place for the plot")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file for the plot")
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("plots need matplotlib: pip install 'timm-dgconv[plot]'")


def draw(what: GroupReport | GroupHistory, path: Path, layers: Sequence[str] = ()) -> None:
    """Draw the groups of a model, or how they moved over several checkpoints.

    One model: the number of groups of every layer beside the ResNeXt's, and the connectivity of some layers. Several
    checkpoints: the groups of every layer over them, and the share of a dense network's connections.

    Args:
        what: What to draw; a history of one checkpoint is drawn as a model.
        path: File to write, .png, .svg or .pdf; replaced if it exists.
        layers: Names of the layers whose connectivity is drawn (the first of each stage, at most four, if there are
            none); of a history, the layers that are drawn (all if there are none).

    Raises:
        ValueError: For an unknown layer, suffix or folder.
        RuntimeError: If matplotlib is missing.
    """
    check(path)
    if isinstance(what, GroupHistory) and len(what.reports) == 1:
        (what,) = what.reports
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure = _history(what, layers) if isinstance(what, GroupHistory) else _model(what, layers)
        beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            figure.savefig(beside, format=path.suffix.lower()[1:], dpi=300)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def _model(report: GroupReport, names: Sequence[str]) -> Any:
    """Groups over depth, matrices under it."""
    from matplotlib.figure import Figure  # no pyplot, whose backend is the user's

    shown = report.select(names) or _first_of_stages(report)
    rows = -(-len(shown) // 4)
    figure = Figure(figsize=(_WIDTH, 2.6 + 2.15 * rows), layout="constrained")
    panels: Any = figure.subfigures(2, 1, height_ratios=[2.6, 2.15 * rows])
    above, below = panels
    _depth(above.subplots(), report)
    axes = below.subplots(rows, 4, squeeze=False).flatten()
    averaged = [image for axis, layer in zip(axes, shown, strict=False) if (image := _matrix(axis, layer)) is not None]
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    for axis in axes[::4]:
        axis.set_ylabel("output channel")
    if averaged:
        bar = below.colorbar(averaged[0], ax=axes, ticks=[0, 0.1, 0.5, 1], format="{x:g}", pad=0.01, aspect=25)
        bar.set_label("connected share of a cell")
        bar.minorticks_off()
    return figure


def _first_of_stages(report: GroupReport) -> list[LayerReport]:
    stages: dict[str, LayerReport] = {}
    for layer in report.layers:
        stages.setdefault(layer.stage or layer.name, layer)
    first = list(stages.values()) if len(stages) > 1 else list(report.layers)
    return first[:4]


def _depth(axis: Any, report: GroupReport) -> None:
    """Number of groups of every layer, in order."""
    layers = report.layers
    places = range(len(layers))
    edges = [place - 0.5 for place in range(len(layers) + 1)]
    widest = max(layer.in_channels for layer in layers)
    axis.stairs([c.in_channels for c in layers], edges, color="0.6", linewidth=0.8, baseline=None, label="channels")
    fixed = [layer.resnext_groups for layer in layers]
    if None not in fixed:
        axis.stairs(fixed, edges, color="black", linestyle="--", linewidth=0.8, baseline=None, label="ResNeXt")
    groups = [layer.groups for layer in layers]
    axis.plot(places, groups, color="black", marker="o", markersize=3.5, linewidth=0.8, label="learned")
    axis.set_yscale("log", base=2)
    _powers_of_two(axis.yaxis, widest)
    axis.set(xlim=(edges[0], edges[-1]), ylim=(0.8, 1.4 * widest), ylabel="groups")

    starts = [n for n, layer in enumerate(layers) if n == 0 or layer.stage != layers[n - 1].stage]
    stages = list(zip(starts, [*starts[1:], len(layers)], strict=True))
    room = 6.4 / len(layers) / _CHARACTER  # for characters, a layer
    if all(0 < len(layers[start].stage) < room * (end - start) for start, end in stages):
        for start, end in stages:
            if start:
                axis.axvline(start - 0.5, color="0.8", linewidth=0.6, zorder=0)
            middle = ((start + end) / 2 - 0.5, 1)
            over: dict[str, Any] = dict(xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points")
            axis.annotate(layers[start].stage, middle, ha="center", **over)
        names = [layer.name.split(".")[-2] for layer in layers]
        axis.set_xlabel("block")
    else:
        names = [layer.name for layer in layers]
        axis.set_xlabel("layer")
    axis.set_xticks(places, names)
    axis.tick_params(axis="x", rotation=90 if max(map(len, names)) + 0.5 > room else 0)
    handles, labels = axis.get_legend_handles_labels()
    axis.figure.legend(handles[::-1], labels[::-1], loc="outside upper center", ncols=3, frameon=False)


def _matrix(axis: Any, layer: LayerReport) -> Any:
    """Connectivity; where cells stand for several channels, the grey is the share of their pairs that are connected.

    Returns:
        The image of such cells; None where every cell is one pair.
    """
    from matplotlib import ticker
    from matplotlib.colors import PowerNorm

    matrix = layer.connectivity()
    out_cell, in_cell = (-(-channels // _CELLS) for channels in matrix.shape)
    cells = F.avg_pool2d(matrix[None], (out_cell, in_cell), ceil_mode=True)[0]
    # Larger, since viewers of .pdf and .svg may blur an image of few pixels.
    pixels = cells.repeat_interleave(8, dim=0).repeat_interleave(8, dim=1)
    image = axis.imshow(
        pixels.numpy(),
        cmap="Greys",
        norm=PowerNorm(0.5, vmin=0, vmax=1),  # a few pairs of many can be seen
        interpolation="none",
        extent=(0, layer.in_channels, layer.out_channels, 0),
        aspect="auto",
    )
    axis.set_box_aspect(1)
    for side, channels in ((axis.xaxis, layer.in_channels), (axis.yaxis, layer.out_channels)):
        side.set_major_locator(ticker.FixedLocator([0, channels // 2, channels]))
    axis.set_xlabel("input channel")
    title = f"{layer.name}\n{layer.groups} group{'s' * (layer.groups > 1)} of {layer.channels_per_group}"
    if out_cell == in_cell == 1:
        axis.set_title(title)
        return None
    axis.set_title(f"{title}\ncells of {out_cell} x {in_cell}")
    return image


def _history(history: GroupHistory, names: Sequence[str]) -> Any:
    """Groups of every layer over the checkpoints, the share of connections under it."""
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure

    shown = [report.select(names) or list(report.layers) for report in history.reports]
    layers, count = shown[0], len(shown)
    groups = [[report[n].groups for report in shown] for n in range(len(layers))]
    top = max(map(max, groups)).bit_length()
    height = max(0.17 * len(layers), 0.14 * top)
    width = max(_WIDTH, min(1.8 + 0.2 * count, 14))
    column = (width - 1.8) / count
    letters = max(map(len, history.labels)) + 1
    upright = history.axis == "checkpoint" and letters * _CHARACTER > column
    under = letters * _CHARACTER if upright else 0
    figure = Figure(figsize=(width, height + 2.3 + under), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[height + 0.3, 1.3])

    shades = [1 - 0.75 * n / max(1, top - 1) for n in range(top)]
    bounds = [2 ** (n - 0.5) for n in range(top + 1)]
    cells = above.pcolormesh(
        groups, cmap=ListedColormap([str(shade) for shade in shades]), norm=BoundaryNorm(bounds, top)
    )
    if column >= 3 * _CHARACTER:
        _numbers(above, groups, shades)
    for n, layer in enumerate(layers[1:], start=1):
        if layer.stage != layers[n - 1].stage:
            above.axhline(n, color="black", linewidth=0.8)
    above.set_yticks([n + 0.5 for n in range(len(layers))], [layer.name.removesuffix(".conv2") for layer in layers])
    above.tick_params(axis="both", length=0)
    above.invert_yaxis()
    bar = figure.colorbar(
        cells, ax=above, ticks=[2**n for n in range(top)], format="{x:g}", pad=0.01, aspect=8 * height
    )
    bar.set_label("groups")
    bar.ax.tick_params(length=0)

    places = [n + 0.5 for n in range(count)]
    below.plot(places, [100 * r.share for r in history.reports], color="black", marker="o", markersize=3, linewidth=0.8)
    fixed = history.reports[0].resnext_share
    if fixed is not None:
        below.axhline(100 * fixed, color="black", linestyle="--", linewidth=0.8)
        beside: dict[str, Any] = dict(xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points")
        # Under the bar of greys, where there is room.
        below.annotate("ResNeXt", (1, 100 * fixed), va="center", **beside).set_in_layout(False)
    below.set(ylabel="connections,\n% of dense", xlim=(0, count), xlabel=history.axis)
    below.set_ylim(bottom=0)
    every = math.ceil((2 if upright else letters) * _CHARACTER / column)  # label that there is room for
    below.set_xticks(places[::every], history.labels[::every])
    below.tick_params(axis="x", rotation=90 if upright else 0)
    for side in ("top", "right"):
        below.spines[side].set_visible(False)
    return figure


def _numbers(axis: Any, groups: Sequence[Sequence[int]], shades: Sequence[float]) -> None:
    """The number where a row begins and where it changes."""
    for row, numbers in enumerate(groups):
        for column, number in enumerate(numbers):
            if column == 0 or number != numbers[column - 1]:
                shade = shades[number.bit_length() - 1]
                axis.text(
                    column + 0.5,
                    row + 0.5,
                    str(number),
                    ha="center",
                    va="center_baseline",
                    fontsize=5.5,
                    color="black" if shade > 0.47 else "white",
                )


def _powers_of_two(axis: Any, largest: int) -> None:
    from matplotlib import ticker

    axis.set_major_locator(ticker.FixedLocator([2**n for n in range(largest.bit_length())]))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(ticker.NullLocator())
