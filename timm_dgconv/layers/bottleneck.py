"""The order of channels inside of timm's bottlenecks: an unsorted 3x3 layer may move its order into the 1x1 layers."""

from collections import Counter
from typing import Any

import timm.layers
import torch
from timm.models.resnet import Bottleneck
from torch import nn

from timm_dgconv import _compat
from timm_dgconv.layers.dgconv import DGConv2d
from timm_dgconv.ops import algebra

_PER_CHANNEL = (
    *(nn.Identity, nn.BatchNorm2d, nn.SyncBatchNorm, nn.AvgPool2d, nn.MaxPool2d, nn.Dropout2d),
    *(timm.layers.BatchNormAct2d, timm.layers.SyncBatchNormAct, timm.layers.FrozenBatchNormAct2d),
    *(timm.layers.BlurPool2d, timm.layers.DropBlock2d),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    *(nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Hardtanh, nn.Softplus),
)
"""Types of modules that compute each channel in the same way, apart from parameters and buffers with one value each."""


def movable_blocks(model: nn.Module) -> list[Bottleneck]:
    """Return the bottlenecks of a network whose channels may be reordered for an unsorted 3x3 layer.

    Reordering is exact if no other module shares a parameter, and if nothing else sees the channels.
    """
    modules = [module for _, module in model.named_modules(remove_duplicate=False)]
    owners = Counter(id(p) for module in modules for p in module.parameters(recurse=False))
    tied = {key for key, count in owners.items() if count > 1}
    return [block for block in model.modules() if isinstance(block, Bottleneck) and _is_movable(block, tied)]


def _is_movable(block: Any, tied: set[int]) -> bool:
    conv: Any = block.conv2
    if not isinstance(conv, DGConv2d) or conv.sort:
        return False
    above, below = _around(block)
    is_pointwise = all(type(c) is nn.Conv2d and c.groups == 1 for c in (block.conv1, block.conv3))
    changed = [block.conv1, block.conv3, *(module for m in (conv, *above, *below) for module in m.modules())]
    is_free = is_pointwise and all(type(m) in (*_PER_CHANNEL, nn.Conv2d, DGConv2d) for m in changed)
    has_hooks = any(getattr(module, hooks) for module in changed for hooks in _compat.HOOKS)
    is_timms = type(block).forward is Bottleneck.forward and not any("forward" in vars(m) for m in (block, *changed))
    is_tied = any(id(p) in tied for module in changed for p in module.parameters())
    return is_free and is_timms and not has_hooks and not is_tied


def _around(block: Any) -> tuple[tuple[nn.Module, ...], tuple[nn.Module, ...]]:
    """Return the modules between the 1x1 layers and the 3x3 layer, above and below it."""
    return (block.bn1, block.act1), (block.bn2, block.drop_block, block.act2, block.aa)


@torch.no_grad()
def sort_channels(block: Any) -> None:
    """Reorder the channels inside of a movable bottleneck so that its 3x3 layer has contiguous groups."""
    conv, (above, below) = block.conv2, _around(block)
    bits = conv.closed_bits()
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
