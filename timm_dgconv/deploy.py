"""The compact form of a G-ResNeXt: what was learned, as plain convolutions.

For inference `timm.utils.reparameterize_model` goes one step further and folds the batch norms in, too
(`GroupableBottleneck.fuse`).
"""

import copy
from typing import Any

from torch import nn

from timm_dgconv.dgconv import DGConv2d
from timm_dgconv.fold import to_group_convolution
from timm_dgconv.g_resnext import TRAINING_ARGS, GroupableBottleneck


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
    blocks = [module for module in result.modules() if isinstance(module, GroupableBottleneck)]
    inside = {block.conv2 for block in blocks}
    outside = [name for name, module in result.named_modules() if isinstance(module, DGConv2d) and module not in inside]
    if not blocks:
        raise ValueError(f"compact needs a G-ResNeXt; {type(model).__name__} has no GroupableBottleneck")
    if outside:
        raise ValueError(f"compact needs every DGConv2d in a GroupableBottleneck, and {outside[0]} is in none")
    for block in blocks:
        if isinstance(block.conv2, DGConv2d):
            to_group_convolution(block)
    # timm >= 1.0.31 stores these as the model_args of config.json.
    args = {key: value for key, value in getattr(result, "_model_args", {}).items() if key not in TRAINING_ARGS}
    result._model_args = {**args, "groups": block_groups(result)}
    return result


def block_groups(model: nn.Module) -> list[int]:
    """Number of groups of every block of a G-ResNeXt, in order: what `groups` of `timm.create_model` takes.

    Args:
        model: A G-ResNeXt, learnable or compact, or a module that contains one.

    Returns:
        One number a block; an empty list where there is none.

    Examples:
        >>> import timm
        >>> block_groups(timm.create_model("test_g_resnext", groups=[1, 2, 4, 8]))
        [1, 2, 4, 8]
    """
    convs = [module.conv2 for module in model.modules() if isinstance(module, GroupableBottleneck)]
    return [conv.num_groups if isinstance(conv, DGConv2d) else conv.groups for conv in convs]
