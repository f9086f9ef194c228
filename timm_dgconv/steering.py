"""The complexity regularizer in an unchanged training loop: a term of the gates' gradients at every optimizer step.

The original release returns the regularizer beside the logits for the training script to add to its loss. Here the
gradient of ``weight * complexity`` is added where an optimizer takes its step: after gradients were accumulated,
averaged over processes, unscaled and clipped, and so once a step and unscaled, whatever the loop does before.

The one hook (torch.optim.optimizer.register_optimizer_step_pre_hook) is installed when the first model asks for it.
"""

import functools
import math
import threading
import weakref
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from timm_dgconv import grouping


class ComplexityTerm:
    """What steers the complexity of the layers that share it.

    Args:
        weight: Factor of the complexity's gradient, at least 0.
        target: Share of a dense network's connections at and below which the term rests, in (0, 1]; None for never.

    Raises:
        TypeError: If one of them is no number.
        ValueError: If one is out of its range.
    """

    def __init__(self, weight: float, target: float | None = None) -> None:
        for name, value in (("complexity_weight", weight), ("complexity_target", target)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise TypeError(f"{name}={value!r} must be a number")
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"complexity_weight={weight} must be at least 0 and finite; try 1e-7")
        if target is not None and not 0 < target <= 1:
            raise ValueError(
                f"complexity_target={target} must be a share of a dense network's connections, above 0 and at most 1"
            )
        self.weight = weight
        self.target = target


_layers: Any = weakref.WeakSet()  # DGConv2d layers with a complexity_term
_lock = threading.Lock()
# gate -> its gradient and that one's version when the term was added: it is in there as long as nothing has changed.
_added: Any = WeakTensorKeyDictionary()


def follow(layer: nn.Module) -> None:
    """Add the layer's `complexity_term` to the gradient of its gates at every step of an optimizer that has them."""
    _install()
    with _lock:
        _layers.add(layer)


@functools.cache
def _install() -> None:
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
    with _lock:
        followed = list(_layers)
    terms = defaultdict(list)
    for layer in followed:
        terms[layer.complexity_term].append(layer)
    steered = [
        (term, layers) for term, layers in terms.items() if any(id(layer.gate) in parameters for layer in layers)
    ]
    if not steered:
        return None

    def add() -> None:
        for term, layers in steered:
            _add(term, layers, parameters, getattr(optimizer, "grad_scale", None))

    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        add()
        return None

    def with_term() -> Any:  # the gradients are there after the closure only
        loss = closure()
        add()
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": with_term}
    return (args[0], with_term, *args[2:]), kwargs


def _add(term: ComplexityTerm, layers: Iterable[Any], parameters: set[int], grad_scale: Tensor | None) -> None:
    """Add the term to the gates among these parameters.

    Args:
        term: Weight and target.
        layers: All layers that share them.
        parameters: Ids of the optimizer's parameters.
        grad_scale: By what the gradients are still multiplied, where a fused optimizer unscales them itself.
    """
    # Single precision at least: float16 ends below the number of connections of a layer.
    gates = {
        id(layer.gate): layer.gate.detach().to(torch.promote_types(layer.gate.dtype, torch.float32)).requires_grad_()
        for layer in layers
    }
    with torch.enable_grad():
        device = next(iter(gates.values())).device
        # The order of the layers differs between processes; whole numbers in double precision do not mind.
        complexities = [
            grouping.complexity(gates[id(layer.gate)], layer.out_channels, layer.in_channels).to(device).double()
            for layer in layers
        ]
        complexity = torch.stack(complexities).sum()
        gradients = dict(zip(gates, torch.autograd.grad(complexity, list(gates.values())), strict=True))
    factor = torch.as_tensor(term.weight, dtype=torch.float64, device=device)
    if term.target is not None:
        dense = sum(layer.out_channels * layer.in_channels for layer in layers)
        factor = factor * (complexity.detach() > term.target * dense)
    if grad_scale is not None:
        factor = factor * grad_scale.to(device)
    with torch.no_grad():
        for gate in {id(layer.gate): layer.gate for layer in layers}.values():
            if not gate.requires_grad or id(gate) not in parameters or _has_term(gate):
                continue
            gradient = gradients[id(gate)]
            gradient = (gradient * factor.to(gradient.device)).to(gate.dtype)
            if gate.grad is None:
                gate.grad = gradient
            else:
                gate.grad.add_(gradient)
            _added[gate] = gate.grad, gate.grad._version


def _has_term(gate: Tensor) -> bool:
    """Whether the gradient has the term already: steps that call each other, a second step with the same gradient."""
    gradient, version = _added.get(gate, (None, None))
    return gate.grad is not None and gate.grad is gradient and gate.grad._version == version
