"""Hooks of optimizers: every step acts on the gates of the steered models whose gates it trains.

The hooks are global. Before a step they add the gradient of ``weight * log(complexity)`` to the gradients of the gates.
The loop has accumulated, averaged, unscaled and clipped the gradients by then. So the term is added once per step,
unscaled and unclipped. After a step they take back what the gates must not do: leave their bound, exceed the target, or
move at all.
"""

import functools
import sys
import threading
import warnings
import weakref
from collections import defaultdict
from collections.abc import MutableSet, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from timm_dgconv import _compat
from timm_dgconv.layers.dgconv import DGConv2d
from timm_dgconv.ops.autograd import READ_HOOKS, is_plain
from timm_dgconv.optim.steered_model import SteeredModel, add_term, hold_gates

if TYPE_CHECKING:
    from timm_dgconv.optim.steering import Steering


class SteeredLayer:
    """Links a layer to the steering of its model, and is stored on the layer.

    A copied or unpickled layer is linked, too.

    Args:
        layer: The layer.
        steering: The steering of its model.
        index: Position of the layer in the model.
    """

    def __init__(self, layer: DGConv2d, steering: "Steering", index: int) -> None:
        self.layer = weakref.ref(layer)
        self.steering = steering
        self.index = index
        self.last: tuple[int, Sequence[float]] = (0, ())  # steps of the model and gates, in the last pass
        self.changes = 0  # since the last step of the model
        _register_hooks()
        with _lock:
            _layers.add(self)

    def notice(self, values: Sequence[float]) -> None:
        """Warn if something else than a step that `_before_step` has seen changes the gates of a model in training.

        Some optimizers change gates several times per step, for example to look for the sharpest loss nearby.
        """
        taken, last = self.last
        self.last = (self.steering.taken, values)
        self.changes = self.changes + (last != values) if taken == self.steering.taken and last else 0
        if self.changes == _NOTICED and not self.steering.warned:
            self.steering.warned = True
            warnings.warn(
                f"gates have changed in {_NOTICED} training passes without a step of a torch optimizer that has them"
                f"{_other}, so complexity_weight, complexity_target, gate_bound and gate_steps do not act; use an "
                "optimizer of torch.optim, or add timm_dgconv.complexity to the loss and call timm_dgconv.hold_target "
                "after each step (docs/steering.md, Loops)",
                stacklevel=2,
            )

    def __reduce__(self) -> Any:
        return SteeredLayer, (self.layer(), self.steering, self.index)


_layers: MutableSet[SteeredLayer] = weakref.WeakSet()
_lock = threading.Lock()  # of _layers
_NOTICED = 5  # changes of gates without a step, after which a warning is due
_other = ""  # names the last optimizer that had no steered gates
_left: list[weakref.ref[Tensor]] = []  # gates of steered layers that are gone


@functools.cache
def _register_hooks() -> None:
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)
    _compat.hook_wrappers()
    READ_HOOKS.append(_notice_compiled)


def _notice_compiled(gates: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Let layers notice the values of their gates in compiled graphs, which know where gates are, and no layers."""
    with _lock:
        found = [(member, member.layer()) for member in _layers]
    training = [(member, layer) for member, layer in found if layer is not None and layer.training]
    current = [(member, layer.gate) for member, layer in training if layer.steered is member]
    members = {gate.data_ptr(): member for member, gate in current if is_plain(gate)}  # sharded gates have no address
    for gate, read in zip(gates, values, strict=True):
        if gate.data_ptr() in members:
            members[gate.data_ptr()].notice(read.tolist())


def leave_behind(gate: "weakref.ref[Tensor]") -> None:
    """Remember the gates of a layer that is gone. Another module may have them: a graph of torch.fx or torch.jit."""
    _left.append(gate)


def _warn_of_gates_without_layers(optimizer: Optimizer) -> None:
    if _left:
        left = {gate for reference in _left if (gate := reference()) is not None}
        trained = left & {p for group in optimizer.param_groups for p in group["params"]}
        _left[:] = map(weakref.ref, left - trained)
        if trained:
            warnings.warn(
                "an optimizer trains gates whose DGConv2d layers are gone, so complexity_weight, complexity_target, "
                "gate_bound and gate_steps do not act on them; torch.fx and torch.jit.trace make modules without these "
                "layers, so keep the model that they have traced",
                stacklevel=4,
            )


def models() -> dict["Steering", dict[int, DGConv2d]]:
    """Return the layers of each steered model by their positions.

    A copy of some layers of a model takes the places of those that are gone or that do not learn, as in PEFT.
    """
    with _lock:
        steered = sorted(_layers, key=lambda member: member.index)
    own: dict[Steering, dict[int, DGConv2d]] = defaultdict(dict)
    for member in steered:
        layer = member.layer()
        if layer is not None and getattr(layer, "steered", None) is member:
            own[member.steering][member.index] = layer
    result: dict[Steering, dict[int, DGConv2d]] = defaultdict(dict)
    for steering, layers in own.items():
        source = steering.source() if steering.source is not None else None
        if source in own and not layers.keys() >= own[source].keys():
            learning = {index for index, layer in own[source].items() if layer.gate.requires_grad}
            copied = {index: layer for index, layer in layers.items() if index not in learning}
            result[source] = {**own[source], **result[source], **copied}
        else:
            result[steering] = {**layers, **result[steering]}
    return {steering: {index: layers[index] for index in sorted(layers)} for steering, layers in result.items()}


def _steered_models(optimizer: Optimizer) -> list[SteeredModel]:
    """Return the steered models with gates among the parameters of an optimizer.

    Raises:
        RuntimeError: If this process has only a part of the gates.
    """
    parameters: set[Tensor] = {p for group in optimizer.param_groups for p in group["params"]}
    flattened = {module for p in parameters for module in _compat.flat_parameter_modules(p)}
    steered = []
    for steering, layers in models().items():
        for layer in layers.values():
            if layer in flattened or (layer.gate in parameters and layer.gate.numel() != layer.num_bits):
                raise RuntimeError(
                    "FullyShardedDataParallel has sharded the gates of a DGConv2d, and complexity_weight needs whole "
                    "gates; shard with torch.distributed.fsdp.fully_shard, or train with DistributedDataParallel"
                )
        if not any(layer.gate in parameters for layer in layers.values()):
            continue
        is_sharded = any(hasattr(layer.gate, "full_tensor") for layer in layers.values())  # a DTensor
        if steering.acts_after_steps and is_sharded:
            raise RuntimeError(
                "complexity_target, gate_bound and gate_steps need all gates in each process, and fully_shard has "
                "sharded them; use complexity_weight alone, or train with DistributedDataParallel"
            )
        steered.append(SteeredModel(steering, layers, {p for p in parameters if p.requires_grad}))
    return steered


class _Step(NamedTuple):
    """A running step of an optimizer.

    Attributes:
        call: The call of torch's wrapper around the method `step`.
        steered: The models that it steers.
        before: Their gates before the step, where something acts afterwards.
    """

    call: FrameType
    steered: list[SteeredModel]
    before: list[Tensor | None]


class _Steps(threading.local):
    """The running steps of this thread, the outermost first."""

    def __init__(self) -> None:
        self.steps: list[_Step] = []

    def running(self) -> list[_Step]:
        """Forget the steps that an exception has ended, since torch calls no hook after them."""
        frame: FrameType | None = sys._getframe()
        calls = set()
        while self.steps and frame is not None:
            calls.add(frame)
            frame = frame.f_back
        self.steps = [step for step in self.steps if step.call in calls]
        return self.steps


_steps = _Steps()


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    global _other
    _warn_of_gates_without_layers(optimizer)
    # A step inside of another one, of super().step() or of a base optimizer, leaves its gates to the outer one.
    outer = {gate for step in _steps.running() for model in step.steered for gate in model.trained}
    steered = [model for model in _steered_models(optimizer) if not outer.issuperset(model.trained)]
    if not steered:
        _other = _other if outer else f" (the last step was of {type(optimizer).__name__})"
        return None
    before = [model.flat() if model.steering.acts_after_steps else None for model in steered]
    _steps.steps.append(_Step(sys._getframe(1), steered, before))
    signs = {p: -1 if group.get("maximize") else 1 for group in optimizer.param_groups for p in group["params"]}

    def add_terms() -> None:
        done = {gate for model in steered for gate in model.gates if _has_term(gate)}
        for model in steered:
            waiting = {gate: signs[gate] for gate in model.trained if gate not in done}
            if waiting and model.steering.weight:
                add_term(model, waiting, getattr(optimizer, "grad_scale", None))
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
    """Return whether the gradient has the term already: a step can reuse the gradient of the last one."""
    return gate.grad is not None and getattr(gate.grad, "_version_with_term", None) == _compat.version(gate.grad)


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    call = sys._getframe(1)
    step = next((step for step in _steps.running() if step.call is call), None)
    if step is None:
        return
    _steps.steps.remove(step)
    # A fused optimizer skips the steps whose gradients have overflowed. GradScaler skips those of others itself.
    overflow = getattr(optimizer, "found_inf", None)
    for model, before in zip(step.steered, step.before, strict=True):
        trained = set(model.trained)
        if model.steering.steps is None or overflow is None or not overflow.item():
            for steering in model.steerings:
                steering.count({place for place, gate in enumerate(model.gates) if gate in trained})
        if before is not None:
            _take_back(model, before)


@torch.no_grad()
def _take_back(model: SteeredModel, before: Tensor) -> None:
    """Take back what the gates must not do in a step of the optimizer."""
    steering = model.steering
    if steering.steps is not None and steering.taken > steering.steps:
        for gate, old in model.split(before).items():
            gate.copy_(old)
        return
    if steering.bound is not None:
        for gate in model.trained:
            gate.clamp_(-steering.bound, steering.bound)
    if steering.target is not None:
        hold_gates(model, before)
