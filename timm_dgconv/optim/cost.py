"""What a network costs: a table per layer over its numbers of groups, and the cost of the rest of the network."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_dgconv.layers.dgconv import DGConv2d
from timm_dgconv.ops import algebra
from timm_dgconv.tracing import image_size, trace, unwrap

FORMAT = 1
"""Version of the JSON files with measured costs."""

Table = tuple[float, ...]
"""The costs of a layer with 1, 2, 4, ..., 2^K groups."""


@dataclass(frozen=True)
class CostTable:
    """What a network costs with any numbers of groups.

    Attributes:
        unit: "connections", "macs", or the unit of a measured table, such as "ms".
        names: The names of the DGConv2d layers in the order of the model.
        tables: Per layer its costs with 1, 2, 4, ..., 2^K groups.
        rest: The cost of the rest of the network.
        is_limit: Whether a target is an upper limit only, so that no gates open to reach it.
    """

    unit: str
    names: tuple[str, ...]
    tables: tuple[Table, ...]
    rest: float
    is_limit: bool = False

    @property
    def dense(self) -> float:
        """The cost of the whole network with one group in each layer."""
        return self.total([0] * len(self.tables))

    def total(self, closed: Sequence[int]) -> float:
        """Return the cost of the whole network with these numbers of closed gates, one per layer."""
        return self.rest + sum(table[m] for table, m in zip(self.tables, closed, strict=True))

    def share(self, groups: int) -> float:
        """Return the share of the dense network's cost that the network has with this number of groups in each layer.

        Raises:
            ValueError: If a layer cannot have this number of groups.
        """
        m = groups.bit_length() - 1
        for name, table in zip(self.names, self.tables, strict=True):
            if groups != 1 << m or m >= len(table):
                raise ValueError(f"{name} cannot have the {groups} groups of a ResNeXt; use a number as the target")
        return self.total([m] * len(self.tables)) / self.dense

    def of_layers(self, layers: Sequence[DGConv2d]) -> Tensor:
        """Return the cost of the whole network as a scalar tensor, differentiable in the gates that learn.

        Raises:
            ValueError: If the table is of another network.
        """
        sizes = [layer.gate.numel() + 1 for layer in layers]
        if sizes != [len(table) for table in self.tables]:
            raise ValueError(
                f"the cost is of another network, with {len(self.tables)} layers; use timm_dgconv.cost_table on this "
                f"model, which has {len(layers)}"
            )
        return self.rest + torch.stack(list(map(_layer_cost, layers, self.tables))).sum()

    def check_target(self, target: float, layers: Sequence[DGConv2d]) -> None:
        """Check that a share of the dense network's cost can be reached by the gates that learn now.

        Raises:
            ValueError: If it cannot be reached.
        """
        frozen = smallest = 0.0
        for layer, table in zip(layers, self.tables, strict=True):
            if layer.gate.requires_grad or layer.gate.is_meta:
                smallest += min(table)
            else:
                frozen += table[sum(layer.closed)]
        reached = (self.rest + frozen + smallest) / self.dense
        if target < reached * (1 - 1e-9):
            limits = {"the rest of the network": self.rest, "frozen layers": frozen, "layers at their least": smallest}
            parts = " and ".join(f"{value / self.dense:.4g} in {name}" for name, value in limits.items() if value)
            ways = ["use a larger target"] * (reached < 1) + ["let the frozen layers learn"] * (frozen > 0)
            way_out = " or ".join(ways) or "more groups save nothing, so leave the target out"
            least = f"{math.ceil(1e4 * reached) / 1e4:.4g}"  # rounded up, so that it can be reached
            raise ValueError(
                f"complexity_target={target} cannot be reached: the smallest share of the dense network's {self.unit} "
                f"is {least}, {parts}; {way_out}"
            )


def named_layers(model: nn.Module) -> dict[str, DGConv2d]:
    """Return the DGConv2d layers of a model by name, in the order of the model.

    Raises:
        ValueError: If there is none.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, DGConv2d)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no DGConv2d, so there are no groups to learn")
    return layers


def cost_table(model: nn.Module, unit: str = "connections", input_size: Sequence[int] | None = None) -> CostTable:
    """Return what a network costs with any numbers of groups.

    Args:
        model: A model with at least one DGConv2d.
        unit: "connections" of the DGConv2d layers, "macs" for the multiply-adds of the whole network, or the path of a
            JSON file that ``timm-dgconv measure`` or you have written.
        input_size: Channels, height and width of the image for which multiply-adds are counted. The default is the
            input size of the pretrained_cfg.

    Raises:
        TypeError: If `input_size` is not three integers.
        ValueError: If the model has no DGConv2d or no known input size, if the unit is unknown, or if the file is not a
            table of this network.

    Examples:
        >>> import timm
        >>> cost = cost_table(timm.create_model("test_g_resnet"), "macs", (3, 64, 64))
        >>> round(cost.dense), round(cost.rest)
        (14563200, 10010496)
    """
    model = unwrap(model)
    layers = named_layers(model)
    if unit == "connections":
        dense, rest = [float(layer.in_channels * layer.out_channels) for layer in layers.values()], 0.0
    elif unit == "macs":
        traced = trace(model, image_size(model, input_size))
        dense = [
            float(sum(output.numel() for output in traced.outputs[name]) * layer.weight[0].numel())
            for name, layer in layers.items()
        ]
        rest = traced.macs - sum(dense)
    else:
        return read_costs(unit, {name: layer.gate.numel() for name, layer in layers.items()})
    tables = tuple(
        tuple(value / 2**m for m in range(layer.gate.numel() + 1))
        for value, layer in zip(dense, layers.values(), strict=True)
    )
    return CostTable(unit, tuple(layers), tables, rest, is_limit=unit == "connections")


def read_costs(path: str, layers: Mapping[str, int]) -> CostTable:
    """Read a JSON file with measured costs of a network with these layers, by name with their numbers of gates.

    Raises:
        ValueError: If it is not such a file.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path!r} is not a file of costs that can be read; write one with timm-dgconv measure, or use the "
            "complexity_unit connections or macs"
        ) from error
    except ValueError as error:  # of json and of the encoding
        raise ValueError(f"{path} is not a JSON file: {error}; write one with timm-dgconv measure") from error
    problem = _problem(content, layers)
    if problem:
        raise ValueError(f"{path} {problem}; use timm-dgconv measure with this model, or see docs/steering.md")
    tables = tuple(tuple(map(float, content["layers"][name])) for name in layers)
    rest = max(0.0, content["whole"] - sum(table[0] for table in tables))  # rounded, it may be below 0
    return CostTable(str(content.get("unit", "ms")), tuple(layers), tables, rest)


def _problem(content: Any, layers: Mapping[str, int]) -> str:
    """Return what is wrong with the content of a JSON file with measured costs, or an empty string."""
    if not isinstance(content, dict) or not isinstance(content.get("layers"), dict) or "whole" not in content:
        return "is not a table of costs: it has no 'whole' and 'layers'"
    if content.get("format", FORMAT) != FORMAT:
        return f"has format {content['format']!r}, which is not the format {FORMAT} of this version"
    tables = content["layers"]
    if unknown := [name for name in tables if name not in layers]:
        return f"is a table of another network: {unknown[0]} is not a layer of this one that learns groups"
    if missing := [name for name in layers if name not in tables]:
        return f"has no costs of {len(missing)} layers of this network, such as {missing[0]}"
    for name, bits in layers.items():
        if not isinstance(tables[name], list) or len(tables[name]) != bits + 1:
            groups = ", ".join(str(1 << m) for m in range(bits + 1))
            return f"has {tables[name]!r} for {name}, which is not a list of {bits + 1} costs, for {groups} groups"
    for name, costs in {"whole": [content["whole"]], **tables}.items():
        for cost in costs:
            if type(cost) not in (int, float) or not 0 <= cost < math.inf:
                return f"has the cost {cost!r} for {name}, which is not a finite number of at least 0"
    dense = sum(costs[0] for costs in tables.values())
    if not content["whole"] > 0 or content["whole"] < dense * (1 - 1e-9):
        return f"has the cost {content['whole']} for the whole network, which is less than {dense:.6g} of its layers"
    return ""


def slopes(table: Table) -> tuple[Table, Table]:
    """Return the slopes of a closed and of an open gate at every number m of closed gates, divided by ln 2.

    A slope is ln 2 times the cost that a halving table with the same step has at m. A closed gate has the step from m
    to m - 1, an open gate the step from m to m + 1. So both slopes of a halving table are ln 2 times its cost.
    """
    down = [cost - cheaper for cost, cheaper in itertools.pairwise(table)]
    return (0.0, *down), (*(2 * step for step in down), 0.0)


def _layer_cost(layer: DGConv2d, table: Table) -> Tensor:
    """Return the cost of a layer as a scalar tensor, differentiable in the gates that learn."""
    gate = layer.gate.to(torch.promote_types(layer.gate.dtype, torch.float32))
    closed, zeros = algebra.bits(gate, gate.detach(), layer.sort, layer.nested)
    costs, of_closed, of_open = torch.tensor([table, *slopes(table)]).to(gate).index_select(1, closed.sum().view(1))
    return costs.sum() + math.log(2) * (torch.where(closed, of_closed, of_open) * zeros).sum()
