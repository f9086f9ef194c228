"""The compact and the deployed form of a G-ResNeXt: plain group convolutions with the learned groups.

In a bottleneck, a DGConv2d stands between two 1x1 convolutions, with norms and activations between them. Its
permutation of channels moves through these into the rows of the first and the columns of the second 1x1 convolution.
The compact form trains. The deployed form also has its batch norms folded into the convolutions:
`timm.utils.reparameterize_model` builds it by calling `fuse` on the modules.
"""

import copy
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import timm.layers
import torch
from timm.models.resnet import Bottleneck
from torch import Tensor, nn
from torch.nn.modules import activation, batchnorm, dropout, instancenorm, pooling
from torch.nn.utils.fusion import fuse_conv_bn_weights

from timm_dgconv import _compat
from timm_dgconv.layers import grouping
from timm_dgconv.layers.dgconv import DGConv2d

TRAINING_ARGS = (
    "complexity_weight",
    "complexity_target",
    "gate_bound",
    "gate_steps",
    "init_groups",
    "freeze_groups",
)
"""Arguments of a model that say how it is trained. They do not belong in its config.json."""

_BATCH_NORMS_WITH_ACT = (
    timm.layers.BatchNormAct2d,
    timm.layers.SyncBatchNormAct,
    timm.layers.FrozenBatchNormAct2d,
)
_TIMM_EQUIVARIANT = (
    *("AvgPool2dSame", "BlurPool2d", "DropBlock2d", "EvoNorm2dB0", "EvoNorm2dB1", "EvoNorm2dB2"),
    *("FilterResponseNormAct2d", "FilterResponseNormTlu2d", "GroupNorm1", "GroupNorm1Act"),
    *("LayerNorm2d", "LayerNorm2dFp32", "LayerNormAct2d", "LayerNormAct2dFp32"),
    *("RmsNorm2d", "RmsNorm2dFp32", "RmsNormAct2d", "RmsNormAct2dFp32", "SimpleNorm2d", "SimpleNorm2dFp32"),
)
_CHANNEL_MIXING = ("GLU", "LogSoftmax", "MultiheadAttention", "Softmax", "Softmax2d", "Softmin")

EQUIVARIANT: set[type[nn.Module]] = {
    nn.Identity,
    nn.Sequential,
    *_BATCH_NORMS_WITH_ACT,
    *(getattr(timm.layers, name) for name in _TIMM_EQUIVARIANT if hasattr(timm.layers, name)),
    *(
        getattr(module, name)
        for module in (activation, batchnorm, dropout, instancenorm, pooling)
        for name in module.__all__
        if name not in _CHANNEL_MIXING and not name.endswith("3d")
    ),
    *(
        value
        for name in dir(timm.layers)
        if isinstance(value := getattr(timm.layers, name), type)
        and value.__module__.startswith("timm.layers.activations")
    ),
}
"""Types of modules for which a permutation of the input channels permutes the output channels in the same way.

Parameters and buffers whose first dimension is the number of channels are permuted along. Add a type of your own here.
"""


def compact(model: nn.Module) -> nn.Module:
    """Return a copy of a G-ResNeXt that computes the same with plain group convolutions.

    The copy keeps only the connected weights: at 32 groups 25 M of the 69 M parameters of g_resnext50. It trains with
    its groups fixed. `timm.create_model(name, groups=block_groups(model))` builds the same structure.

    Args:
        model: A G-ResNeXt, or a module that contains one (a features_only model, a wrapper).

    Returns:
        A copy of the model. Blocks that are compact already stay as they are.

    Raises:
        ValueError: If the model has no block of a G-ResNeXt, a DGConv2d outside of such a block, or a module between
            the convolutions of a block that is not known to treat all channels alike (see `EQUIVARIANT`).

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
    blocks = groupable_blocks(result)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no block of a G-ResNeXt; use compact on a G-ResNeXt")
    inside = {block.conv2 for block in blocks.values()}
    outside = [name for name, module in result.named_modules() if isinstance(module, DGConv2d) and module not in inside]
    if outside:
        raise ValueError(f"the DGConv2d {outside[0]} is outside of a bottleneck; compact needs all of them inside")
    for name, block in blocks.items():
        if isinstance(block.conv2, DGConv2d):
            obstacle = find_obstacle(block)
            if obstacle is not None:
                raise ValueError(
                    f"{name} has a {type(obstacle).__name__} between its convolutions, which may mix channels; use "
                    "another norm_layer or act_layer, or add its type to timm_dgconv.models.compact.EQUIVARIANT"
                )
            to_group_conv(block)
    args = {key: value for key, value in getattr(result, _compat.MODEL_ARGS, {}).items() if key not in TRAINING_ARGS}
    setattr(result, _compat.MODEL_ARGS, {**args, "groups": block_groups(result)})
    return result


def block_groups(model: nn.Module) -> list[int]:
    """Return the number of groups of every block of a G-ResNeXt, for the `groups` argument of `timm.create_model`.

    Args:
        model: A G-ResNeXt, learnable or compact, or a module that contains one.

    Returns:
        One number per block in the order of the model. The list is empty if there is no such block.

    Examples:
        >>> import timm
        >>> block_groups(timm.create_model("test_g_resnext", groups=[1, 2, 4, 8]))
        [1, 2, 4, 8]
    """
    convs = [block.conv2 for block in groupable_blocks(model).values()]
    return [conv.num_groups if isinstance(conv, DGConv2d) else conv.groups for conv in convs]


def groupable_blocks(model: nn.Module) -> dict[str, Any]:
    """Return the blocks of a G-ResNeXt by name, learnable or compact: the bottlenecks that have a `cardinality`."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Bottleneck) and hasattr(module, "cardinality")
    }


def find_obstacle(block: Any) -> nn.Module | None:
    """Return the first module through which the permutation of a block's DGConv2d cannot move, or None.

    Args:
        block: A timm Bottleneck whose conv2 is a DGConv2d.
    """
    conv: DGConv2d = block.conv2
    if _is_identity(grouping.channel_order(conv.gate, conv.out_channels, conv.sort)):
        return None
    neighbors = [m for m in (block.conv1, block.conv3) if type(m) is not nn.Conv2d or m.groups != 1]
    between = [m for root in (*_before(block), *_after(block)) for m in root.modules() if not _is_equivariant(m)]
    return next(iter(neighbors + between), None)


def _is_equivariant(module: nn.Module) -> bool:
    if isinstance(module, nn.GroupNorm):
        return module.num_groups == 1 and type(module) in {*EQUIVARIANT, nn.GroupNorm, timm.layers.GroupNorm}
    return type(module) in EQUIVARIANT


def _before(block: Any) -> tuple[nn.Module, ...]:
    return block.bn1, block.act1


def _after(block: Any) -> tuple[nn.Module, ...]:
    return block.bn2, block.drop_block, block.act2, block.aa


@torch.no_grad()
def to_group_conv(block: Any) -> None:
    """Replace the DGConv2d of a timm Bottleneck by the group convolution that it computes, exactly.

    Args:
        block: A timm Bottleneck whose conv2 is a DGConv2d and that has no obstacle; changed in place.
    """
    conv: DGConv2d = block.conv2
    order_in = grouping.channel_order(conv.gate, conv.in_channels, conv.sort)
    order_out = grouping.channel_order(conv.gate, conv.out_channels, conv.sort)
    groups = conv.num_groups
    block.conv2 = group_conv_like(conv, groups)
    block.conv2.weight.copy_(grouping.group_blocks(conv.weight[order_out][:, order_in], groups).flatten(0, 1))
    if conv.bias is not None:
        block.conv2.bias.copy_(conv.bias[order_out])
    if not _is_identity(order_out):
        block.conv3.weight.copy_(block.conv3.weight[:, order_out])
        _permute((block.conv1, *_before(block)), order_in)
        _permute(_after(block), order_out)


def group_conv_like(conv: DGConv2d, groups: int) -> nn.Conv2d:
    """Return a new group convolution with the shape, device, dtype and flags of a DGConv2d."""
    result = nn.Conv2d(
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
    for new, old in zip(result.parameters(), (conv.weight, conv.bias), strict=False):
        new.requires_grad_(old is not None and old.requires_grad)
    return result


def _is_identity(order: Tensor) -> bool:
    return torch.equal(order, torch.arange(len(order), device=order.device))


def _permute(modules: Iterable[nn.Module], order: Tensor) -> None:
    """Permute the parameters and buffers that these modules have per channel."""
    for module in (module for root in modules for module in root.modules()):
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            if tensor.ndim and tensor.shape[0] == order.shape[0]:
                tensor.copy_(tensor[order])


@torch.no_grad()
def fold_norm(conv: nn.Module, norm: Any) -> Any:
    """Fold the running statistics and weights of a batch norm into the convolution before it.

    Args:
        conv: The module before the norm; changed in place if it is a plain convolution.
        norm: The norm, in training or evaluation mode.

    Returns:
        The module that replaces the norm: an identity, or the activation of the norm. The norm itself comes back, and
        the convolution is unchanged, if the norm is of another kind or has no running statistics, or if `conv` is not a
        plain convolution.
    """
    is_batch_norm = type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm, *_BATCH_NORMS_WITH_ACT)
    if type(conv) is not nn.Conv2d or not is_batch_norm or norm.running_mean is None:
        return norm
    # Fold in float64: the weights may be in half precision.
    names = ("running_mean", "running_var", "weight", "bias")
    values: Any = (value if (value := getattr(norm, name)) is None else value.double() for name in names)
    mean, var, weight, bias = values
    conv_bias = None if conv.bias is None else conv.bias.double()
    fused_weight, fused_bias = fuse_conv_bn_weights(conv.weight.double(), conv_bias, mean, var, norm.eps, weight, bias)
    conv.weight.copy_(fused_weight)
    conv.bias = nn.Parameter(fused_bias.to(conv.weight.dtype), conv.weight.requires_grad)
    if type(norm) in _BATCH_NORMS_WITH_ACT:
        return nn.Sequential(norm.drop, norm.act)
    return nn.Identity()


def fold_sequence(module: nn.Module | None) -> None:
    """Fold every batch norm of a torch.nn.Sequential into the convolution directly before it."""
    if isinstance(module, nn.Sequential):
        for (_, conv), (name, norm) in pairwise(list(module.named_children())):
            setattr(module, name, fold_norm(conv, norm))
