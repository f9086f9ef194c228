"""The complexity regularizer of the paper over a whole model, and models whose groups stay as they are."""

import torch
from torch import Tensor, nn

from timm_dgconv import steering
from timm_dgconv.dgconv import DGConv2d


def complexity(model: nn.Module) -> Tensor:
    """Number of connected channel pairs, summed over the DGConv2d layers of a model.

    The sum of the "U regularizers" that the original release returns beside the logits. Add it, times a small weight,
    to a loss to learn sparser groups. In a training loop that cannot be changed, ``create_model(...,
    complexity_weight=1e-7)`` does the same.

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
    return torch.stack([layer.complexity() for layer in _layers(model)]).sum()


def freeze_groups(model: nn.Module, frozen: bool = True) -> None:
    """Fix the groups of a model's DGConv2d layers where they are, or let them learn again.

    Frozen gates have no gradient, so optimizers leave them as they are, weight decay included, and the layers cost what
    a group convolution costs. Freeze before DistributedDataParallel wraps the model: it counts the gradients then.

    Args:
        model: A model with at least one DGConv2d; changed in place.
        frozen: Whether the gates are fixed.

    Raises:
        ValueError: If the model has no DGConv2d.

    Examples:
        >>> conv = DGConv2d(64, 64, kernel_size=3)
        >>> freeze_groups(conv)
        >>> conv.gate.requires_grad, conv.weight.requires_grad
        (False, True)
    """
    for layer in _layers(model):
        layer.gate.requires_grad_(not frozen)
        if frozen:
            layer.gate.grad = None


def steer(model: nn.Module, weight: float, target: float | None = None) -> None:
    """Have every optimizer step add the gradient of ``weight * complexity(model)`` to that of the gates.

    What ``create_model(..., complexity_weight=..., complexity_target=...)`` calls. The term is added once a step, to
    gradients that are accumulated, averaged over processes, unscaled and clipped; an optimizer without its gates
    is left alone. A copy of the model has the term, too.

    Args:
        model: A model with at least one DGConv2d.
        weight: Factor of the complexity, at least 0; 0 removes the term.
        target: Share of a dense network's connections, in (0, 1]; the term acts only while the model has more, on the
            open gates nearest to zero, as many as must close to get there. No step opens gates that would take it
            above, nor closes gates that would take it more than 5 % below, where anything nearer can be reached.

    Raises:
        TypeError: If weight or target is no number.
        ValueError: If the model has no DGConv2d, or weight or target is out of its range.
    """
    term = steering.ComplexityTerm(weight, target)
    for place, layer in enumerate(_layers(model)):
        layer.complexity_term = (term, place) if weight else None
        if weight:
            steering.follow(layer)


def _layers(model: nn.Module) -> list[DGConv2d]:
    layers = [module for module in model.modules() if isinstance(module, DGConv2d)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no DGConv2d, so there are no groups to learn")
    return layers
