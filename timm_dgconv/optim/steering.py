"""Steer the groups in an unchanged training loop: what users call, and what a model knows of its training."""

import copy
import math
import weakref
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn

from timm_dgconv.layers.bottleneck import movable_blocks
from timm_dgconv.layers.gate_reader import has_values
from timm_dgconv.optim import hooks, steered_model
from timm_dgconv.optim.cost import CostTable, cost_table, named_layers

DEFAULT_WEIGHT = 0.1
"""Weight of a model that has a target only."""


class Steering:
    """What steers the gates of a model, with the arguments of `steer`, and how far it has come.

    The layers of one model share one object. A copy of a single layer, as PEFT makes it, still belongs to its model.
    Without a cost it waits for one: an optimizer step is an error.

    Attributes:
        num_layers: Number of layers of the model.
        source: The object of which this is a copy, or None.
        taken: Number of steps that the model has taken.
        settled: Whether the gates stand still from the next step on. It is stored, since a compiled forward pass reads
            it, and torch.compile would compile again for every number of steps.
        stepped: The places of the gates that took part in the last of them. Each optimizer may have some of the gates.
        start: What a model with a target cost before its first step.
        warned: Whether it has warned that something else changes the gates.

    Raises:
        TypeError: If a value is not a number.
        ValueError: If a value is out of its range.
    """

    def __init__(
        self,
        weight: float | None,
        target: float | None,
        bound: float | None,
        steps: int | None,
        cost: CostTable | None = None,
    ) -> None:
        if weight is None:
            weight = 0.0 if target is None else DEFAULT_WEIGHT
        self.weight, self.target, self.bound, self.steps, self.cost = weight, target, bound, steps, cost
        self.num_layers = self.taken = 0
        self.settled = steps == 0
        self.source: weakref.ref[Steering] | None = None
        self.stepped: set[int] = set()
        self.start: float | None = None
        self.warned = False
        given = {"complexity_weight": weight, "complexity_target": target, "gate_bound": bound, "gate_steps": steps}
        for name, value in given.items():
            numbers, kind = (Integral, "a whole number") if name == "gate_steps" else (Real, "a number")
            if value is not None and (isinstance(value, bool) or not isinstance(value, numbers)):
                raise TypeError(f"{name}={value!r} must be {kind}")
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be at least 0 and finite")
        if target is not None and not weight:
            raise ValueError(f"complexity_target={target} needs a complexity_weight above 0; leave it out")
        if target is not None and not 0 < target <= 1:
            unit = cost.unit if cost else "cost"
            raise ValueError(
                f"complexity_target={target} must be a share of a dense network's {unit}, above 0 and at most 1"
            )
        if target is not None and steps == 0:
            raise ValueError(
                f"gate_steps=0 lets no step reach complexity_target={target}; use more steps, or init_groups"
            )
        if bound == 0:
            raise ValueError("gate_bound=0 leaves the gates no room; use freeze_groups=True")

    @property
    def acts_after_steps(self) -> bool:
        """Whether a step can be taken back."""
        return (self.target, self.bound, self.steps) != (None, None, None)

    def count(self, places: set[int]) -> None:
        """Count a step of the gates at these places, unless it is one with the step of the others."""
        if not self.stepped or self.stepped & places:
            self.taken += 1
            self.stepped = set()
        self.settled = self.steps is not None and self.taken >= self.steps
        self.stepped = self.stepped | places

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "source": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Steering":
        result = memo[id(self)] = copy.copy(self)
        result.source = weakref.ref(self)
        return result


def steer(
    model: nn.Module,
    weight: float | None = None,
    target: float | None = None,
    bound: float | None = None,
    steps: int | None = None,
    unit: str = "connections",
    input_size: Sequence[int] | None = None,
) -> None:
    """Let every optimizer step act on the gates of a model, or stop that if no argument is given.

    `create_model` calls this with `complexity_weight`, `complexity_target`, `gate_bound`, `gate_steps` and
    `complexity_unit`. An optimizer that has none of the gates is not affected. A copy of the model is steered, too.

    Args:
        model: A model with at least one DGConv2d.
        weight: Add the gradient of ``weight * log(cost)`` to the gradient of the gates, where the cost is that of
            ``timm_dgconv.complexity(model, timm_dgconv.cost_table(model, unit))``. The default is `DEFAULT_WEIGHT` with
            a target, and 0 without.
        target: Largest cost, as a share of the dense network's cost, in (0, 1]. The term acts while the cost is above
            the target. From then on, after each step the open gates nearest to zero close until the cost is at most
            the target. Gates that close in a step open again if the target allows it. If the unit is not
            "connections", further gates open while the cost is below `REACHED` of the target.
        bound: Keep the gates in [-bound, bound], so that they can always flip soon, as BinaryConnect does with weights
            (https://arxiv.org/abs/1511.00363). Only the sign of a gate matters, so half the bound acts as twice the
            learning rate of the gates does.
        steps: Keep the gates where they are after this number of optimizer steps. One epoch has about ``images /
            (batch size * accumulation steps * processes)`` steps. A resumed training counts from 0. The gates then
            approach a target over the first half of these steps, on the cubic schedule of Zhu and Gupta
            (https://arxiv.org/abs/1710.01878).
        unit: "connections" of the DGConv2d layers, "macs" for the multiply-adds of the whole network, or the path of a
            JSON file with measured costs, see `timm_dgconv.cost_table`.
        input_size: Channels, height and width of the image for which multiply-adds are counted. The default is the
            input size of the pretrained_cfg.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If the model has no DGConv2d, if an argument is out of its range, if the target cannot be reached,
            if a layer is steered as a part of another model, if the deployed form of a layer costs more than `unit`
            counts, or as `timm_dgconv.cost_table`.

    Examples:
        >>> from timm_dgconv import DGConv2d
        >>> conv = DGConv2d(8, 8, 1)
        >>> steer(conv, target=0.25)
        >>> optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
        >>> for _ in range(8):
        ...     optimizer.zero_grad()
        ...     optimizer.step()
        >>> conv.num_groups >= 4
        True
    """
    cost = cost_table(model, unit, input_size)
    layers, steered = named_layers(model), hooks.models()
    for name, layer in layers.items():
        together = steered.get(layer.steered.steering, {}) if layer.steered is not None else {}
        if others := {*together.values()} - {*layers.values()}:
            raise ValueError(
                f"{name} is steered with {len(others)} layers of another model; steer one model that has all of these "
                "layers, or end that steering first: timm_dgconv.steer(other)"
            )
    if unit != "connections":
        ordered = {block.conv2 for block in movable_blocks(model)}
        for name, layer in layers.items():
            if not layer.sort and layer not in ordered:
                raise ValueError(
                    f"{name} has sort=False, and its order of channels cannot move, so its deployed form costs more "
                    f"than complexity_unit={unit!r} counts; use sort=True, or the unit connections"
                )
    steering = Steering(weight, target, bound, steps, cost)
    if target is not None:
        cost.check_target(target, list(layers.values()))
    link(model, steering)


def link(model: nn.Module, steering: Steering) -> None:
    """Let a steering act on the layers of a model."""
    layers = list(named_layers(model).values())
    steering.num_layers = len(layers)
    acts = steering.weight > 0 or steering.acts_after_steps
    for index, layer in enumerate(layers):
        layer.steered = hooks.SteeredLayer(layer, steering, index) if acts else None
        if acts:
            weakref.finalize(layer, hooks.leave_behind, weakref.ref(layer.gate)).atexit = False


@torch.no_grad()
def hold_target(model: nn.Module) -> None:
    """Close gates of a model until it is within its `complexity_target`, those nearest to zero first, frozen ones, too.

    An optimizer step does this by itself. Use it after something else has changed the gates: on an average of models
    (EMA, SWA), after ``optimizer.eval()`` of schedulefree, or in a loop without a torch optimizer.

    Args:
        model: A model with a target, a copy or an average of one, or a wrapper around one; changed in place.

    Raises:
        ValueError: If the model has no DGConv2d with a target.
        RuntimeError: If this process has only a part of the gates.

    Examples:
        >>> from timm_dgconv import DGConv2d
        >>> conv = DGConv2d(8, 8, 1)
        >>> steer(conv, target=0.25)
        >>> _ = conv.gate.data.fill_(1.0)
        >>> hold_target(conv)
        >>> conv.num_groups
        4
    """
    layers = named_layers(model)
    for name, layer in layers.items():
        if not has_values(layer) or hasattr(layer.gate, "full_tensor"):  # a DTensor
            raise RuntimeError(
                f"the gates of {name} are sharded, and hold_target needs whole gates; with DeepSpeed call it in "
                "deepspeed.zero.GatheredParameters(gates, modifier_rank=0), otherwise before the model is sharded"
            )
    linked = [layer.steered for layer in layers.values() if layer.steered is not None]
    steerings = {steered.steering for steered in linked if steered.steering.target is not None}
    if not steerings:
        raise ValueError(
            f"{type(model).__name__} has no complexity_target; use timm_dgconv.steer(model, target=...) first"
        )
    for steering, members in hooks.models().items():
        if steering in steerings:
            gates = {layer.gate for layer in members.values()}  # frozen ones, too: averages are often frozen
            steered = steered_model.SteeredModel(steering, members, gates)
            steered_model.hold_gates(steered)
            for each in steered.steerings:
                each.warned = True  # the user holds the target
