"""The compact form of a network: torch.nn.Conv2d layers with the learned groups. It trains."""

import copy
from collections import Counter
from typing import Any

import timm.layers
import torch
from timm.models.resnet import Bottleneck
from torch import nn

from timm_dgconv import _compat
from timm_dgconv.layers.dgconv import DGConv2d
from timm_dgconv.layers.gate_reader import read_per_layer
from timm_dgconv.models.group_net import TRAINING_ARGS, GroupNet, layer_groups
from timm_dgconv.ops import algebra

_PER_CHANNEL = (
    *(nn.Identity, nn.BatchNorm2d, nn.SyncBatchNorm, nn.AvgPool2d, nn.MaxPool2d, nn.Dropout2d),
    *(timm.layers.BatchNormAct2d, timm.layers.SyncBatchNormAct, timm.layers.FrozenBatchNormAct2d),
    *(timm.layers.BlurPool2d, timm.layers.DropBlock2d),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    *(nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Hardtanh, nn.Softplus),
)
"""Types of modules that compute each channel in the same way, apart from parameters and buffers with one value each."""


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


def to_group_convs(model: nn.Module) -> None:
    """Turn every DGConv2d inside a module into a torch.nn.Conv2d, in place. Layers that share weights still do."""
    modules = [module for _, module in model.named_modules(remove_duplicate=False)]
    owners = Counter(id(p) for module in modules for p in module.parameters(recurse=False))
    for module in model.modules():
        if isinstance(module, Bottleneck):
            _sort_channels(module, {key for key, count in owners.items() if count > 1})
    weights: dict[tuple[torch.Tensor, torch.Tensor], Any] = {}
    for name, layer in [entry for entry in model.named_modules() if isinstance(entry[1], DGConv2d)]:
        key = layer.weight, layer.gate
        try:
            conv = layer.to_group_conv_()
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if name else str(error)) from error
        conv.weight = weights.setdefault(key, conv.weight)
    for module in model.modules():
        read_per_layer(module)


@torch.no_grad()
def _sort_channels(block: Any, tied: set[int]) -> None:
    """Reorder the channels inside of a bottleneck so that its 3x3 layer has contiguous groups, where that is exact.

    It is not exact if other modules share a parameter. `tied` has the ids of shared parameters.
    """
    conv: Any = block.conv2
    if not isinstance(conv, DGConv2d) or conv.sort:
        return
    above, below = (block.bn1, block.act1), (block.bn2, block.drop_block, block.act2, block.aa)
    is_pointwise = all(type(c) is nn.Conv2d and c.groups == 1 for c in (block.conv1, block.conv3))
    changed = [block.conv1, block.conv3, *(module for m in (conv, *above, *below) for module in m.modules())]
    is_free = is_pointwise and all(type(m) in (*_PER_CHANNEL, nn.Conv2d, DGConv2d) for m in changed)
    has_hooks = any(getattr(module, hooks) for module in changed for hooks in _compat.HOOKS)
    is_timms = type(block).forward is Bottleneck.forward and not any("forward" in vars(m) for m in (block, *changed))
    is_tied = any(id(p) in tied for module in changed for p in module.parameters())
    if not is_free or not is_timms or has_hooks or is_tied:
        return
    bits = conv.bits()
    before, after = (algebra.channel_order(bits, channels) for channels in (conv.in_channels, conv.out_channels))
    conv.weight.copy_(conv.weight[:, before])
    conv.set_sort(True)
    _permute((block.conv1, *above), before)
    _permute((conv, *below), after)
    block.conv3.weight.copy_(block.conv3.weight[:, after])


def _permute(modules: Any, order: torch.Tensor) -> None:
    """Permute the parameters and buffers that modules have per channel."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.ndim and tensor.shape[0] == order.shape[0]:
                tensor.copy_(tensor[order.to(tensor.device)])
