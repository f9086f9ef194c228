"""Steer the groups in an unchanged training loop: every optimizer step acts on the gates, too.

Global hooks on `torch.optim.Optimizer.step` do two things.

Before a step they add the gradient of ``weight * log(complexity)`` to the gradients of the gates. The loop has
accumulated, averaged, unscaled and clipped the gradients by then. So the term is added once per step, unscaled and
unclipped.

After a step they take back what the gates must not do: leave their bound, exceed the target, or move at all.

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
from timm_dgconv.layers.dgconv import DGConv2d
from timm_dgconv.ops import algebra
from timm_dgconv.optim.complexity import dgconv_layers

DEFAULT_WEIGHT = 0.1
"""Weight of a model that has a target only."""

Gates = list[list[float]]
"""The values of the gates, per parameter."""


class Steering:
    """What steers the gates. The layers of one model share one object.

    Args:
        weight: Factor of the gradient of the logarithm of the complexity, at least 0.
        target: Largest density, in (0, 1], or None.
        bound: Largest distance of a gate from zero, above 0, or None.
        steps: Number of optimizer steps after which the gates stand still, or None.

    Raises:
        TypeError: If a value is not a number.
        ValueError: If a value is out of its range.
    """

    def __init__(self, weight: float, target: float | None, bound: float | None, steps: int | None) -> None:
        self.weight, self.target, self.bound, self.steps = weight, target, bound, steps
        names = {"complexity_weight": weight, "complexity_target": target, "gate_bound": bound, "gate_steps": steps}
        for name, value in names.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise TypeError(f"{name}={value!r} must be a number")
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be at least 0 and finite")
        if target is not None and not weight:
            raise ValueError(f"complexity_target={target} needs a complexity_weight above 0; leave it out")
        if target is not None and not 0 < target <= 1:
            raise ValueError(
                f"complexity_target={target} must be a share of a dense network's connections, above 0 and at most 1"
            )
        if bound == 0:
            raise ValueError("gate_bound=0 leaves the gates no room; use freeze_groups=True")

    @property
    def acts_after_steps(self) -> bool:
        """Whether a step can be taken back."""
        return (self.target, self.bound, self.steps) != (None, None, None)


class _Steered:
    """Links a layer to its steering, and is stored on the layer. A copied or unpickled layer is linked, too."""

    def __init__(self, layer: DGConv2d, steering: Steering, index: int) -> None:
        self.layer = weakref.ref(layer)
        self.steering = steering
        self.index = index  # position of the layer in the model
        _register_hooks()
        with _lock:
            _steered.add(self)

    def __reduce__(self) -> Any:
        return _Steered, (self.layer(), self.steering, self.index)


_steered: MutableSet[_Steered] = weakref.WeakSet()
_lock = threading.Lock()
_before: MutableMapping[Optimizer, dict[Steering, Tensor]] = weakref.WeakKeyDictionary()
"""The gates before the running step of an optimizer. Steps can be nested."""
_steps: MutableMapping[Optimizer, int] = weakref.WeakKeyDictionary()
"""The number of steps that an optimizer has taken with steered gates."""


def steer(
    model: nn.Module,
    weight: float | None = None,
    target: float | None = None,
    bound: float | None = None,
    steps: int | None = None,
) -> None:
    """Let every optimizer step act on the gates of a model, or stop that if no argument is given.

    `create_model` calls this with `complexity_weight`, `complexity_target`, `gate_bound` and `gate_steps`. An optimizer
    that has none of the gates is not affected. A copy of the model is steered, too.

    Args:
        model: A model with at least one DGConv2d.
        weight: Add the gradient of ``weight * log(timm_dgconv.complexity(model))`` to the gradient of the gates. The
            default is `DEFAULT_WEIGHT` with a target, and 0 without.
        target: Largest density, the share of a dense network's connections, in (0, 1]. The term acts while the density
            is above the target. From then on, after each step the open gates nearest to zero close until the density
            is at most the target. Gates that close in a step open again if the target allows it.
        bound: Keep the gates in [-bound, bound], so that they can always flip soon, as BinaryConnect does with weights
            (https://arxiv.org/abs/1511.00363). Only the sign of a gate matters, so half the bound acts as twice the
            learning rate of the gates does.
        steps: Keep the gates where they are after this number of optimizer steps. One epoch has about ``images /
            (batch size * accumulation steps * processes)`` steps. A resumed training counts from 0.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If the model has no DGConv2d, or if an argument is out of its range.
    """
    if weight is None:
        weight = 0.0 if target is None else DEFAULT_WEIGHT
    steering = Steering(weight, target, bound, steps)
    acts = weight > 0 or steering.acts_after_steps
    for index, layer in enumerate(dgconv_layers(model)):
        layer.steered = _Steered(layer, steering, index) if acts else None  # type: ignore[assignment]


@functools.cache
def _register_hooks() -> None:
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)
    _compat.hook_lookahead()


class _Group:
    """The layers of one steered model, seen from one optimizer. Layers can share their gates.

    Attributes:
        steering: What steers the model.
        gates: The gate parameters of all layers.
        users: Per parameter the indices of the layers.
        trainable: Per parameter whether the optimizer trains it.
        nested: Per parameter whether only the gates that can flip next learn.
        sizes: Per layer the number of connections of a dense layer.
    """

    def __init__(self, steering: Steering, layers: Sequence[DGConv2d], parameters: set[int]) -> None:
        self.steering = steering
        self.gates = list({id(layer.gate): layer.gate for layer in layers}.values())
        self.users = [tuple(n for n, layer in enumerate(layers) if layer.gate is gate) for gate in self.gates]
        self.trainable = [gate.requires_grad and id(gate) in parameters for gate in self.gates]
        self.nested = tuple(layers[users[0]].sort and layers[users[0]].nested for users in self.users)
        self.sizes = tuple(layer.in_channels * layer.out_channels for layer in layers)
        self.num_gates = tuple(gate.numel() for gate in self.gates)

    @property
    def budget(self) -> float:
        """Number of connections at the target."""
        assert self.steering.target is not None
        return self.steering.target * sum(self.sizes)

    def flat(self) -> Tensor:
        """Return a copy of all gates as one tensor, in single precision at least."""
        gates: list[Any] = [gate.detach() for gate in self.gates]
        wholes = [gate.full_tensor() if hasattr(gate, "full_tensor") else gate for gate in gates]  # of a DTensor
        like = wholes[0].new_empty(0, dtype=torch.promote_types(wholes[0].dtype, torch.float32))
        return torch.cat([whole.to(like) for whole in wholes])

    def split(self, flat: Tensor) -> Gates:
        """Read the values of all gates, in one transfer, per tensor of `flat` and parameter."""
        numbers = iter(flat.tolist())
        return [list(itertools.islice(numbers, n)) for n in self.num_gates * (len(flat) // sum(self.num_gates))]

    def connections(self, gates: Gates) -> float:
        """Return the number of connections of the model with these values of the gates."""
        connections = list(map(float, self.sizes))
        for values, users in zip(gates, self.users, strict=True):
            for n in users:
                connections[n] *= 0.5 ** sum(map(algebra.is_closed, values))
        return sum(connections)


def _groups(optimizer: Optimizer) -> list[_Group]:
    """Return the steered models with gates among the parameters of an optimizer.

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
            members[member.steering].append((member.index, layer))
    groups = []
    for steering, indexed in members.items():
        layers = [layer for _, layer in sorted(indexed, key=lambda entry: entry[0])]
        for layer in layers:
            if layer in flattened or (id(layer.gate) in ids and layer.gate.numel() != layer.num_bits):
                raise RuntimeError(
                    "FullyShardedDataParallel has sharded the gates of a DGConv2d, and complexity_weight needs whole "
                    "gates; shard with torch.distributed.fsdp.fully_shard, or train with DistributedDataParallel"
                )
        if not any(id(layer.gate) in ids for layer in layers):
            continue
        if steering.acts_after_steps and any(hasattr(layer.gate, "full_tensor") for layer in layers):  # a DTensor
            raise RuntimeError(
                "complexity_target, gate_bound and gate_steps need all gates in each process, and fully_shard has "
                "sharded them; use complexity_weight alone, or train with DistributedDataParallel"
            )
        groups.append(_Group(steering, layers, ids))
    return groups


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    groups = _groups(optimizer)
    if not groups:
        return None
    _before[optimizer] = {group.steering: group.flat() for group in groups if group.steering.acts_after_steps}

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


def _has_term(gate: Tensor) -> bool:
    """Return whether the gradient has the term already: steps can be nested or reuse a gradient."""
    return gate.grad is not None and getattr(gate.grad, "_version_with_term", None) == _compat.version(gate.grad)


@torch.no_grad()
def _add_term(group: _Group, done: set[int], grad_scale: Tensor | None) -> set[int]:
    """Add the term to the gradient of the gates that the optimizer trains.

    The derivative of a layer's complexity, ``size * 2^(-number of closed gates)``, is the complexity times ln(2) for
    each of its gates that learns: with nested gates, the closed and the open gate nearest to zero.

    Args:
        group: The model.
        done: Ids of the gates whose gradients have the term already.
        grad_scale: Factor of the gradients, if a fused optimizer unscales them itself.

    Returns:
        Ids of the gates whose gradients have changed.
    """
    indices = [n for n, gate in enumerate(group.gates) if group.trainable[n] and id(gate) not in done]
    if not indices or not group.steering.weight:
        return set()
    flat = group.flat()
    matrix, sizes = _membership(group.num_gates, tuple(group.users), group.sizes, flat.device, flat.dtype)
    complexities = sizes * torch.exp2(-(matrix @ algebra.closed_gates(flat).to(flat.dtype)))
    total = complexities.sum()
    term = (complexities @ matrix) * (group.steering.weight * math.log(2) / total)
    if any(group.nested):
        term *= _learns(flat, group.num_gates, group.nested)
    if group.steering.target is not None:
        term *= total > group.budget
    if grad_scale is not None:
        term *= grad_scale.to(flat.device)
    pieces = term.split(group.num_gates)
    grads = []
    for n in indices:
        gate = group.gates[n]
        gate.grad = torch.zeros_like(gate) if gate.grad is None else gate.grad
        grads.append(gate.grad.to_local() if hasattr(gate.grad, "to_local") else gate.grad)
    # A DTensor has some of the gates here. The gates of a layer have one gradient.
    _compat.foreach_add_(grads, [pieces[n][: len(g)].to(g) for n, g in zip(indices, grads, strict=True)])
    return {id(group.gates[n]) for n in indices}


def _learns(flat: Tensor, num_gates: tuple[int, ...], nested: tuple[bool, ...]) -> Tensor:
    """Return 1 for each gate that learns and 0 for the others, see `timm_dgconv.ops.algebra.read_bits`."""
    index, rows = _rows(num_gates, flat.device)
    padded = nn.functional.pad(flat, (0, 1), value=math.inf)[index]  # (parameters, largest number of gates)
    closed = algebra.closed_gates(padded)
    learns = torch.zeros_like(padded)
    for side in (closed, ~closed):
        distance = torch.where(side, padded.abs(), math.inf)
        learns.scatter_add_(1, distance.argmin(1, keepdim=True), distance.amin(1, keepdim=True).isfinite().to(flat))
    every = torch.tensor([not n for n in nested], device="cpu").to(flat.device, flat.dtype, non_blocking=True)
    return torch.maximum(learns, every.unsqueeze(1)).flatten()[rows]


@functools.lru_cache(maxsize=64)
def _rows(num_gates: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the index that pads flat gates to rows of one length, and the index that takes them back."""
    width, total = max(num_gates), sum(num_gates)
    starts = itertools.accumulate(num_gates, initial=0)
    rows = [[start + k if k < n else total for k in range(width)] for start, n in zip(starts, num_gates, strict=False)]
    index = torch.tensor(rows, device="cpu")
    return index.to(device), (index.flatten() < total).nonzero().flatten().to(device)


@functools.lru_cache(maxsize=64)
def _membership(
    num_gates: tuple[int, ...],
    users: tuple[tuple[int, ...], ...],
    sizes: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the 0/1 matrix of shape (layers, gates) of the gates that each layer has, and the sizes of the layers."""
    matrix = torch.zeros(len(sizes), len(num_gates), dtype=dtype)
    for column, layers in enumerate(users):
        matrix[list(layers), column] = 1
    matrix = matrix.repeat_interleave(torch.tensor(num_gates), dim=1)
    return matrix.to(device), torch.tensor(sizes, dtype=dtype).to(device)


@torch.no_grad()
def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    before = _before.pop(optimizer, {})
    groups = _groups(optimizer) if before else []
    if groups:
        _steps[optimizer] = _steps.get(optimizer, 0) + 1
    for group in groups:
        steering = group.steering
        if steering not in before:
            continue
        trained = [gate for gate, trainable in zip(group.gates, group.trainable, strict=True) if trainable]
        if steering.steps is not None and _steps[optimizer] > steering.steps:
            for gate, old in zip(group.gates, before[steering].split(group.num_gates), strict=True):
                gate.copy_(old)
            continue
        if steering.bound is not None:
            for gate in trained:
                gate.clamp_(-steering.bound, steering.bound)
        if steering.target is not None:
            _hold_target(group, before[steering])


def _hold_target(group: _Group, before: Tensor) -> None:
    """Close gates until the network is within its target, and open gates that need not have closed.

    Open gates compete for the target by their distance from zero, as the scores of movement pruning do
    (https://arxiv.org/abs/2005.07683). A gate that is turned keeps its distance from zero.

    Args:
        group: The model after a step of the optimizer.
        before: All gates before the step.
    """
    both = group.split(torch.cat([before, group.flat()]))  # one transfer
    old, new = both[: len(group.gates)], both[len(group.gates) :]
    positions = [(n, k) for n, values in enumerate(new) for k in range(len(values)) if group.trainable[n]]
    positions.sort(key=lambda position: abs(new[position[0]][position[1]]))
    allowed = max(group.budget, group.connections(old))  # above the target the term closes gates

    def turn(n: int, k: int) -> float:
        new[n][k] = -new[n][k]
        return group.connections(new)

    stepped = [list(values) for values in new]
    total = group.connections(new)
    for n, k in positions:
        if total > allowed and not algebra.is_closed(new[n][k]):
            total = turn(n, k)
    for n, k in positions:
        if algebra.is_closed(new[n][k]) and not algebra.is_closed(old[n][k]) and turn(n, k) > group.budget:
            turn(n, k)
    for n, k in positions:
        if algebra.is_closed(new[n][k]) != algebra.is_closed(stepped[n][k]):
            group.gates[n][k] = new[n][k]
