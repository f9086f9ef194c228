"""The arguments that all networks of this package have beside the arguments of their timm class."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from timm_dgconv import _compat
from timm_dgconv.layers.dgconv import DGConv2d
from timm_dgconv.layers.gate_cache import share_reader
from timm_dgconv.models.groupable import groupable
from timm_dgconv.optim import complexity, steering

TRAINING_ARGS = (
    "complexity_weight",
    "complexity_target",
    "gate_bound",
    "gate_steps",
    "init_groups",
    "freeze_groups",
)
"""Arguments of a model that say how it is trained. They do not belong in its config.json."""


class GroupNet(nn.Module):
    """Base class of networks with DGConv2d layers (GroupNets, https://arxiv.org/abs/1908.05867, section 4).

    The next base class is a network of timm. If it has no DGConv2d, `timm_dgconv.groupable` converts its convolutions.

    Args:
        *args: Arguments of the network of timm.
        groups: A fixed number of groups, in all layers or one per layer, instead of learned groups. This builds group
            convolutions (the compact form, see `timm_dgconv.compact`).
        complexity_weight: Every optimizer step adds the gradient of ``complexity_weight * log(complexity)`` to the
            gradient of the gates. See `timm_dgconv.optim.steering.steer`, also for the next three.
        complexity_target: Largest density, the share of a dense network's connections, above 0 and at most 1. It needs
            no weight.
        gate_bound: Largest distance of a gate from zero.
        gate_steps: Number of optimizer steps after which the gates stand still.
        init_groups: Number of groups with which training starts, in all layers or one per layer: powers of two. The
            default are gates near zero with random signs, as in the original release.
        freeze_groups: Build gates that do not learn, see `timm_dgconv.freeze_groups`.
        **kwargs: Further arguments of the network of timm.

    Raises:
        TypeError: If an argument is not a number, or is not an argument of the network of timm.
        ValueError: If `groups` or `init_groups` has the wrong length or does not fit the channel counts, or if an
            argument is out of range or needs gates that learn.
    """

    def __init__(
        self,
        *args: Any,
        groups: int | Sequence[int] | None = None,
        complexity_weight: float | None = None,
        complexity_target: float | None = None,
        gate_bound: float | None = None,
        gate_steps: int | None = None,
        init_groups: int | Sequence[int] | None = None,
        freeze_groups: bool = False,
        **kwargs: Any,
    ) -> None:
        steers = dict(weight=complexity_weight, target=complexity_target, bound=gate_bound, steps=gate_steps)
        is_steered = bool(complexity_weight) or {complexity_target, gate_bound, gate_steps} != {None}
        if is_steered and (freeze_groups or groups is not None):
            given = ", ".join(f"{name}={value}" for name, value in steers.items() if value is not None)
            fixed = "freeze_groups=True" if groups is None else "groups=..."
            raise ValueError(f"steering with {given} needs gates that learn, and {fixed} has none; leave one out")
        if init_groups is not None and groups is not None:
            raise ValueError(f"init_groups={init_groups} needs gates, and groups=... has none; leave one out")
        super().__init__(*args, **kwargs)
        convs = _dgconvs(self)
        if not convs:
            convs = _dgconvs(groupable(self))
            for conv in convs.values():
                conv.reset_gate()
        share_reader(convs.values())
        for name, conv, number in _per_layer(convs, "groups", groups):
            self.set_submodule(name, conv.to_group_conv(number))
        for _, conv, number in _per_layer(convs, "init_groups", init_groups):
            conv.reset_gate(number)
        if is_steered:
            steering.steer(self, **steers)  # type: ignore[arg-type]
        if freeze_groups and groups is None:
            complexity.freeze_groups(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Leave out `TRAINING_ARGS` when timm records the arguments of the model."""
        if name == _compat.MODEL_ARGS:
            value = {key: argument for key, argument in value.items() if key not in TRAINING_ARGS}
        super().__setattr__(name, value)


def _dgconvs(model: nn.Module) -> dict[str, DGConv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, DGConv2d)}


def _per_layer(
    convs: dict[str, DGConv2d], option: str, groups: int | Sequence[int] | None
) -> list[tuple[str, DGConv2d, int]]:
    """Return name, layer and number of groups of each layer, or an empty list if `groups` is None."""
    if groups is None:
        return []
    numbers = [groups] * len(convs) if isinstance(groups, int) else groups
    if not isinstance(numbers, list | tuple) or len(numbers) != len(convs):
        raise ValueError(f"{option}={groups!r} must be one number, or one for each of the {len(convs)} layers")
    return [(name, conv, number) for (name, conv), number in zip(convs.items(), numbers, strict=True)]
