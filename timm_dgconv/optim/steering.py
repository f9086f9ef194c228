"""The complexity regularizer in an unchanged training loop: every optimizer step adds its gradient to the gates'.

The original release returns the regularizer with the logits, and its training script adds it to the loss. Here global
hooks on `torch.optim.Optimizer.step` add the gradient of ``weight * complexity``. They run after the loop has
accumulated, averaged, unscaled and clipped the gradients. So the term is added once per step, unscaled and unclipped.

The hooks are registered when the first model is steered.
"""

import functools
import itertools
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
_before: MutableMapping[Optimizer, dict[ComplexityTerm, Tensor]] = weakref.WeakKeyDictionary()
"""The gates before the running step of an optimizer, for terms with a target. Steps can be nested."""
_known: MutableMapping[ComplexityTerm, Gates] = weakref.WeakKeyDictionary()
"""The gates after the last step, for terms with a target."""


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
    """A term and all its layers, seen from one optimizer. Layers can share their gates.

    Attributes:
        gates: The gates of all layers.
        users: Per gates the indices of the layers.
        trainable: Per gates whether the optimizer trains them.
        sizes: Per layer the number of connections of a dense layer.
    """

    def __init__(self, term: ComplexityTerm, layers: Sequence[DGConv2d], parameters: set[int]) -> None:
        self.term = term
        self.gates = list({id(layer.gate): layer.gate for layer in layers}.values())
        self.users = [[n for n, layer in enumerate(layers) if layer.gate is gate] for gate in self.gates]
        self.trainable = [gate.requires_grad and id(gate) in parameters for gate in self.gates]
        self.sizes = [layer.in_channels * layer.out_channels for layer in layers]

    @property
    def budget(self) -> float:
        """Number of connections at the target."""
        assert self.term.target is not None
        return self.term.target * sum(self.sizes)

    def flat(self) -> Tensor:
        """Return a copy of all gates as one tensor, on the device of the first one.

        Single precision at least: the largest float16 is below the number of connections of a layer.
        """
        gates: list[Any] = [gate.detach() for gate in self.gates]
        wholes = [gate.full_tensor() if hasattr(gate, "full_tensor") else gate for gate in gates]  # of a DTensor
        like = wholes[0].new_empty(0, dtype=torch.promote_types(wholes[0].dtype, torch.float32))
        return torch.cat([whole.to(like) for whole in wholes])

    def values(self, flat: Sequence[float]) -> Gates:
        """Split the values of all gates."""
        ends = list(itertools.accumulate(gate.numel() for gate in self.gates))
        return [list(flat[start:end]) for start, end in zip([0, *ends], ends, strict=False)]

    def connections(self, values: Gates) -> list[float]:
        """Return the number of connections per layer with these values of the gates."""
        connections = list(map(float, self.sizes))
        for gate, users in zip(values, self.users, strict=True):
            for n in users:
                connections[n] *= 0.5 ** sum(map(gate_cache.is_closed, gate))
        return connections


@functools.lru_cache(maxsize=64)
def _membership(
    num_gates: tuple[int, ...], users: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], like: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """Return the 0/1 matrix of shape (layers, gates) of the gates that each layer has, and the sizes of the layers."""
    matrix = torch.zeros(len(sizes), len(num_gates))
    for column, layers in enumerate(users):
        matrix[list(layers), column] = 1
    device, dtype = like
    matrix = matrix.repeat_interleave(torch.tensor(num_gates), dim=1)
    return matrix.to(device, dtype), torch.tensor(sizes, dtype=dtype).to(device)


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
        if not any(id(layer.gate) in ids for layer in layers):
            continue
        if term.target is not None and any(hasattr(layer.gate, "full_tensor") for layer in layers):  # a DTensor
            raise RuntimeError(
                "complexity_target needs all gates in each process, and fully_shard has sharded them; leave the target "
                "out, or train with DistributedDataParallel"
            )
        groups.append(_Group(term, layers, ids))
    return groups


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    groups = _groups(optimizer)
    if not groups:
        return None
    _before[optimizer] = {group.term: group.flat() for group in groups if group.term.target is not None}

    def add_terms() -> None:
        gates = [gate for group in groups for gate in group.gates]
        done = {id(gate) for gate in gates if _has_term(gate)}
        for group in groups:
            done |= _add_term(group, done, getattr(optimizer, "grad_scale", None))
        # Afterwards: gradients that are views of one bucket (DistributedDataParallel) share a version.
        for gate in gates:
            if id(gate) in done:
                assert gate.grad is not None
                gate.grad._version_with_term = _compat.version(gate.grad)  # type: ignore[attr-defined]

    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        add_terms()
        return None

    def closure_with_terms() -> Any:  # the closure computes the gradients
        loss = closure()
        add_terms()
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


@torch.no_grad()
def _add_term(group: _Group, done: set[int], grad_scale: Tensor | None) -> set[int]:
    """Add the term to the gradient of the gates that the optimizer trains.

    The derivative of ``size * 2^(-closed gates)`` with respect to a gate is the value times ln(2).

    Args:
        group: The term and its layers.
        done: Ids of the gates whose gradients have the term already.
        grad_scale: Factor of the gradients, if a fused optimizer unscales them itself.

    Returns:
        Ids of the gates whose gradients have changed.
    """
    indices = [n for n, gate in enumerate(group.gates) if group.trainable[n] and id(gate) not in done]
    chosen = None
    if group.term.target is not None:
        chosen = _to_close(group, _known_values(group))
        indices = [n for n in indices if any(chosen[n])]
    if not indices:
        return set()
    flat = group.flat()
    num_gates = tuple(gate.numel() for gate in group.gates)
    users = tuple(map(tuple, group.users))
    matrix, sizes = _membership(num_gates, users, tuple(group.sizes), (flat.device, flat.dtype))
    complexities = sizes * torch.exp2(-(matrix @ grouping.closed_gates(flat).to(flat.dtype)))
    factor = group.term.weight * math.log(2) * (1 if grad_scale is None else grad_scale.to(flat.device))
    term = (factor * complexities) @ matrix
    if chosen is not None:
        term *= _mask(tuple(bit for gate in chosen for bit in gate), flat.device)
    pieces = term.split(num_gates)
    grads = []
    for n in indices:
        gate = group.gates[n]
        gate.grad = torch.zeros_like(gate) if gate.grad is None else gate.grad
        grads.append(gate.grad.to_local() if hasattr(gate.grad, "to_local") else gate.grad)
    # A DTensor has some of the gates here. Without a target the gates of a layer have one gradient.
    _compat.foreach_add_(grads, [pieces[n][: len(g)].to(g) for n, g in zip(indices, grads, strict=True)])
    return {id(group.gates[n]) for n in indices}


def _known_values(group: _Group) -> Gates:
    """Return the values of all gates after the last step, or now if there was none. They only choose what to push."""
    values = _known.get(group.term)
    if values is None or list(map(len, values)) != [gate.numel() for gate in group.gates]:
        values = _known[group.term] = group.values(group.flat().tolist())
    return values


@functools.lru_cache(maxsize=64)
def _mask(chosen: tuple[bool, ...], device: torch.device) -> Tensor:
    return torch.tensor(chosen).to(device, non_blocking=True)


def _to_close(group: _Group, gates: Gates) -> list[list[bool]]:
    """Choose the gates that must close to reach the target: the open gates nearest to zero.

    Choose no more gates than needed, since the momentum of an optimizer would close all of them. If every remaining
    gate would take the network below the target, and the network is more than `SLACK` above, also choose the gate that
    undershoots least.

    Returns:
        Per gate whether it must close.
    """
    connections = group.connections(gates)
    excess = sum(connections) - group.budget
    chosen = [[False] * len(values) for values in gates]
    candidates = [
        (value, n, k)
        for n, values in enumerate(gates)
        for k, value in enumerate(values)
        if excess > 0 and group.trainable[n] and not gate_cache.is_closed(value)
    ]

    def saved(n: int) -> float:
        return sum(connections[layer] for layer in group.users[n]) / 2

    for _, n, k in sorted(candidates):
        if saved(n) <= excess:
            excess -= saved(n)
            chosen[n][k] = True
            for layer in group.users[n]:
                connections[layer] /= 2
    rest = [(saved(n), value, n, k) for value, n, k in candidates if not chosen[n][k]]
    if rest and excess > SLACK * group.budget:
        *_, n, k = min(rest)
        chosen[n][k] = True
    return chosen


@torch.no_grad()
def _enforce_target(group: _Group, before: Tensor) -> None:
    """Reverse the flips of a step that take the network above the target or more than `SLACK` below it.

    The flips of the gates nearest to zero are reversed first. A reversed gate keeps its distance from zero. Gates that
    must close to reach the target stay closed.
    """
    flat = torch.cat([before, group.flat()]).tolist()  # one transfer
    old, new = group.values(flat[: len(before)]), group.values(flat[len(before) :])
    must_close = _to_close(group, old)
    flips = sorted(
        (abs(value), n, k)
        for n in range(len(new))
        for k, value in enumerate(new[n])
        if group.trainable[n] and gate_cache.is_closed(value) != gate_cache.is_closed(old[n][k])
    )
    opened = [(n, k) for _, n, k in flips if not gate_cache.is_closed(new[n][k])]
    closed = [(n, k) for _, n, k in flips if gate_cache.is_closed(new[n][k]) and not must_close[n][k]]

    def total() -> float:
        return sum(group.connections(new))

    def reverse(n: int, k: int) -> None:
        new[n][k] = -new[n][k]
        group.gates[n][k] = new[n][k]

    def reverse_openings() -> None:
        while opened and total() > group.budget:
            reverse(*opened.pop(0))

    reverse_openings()
    while closed and total() < (1 - SLACK) * group.budget:
        reverse(*closed.pop(0))
        reverse_openings()
    _known[group.term] = new
