"""The complexity regularizer in an unchanged training loop: every optimizer step adds its gradient to the gates'.

The original release returns the regularizer with the logits, and its training script adds it to the loss. Here global
hooks on `torch.optim.Optimizer.step` add the gradient of ``weight * complexity``. They run after the loop has
accumulated, averaged, unscaled and clipped the gradients. So the term is added once per step, unscaled and unclipped.

The hooks are registered when the first model is steered.
"""

import functools
import math
import threading
import weakref
from collections import defaultdict
from collections.abc import MutableMapping, MutableSet, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from timm_dgconv import _compat
from timm_dgconv.layers import gate_cache, grouping
from timm_dgconv.layers.dgconv import DGConv2d
from timm_dgconv.optim.complexity import dgconv_layers

SLACK = 0.05
"""How far a step may take a network below its target, as a part of the target."""

Gates = list[list[float]]
"""The values of the gates, per layer."""


class ComplexityTerm:
    """Weight and target of the complexity. The layers of one model share one term.

    Args:
        weight: Factor of the gradient of the complexity, at least 0.
        target: Largest density, in (0, 1], or None. See `steer`.

    Raises:
        TypeError: If a value is not a number.
        ValueError: If a value is out of its range.
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


class _Steered:
    """Links a layer to its term, and is stored on the layer. A copied or unpickled layer is linked, too."""

    def __init__(self, layer: DGConv2d, term: ComplexityTerm, index: int) -> None:
        self.layer = weakref.ref(layer)
        self.term = term
        self.index = index  # position of the layer in the model
        _register_hooks()
        with _lock:
            _steered.add(self)

    def __reduce__(self) -> Any:
        return _Steered, (self.layer(), self.term, self.index)


_steered: MutableSet[_Steered] = weakref.WeakSet()
_lock = threading.Lock()
_before: MutableMapping[Optimizer, dict[ComplexityTerm, Gates]] = weakref.WeakKeyDictionary()
"""The gates before the running step of an optimizer, for terms with a target. Steps can be nested."""


def steer(model: nn.Module, weight: float, target: float | None = None) -> None:
    """Let every optimizer step add the gradient of ``weight * complexity(model)`` to the gradient of the gates.

    `create_model(..., complexity_weight=..., complexity_target=...)` calls this. An optimizer that has none of the
    gates is not affected. A copy of the model is steered, too.

    Args:
        model: A model with at least one DGConv2d.
        weight: Factor of the gradient, at least 0. With 0 the model is no longer steered.
        target: Largest density, the share of a dense network's connections, in (0, 1]. While the density is above the
            target, the term closes open gates, the gates nearest to zero first, and only as many as needed. After each
            step, flips that raise the density above the target are reversed. Flips that lower it more than 5 % below
            are reversed, too, unless no density in between can be reached.

    Raises:
        TypeError: If weight or target is not a number.
        ValueError: If the model has no DGConv2d, or if weight or target is out of its range.
    """
    term = ComplexityTerm(weight, target)
    for index, layer in enumerate(dgconv_layers(model)):
        layer.steered = _Steered(layer, term, index) if weight else None  # type: ignore[assignment]


@functools.cache
def _register_hooks() -> None:
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)
    _compat.hook_lookahead()


class _Group:
    """A term and all its layers, seen from one optimizer.

    Attributes:
        trainable: Per layer whether the optimizer trains its gates.
    """

    def __init__(self, term: ComplexityTerm, layers: Sequence[DGConv2d], parameters: set[int]) -> None:
        self.term = term
        self.layers = layers
        self.trainable = [layer.gate.requires_grad and id(layer.gate) in parameters for layer in layers]
        self.sizes = [layer.in_channels * layer.out_channels for layer in layers]

    @property
    def budget(self) -> float:
        """Number of connections at the target."""
        assert self.term.target is not None
        return self.term.target * sum(self.sizes)

    def gates(self) -> Gates:
        """Return the values of all gates.

        Raises:
            RuntimeError: If this process does not have all of them.
        """
        if any(hasattr(layer.gate, "full_tensor") for layer in self.layers):  # a DTensor
            raise RuntimeError(
                "complexity_target needs all gates in each process, and fully_shard has sharded them; leave the target "
                "out, or train with DistributedDataParallel"
            )
        return gate_cache.read_together([layer.gate for layer in self.layers])

    def connections(self, gates: Gates) -> list[float]:
        """Return the number of connections per layer with these gates."""
        return [size * 0.5 ** sum(map(gate_cache.is_closed, g)) for size, g in zip(self.sizes, gates, strict=True)]


def _groups(optimizer: Optimizer) -> list[_Group]:
    """Return the terms with gates among the parameters of an optimizer.

    Raises:
        RuntimeError: If this process has only a part of the gates.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    ids = {id(p) for p in parameters}
    flattened = {module for p in parameters for module in _compat.flat_parameter_modules(p)}
    members = defaultdict(list)
    with _lock:
        steered = list(_steered)
    for member in steered:
        layer = member.layer()
        if layer is not None and getattr(layer, "steered", None) is member:
            members[member.term].append((member.index, layer))
    groups = []
    for term, indexed in members.items():
        layers = [layer for _, layer in sorted(indexed, key=lambda entry: entry[0])]
        for layer in layers:
            num_bits = grouping.num_bits(layer.in_channels, layer.out_channels)
            if layer in flattened or (id(layer.gate) in ids and layer.gate.numel() != num_bits):
                raise RuntimeError(
                    "FullyShardedDataParallel has sharded the gates of a DGConv2d, and complexity_weight needs whole "
                    "gates; shard with torch.distributed.fsdp.fully_shard, or train with DistributedDataParallel"
                )
        if any(id(layer.gate) in ids for layer in layers):
            groups.append(_Group(term, layers, ids))
    return groups


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    groups = _groups(optimizer)
    if not groups:
        return None
    _before[optimizer] = {group.term: group.gates() for group in groups if group.term.target is not None}

    def add_terms(known: dict[ComplexityTerm, Gates]) -> None:
        gates = [layer.gate for group in groups for layer in group.layers]
        done = {id(gate) for gate in gates if _has_term(gate)}
        for group in groups:
            values = known.get(group.term)
            done |= _add_term(group, values, done, getattr(optimizer, "grad_scale", None))
        # Afterwards: gradients that are views of one bucket (DistributedDataParallel) share a version.
        for gate in gates:
            if id(gate) in done:
                assert gate.grad is not None
                gate.grad._version_with_term = _compat.version(gate.grad)  # type: ignore[attr-defined]

    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        add_terms(_before[optimizer])
        return None

    def closure_with_terms() -> Any:  # the closure computes the gradients
        loss = closure()
        add_terms({})  # earlier closures of this step have changed the gates
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure_with_terms}
    return (args[0], closure_with_terms, *args[2:]), kwargs


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    before = _before.pop(optimizer, {})
    for group in _groups(optimizer) if before else ():
        if group.term in before:
            _enforce_target(group, before[group.term])


def _has_term(gate: Tensor) -> bool:
    """Return whether the gradient has the term already: steps can be nested or reuse a gradient."""
    return gate.grad is not None and getattr(gate.grad, "_version_with_term", None) == _compat.version(gate.grad)


def _add_term(group: _Group, gates: Gates | None, done: set[int], grad_scale: Tensor | None) -> set[int]:
    """Add the term to the gradient of the gates that the optimizer trains.

    Args:
        group: The term and its layers.
        gates: The values of the gates, if they are known.
        done: Ids of the gates whose gradients have the term already.
        grad_scale: Factor of the gradients, if a fused optimizer unscales them itself.

    Returns:
        Ids of the gates whose gradients have changed.
    """
    layers = [
        layer
        for layer, trainable in zip(group.layers, group.trainable, strict=True)
        if trainable and id(layer.gate) not in done
    ]
    masks: dict[DGConv2d, Tensor] = {}
    if group.term.target is not None and layers:
        chosen = dict(zip(group.layers, _to_close(group, gates or group.gates()), strict=True))
        layers = [layer for layer in layers if any(chosen[layer])]
        bits = torch.tensor([bit for layer in layers for bit in chosen[layer]])
        bits = bits.to(layers[0].gate.device) if layers else bits  # one copy for all layers
        masks = dict(zip(layers, bits.split([len(chosen[layer]) for layer in layers]), strict=True))
    # Single precision at least: the largest float16 is below the number of connections of a layer.
    leaves = [
        layer.gate.detach().to(torch.promote_types(layer.gate.dtype, torch.float32)).requires_grad_()
        for layer in layers
    ]
    with torch.enable_grad():
        complexities = [
            grouping.complexity(leaf, layer.out_channels, layer.in_channels)
            for leaf, layer in zip(leaves, layers, strict=True)
        ]
    gradients = torch.autograd.grad(complexities, leaves) if leaves else ()
    changed = set()
    for layer, gradient in zip(layers, gradients, strict=True):
        gate = layer.gate
        if id(gate) in changed:  # layers can share their gates
            continue
        factor = group.term.weight if grad_scale is None else group.term.weight * grad_scale.to(gate.device)
        gradient = (gradient * factor).to(gate.dtype)
        if masks:
            gradient *= masks[layer].to(gate.device)
        with torch.no_grad():
            if gate.grad is None:
                gate.grad = gradient
            else:
                gate.grad.add_(gradient)
        changed.add(id(gate))
    return changed


def _to_close(group: _Group, gates: Gates) -> list[list[bool]]:
    """Choose the gates that must close to reach the target: the open gates nearest to zero.

    Choose no more gates than needed, since the momentum of an optimizer would close all of them. If every remaining
    gate would take the network below the target, and the network is more than `SLACK` above, also choose the gate that
    undershoots least.

    Returns:
        Per layer and gate whether it must close.
    """
    connections = group.connections(gates)
    excess = sum(connections) - group.budget
    chosen = [[False] * len(values) for values in gates]
    candidates = [
        (n, k)
        for n, values in enumerate(gates)
        for k, value in enumerate(values)
        if group.trainable[n] and not gate_cache.is_closed(value)
    ]
    for n, k in sorted(candidates, key=lambda place: (gates[place[0]][place[1]], place)):
        saved = connections[n] / 2
        if saved <= excess:
            connections[n], excess, chosen[n][k] = saved, excess - saved, True
    rest = [(connections[n], gates[n][k], n, k) for n, k in candidates if not chosen[n][k]]
    if rest and excess > SLACK * group.budget:
        *_, n, k = min(rest)
        chosen[n][k] = True
    return chosen


@torch.no_grad()
def _enforce_target(group: _Group, before: Gates) -> None:
    """Reverse the flips of a step that take the network above the target or more than `SLACK` below it.

    Flips that must close gates are kept first, then the flips that moved their gates farthest beyond zero. A reversed
    gate keeps its distance from zero.
    """
    after = group.gates()
    must_close = _to_close(group, before)
    closes = {  # per flipped gate whether it closes
        (n, k): gate_cache.is_closed(new)
        for n, values in enumerate(zip(before, after, strict=True))
        for k, (old, new) in enumerate(zip(*values, strict=True))
        if group.trainable[n] and gate_cache.is_closed(old) != gate_cache.is_closed(new)
    }
    pending = sorted(
        closes, key=lambda place: (not must_close[place[0]][place[1]], -abs(after[place[0]][place[1]]), place)
    )
    connections, budget = group.connections(before), group.budget
    total = sum(connections)
    changed = bool(pending)
    while changed:  # a gate that opens makes room for a gate that closes, and vice versa
        changed = False
        for n, k in list(pending):
            change = -connections[n] / 2 if closes[n, k] else connections[n]
            allowed = total + change >= (1 - SLACK) * budget if closes[n, k] else total + change <= budget
            if must_close[n][k] or allowed:
                connections[n] += change
                total += change
                pending.remove((n, k))
                changed = True
    for n, k in pending:
        group.layers[n].gate[k] = math.copysign(after[n][k], 1 if closes[n, k] else -1)
