"""The compact form of a network: torch.nn.Conv2d layers with the learned groups. It trains."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from timm_dgconv import _compat
from timm_dgconv.layers.bottleneck import movable_blocks, sort_channels
from timm_dgconv.layers.dgconv import DGConv2d
from timm_dgconv.layers.gate_reader import read_per_layer
from timm_dgconv.models.group_net import TRAINING_ARGS, GroupNet, layer_groups


def compact(model: nn.Module) -> nn.Module:
    """Return a copy of a network that computes the same with torch.nn.Conv2d layers instead of DGConv2d layers.

    The copy keeps only the connected weights, and trains with its groups fixed.

    Layers with ``sort=False`` need another order of channels for this. In timm's bottlenecks the order moves into the
    1x1 convolutions around the layer. Elsewhere the copy has the smallest contiguous groups that hold the learned ones,
    with zeros between the channels that are not connected. Training changes these zeros.

    Args:
        model: A network with DGConv2d layers.

    Returns:
        A copy of the model. ``timm.create_model(name, groups=layer_groups(copy))`` builds the same structure for the
        models of this package.

    Raises:
        ValueError: If the model has no DGConv2d and is not compact, or if a DGConv2d computes something else than its
            class, see `timm_dgconv.DGConv2d.to_group_conv`.

    Examples:
        >>> import timm, torch
        >>> model = timm.create_model("test_g_resnext").eval()
        >>> small = compact(model)
        >>> small.layer4[0].conv2.groups == model.layer4[0].conv2.num_groups
        True
        >>> images = torch.randn(2, 3, 64, 64)
        >>> torch.allclose(small(images), model(images), atol=1e-5)
        True
    """
    for name, layer in model.named_modules():
        if isinstance(layer, DGConv2d):
            with _named(name):
                layer.refuse_other_forms()  # before torch refuses to copy a weight that a hook has computed
    result: Any = copy.deepcopy(model)
    if not any(isinstance(module, DGConv2d) for module in result.modules()) and not layer_groups(result):
        raise ValueError(
            f"{type(model).__name__} has no DGConv2d; use compact on a model of this package, or on a network that "
            "timm_dgconv.groupable has converted"
        )
    to_group_convs(result)
    args = {key: value for key, value in getattr(result, _compat.MODEL_ARGS, {}).items() if key not in TRAINING_ARGS}
    if isinstance(result, GroupNet):
        args["groups"] = layer_groups(result)
    if args:
        setattr(result, _compat.MODEL_ARGS, args)
    return result


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Name a layer in a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}" if name else str(error)) from error


def to_group_convs(model: nn.Module) -> None:
    """Turn every DGConv2d inside a module into a torch.nn.Conv2d, in place. Layers that share weights still do."""
    for block in movable_blocks(model):
        sort_channels(block)
    weights: dict[tuple[torch.Tensor, torch.Tensor], Any] = {}
    for name, layer in [entry for entry in model.named_modules() if isinstance(entry[1], DGConv2d)]:
        key = layer.weight, layer.gate
        with _named(name):
            conv = layer.to_group_conv_()
        conv.weight = weights.setdefault(key, conv.weight)
    for module in model.modules():
        read_per_layer(module)
