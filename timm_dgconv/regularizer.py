"""The complexity regularizer of the paper over a whole model."""

import torch
from torch import Tensor, nn

from timm_dgconv.dgconv import DGConv2d


def complexity(model: nn.Module) -> Tensor:
    """Number of connected channel pairs, summed over the DGConv2d layers of a model.

    The sum of the "U regularizers" that the original release returns beside the logits. Add it, times a small weight,
    to a loss to learn sparser groups.

    Args:
        model: A model with at least one DGConv2d.

    Returns:
        Scalar tensor, differentiable in the gates.

    Raises:
        ValueError: If the model has no DGConv2d.

    Examples:
        >>> float(complexity(nn.Sequential(DGConv2d(4, 4, 1), DGConv2d(2, 2, 1)))) <= 20
        True
    """
    layers = [module for module in model.modules() if isinstance(module, DGConv2d)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no DGConv2d, so there is no complexity to learn")
    return torch.stack([layer.complexity() for layer in layers]).sum()
