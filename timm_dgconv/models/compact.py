"""The compact and the deployed form of a network: group convolutions with the learned groups.

The compact form trains. The deployed form of a G-ResNet or G-ResNeXt also has its batch norms folded into the
convolutions: `timm.utils.reparameterize_model` builds it by calling `fuse` on the modules.
"""

import copy
from itertools import pairwise
from typing import Any

import timm.layers
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from timm_dgconv import _compat
from timm_dgconv.layers.dgconv import DGConv2d
from timm_dgconv.layers.group_conv import GroupConv2d
from timm_dgconv.models.channel_orders import absorb_orders
from timm_dgconv.models.group_net import TRAINING_ARGS, GroupNet

_BATCH_NORMS_WITH_ACT = (
    timm.layers.BatchNormAct2d,
    timm.layers.SyncBatchNormAct,
    timm.layers.FrozenBatchNormAct2d,
)


def compact(model: nn.Module) -> nn.Module:
    """Return a copy of a network that computes the same with group convolutions instead of DGConv2d layers.

    The copy keeps only the connected weights: at 32 groups 25 M of the 69 M parameters of g_resnext50. It trains with
    its groups fixed. The group convolutions of learned groups need their channels in another order. The orders move
    into the weights around them, see `timm_dgconv.models.channel_orders`. Where they cannot, a GroupConv2d reorders the
    channels when it runs.

    Args:
        model: A network with DGConv2d layers.

    Returns:
        A copy of the model. ``timm.create_model(name, groups=layer_groups(model))`` builds the same structure for the
        models of this package.

    Raises:
        ValueError: If the model has neither a DGConv2d nor a GroupConv2d.

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
    if not group_layers(result):
        raise ValueError(
            f"{type(model).__name__} has no DGConv2d; use compact on a model of this package, or on a network that "
            "timm_dgconv.groupable has converted"
        )
    to_group_convs(result)
    if isinstance(result, DGConv2d):
        result = result.to_group_conv()
    args = {key: value for key, value in getattr(result, _compat.MODEL_ARGS, {}).items() if key not in TRAINING_ARGS}
    if isinstance(result, GroupNet):
        args["groups"] = layer_groups(result)
    if args:
        setattr(result, _compat.MODEL_ARGS, args)
    return result


def to_group_convs(model: nn.Module) -> None:
    """Replace every DGConv2d inside a module, and move the orders of channels into other weights, in place."""
    places = [(parent, *entry) for parent in model.modules() for entry in parent.named_children()]
    convs = {module: module.to_group_conv() for module in model.modules() if isinstance(module, DGConv2d)}
    for parent, name, child in places:
        if child in convs:
            setattr(parent, name, convs[child])
    absorb_orders(model)


def group_layers(model: nn.Module) -> dict[str, DGConv2d | GroupConv2d]:
    """Return the layers that learn their groups, or have learned them, by name in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DGConv2d | GroupConv2d)}


def layer_groups(model: nn.Module) -> list[int]:
    """Return the number of groups of every DGConv2d and GroupConv2d, for the `groups` argument of `timm.create_model`.

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


@torch.no_grad()
def fold_norm(conv: Any, norm: Any) -> Any:
    """Fold the running statistics and weights of a batch norm into the convolution before it.

    Args:
        conv: The module before the norm; changed in place if it is a plain convolution.
        norm: The norm, in training or evaluation mode.

    Returns:
        The module that replaces the norm: an identity, or the activation of the norm. The norm itself comes back, and
        the convolution is unchanged, if the norm is of another kind or has no running statistics, or if `conv` is not a
        convolution.
    """
    is_batch_norm = type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm, *_BATCH_NORMS_WITH_ACT)
    if type(conv) not in (nn.Conv2d, GroupConv2d) or not is_batch_norm or norm.running_mean is None:
        return norm
    # A GroupConv2d reorders its output before the norm.
    out_order = getattr(conv, "out_order", None)
    order = slice(None) if out_order is None else out_order.argsort()
    # Fold in float64: the weights may be in half precision.
    names = ("running_mean", "running_var", "weight", "bias")
    values: Any = (value if (value := getattr(norm, name)) is None else value.double()[order] for name in names)
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
