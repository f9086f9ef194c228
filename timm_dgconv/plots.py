"""Figures of the learned groups, in greys, for screen and paper (.png, .svg, .pdf)."""

import importlib.util
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.nn import functional as F

from timm_dgconv.report import GroupHistory, GroupReport, LayerReport

_SUFFIXES = (".pdf", ".png", ".svg")
_CELLS = 128  # largest number of rows of a drawn connectivity matrix; larger matrices are averaged to cells
_WIDTH = 7.2  # of a figure in inches: two columns of a paper
_CHARACTER = 0.065  # width of a letter of a tick label in inches
_LINE: dict[str, Any] = dict(color="black", linewidth=0.8)
_STYLE: dict[str, Any] = {
    **dict.fromkeys(("font.size", "axes.titlesize", "legend.fontsize"), 7.5),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 7),
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
    "axes.labelsize": 8,
    "pdf.fonttype": 42,  # TrueType, which publishers require
}


def check(path: Path) -> None:
    """Check whether a figure can be written to this path, before the work starts.

    Raises:
        ValueError: If the folder does not exist, or the suffix is not the suffix of a figure.
        RuntimeError: If matplotlib is missing.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"{path} must end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path.absolute().parent} is not a folder; create it, or use another path for the plot")
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("plots need matplotlib: pip install 'timm-dgconv[plot]'")


def draw(what: GroupReport | GroupHistory, path: Path, layers: Sequence[str] = ()) -> None:
    """Draw the groups of a model, or the groups over several checkpoints.

    For one model, or a history of one checkpoint, the figure shows the number of groups per layer, with the ResNeXt's,
    and the connectivity of some layers: by default of the first layer of each stage, at most four. For several
    checkpoints it shows the number of groups per layer over the checkpoints, by default of all layers, and the shares
    of the dense network's connections, multiply-adds and measured cost.

    Args:
        what: The report to draw.
        path: File to write, .png, .svg or .pdf; replaced if it exists.
        layers: Names of the layers to show.

    Raises:
        ValueError: If a layer, the suffix or the folder is unknown.
        RuntimeError: If matplotlib is missing.
    """
    check(path)
    if isinstance(what, GroupHistory) and len(what.reports) == 1:
        (what,) = what.reports
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure = _history(what, layers) if isinstance(what, GroupHistory) else _model(what, layers)
        file = io.BytesIO()  # a figure that fails leaves the file as it is
        figure.savefig(file, format=path.suffix.lower()[1:], dpi=300)
    path.write_bytes(file.getvalue())


def _model(report: GroupReport, names: Sequence[str]) -> Any:
    """Draw the groups over depth, and the connectivity matrices below."""
    from matplotlib.figure import Figure  # pyplot would use the backend of the user

    shown = report.select(names)
    if not shown:
        stages: dict[str, LayerReport] = {}
        for layer in report.layers:
            stages.setdefault(layer.stage or layer.name, layer)
        shown = list(stages.values() if len(stages) > 1 else report.layers)[:4]
    rows = -(-len(shown) // 4)
    figure = Figure(figsize=(_WIDTH, 2.8 + 2.15 * rows), layout="constrained")
    panels: Any = figure.subfigures(2, 1, height_ratios=[2.8, 2.15 * rows])
    above, below = panels
    _depth(above.subplots(), report)
    axes = below.subplots(rows, 4, squeeze=False).flatten()
    images = [_matrix(axis, layer) for axis, layer in zip(axes, shown, strict=False)]
    averaged = [image for image in images if image is not None]
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    for axis in axes[::4]:
        axis.set_ylabel("output channel")
    if averaged:
        ticks = dict(ticks=[0, 0.1, 0.5, 1], format="{x:g}", label="density of a cell")
        below.colorbar(averaged[0], ax=axes, pad=0.01, aspect=25, **ticks).minorticks_off()
    return figure


def _depth(axis: Any, report: GroupReport) -> None:
    """Draw the number of groups of every layer in order."""
    layers = report.layers
    places = range(len(layers))
    edges = [place - 0.5 for place in range(len(layers) + 1)]
    widest = max(layer.in_channels for layer in layers)
    axis.stairs([c.in_channels for c in layers], edges, color="0.6", linewidth=0.8, baseline=None, label="channels")
    if report.resnext is not None:
        fixed = [layer.resnext_groups for layer in layers]
        axis.stairs(fixed, edges, linestyle="--", baseline=None, label="ResNeXt", **_LINE)
    axis.plot(places, [layer.groups for layer in layers], marker="o", markersize=3.5, label="learned", **_LINE)
    axis.set_yscale("log", base=2)
    axis.set_yticks([2**n for n in range(widest.bit_length())])
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set(xlim=(edges[0], edges[-1]), ylim=(0.8, 1.4 * widest), ylabel="groups")

    starts = [n for n, layer in enumerate(layers) if n == 0 or layer.stage != layers[n - 1].stage]
    stages = list(zip(starts, [*starts[1:], len(layers)], strict=True))
    room = 6.4 / len(layers) / _CHARACTER  # characters per layer
    if all(0 < len(layers[start].stage) < room * (end - start) for start, end in stages):
        for start, end in stages:
            if start:
                axis.axvline(start - 0.5, color="0.8", linewidth=0.6, zorder=0)
            over = dict(xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points")
            axis.annotate(layers[start].stage, ((start + end) / 2 - 0.5, 1), ha="center", **over)
        names, label = [layer.name.split(".")[-2] for layer in layers], "block"
    else:
        names, label = [layer.name for layer in layers], "layer"
    shares = ", ".join(f"{name} {100 * share:.2f} %" for name, share in report.shares.items())
    axis.set_xlabel(f"{label}\n{shares} of dense")
    axis.set_xticks(places, names)
    axis.tick_params(axis="x", rotation=90 if max(map(len, names)) + 0.5 > room else 0)
    handles, labels = axis.get_legend_handles_labels()
    axis.figure.legend(handles[::-1], labels[::-1], loc="outside upper center", ncols=3, frameon=False)


def _matrix(axis: Any, layer: LayerReport) -> Any:
    """Draw the connectivity of a layer. Return the image if its cells are densities of several channel pairs."""
    from matplotlib.colors import PowerNorm

    matrix = layer.connectivity()
    out_cell, in_cell = (-(-channels // _CELLS) for channels in matrix.shape)
    cells = F.avg_pool2d(matrix[None], (out_cell, in_cell), ceil_mode=True)[0]
    # Enlarge the image, since viewers of .pdf and .svg may blur an image of few pixels.
    image = axis.imshow(
        cells.repeat_interleave(8, dim=0).repeat_interleave(8, dim=1).numpy(),
        cmap="Greys",
        norm=PowerNorm(0.5, vmin=0, vmax=1),  # makes a low density visible
        interpolation="none",
        extent=(0, layer.in_channels, layer.out_channels, 0),
        aspect="auto",
    )
    axis.set_box_aspect(1)
    inputs, outputs = layer.in_channels, layer.out_channels
    axis.set(xticks=[0, inputs // 2, inputs], yticks=[0, outputs // 2, outputs], xlabel="input channel")
    title = f"{layer.name}\n{layer.groups} group{'s' * (layer.groups > 1)} of {layer.channels_per_group}"
    is_averaged = max(out_cell, in_cell) > 1
    axis.set_title(f"{title}\ncells of {out_cell} x {in_cell}" if is_averaged else title)
    return image if is_averaged else None


def _history(history: GroupHistory, names: Sequence[str]) -> Any:
    """Draw the groups of every layer over the checkpoints, and the shares of the dense network's costs below."""
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure

    shown = [report.select(names) or list(report.layers) for report in history.reports]
    layers, count = shown[0], len(shown)
    groups = [[report[n].groups for report in shown] for n in range(len(layers))]
    top = max(map(max, groups)).bit_length()
    height = max(0.17 * len(layers), 0.14 * top)
    width = max(_WIDTH, min(1.8 + 0.2 * count, 14))
    column = (width - 1.8) / count
    room = (max(map(len, history.labels)) + 1) * _CHARACTER  # of a label
    upright = history.axis == "checkpoint" and room > column
    figure = Figure(figsize=(width, height + 2.3 + (room if upright else 0)), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[height + 0.3, 1.3])

    shades = [1 - 0.75 * n / max(1, top - 1) for n in range(top)]
    norm = BoundaryNorm([2 ** (n - 0.5) for n in range(top + 1)], top)
    cells = above.pcolormesh(groups, cmap=ListedColormap([str(shade) for shade in shades]), norm=norm)
    for row, numbers in enumerate(groups):
        for n, number in enumerate(numbers):
            if column >= 3 * _CHARACTER and (n == 0 or number != numbers[n - 1]):
                color = "black" if shades[number.bit_length() - 1] > 0.47 else "white"
                above.text(
                    n + 0.5, row + 0.5, str(number), fontsize=5.5, color=color, ha="center", va="center_baseline"
                )
    for n, layer in enumerate(layers[1:], start=1):
        if layer.stage != layers[n - 1].stage:
            above.axhline(n, color="black", linewidth=0.8)
    above.set_yticks([n + 0.5 for n in range(len(layers))], [layer.name for layer in layers])
    above.tick_params(axis="both", length=0)
    above.invert_yaxis()
    ticks = [2**n for n in range(top)]
    bar = figure.colorbar(cells, ax=above, ticks=ticks, format="{x:g}", pad=0.01, aspect=8 * height, label="groups")
    bar.ax.tick_params(length=0)

    places = [n + 0.5 for n in range(count)]
    for name, marker in zip(history.reports[0].shares, "osx", strict=False):
        shares = [100 * report.shares[name] for report in history.reports]
        below.plot(places, shares, marker=marker, markersize=3, label=name, **_LINE)
    fixed = history.reports[0].resnext_density
    if fixed is not None:
        below.axhline(100 * fixed, linestyle="--", label="connections of a ResNeXt", **_LINE)
    below.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4)
    below.set(ylabel="% of dense", xlim=(0, count), xlabel=history.axis)
    below.set_ylim(0, 1.05 * max(below.get_ylim()))
    every = math.ceil((2 * _CHARACTER if upright else room) / column)  # one label per so many checkpoints
    below.set_xticks(places[::every], history.labels[::every])
    below.tick_params(axis="x", rotation=90 if upright else 0)
    below.spines[["top", "right"]].set_visible(False)
    return figure
