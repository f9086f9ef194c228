"""The deployed form of a network: `timm.utils.reparameterize_model` calls `fuse`, which folds batch norms."""

import copy
from collections import Counter
from itertools import pairwise
from typing import Any

import timm.layers
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from timm_dgconv import _compat
from timm_dgconv.models.compact import to_group_convs

_NORMS_WITH_ACT = (timm.layers.BatchNormAct2d, timm.layers.SyncBatchNormAct, timm.layers.FrozenBatchNormAct2d)


class FoldsNorms(nn.Module):
    """Mixin of the residual blocks of timm with learned groups: their method `fuse`."""

    knows_gates = True  # for `timm_dgconv.groupable`

    def fuse(self) -> nn.Module:
        """Return the block for inference, as `timm.utils.reparameterize_model` requests it.

        Each DGConv2d becomes a group convolution, see `timm_dgconv.compact`. Batch norms with running statistics are
        folded into the convolutions before them.

        Returns:
            A new block. It computes what this block computes in evaluation mode.
        """
        block: Any = copy.deepcopy(self)
        to_group_convs(block)
        uses = Counter(module for _, module in block.named_modules(remove_duplicate=False))
        pairs = [(block, f"bn{n}", getattr(block, f"conv{n}", None), getattr(block, f"bn{n}", None)) for n in (1, 2, 3)]
        if isinstance(block.downsample, nn.Sequential):
            children = list(block.downsample.named_children())
            pairs += [(block.downsample, name, conv, norm) for (_, conv), (name, norm) in pairwise(children)]
        for owner, name, conv, norm in pairs:
            if norm is not None and uses[conv] == 1:
                setattr(owner, name, fold_norm(conv, norm))
        return block


@torch.no_grad()
def fold_norm(conv: Any, norm: Any) -> Any:
    """Fold the running statistics and weights of a batch norm into the convolution before it.

    Args:
        conv: The module before the norm; changed in place if it is a plain convolution.
        norm: The norm, in training or evaluation mode.

    Returns:
        The module that replaces the norm: an identity, or the activation of the norm. The norm itself comes back, and
        the convolution is unchanged, if the norm is of another kind or has no running statistics, if `conv` is not a
        plain convolution, or if a hook computes its weight or sees what it computes.
    """
    is_batch_norm = type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm, *_NORMS_WITH_ACT)
    if type(conv) is not nn.Conv2d or not is_batch_norm or norm.running_mean is None:
        return norm
    is_plain = dict(conv.named_parameters()).keys() == {"weight", "bias"} - ({"bias"} if conv.bias is None else set())
    has_own_forward = _compat.FORWARDS & {*vars(conv), *vars(norm)}
    if not is_plain or has_own_forward or any(getattr(m, h) for m in (conv, norm) for h in _compat.HOOKS):
        return norm
    # Fold in float64: the weights may be in half precision.
    tensors = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    doubles: Any = (None if tensor is None else tensor.double() for tensor in tensors)
    weight, bias, mean, var, scale, shift = doubles
    folded = fuse_conv_bn_weights(weight, bias, mean, var, norm.eps, scale, shift)
    # Another convolution of the block may share the weight.
    conv.weight, conv.bias = (nn.Parameter(t.to(conv.weight.dtype), conv.weight.requires_grad) for t in folded)
    return nn.Sequential(norm.drop, norm.act) if type(norm) in _NORMS_WITH_ACT else nn.Identity()
