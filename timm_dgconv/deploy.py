"""Forms of a G-ResNeXt without gates: what was learned, as plain convolutions."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from timm_dgconv import grouping
from timm_dgconv.dgconv import DGConv2d
from timm_dgconv.g_resnext import GroupableBottleneck


def compact(model: nn.Module) -> nn.Module:
    """The same function with plain group convolutions in place of the DGConv2d layers.

    A DGConv is a group convolution up to a permutation of its channels. In a bottleneck the permutation moves through
    norms and activations into the rows of the 1x1 convolution before and the columns of the one after it, so nothing of
    it is left at run time. Only the connected weights are kept: at 32 groups 25 M of 69 M numbers for g_resnext50.

    The result trains, with its groups fixed. `timm.create_model(name, groups=[...])` with the numbers of groups, one a
    block, builds the same structure.

    Args:
        model: A G-ResNeXt, or a module that contains one (a features_only model, a wrapper).

    Returns:
        A copy; blocks that are compact already stay as they are.

    Raises:
        ValueError: If the model has no block of G-ResNeXt, a DGConv2d outside of one, or a norm that mixes channels in
            groups of its own, through which no permutation can move.
    """
    result: Any = copy.deepcopy(model)
    blocks = [module for module in result.modules() if isinstance(module, GroupableBottleneck)]
    inside = {block.conv2 for block in blocks}
    outside = [name for name, module in result.named_modules() if isinstance(module, DGConv2d) and module not in inside]
    if not blocks:
        raise ValueError(f"compact needs a G-ResNeXt; {type(model).__name__} has no GroupableBottleneck")
    if outside:
        raise ValueError(f"compact needs every DGConv2d in a GroupableBottleneck, and {outside[0]} is in none")
    with torch.no_grad():
        for block in blocks:
            if isinstance(block.conv2, DGConv2d):
                _compact_block(block)
    # timm >= 1.0.31 stores these as the model_args of config.json.
    result._model_args = {**getattr(result, "_model_args", {}), "groups": block_groups(result)}
    return result


def block_groups(model: nn.Module) -> list[int]:
    """Number of groups of every block of a G-ResNeXt, in order: what `groups` of `timm.create_model` takes."""
    convs = [module.conv2 for module in model.modules() if isinstance(module, GroupableBottleneck)]
    return [conv.num_groups if isinstance(conv, DGConv2d) else conv.groups for conv in convs]


def _compact_block(block: Any) -> None:
    conv: DGConv2d = block.conv2
    order_in = grouping.channel_order(conv.gate, conv.in_channels, conv.sort)
    order_out = grouping.channel_order(conv.gate, conv.out_channels, conv.sort)
    groups = conv.num_groups
    block.conv2 = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        stride=conv.stride,  # type: ignore[arg-type]
        padding=conv.padding,  # type: ignore[arg-type]
        dilation=conv.dilation,  # type: ignore[arg-type]
        groups=groups,
        bias=conv.bias is not None,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    ).train(conv.training)
    block.conv2.weight.copy_(grouping.group_blocks(conv.weight[order_out][:, order_in], groups).flatten(0, 1))
    if conv.bias is not None:
        block.conv2.bias.copy_(conv.bias[order_out])
    block.conv1.weight.copy_(block.conv1.weight[order_in])
    _permute((block.bn1, block.act1), order_in)
    _permute((block.bn2, block.drop_block, block.act2, block.aa), order_out)
    block.conv3.weight.copy_(block.conv3.weight[:, order_out])


def _permute(modules: tuple[Any, ...], order: Tensor) -> None:
    """Reorder what these modules hold for every channel."""
    for module in (m for root in modules for m in root.modules()):
        if getattr(module, "num_groups", 1) > 1:
            raise ValueError(
                f"the channels of {module} cannot be reordered: use a norm_layer without groups of its own"
            )
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            if tensor.ndim and tensor.shape[0] == order.shape[0]:
                tensor.copy_(tensor[order])
