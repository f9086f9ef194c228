"""The values of gates, known on the host.

A group convolution can be built only if the host knows which gates are closed. Gates on the CPU are read directly,
which costs microseconds. Reading gates on another device waits for it. So the outermost module that owns DGConv2d
layers reads all their gates at the start of its forward call, in one transfer.

A reading ends with the forward call of its owner. Outside of such a call each layer reads its own gates, for example in
a recomputation of activation checkpointing. The version of a parameter does not tell whether its values have changed:
fused optimizers, `.data` edits, collectives and replayed CUDA graphs leave it as it is.
"""

import sys
import threading
from collections import defaultdict
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from timm_dgconv import _compat
from timm_dgconv.ops import autograd
from timm_dgconv.ops.algebra import read_bits

READ_DIRECTLY = {"cpu"}
"""Types of the devices whose gates are read every time. If it is empty, the CPU behaves as CUDA does."""


class _Pass(threading.local):
    """The forward call of an owner in this thread, and what it has read. It is valid while the call is on the stack.

    torch calls no hook after a KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.end()

    def end(self) -> None:
        self.call: FrameType | None = None
        self.readings: dict[nn.Module, tuple[Tensor, Sequence[float]]] = {}

    def is_running(self) -> bool:
        frame = sys._getframe() if self.call is not None else None
        while frame not in (None, self.call):
            frame = frame.f_back
        return frame is not None


_pass = _Pass()


class OneReading(nn.Module):
    """Mixin of networks whose forward call reads the gates of all DGConv2d layers inside in one transfer."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        _begin(self, depth=1)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            _end(self, depth=1)


def read_once_per_call(owner: nn.Module) -> None:
    """Let each forward call of a module read the gates of all DGConv2d layers inside in one transfer."""
    if _before_forward not in getattr(owner, _compat.HOOKS[1]).values():
        owner.register_forward_pre_hook(_before_forward)
        owner.register_forward_hook(_after_forward, always_call=True)


def read_per_layer(owner: nn.Module) -> None:
    """Undo `read_once_per_call`."""
    for name in _compat.HOOKS:
        hooks = getattr(owner, name)
        for key in [key for key, hook in hooks.items() if hook in (_before_forward, _after_forward)]:
            del hooks[key]


# torch.jit.script compiles the hooks of a module. These have the types of a network from a tensor to a tensor.


def _before_forward(self: Any, input: tuple[Tensor]) -> None:
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        _begin(self, depth=2)


def _after_forward(self: Any, input: tuple[Tensor], output: Tensor) -> None:
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        _end(self, depth=2)


def _read_in_graph(gates: list[Tensor]) -> list[Tensor]:
    return torch.ops.timm_dgconv.read_gates([gate.detach() for gate in gates])


def _layers(owner: nn.Module) -> list[Any]:
    """Return the DGConv2d layers of a module, which this file cannot import."""
    return [module for module in owner.modules() if hasattr(module, "gate_reading")]


def _begin(owner: nn.Module, depth: int) -> None:
    """Read the gates, unless this call, `depth` frames above this one, is inside of the call of another owner."""
    if torch.compiler.is_compiling():
        layers = _layers(owner)
        gates = [layer.gate for layer in layers]
        is_outermost = all(layer.gate_reading is None for layer in layers)
        if layers and is_outermost and all(autograd.is_grouped(gate, gate, gate) for gate in gates):
            for layer, values in zip(layers, _read_in_graph(gates), strict=True):
                layer.gate_reading = owner, values
        return
    first = next(owner.parameters(), None)
    is_direct = first is not None and first.device.type in READ_DIRECTLY  # replicas of DataParallel have no parameters
    if is_direct or _pass.is_running():
        return  # each layer reads its own gates, or has the reading of the outer owner
    waiting = defaultdict(list)
    for layer in _layers(owner):
        if autograd.is_grouped(layer.gate, layer.gate, layer.gate) and has_values(layer):
            waiting[layer.gate.device].append(layer)
    _pass.end()
    for layers in waiting.values():
        found = autograd.read_gates([layer.gate for layer in layers])
        _pass.readings |= {layer: (layer.gate, values.tolist()) for layer, values in zip(layers, found, strict=True)}
    _pass.call = sys._getframe(depth)


def _end(owner: nn.Module, depth: int) -> None:
    """Forget what `_begin` has read for this owner."""
    if torch.compiler.is_compiling():
        for layer in _layers(owner):
            if layer.gate_reading is not None and layer.gate_reading[0] is owner:
                layer.gate_reading = None
    elif _pass.call is sys._getframe(depth) or not _pass.is_running():  # torch calls hooks elsewhere after an error
        _pass.end()


def read(layer: Any) -> Sequence[float] | Tensor:
    """Return the values of the gates of a layer in its forward pass, as `timm_dgconv.ops.autograd.dgconv2d` takes them.

    Raises:
        RuntimeError: If this process does not have the values.
    """
    if torch.compiler.is_compiling():
        return _read_in_graph([layer.gate])[0] if layer.gate_reading is None else layer.gate_reading[1]
    gate, values = _pass.readings.get(layer, (None, ()))
    # torch.func.functional_call may have exchanged the gates.
    return values if gate is not None and gate is layer.gate and _pass.is_running() else read_alone(layer)


def read_alone(layer: Any) -> list[float]:
    """Return the values that the gates of a layer have now. All processes that share a DTensor must make this call.

    Raises:
        RuntimeError: If this process does not have the values.
    """
    gate = layer.gate
    if gate.is_meta:
        raise RuntimeError("gates of a DGConv2d are on the meta device and have no values; load weights first")
    if not has_values(layer):
        raise RuntimeError(
            "FullyShardedDataParallel has sharded the gates of a DGConv2d; read them inside "
            "FullyShardedDataParallel.summon_full_params(model), or shard with torch.distributed.fsdp.fully_shard"
        )
    full_tensor = getattr(gate, "full_tensor", None)  # a DTensor
    return (gate if full_tensor is None else full_tensor()).tolist()


def has_values(layer: Any) -> bool:
    """Return whether this process has the gates of a layer: FullyShardedDataParallel leaves a part, or nothing."""
    gate = layer.gate
    return gate.numel() == layer.num_bits and (hasattr(gate, "full_tensor") or gate.untyped_storage().nbytes() > 0)


def refuse_nan(layer: Any) -> None:
    """Raise if a gate is nan and the host can read it. A graph propagates nan to its output instead.

    Raises:
        RuntimeError: If a gate is nan.
    """
    gate = layer.gate
    is_data = torch.compiler.is_compiling() or torch.jit.is_tracing() or _compat.is_traced_by_proxies()  # type: ignore[attr-defined]
    if not isinstance(gate, Tensor) or is_data:
        return
    gate = _compat.unwrap_functorch(gate)
    if autograd.is_plain(gate) and not autograd.is_capturing(gate):
        with _compat.functorch_disabled():
            read_bits(gate.flatten().tolist(), sort=False, nested=False)
