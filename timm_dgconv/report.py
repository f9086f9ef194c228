"""Reports of the learned groups: per layer the groups and their cost, for one model or for the checkpoints of a run."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_dgconv.layers.dgconv import DGConv2d
from timm_dgconv.models.g_resnet import GResNet
from timm_dgconv.models.group_net import GroupFeatureListNet, group_layers
from timm_dgconv.ops import algebra
from timm_dgconv.ops.naive import connectivity
from timm_dgconv.optim.cost import CostTable, read_costs
from timm_dgconv.tracing import image_size, setting, trace, unwrap


@dataclass(frozen=True)
class Cost:
    """Number of parameters and number of multiply-adds per image."""

    params: int
    macs: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.params + other.params, self.macs + other.macs)


@dataclass(frozen=True)
class LayerReport:
    """The groups of one layer and their cost.

    Attributes:
        name: Name of the module in the model.
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        resolution: Height and width of the output, or None if the model does not run this layer.
        groups: Number of groups.
        bits: One character per bit of the channel index, the most significant bit first: 1 if the bit is open, 0 if it
            is closed. An open bit connects the channels that differ in it. None for a plain group convolution.
        learned: Cost with these groups, without the gates. Parameters that layers share count in the first one.
        dense: Cost with one group.
        resnext: Cost in the ResNeXt with the same widths, or None outside of a G-ResNeXt.
        resnext_groups: Number of groups in that ResNeXt.
    """

    name: str
    in_channels: int
    out_channels: int
    resolution: tuple[int, int] | None
    groups: int
    bits: str | None
    learned: Cost
    dense: Cost
    resnext: Cost | None
    resnext_groups: int | None

    @property
    def channels_per_group(self) -> int:
        """Number of input channels per group."""
        return self.in_channels // self.groups

    @property
    def stage(self) -> str:
        """Name of the stage, such as ``layer1`` for ``layer1.0.conv2``."""
        return ".".join(self.name.split(".")[:-2])

    def connectivity(self) -> Tensor:
        """Return the 0/1 matrix of shape (out_channels, in_channels): 1 where an input feeds an output channel."""
        if self.bits is None:
            blocks = torch.ones(self.out_channels // self.groups, self.channels_per_group)
            return torch.kron(torch.eye(self.groups), blocks)
        gate = torch.tensor([1.0 if bit == "1" else -1.0 for bit in self.bits])
        return connectivity(gate, self.out_channels, self.in_channels, sort=False, nested=False)


@dataclass(frozen=True)
class GroupReport:
    """The groups of every layer of a model and the cost of the whole network.

    Attributes:
        model: Name of the architecture, or of the class if there is no architecture.
        input_size: Channels, height and width of the image for which multiply-adds are counted.
        layers: The layers that learn their groups, or have learned them in the compact form, in the order of the model.
        learned: Cost of the whole network with these groups. The compact form of layers with ``sort=False`` may cost
            more, see `timm_dgconv.compact`.
        dense: Cost of the whole network with one group in each of these layers.
        resnext: Cost of the ResNeXt with the same widths, or None if a layer is outside of a G-ResNeXt.
        costs: Measured costs of the network, or None.
    """

    model: str
    input_size: tuple[int, int, int]
    layers: tuple[LayerReport, ...]
    learned: Cost
    dense: Cost
    resnext: Cost | None
    costs: CostTable | None = None

    @property
    def complexity(self) -> int:
        """Number of connected channel pairs of these layers, as `timm_dgconv.complexity` returns it."""
        return self._connections(layer.groups for layer in self.layers)

    @property
    def density(self) -> float:
        """Connected share of all channel pairs of these layers."""
        return self.complexity / self._connections(1 for _ in self.layers)

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the dense network: of the connections, of the multiply-adds, and of the measured cost if known."""
        shares = {"connections": self.density, "multiply-adds": self.learned.macs / self.dense.macs}
        if self.costs is not None:
            shares[f"measured {self.costs.unit}"] = self.costs.total(self._closed) / self.costs.dense
        return shares

    @property
    def resnext_density(self) -> float | None:
        """Connected share of all channel pairs in the ResNeXt with the same widths, or None if there is none."""
        groups = [layer.resnext_groups for layer in self.layers if layer.resnext_groups is not None]
        return None if self.resnext is None else self._connections(groups) / self._connections(1 for _ in self.layers)

    def _connections(self, groups: Iterable[int]) -> int:
        return sum(c.in_channels * c.out_channels // g for c, g in zip(self.layers, groups, strict=True))

    def select(self, names: Sequence[str]) -> list[LayerReport]:
        """Return the layers with these names.

        Raises:
            ValueError: If a layer does not exist.
        """
        layers = {layer.name: layer for layer in self.layers}
        for name in names:
            if name not in layers:
                raise ValueError(f"{self.model} has no layer {name!r} that learns groups; it has {', '.join(layers)}")
        return [layers[name] for name in names]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as dicts, lists, strings and numbers, for JSON."""
        layers = [{**asdict(layer), "channels_per_group": layer.channels_per_group} for layer in self.layers]
        totals = ("complexity", "density", "resnext_density")
        return {**asdict(self), "layers": layers, **{name: getattr(self, name) for name in totals}}

    def __str__(self) -> str:
        """Return a table with one row per layer, and a second table for the whole network."""
        names = ("layer", "channels", "resolution", "groups", "channels", "open bits", "parameters", "", "", "MACs, M")
        rows = [[*names, "", ""], ["", "", "", "", "per group", "", *("learned", "dense", "ResNeXt") * 2]]
        for layer in self.layers:
            params, macs = _cells(layer.learned, layer.dense, layer.resnext)
            resolution = "-" if layer.resolution is None else "{} x {}".format(*layer.resolution)
            groups = (str(layer.groups), str(layer.channels_per_group))
            rows.append([layer.name, _channels(layer), resolution, *groups, layer.bits or "-", *params, *macs])
        params, macs = _cells(self.learned, self.dense, self.resnext)
        fixed = {layer.resnext_groups for layer in self.layers} - {None, 1}
        densities = (self.density, 1.0, self.resnext_density)
        shares = (
            None if cost is None else cost.macs / self.dense.macs for cost in (self.learned, self.dense, self.resnext)
        )
        whole = [
            ["whole network", "learned", "dense", f"ResNeXt, {fixed.pop()} groups" if len(fixed) == 1 else "ResNeXt"],
            ["parameters", *params],
            ["multiply-adds (MACs), M", *macs],
            ["multiply-adds, % of dense", *map(_percent, shares)],
            ["connections, % of dense", *map(_percent, densities)],
        ]
        title = f"{self.model}, input {' x '.join(map(str, self.input_size))}"
        return "\n\n".join(
            [title, _align(rows), _align(whole), *([] if self.costs is None else [self._measured(self.costs)])]
        )

    @property
    def _closed(self) -> list[int]:
        return [layer.groups.bit_length() - 1 for layer in self.layers]

    def _measured(self, costs: CostTable) -> str:
        """Return a table of the measured costs."""
        closed = self._closed
        entries = zip(costs.names, costs.tables, closed, strict=True)
        rows = [[name, *(f"{value:.3f}" for value in (table[m], table[0]))] for name, table, m in entries]
        totals = (costs.total(closed), costs.dense)
        return _align(
            [
                [f"measured, {costs.unit}", "learned", "dense"],
                *rows,
                ["whole network", *(f"{value:.3f}" for value in totals)],
                ["% of dense", *(_percent(value / costs.dense) for value in totals)],
            ]
        )


@dataclass(frozen=True)
class GroupHistory:
    """The reports of the checkpoints of one run, in order.

    Attributes:
        reports: One report per checkpoint.
        sources: The source of each checkpoint.
        epochs: The epoch of each checkpoint, or None if it is not known.

    Raises:
        ValueError: If the reports are of different networks.
    """

    reports: tuple[GroupReport, ...]
    sources: tuple[str, ...]
    epochs: tuple[int | None, ...]

    def __post_init__(self) -> None:
        first = self.reports[0]
        for report, source in zip(self.reports, self.sources, strict=True):
            if _network(report) != _network(first):
                raise ValueError(
                    f"{source} is of another network than {self.sources[0]}: {report.model} with "
                    f"{report.dense.params:,} parameters (dense) and images of {report.input_size}, not {first.model} "
                    f"with {first.dense.params:,} and {first.input_size}; use checkpoints of one run, or --img-size"
                )

    @property
    def axis(self) -> str:
        """Meaning of the labels: ``epoch`` if the epochs of all checkpoints are known, otherwise ``checkpoint``."""
        return "checkpoint" if None in self.epochs else "epoch"

    @property
    def labels(self) -> tuple[str, ...]:
        """The epochs. If a checkpoint has none, the names of the files, or the sources if names are ambiguous."""
        if self.axis == "epoch":
            return tuple(map(str, self.epochs))
        names = tuple(Path(source).name for source in self.sources)
        return names if len(set(names)) == len(names) else self.sources

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return `GroupReport.as_dict` of each checkpoint, with its source and epoch."""
        triples = zip(self.sources, self.epochs, self.reports, strict=True)
        return [{"source": source, "epoch": epoch, **report.as_dict()} for source, epoch, report in triples]

    def __str__(self) -> str:
        """Return a table with one column per checkpoint: the groups of each layer, and the density in percent.

        For a single checkpoint this is the table of its report.
        """
        first, *others = self.reports
        if not others:
            return str(first)
        rows = [["layer", "channels", *self.labels]]
        for layer, *later in zip(*(report.layers for report in self.reports), strict=True):
            rows.append([layer.name, _channels(layer), str(layer.groups), *(str(other.groups) for other in later)])
        for name in first.shares:
            rows.append([f"{name}, % of dense", "", *(_percent(report.shares[name]) for report in self.reports)])
        return f"{first.model}, groups by {self.axis}\n\n{_align(rows)}"


def group_report(
    model: nn.Module, input_size: tuple[int, int, int] | None = None, costs: str | None = None
) -> GroupReport:
    """Report the groups of every layer of a model and their cost, and compare with dense layers and with a ResNeXt.

    torch.utils.flop_counter.FlopCounterMode counts multiply-adds in evaluation mode, on a copy of the model on the meta
    device. So nothing is computed and the model does not change.

    Args:
        model: A G-ResNeXt, learnable or compact, a wrapper around one, or any module with DGConv2d layers.
        input_size: Channels, height and width of the image. The default is the input size of the pretrained_cfg.
        costs: Path of a JSON file with measured costs, see `timm_dgconv.cost_table`.

    Returns:
        The report. ``print`` shows it as a table.

    Raises:
        TypeError: If `input_size` is not three integers.
        ValueError: If the model has no such layer or no known input size, does not run on such an image, or if `costs`
            is not a table of this model.
        RuntimeError: If a gate is nan or has no value in this process.

    Examples:
        >>> report = group_report(nn.Sequential(DGConv2d(64, 64, 3, padding=1)), input_size=(64, 7, 7))
        >>> report.layers[0].dense
        Cost(params=36928, macs=1806336)
    """
    model = unwrap(model)
    convs = group_layers(model)
    if not convs:
        raise ValueError(
            f"{type(model).__name__} has no DGConv2d and is no model of this package, so it has no groups to report; "
            "use timm_dgconv.groupable on it, or report on it before timm_dgconv.compact"
        )
    size = image_size(model, input_size)
    traced = trace(model, size)
    cardinalities = _cardinalities(model)
    layers, counted = [], set[Tensor]()
    rest = Cost(sum(parameter.numel() for parameter in model.parameters()), traced.macs)  # of all but these layers
    for name, conv in convs.items():
        outputs, fixed = traced.outputs[name], cardinalities.get(name)
        macs = sum(output.numel() for output in outputs) * conv.weight[0].numel()
        own = {parameter for parameter in conv.parameters() if parameter not in counted}
        counted |= own
        rest += Cost(-sum(parameter.numel() for parameter in own), -macs)
        bits = None
        if isinstance(conv, DGConv2d):
            bits = "".join("0" if is_closed else "1" for is_closed in conv.closed_bits())
        groups = conv.groups if bits is None else 1 << bits.count("0")
        bias = conv.bias.numel() if conv.bias in own else 0
        weights, products = conv.weight.numel() * conv.groups * (conv.weight in own), macs * conv.groups
        learned, dense, resnext = (Cost(weights // g + bias, products // g) for g in (groups, 1, fixed or 1))
        channels = (conv.in_channels, conv.out_channels)
        resolution = (outputs[0].shape[-2], outputs[0].shape[-1]) if outputs else None
        layers.append(
            LayerReport(name, *channels, resolution, groups, bits, learned, dense, resnext if fixed else None, fixed)
        )
    resnexts = [layer.resnext for layer in layers if layer.resnext is not None]
    return GroupReport(
        setting(model, "architecture") or type(model).__name__,
        size,
        tuple(layers),
        sum((layer.learned for layer in layers), rest),
        sum((layer.dense for layer in layers), rest),
        sum(resnexts, rest) if len(resnexts) == len(layers) else None,
        None if costs is None else _read_costs(costs, layers),
    )


def _read_costs(path: str, layers: Sequence[LayerReport]) -> CostTable:
    bits = {layer.name: algebra.num_bits(layer.in_channels, layer.out_channels) for layer in layers}
    for layer in layers:
        if layer.groups not in [1 << m for m in range(bits[layer.name] + 1)]:
            raise ValueError(
                f"{layer.name} has {layer.groups} groups, which no table of costs has; leave the costs out"
            )
    return read_costs(path, bits)


def _cardinalities(model: nn.Module) -> dict[str, int]:
    """Return the number of groups in the ResNeXt with the same widths, for all convolutions of a G-ResNeXt."""
    return {
        name: net.cardinality if max(conv.kernel_size) > 1 else 1
        for prefix, net in model.named_modules()
        if isinstance(net, GResNet | GroupFeatureListNet) and net.cardinality > 1
        for name, conv in net.named_modules(prefix=prefix)
        if isinstance(conv, nn.Conv2d)
    }


def _network(report: GroupReport) -> tuple[Any, ...]:
    """Return the properties that all checkpoints of one run share."""
    layers = [(layer.name, layer.in_channels, layer.out_channels, layer.resolution) for layer in report.layers]
    return report.model, report.input_size, report.dense, layers


def _channels(layer: LayerReport) -> str:
    inputs, outputs = layer.in_channels, layer.out_channels
    return f"{inputs}" if inputs == outputs else f"{inputs} -> {outputs}"


def _cells(*costs: Cost | None) -> tuple[list[str], list[str]]:
    """Return parameters and multiply-adds in millions as text."""
    params = ["-" if cost is None else f"{cost.params:,}" for cost in costs]
    return params, ["-" if cost is None else f"{cost.macs / 1e6:,.2f}" for cost in costs]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def _align(rows: Sequence[Sequence[str]]) -> str:
    """Align columns of text: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(f"{{:{'<' if n == 0 else '>'}{width}}}" for n, width in enumerate(widths))
    return "\n".join(form.format(*row).rstrip() for row in rows)
