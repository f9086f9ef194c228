"""The complexity regularizer of the paper for a whole model, and models with frozen groups."""

import torch
from torch import Tensor, nn

from timm_dgconv.layers.dgconv import DGConv2d


def complexity(model: nn.Module) -> Tensor:
    """Return the number of connected channel pairs, summed over the DGConv2d layers of a model.

    This is the sum of the "U regularizers" that the original release returns with the logits. Add it to the loss with a
    small weight to learn sparser groups. If the training loop cannot be changed, use ``create_model(...,
    complexity_weight=1e-7)``.

    Args:
        model: A model with at least one DGConv2d.

    Returns:
        Scalar tensor, differentiable in the gates.

    Raises:
        ValueError: If the model has no DGConv2d.

    Examples:
        >>> complexity(nn.Sequential(DGConv2d(4, 4, 1), DGConv2d(2, 2, 1))).item() <= 20
        True
    """
    return torch.stack([layer.complexity() for layer in dgconv_layers(model)]).sum()


def freeze_groups(model: nn.Module, frozen: bool = True) -> None:
    """Freeze the groups of a model's DGConv2d layers, or let them learn again.

    Frozen gates have no gradient, so no optimizer changes them, not even by weight decay. The layers then cost about as
    much as a group convolution. Freeze the groups before DistributedDataParallel wraps the model. It registers the
    parameters that have gradients.

    Args:
        model: A model with at least one DGConv2d; changed in place.
        frozen: Whether to freeze the groups.

    Raises:
        ValueError: If the model has no DGConv2d.

    Examples:
        >>> conv = DGConv2d(64, 64, kernel_size=3)
        >>> freeze_groups(conv)
        >>> conv.gate.requires_grad, conv.weight.requires_grad
        (False, True)
    """
    for layer in dgconv_layers(model):
        layer.gate.requires_grad_(not frozen)
        if frozen:
            layer.gate.grad = None


def dgconv_layers(model: nn.Module) -> list[DGConv2d]:
    """Return the DGConv2d layers of a model.

    Raises:
        ValueError: If there is none.
    """
    layers = [module for module in model.modules() if isinstance(module, DGConv2d)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no DGConv2d, so there are no groups to learn")
    return layers
