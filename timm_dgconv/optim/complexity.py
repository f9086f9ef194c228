"""The complexity regularizer of the paper for a whole model, and models with frozen groups."""

import torch
from torch import Tensor, nn

from timm_dgconv.layers.dgconv import check_flags
from timm_dgconv.optim.cost import CostTable, named_layers


def complexity(model: nn.Module, cost: CostTable | None = None) -> Tensor:
    """Return the number of connected channel pairs, summed over the DGConv2d layers of a model, or another cost.

    This is the sum of the "U regularizers" that the original release returns with the logits, and zeta in the paper.

    Args:
        model: A model with at least one DGConv2d.
        cost: Return the cost of the whole network in this table instead, see `timm_dgconv.cost_table`.

    Returns:
        Scalar tensor, differentiable in the gates.

    Raises:
        TypeError: If `cost` is not a CostTable.
        ValueError: If the model has no DGConv2d, or if `cost` is of another network.

    Examples:
        >>> from timm_dgconv import DGConv2d
        >>> complexity(nn.Sequential(DGConv2d(4, 4, 1), DGConv2d(2, 2, 1))).item() <= 20
        True
    """
    layers = list(named_layers(model).values())
    if cost is not None and not isinstance(cost, CostTable):
        raise TypeError(f"cost={cost!r} is not a CostTable; use timm_dgconv.cost_table(model, ...)")
    return torch.stack([layer.complexity() for layer in layers]).sum() if cost is None else cost.of_layers(layers)


def constrained_loss(
    loss: Tensor, model: nn.Module, target: float, exponent: float = 0.02, cost: CostTable | None = None
) -> Tensor:
    """Return the objective of the paper, ``loss * (o / zeta) ** a`` (equation 9).

    Here zeta is `complexity`, and o is the number of connections at the target. The exponent a is 0 if zeta is at most
    o, and ``-exponent`` otherwise (equation 10). The paper also demands that zeta is at most o in the end: use
    ``create_model(..., complexity_target=...)`` to hold a target.

    Args:
        loss: Loss of the task, a scalar above 0.
        model: A model with at least one DGConv2d.
        target: Density at which the loss is not changed, the share of a dense network's connections, in (0, 1].
        exponent: How strongly the complexity counts, at least 0. The default is the value of the re-implementation at
            https://github.com/longxianlei/G-ResNeXt_GroupNet.
        cost: See `complexity`. The target is then a share of the dense network's cost.

    Returns:
        Scalar tensor, differentiable in the loss and the gates.

    Raises:
        ValueError: If the model has no DGConv2d, if target or exponent is out of its range, or if `cost` is of another
            network.

    Examples:
        >>> from timm_dgconv import DGConv2d
        >>> conv = DGConv2d(4, 4, 1)
        >>> _ = conv.gate.data.fill_(1.0)
        >>> round(constrained_loss(torch.tensor(2.0), conv, target=0.25).item(), 4)
        2.0562
    """
    if not 0 < target <= 1:
        unit = "connections" if cost is None else cost.unit
        raise ValueError(f"target={target} must be a share of a dense network's {unit}, above 0 and at most 1")
    if not exponent >= 0:
        raise ValueError(f"exponent={exponent} must be at least 0; it is the amount of the paper's negative exponent")
    zeta = complexity(model, cost)
    layers = named_layers(model).values()
    budget = target * (sum(layer.in_channels * layer.out_channels for layer in layers) if cost is None else cost.dense)
    return torch.where(zeta > budget, loss * (budget / zeta) ** -exponent, loss)


def freeze_groups(model: nn.Module, frozen: bool = True) -> None:
    """Freeze the groups of a model's DGConv2d layers, or let them learn again.

    Frozen gates have no gradient, so no optimizer changes them, not even by weight decay. The layers then cost about as
    much as a group convolution. Freeze the groups before DistributedDataParallel wraps the model. It registers the
    parameters that have gradients.

    Args:
        model: A model with at least one DGConv2d; changed in place.
        frozen: Whether to freeze the groups.

    Raises:
        TypeError: If `frozen` is not a bool.
        ValueError: If the model has no DGConv2d.

    Examples:
        >>> from timm_dgconv import DGConv2d
        >>> conv = DGConv2d(64, 64, kernel_size=3)
        >>> freeze_groups(conv)
        >>> conv.gate.requires_grad, conv.weight.requires_grad
        (False, True)
    """
    check_flags(frozen=frozen)
    for layer in named_layers(model).values():
        layer.gate.requires_grad_(not frozen)
        if frozen:
            layer.gate.grad = None
