"""Parts of a bottleneck moved into its convolutions: the permutation of a DGConv2d, batch norms."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from timm_dgconv import grouping
from timm_dgconv.dgconv import DGConv2d


@torch.no_grad()
def to_group_convolution(block: Any) -> None:
    """Replace the DGConv2d of a timm Bottleneck by the group convolution it computes, exactly.

    Its permutation of channels moves through norms and activations into the rows of the 1x1 convolution before and the
    columns of the one after it.

    Args:
        block: A timm Bottleneck whose conv2 is a DGConv2d; changed in place.

    Raises:
        ValueError: If a norm mixes channels in groups of its own, through which no permutation can move. The block is
            as it was then.
    """
    conv: DGConv2d = block.conv2
    order_in = grouping.channel_order(conv.gate, conv.in_channels, conv.sort)
    order_out = grouping.channel_order(conv.gate, conv.out_channels, conv.sort)
    before, after = (block.bn1, block.act1), (block.bn2, block.drop_block, block.act2, block.aa)
    for module in (module for root in (*before, *after) for module in root.modules()):
        if getattr(module, "num_groups", 1) > 1 and not _is_sorted(order_out):
            raise ValueError(
                f"the channels of {module} cannot be reordered: use a norm_layer without groups of its own"
            )
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
    if block.conv1.bias is not None:
        block.conv1.bias.copy_(block.conv1.bias[order_in])
    _permute(before, order_in)
    _permute(after, order_out)
    block.conv3.weight.copy_(block.conv3.weight[:, order_out])


def _is_sorted(order: Tensor) -> bool:
    return torch.equal(order, torch.arange(len(order), device=order.device))


def _permute(modules: Iterable[nn.Module], order: Tensor) -> None:
    """Reorder what these modules hold for every channel."""
    for module in (module for root in modules for module in root.modules()):
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            if tensor.ndim and tensor.shape[0] == order.shape[0]:
                tensor.copy_(tensor[order])


@torch.no_grad()
def fold_norm(conv: nn.Module, norm: Any) -> Any:
    """Fold a batch norm's running statistics and weights into the convolution before it.

    Args:
        conv: The convolution; changed in place.
        norm: What follows it, in training or evaluation mode.

    Returns:
        What is left of the norm: an identity, or its activation. Another kind of norm, one without running statistics
        and one behind something other than a plain convolution come back as they are, and so does the convolution.
    """
    # Here, since the import of timm registers our models, which import this module.
    from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct

    with_activation = (BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d)
    is_batch_norm = type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm, *with_activation)
    if type(conv) is not nn.Conv2d or not is_batch_norm or norm.running_mean is None:
        return norm
    # In float64: half precision would lose what the norm has in float32.
    names = ("running_mean", "running_var", "weight", "bias")
    values: Any = (value if (value := getattr(norm, name)) is None else value.double() for name in names)
    mean, var, weight, bias = values
    conv_bias = None if conv.bias is None else conv.bias.double()
    fused_weight, fused_bias = fuse_conv_bn_weights(conv.weight.double(), conv_bias, mean, var, norm.eps, weight, bias)
    conv.weight.copy_(fused_weight)
    conv.bias = nn.Parameter(fused_bias.to(conv.weight.dtype), conv.weight.requires_grad)
    if type(norm) in with_activation:
        return nn.Sequential(norm.drop, norm.act)
    return nn.Identity()


def fold_norms(module: nn.Module, pairs: Iterable[tuple[str, str]]) -> None:
    """Fold each (convolution, norm) pair of a module's children, given by name."""
    for conv, norm in pairs:
        setattr(module, norm, fold_norm(getattr(module, conv), getattr(module, norm)))


def neighbours(module: nn.Module | None) -> list[tuple[str, str]]:
    """Names of the children of a torch.nn.Sequential that follow each other."""
    names = [name for name, _ in module.named_children()] if isinstance(module, nn.Sequential) else []
    return list(pairwise(names))
