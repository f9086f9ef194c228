"""Steer the groups in an unchanged training loop: every optimizer step acts on the gates, too.

Before a step, global hooks on `torch.optim.Optimizer.step` add the gradient of ``weight * log(complexity)`` to the
gradients of the gates. The loop has accumulated, averaged, unscaled and clipped the gradients by then. So the term is
added once per step, unscaled and unclipped. After a step they take back what the gates must not do: leave their bound,
exceed the target, or move at all.
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
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from timm_dgconv import _compat
from timm_dgconv.layers.dgconv import DGConv2d
from timm_dgconv.ops import algebra
from timm_dgconv.optim.complexity import dgconv_layers

DEFAULT_WEIGHT = 0.1
"""Weight of a model that has a target only."""


class Steering:
    """What steers the gates, with the arguments of `steer`. The layers of one model share one object.

    Raises:
        TypeError: If a value is not a number.
        ValueError: If a value is out of its range.
    """

    def __init__(self, weight: float, target: float | None, bound: float | None, steps: int | None) -> None:
        self.weight, self.target, self.bound, self.steps = weight, target, bound, steps
        given = {"complexity_weight": weight, "complexity_target": target, "gate_bound": bound, "gate_steps": steps}
        for name, value in given.items():
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
_lock = threading.Lock()  # of _steered
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

    Examples:
        >>> conv = DGConv2d(8, 8, 1)
        >>> steer(conv, target=0.25)
        >>> optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
        >>> for _ in range(8):
        ...     optimizer.zero_grad()
        ...     optimizer.step()
        >>> conv.num_groups >= 4
        True
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
    """The layers of one steered model, seen from one optimizer. All gates have one order, that of `flat`.

    Attributes:
        steering: What steers the model.
        gates: The gate parameters of all layers. Layers can share them.
        trained: The gate parameters that the optimizer trains.
        places: Per layer the places of its gates.
        sizes: Per layer the number of connections of a dense layer.
        nested: Per layer whether only the gates that can flip next learn.
    """

    def __init__(self, steering: Steering, layers: Sequence[DGConv2d], parameters: set[Tensor]) -> None:
        self.steering = steering
        self.gates = list(dict.fromkeys(layer.gate for layer in layers))
        self.trained = [gate for gate in self.gates if gate.requires_grad and gate in parameters]
        ends = itertools.accumulate(gate.numel() for gate in self.gates)
        places = {gate: range(end - gate.numel(), end) for gate, end in zip(self.gates, ends, strict=True)}
        self.places = tuple(places[layer.gate] for layer in layers)
        self.sizes = tuple(layer.in_channels * layer.out_channels for layer in layers)
        self.nested = tuple(layer.sort and layer.nested for layer in layers)

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

    def split(self, flat: Tensor) -> dict[Tensor, Tensor]:
        """Return the part of each gate parameter."""
        return dict(zip(self.gates, flat.split([gate.numel() for gate in self.gates]), strict=True))

    def connections(self, values: Sequence[float]) -> float:
        """Return the number of connections of the model with these values of the gates."""
        closed = list(map(algebra.is_closed, values))
        counts = (sum(closed[place.start : place.stop]) for place in self.places)
        return sum(size * 0.5**count for size, count in zip(self.sizes, counts, strict=True))


def _groups(optimizer: Optimizer) -> list[_Group]:
    """Return the steered models with gates among the parameters of an optimizer.

    Raises:
        RuntimeError: If this process has only a part of the gates.
    """
    parameters: set[Tensor] = {p for group in optimizer.param_groups for p in group["params"]}
    flattened = {module for p in parameters for module in _compat.flat_parameter_modules(p)}
    with _lock:
        steered = sorted(_steered, key=lambda member: member.index)
    models = defaultdict(list)
    for member in steered:
        layer = member.layer()
        if layer is not None and getattr(layer, "steered", None) is member:
            models[member.steering].append(layer)
    groups = []
    for steering, layers in models.items():
        for layer in layers:
            if layer in flattened or (layer.gate in parameters and layer.gate.numel() != layer.num_bits):
                raise RuntimeError(
                    "FullyShardedDataParallel has sharded the gates of a DGConv2d, and complexity_weight needs whole "
                    "gates; shard with torch.distributed.fsdp.fully_shard, or train with DistributedDataParallel"
                )
        if not any(layer.gate in parameters for layer in layers):
            continue
        if steering.acts_after_steps and any(hasattr(layer.gate, "full_tensor") for layer in layers):  # a DTensor
            raise RuntimeError(
                "complexity_target, gate_bound and gate_steps need all gates in each process, and fully_shard has "
                "sharded them; use complexity_weight alone, or train with DistributedDataParallel"
            )
        groups.append(_Group(steering, layers, parameters))
    return groups


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    groups = _groups(optimizer)
    if not groups:
        return None
    _before[optimizer] = {group.steering: group.flat() for group in groups if group.steering.acts_after_steps}

    def add_terms() -> None:
        done = {gate for group in groups for gate in group.gates if _has_term(gate)}
        for group in groups:
            waiting = [gate for gate in group.trained if gate not in done]
            if waiting and group.steering.weight:
                _add_term(group, waiting, getattr(optimizer, "grad_scale", None))
                done.update(waiting)
        # Afterwards: gradients that are views of one bucket (DistributedDataParallel) share a version.
        for gate in done:
            gate.grad._version_with_term = _compat.version(gate.grad)  # type: ignore[union-attr, arg-type]

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
def _add_term(group: _Group, gates: Sequence[Tensor], grad_scale: Tensor | None) -> None:
    """Add the term to the gradients of some gate parameters, in few operations for all layers.

    The derivative of a layer's complexity, ``size * 2^(-number of closed gates)``, is the complexity times ln(2) for
    each of its gates that learns. A fused optimizer unscales the gradients itself: it has a `grad_scale`.
    """
    flat = group.flat()
    index, sizes, nested = _layout(group.places, group.sizes, group.nested, flat.device)
    rows = nn.functional.pad(flat, (0, 1), value=math.inf)[index]  # (layers, largest number of gates)
    closed = algebra.closed_gates(rows)
    complexities = sizes.to(flat) * torch.exp2(-closed.sum(1).to(flat))
    total = complexities.sum()
    derivative = complexities * (group.steering.weight * math.log(2) / total)
    if group.steering.target is not None:
        derivative *= total > group.budget
    if grad_scale is not None:
        derivative *= grad_scale.to(flat.device)
    learns = torch.zeros_like(rows)  # with nested gates, the closed and the open gate nearest to zero
    for side in (closed, ~closed):
        distance = torch.where(side, rows.abs(), math.inf)
        learns.scatter_add_(1, distance.argmin(1, keepdim=True), distance.amin(1, keepdim=True).isfinite().to(flat))
    learns = torch.where(nested.unsqueeze(1), learns, 1)
    terms = flat.new_zeros(len(flat) + 1).index_add_(0, index.flatten(), (learns * derivative.unsqueeze(1)).flatten())
    parts = group.split(terms[:-1])
    grads, pieces = [], []
    for gate in gates:
        grad: Any = torch.zeros_like(gate) if gate.grad is None else gate.grad
        part: Any = parts[gate].to(grad.dtype)
        gate.grad = grad
        if hasattr(grad, "to_local"):  # a DTensor, of which this process has a part
            part = type(grad).from_local(part, grad.device_mesh).redistribute(placements=grad.placements).to_local()
            grad = grad.to_local()
        grads.append(grad)
        pieces.append(part.to(grad.device))
    _compat.foreach_add_(grads, pieces)


@functools.lru_cache(maxsize=64)
def _layout(
    places: tuple[range, ...], sizes: tuple[int, ...], nested: tuple[bool, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the places of the gates in rows of one length, one row per layer, and per layer `sizes` and `nested`.

    The place after the last gate fills the rows.
    """
    rows = [torch.tensor(place, device="cpu") for place in places]
    end = max(place.stop for place in places)
    index = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=end)
    return index.to(device), torch.tensor(sizes, device=device), torch.tensor(nested, device=device)


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
        if steering.steps is not None and _steps[optimizer] > steering.steps:
            for gate, old in group.split(before[steering]).items():
                gate.copy_(old)
            continue
        if steering.bound is not None:
            for gate in group.trained:
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
    old, stepped = torch.stack([before, group.flat()]).tolist()  # one transfer
    new = list(stepped)
    owners = [(gate, n) for gate in group.gates for n in range(gate.numel())]
    trained = set(group.trained)
    nearest = sorted((k for k, (gate, _) in enumerate(owners) if gate in trained), key=lambda k: abs(stepped[k]))
    total = group.connections(new)
    allowed = max(group.budget, group.connections(old))  # above the target the term closes gates

    def turn(k: int) -> float:
        new[k] = -new[k]
        return group.connections(new)

    for k in nearest:
        if total > allowed and not algebra.is_closed(new[k]):
            total = turn(k)
    for k in nearest:
        if algebra.is_closed(new[k]) and not algebra.is_closed(old[k]) and turn(k) > group.budget:
            turn(k)
    for k in nearest:
        if algebra.is_closed(new[k]) != algebra.is_closed(stepped[k]):
            gate, n = owners[k]
            gate[n] = new[k]
