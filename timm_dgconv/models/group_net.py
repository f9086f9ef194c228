"""The arguments that all networks of this package have beside the arguments of their timm class."""

import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral
from typing import Any, ClassVar

from timm.models import FeatureListNet
from torch import nn

from timm_dgconv import _compat
from timm_dgconv.layers.checkpoints import GATE_NAMES, from_conv
from timm_dgconv.layers.dgconv import DGConv2d, check_flags
from timm_dgconv.layers.gate_reader import OneReading
from timm_dgconv.models.convert import groupable
from timm_dgconv.optim import complexity, steering
from timm_dgconv.optim.cost import cost_table
from timm_dgconv.tracing import image_size

TRAINING_ARGS = (
    "complexity_weight",
    "complexity_target",
    "complexity_unit",
    "img_size",
    "gate_bound",
    "gate_steps",
    "init_groups",
    "freeze_groups",
    "nested",
)
"""Arguments of a model that say how it is trained. They do not belong in its config.json."""


class GroupNet(OneReading):
    """Base class of networks with DGConv2d layers (GroupNets, https://arxiv.org/abs/1908.05867, section 4).

    The next base class is a network of timm. `timm_dgconv.groupable` converts the convolutions that `learns_groups`
    chooses.

    Args:
        *args: Arguments of the network of timm.
        groups: A fixed number of groups, in all layers or one per layer, instead of learned groups. This builds group
            convolutions (the compact form, see `timm_dgconv.compact`).
        sort: Whether groups are ranges of channels, see `timm_dgconv.DGConv2d`. The networks of the paper have
            ``sort=False``.
        nested: Whether gates receive the slope of their flip, see `timm_dgconv.DGConv2d`.
        pointwise: Let the 1x1 convolutions of the blocks learn their groups, too.
        complexity_weight: Every optimizer step adds the gradient of ``complexity_weight * log(complexity)`` to the
            gradient of the gates. See `timm_dgconv.steer`, also for the arguments up to `gate_steps`.
        complexity_target: Largest cost, as a share of the dense network's cost, above 0 and at most 1. It needs no
            weight.
        complexity_unit: "connections", "macs", or the path of a JSON file with measured costs.
        img_size: Side in pixels, or height and width, of the images for which "macs" counts multiply-adds. The default
            is the input size of the pretrained_cfg.
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

    group_convs: ClassVar[str]
    """A regular expression for the names of the convolutions that learn their groups. 1x1 kernels need `pointwise`."""

    def __init__(
        self,
        *args: Any,
        groups: int | Sequence[int] | None = None,
        sort: bool = True,
        nested: bool = True,
        pointwise: bool = False,
        complexity_weight: float | None = None,
        complexity_target: float | str | None = None,
        complexity_unit: str = "connections",
        img_size: int | Sequence[int] | None = None,
        gate_bound: float | None = None,
        gate_steps: int | None = None,
        init_groups: int | Sequence[int] | None = None,
        freeze_groups: bool = False,
        **kwargs: Any,
    ) -> None:
        check_flags(sort=sort, nested=nested, pointwise=pointwise, freeze_groups=freeze_groups)
        steers = dict(weight=complexity_weight, target=complexity_target, bound=gate_bound, steps=gate_steps)
        is_steered = bool(complexity_weight) or any(steers[name] is not None for name in ("target", "bound", "steps"))
        if is_steered and (freeze_groups or groups is not None):
            given = ", ".join(f"{name}={value}" for name, value in steers.items() if value is not None)
            fixed = "freeze_groups=True" if groups is None else "groups=..."
            raise ValueError(f"steering with {given} needs gates that learn, and {fixed} has none; leave one out")
        if init_groups is not None and groups is not None:
            raise ValueError(f"init_groups={init_groups} needs gates, and groups=... has none; leave one out")
        if complexity_unit != "connections" and not is_steered:
            raise ValueError(f"complexity_unit={complexity_unit!r} is the unit of a target; add complexity_target=...")
        super().__init__(*args, **kwargs)
        self.pointwise = pointwise
        for name, conv in self.named_modules():
            if isinstance(conv, nn.Conv2d) and self.learns_groups(name, conv) and conv.groups > 1:
                # The groups of a ResNeXt only determine its widths, and need not be a power of two.
                shape = (conv.out_channels, conv.in_channels, *conv.kernel_size)
                conv.weight = nn.Parameter(conv.weight.detach().new_zeros(shape))
                conv.groups = 1
        groupable(self, self.learns_groups, sort, nested)
        convs = {name: module for name, module in self.named_modules() if isinstance(module, DGConv2d)}
        for conv in convs.values():
            conv.reset_gate()
        _set_groups(convs, "groups", groups, DGConv2d.to_group_conv_)
        _set_groups(convs, "init_groups", init_groups, DGConv2d.reset_gate)
        if init_groups is not None:
            self.register_load_state_dict_post_hook(partial(_warn_init_groups, init_groups))
        if is_steered:
            self._steers: dict[str, Any] = {**steers, "unit": complexity_unit, "input_size": _image(self, img_size)}
        if is_steered and complexity_unit == "macs" and img_size is None:
            waiting = steering.Steering(complexity_weight or steering.DEFAULT_WEIGHT, None, gate_bound, gate_steps)
            steering.link(self, waiting)  # until timm assigns the pretrained_cfg, which has the input size
        elif is_steered:
            self._steer(**self._steers)
        if freeze_groups and groups is None:
            complexity.freeze_groups(self)

    def learns_groups(self, name: str, conv: nn.Conv2d) -> bool:
        """Return whether a convolution of the network of timm learns its groups, or has learned them."""
        return re.fullmatch(self.group_convs, name) is not None and (self.pointwise or max(conv.kernel_size) > 1)

    def _steer(self, target: Any, unit: str, **kwargs: Any) -> None:
        """Steer the network. The target "resnext" is the share of a ResNeXt with the same widths."""
        cardinality = getattr(self, "cardinality", 1)
        if target == "resnext":
            if cardinality == 1 or self.pointwise:
                raise ValueError(
                    f"complexity_target='resnext' is for the 3x3 layers of a ResNeXt's widths, and this "
                    f"{type(self).__name__} has others; use a number, or a model such as g_resnext50"
                )
            cost = cost_table(self, unit, kwargs.get("input_size"))
            target = 1 / cardinality if unit == "connections" else cost.share(cardinality)
        elif isinstance(target, str):
            raise ValueError(f"complexity_target={target!r} is not a number; use a number, or 'resnext'")
        steering.steer(self, target=target, unit=unit, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Leave out `TRAINING_ARGS` when timm records the arguments of the model.

        Multiply-adds are counted as soon as timm has assigned the pretrained_cfg, which has the input size.
        """
        if name == _compat.MODEL_ARGS:
            value = {key: argument for key, argument in value.items() if key not in TRAINING_ARGS}
        super().__setattr__(name, value)
        steers = vars(self).get("_steers", {})
        if name == "pretrained_cfg" and steers.get("unit") == "macs" and steers["input_size"] is None:
            steers["input_size"] = image_size(self, None)
            self._steer(**steers)


class GroupFeatureListNet(OneReading, FeatureListNet):
    """timm's feature extractor of a network with DGConv2d layers."""

    def __init__(self, model: nn.Module, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.cardinality = getattr(model, "cardinality", 1)
        self.group_convs, self.pointwise = model.group_convs, model.pointwise
        steers: Any = getattr(model, "_steers", None)
        if steers:  # the target is a share of the network that `out_indices` leave
            steering.steer(model)
            self._steer(**steers)

    learns_groups, _steer = GroupNet.learns_groups, GroupNet._steer


def add_missing_gates(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Give pretrained weights without gates the gates with which a model computes the same, also if they are frozen."""
    for name, layer in model.named_modules():
        weight = state_dict.get(f"{name}.weight")
        gates = [f"{name}.{gate}" for gate in ("gate", *GATE_NAMES.values())]
        if isinstance(layer, DGConv2d) and weight is not None and not any(gate in state_dict for gate in gates):
            dense, gate = from_conv(layer, weight)
            state_dict |= {f"{name}.weight": dense, f"{name}.{GATE_NAMES[layer.sort]}": gate}
    return state_dict


def group_layers(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Return the layers that learn their groups, or have learned them, by name in the order of the model.

    The compact form of a network that is not of this package is made of its own modules, so it has no such layers.
    """
    learned = {
        conv
        for net in model.modules()
        if isinstance(net, GroupNet | GroupFeatureListNet)
        for name, conv in net.named_modules()
        if isinstance(conv, nn.Conv2d) and net.learns_groups(name, conv)
    }
    convs = {name: conv for name, conv in model.named_modules() if isinstance(conv, nn.Conv2d)}
    return {name: conv for name, conv in convs.items() if isinstance(conv, DGConv2d) or conv in learned}


def layer_groups(model: nn.Module) -> list[int]:
    """Return the number of groups of every layer, for the `groups` argument of `timm.create_model`.

    Args:
        model: A model, learnable or compact, or a module that contains one.

    Returns:
        One number per layer in the order of the model. The list is empty if there is no such layer.

    Examples:
        >>> import timm
        >>> layer_groups(timm.create_model("test_g_resnext", groups=[1, 2, 4, 8]))
        [1, 2, 4, 8]
    """
    return [conv.num_groups if isinstance(conv, DGConv2d) else conv.groups for conv in group_layers(model).values()]


def _set_groups(convs: dict[str, DGConv2d], option: str, groups: Any, set_number: Callable[[Any, int], Any]) -> None:
    """Set the number of groups of each layer, unless the option has no value."""
    if groups is None:
        return
    numbers = groups if isinstance(groups, list | tuple) else [groups] * len(convs)
    are_whole = all(isinstance(number, Integral) and not isinstance(number, bool) for number in numbers)
    if not are_whole or len(numbers) != len(convs):
        raise ValueError(
            f"{option}={groups!r} must be one whole number, or a list with one for each of the {len(convs)} layers"
        )
    for (name, conv), number in zip(convs.items(), numbers, strict=True):
        try:
            set_number(conv, int(number))
        except ValueError as error:
            raise ValueError(f"{option}: {name} cannot have {number} groups: {error}") from error


def _warn_init_groups(init_groups: int | Sequence[int], model: nn.Module, keys: Any) -> None:
    """Say that loaded gates, if there were any, are not those of `init_groups`."""
    if not any(name.endswith("sorted_gate") for name in keys.missing_keys):
        warnings.warn(f"the groups of the loaded weights replace init_groups={init_groups}", stacklevel=2)


def _image(model: nn.Module, size: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """Return channels, height and width of the images of a network, from the argument `img_size`."""
    if size is None:
        return None
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, list | tuple) or [*map(type, sides)] != [int, int] or min(sides) < 1:
        raise ValueError(f"img_size={size!r} must be one or two positive integers")
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    return (first.in_channels, *sides)
