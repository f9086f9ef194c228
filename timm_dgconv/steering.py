"""The complexity regularizer in an unchanged training loop: a term of the gates' gradients at every optimizer step.

The original release returns the regularizer beside the logits for the training script to add to its loss. Here the
gradient of ``weight * complexity`` is added where an optimizer takes its step: after gradients were accumulated,
averaged over processes, unscaled and clipped, and so once a step and unscaled, whatever the loop does before.

The hooks on the steps of optimizers are installed when the first model asks for it.
"""

import functools
import math
import threading
import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from timm_dgconv import group_conv, grouping

SLACK = 0.05
"""By which part of the target a step may take the network below it."""


class ComplexityTerm:
    """What steers the complexity of the layers that share it.

    Args:
        weight: Factor of the complexity's gradient, at least 0.
        target: Share of a dense network's connections, in (0, 1]. While the network has more, the term acts on the open
            gates nearest to zero, as many as must close to get there. No step opens a gate that would take the network
            above, nor closes one that would take it more than `SLACK` below, unless it is that much above and nothing
            nearer can be reached. Without a target the term acts on all gates, always.

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
        self.before: dict[int, list[list[float]]] = {}
        """The gates before the steps that optimizers (by id) are taking, for a target; one can call another."""


_layers: Any = weakref.WeakSet()  # DGConv2d layers with a complexity_term
_lock = threading.Lock()


def follow(layer: nn.Module) -> None:
    """Add the layer's `complexity_term` to the gradient of its gates at every step of an optimizer that has them."""
    _install()
    with _lock:
        _layers.add(layer)


@functools.cache
def _install() -> None:
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)
    # timm's Lookahead leaves out Optimizer.__init__, and with it that its own step calls hooks, too.
    from timm.optim import Lookahead

    if not getattr(Lookahead.step, "hooked", False):
        Lookahead.step = Optimizer.profile_hook_step(Lookahead.step)
        Lookahead.step.hooked = True


def _steered(optimizer: Optimizer) -> tuple[set[int], list[tuple[ComplexityTerm, list[Any]]]]:
    """Ids of the optimizer's parameters; the terms on their gates, with all their layers in the order of the model."""
    parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
    with _lock:
        followed = list(_layers)
    terms = defaultdict(list)
    for layer in followed:
        if layer.complexity_term is not None:
            term, place = layer.complexity_term
            terms[term].append((place, layer))
    return parameters, [
        (term, [layer for _, layer in sorted(layers, key=lambda entry: entry[0])])
        for term, layers in terms.items()
        if any(id(layer.gate) in parameters for _, layer in layers)
    ]


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    parameters, steered = _steered(optimizer)
    if not steered:
        return None
    for term, layers in steered:
        if term.target is not None:
            term.before[id(optimizer)] = _values(layers)

    def add() -> None:
        gates = [layer.gate for _, layers in steered for layer in layers]
        done = {id(gate) for gate in gates if _has_term(gate)}
        for term, layers in steered:
            _add(term, layers, parameters, done, getattr(optimizer, "grad_scale", None))
        # Only now: gradients that are views of one bucket (DistributedDataParallel) count their versions together.
        for gate in gates:
            if id(gate) in done:
                gate.grad._version_with_term = gate.grad._version

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


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    parameters, steered = _steered(optimizer)
    for term, layers in steered:
        before = term.before.pop(id(optimizer), None)
        if term.target is not None and before is not None:
            _hold(layers, _free(layers, parameters), before, term.target)


def _add(
    term: ComplexityTerm, layers: Sequence[Any], parameters: set[int], done: set[int], grad_scale: Tensor | None
) -> None:
    """Add the term to the gates among these parameters.

    Args:
        term: Weight and target.
        layers: All layers that share them, in the order of the model.
        parameters: Ids of the optimizer's parameters.
        done: Ids of the gates whose gradients have the term; the others are added.
        grad_scale: By what the gradients are still multiplied, where a fused optimizer unscales them itself.
    """
    free = _free(layers, parameters)
    chosen = None
    if term.target is not None:
        chosen = _to_close(layers, _values(layers), free, term.target)
    for place, layer in enumerate(layers):
        gate = layer.gate
        if not free[place] or (chosen is not None and not any(chosen[place])) or id(gate) in done:
            continue
        if gate.numel() != (num_bits := grouping.num_bits(layer.in_channels, layer.out_channels)):
            raise RuntimeError(
                f"complexity_weight finds {gate.numel()} of the {num_bits} gates of a DGConv2d in this process; shard "
                "with torch.distributed.fsdp.fully_shard instead of FullyShardedDataParallel, or leave it out and add "
                "timm_dgconv.complexity(model) to the loss"
            )
        # In single precision at least: float16 ends below the number of connections of a layer.
        leaf = gate.detach().to(torch.promote_types(gate.dtype, torch.float32)).requires_grad_()
        with torch.enable_grad():
            complexity = grouping.complexity(leaf, layer.out_channels, layer.in_channels)
        (gradient,) = torch.autograd.grad(complexity, leaf)
        factor = term.weight if grad_scale is None else term.weight * grad_scale.to(gate.device)
        gradient = (gradient * factor).to(gate.dtype)
        with torch.no_grad():
            if chosen is not None:
                gradient *= torch.tensor(chosen[place], device=gate.device)
            if gate.grad is None:
                gate.grad = gradient
            else:
                gate.grad.add_(gradient)
        done.add(id(gate))


def _values(layers: Sequence[Any]) -> list[list[float]]:
    """The gates of the layers, on the host."""
    if any(hasattr(layer.gate, "full_tensor") for layer in layers):  # DTensor: other processes have some of the values
        raise RuntimeError(
            "complexity_target needs all gates in each process, and fully_shard has sharded them; leave the target "
            "out, or train with DistributedDataParallel"
        )
    return [group_conv.values_on_host(layer.gate) for layer in layers]


def _free(layers: Sequence[Any], parameters: set[int]) -> list[bool]:
    return [layer.gate.requires_grad and id(layer.gate) in parameters for layer in layers]


def _closed(gates: Sequence[float]) -> list[bool]:
    return [math.copysign(1, value) < 0 for value in gates]


def _connections(layers: Sequence[Any], values: Sequence[Sequence[float]]) -> list[float]:
    """Number of connections of each layer with these gates."""
    sizes = [layer.out_channels * layer.in_channels for layer in layers]
    return [size * 0.5 ** sum(_closed(gates)) for size, gates in zip(sizes, values, strict=True)]


def _most(layers: Sequence[Any], target: float) -> float:
    """Number of connections at the target."""
    return target * sum(layer.out_channels * layer.in_channels for layer in layers)


def _to_close(
    layers: Sequence[Any], values: Sequence[Sequence[float]], free: Sequence[bool], target: float
) -> list[list[bool]]:
    """Which gates must close to take the layers to the target: of the open ones those nearest to zero.

    Were it all gates, many would close before the momentum of an optimizer fades. Where none is left that stays above
    the target, and the network is more than `SLACK` above, one more must close: that which goes least below.
    """
    connections, most = _connections(layers, values), _most(layers, target)
    excess = sum(connections) - most
    chosen = [[False] * len(gates) for gates in values]
    places = [
        (n, k) for n, gates in enumerate(map(_closed, values)) for k, bit in enumerate(gates) if free[n] and not bit
    ]
    for n, k in sorted(places, key=lambda place: (values[place[0]][place[1]], place)):
        saved = connections[n] / 2
        if saved <= excess:
            connections[n], excess, chosen[n][k] = saved, excess - saved, True
    rest = [(connections[n], values[n][k], n, k) for n, k in places if not chosen[n][k]]
    if rest and excess > SLACK * most:
        *_, n, k = min(rest)
        chosen[n][k] = True
    return chosen


@torch.no_grad()
def _hold(layers: Sequence[Any], free: Sequence[bool], before: Sequence[Sequence[float]], target: float) -> None:
    """Take back what a step has opened above the target, or closed more than `SLACK` below it.

    What the step has moved farthest beyond zero stays first. What is taken back is as far from zero on its old side.
    """
    values = _values(layers)
    must_close = _to_close(layers, before, free, target)
    closes = {
        (n, k): bool(now)
        for n, gates in enumerate(zip(map(_closed, before), map(_closed, values), strict=True))
        for k, (was, now) in enumerate(zip(*gates, strict=True))
        if free[n] and was != now
    }
    back = sorted(
        closes, key=lambda place: (not must_close[place[0]][place[1]], -abs(values[place[0]][place[1]]), place)
    )
    connections, most = _connections(layers, before), _most(layers, target)
    total = sum(connections)
    changed = bool(back)
    while changed:  # what opens makes room for what closes, and the other way round
        changed = False
        for n, k in list(back):
            change = -connections[n] / 2 if closes[n, k] else connections[n]
            stays_inside = total + change >= (1 - SLACK) * most if closes[n, k] else total + change <= most
            if must_close[n][k] or stays_inside:
                connections[n] += change
                total += change
                back.remove((n, k))
                changed = True
    for n, k in back:
        layers[n].gate[k] = math.copysign(values[n][k], 1 if closes[n, k] else -1)


def _has_term(gate: Tensor) -> bool:
    """Whether the gradient has the term already: steps that call each other, a second step with the same gradient."""
    return gate.grad is not None and getattr(gate.grad, "_version_with_term", None) == gate.grad._version
