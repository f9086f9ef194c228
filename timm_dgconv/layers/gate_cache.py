"""Which gates are closed, known on the host.

A group convolution can be built only if the host knows which gates are closed. Gates on the CPU are read directly,
which costs microseconds. Gates on other devices are read once per version of the tensor. One transfer reads all gates
that have changed, which is one transfer per training step.
"""

import math
import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from timm_dgconv import _compat

READ_DIRECTLY = {"cpu"}
"""Types of the devices whose gates are read every time. If it is empty, the CPU behaves as CUDA does."""

_cache: Any = WeakTensorKeyDictionary()  # gate -> (version, address, values)
_lock = threading.Lock()


def closed_on_host(gate: Tensor) -> tuple[bool, ...]:
    """Return which gates are closed.

    Args:
        gate: Gates of shape (K,).

    Raises:
        RuntimeError: If a gate is nan or has no value.
    """
    values = values_on_host(gate)
    if any(math.isnan(value) for value in values):
        raise RuntimeError(
            f"gates of a DGConv2d are nan: {values}; the training has diverged: go back to an earlier checkpoint and "
            "use a smaller learning rate or gradient clipping"
        )
    return tuple(map(is_closed, values))


def is_closed(value: float) -> bool:
    """Return whether a gate with this value is closed. Its sign bit decides, as in `grouping.closed_gates`."""
    return math.copysign(1, value) < 0


def values_on_host(gate: Tensor) -> list[float]:
    """Return the values of the gates.

    Args:
        gate: Gates of shape (K,). All processes that share a DTensor must make this call.

    Raises:
        RuntimeError: If the gates are on the meta device.
    """
    if gate.is_meta:
        raise RuntimeError("gates of a DGConv2d are on the meta device and have no values; load weights first")
    full_tensor = getattr(gate, "full_tensor", None)  # a DTensor
    if full_tensor is not None:
        return full_tensor().tolist()
    if gate.device.type in READ_DIRECTLY or gate.is_inference():  # an inference tensor has no version
        return gate.tolist()
    with _lock:
        if gate not in _cache or _cache[gate][:2] != _state(gate):
            _cache.setdefault(gate, (None, None, []))
            stale = [g for g, entry in _cache.items() if g is not None and g.device == gate.device]
            stale = [g for g in stale if _cache[g][:2] != _state(g)]
            states = [_state(g) for g in stale]
            values = torch.cat([g.detach().float() for g in stale]).tolist()
            for g, state in zip(stale, states, strict=True):
                _cache[g] = (*state, values[: g.numel()])
                values = values[g.numel() :]
        return _cache[gate][2]


def _state(gate: Tensor) -> tuple[int, int]:
    return _compat.version(gate), gate.data_ptr()


def refuse_nan(gate: Tensor) -> None:
    """Raise if a gate is nan and the host can read it. A graph propagates nan to its output instead.

    Raises:
        RuntimeError: If a gate is nan.
    """
    if not isinstance(gate, Tensor) or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return
    gate = _compat.unwrap_functorch(gate)
    if is_plain(gate) and not is_capturing(gate):
        with _compat.functorch_disabled():
            closed_on_host(gate if gate.ndim == 1 else gate.detach().flatten())


def is_plain(*tensors: Tensor) -> bool:
    """Return whether all tensors are on the CPU or CUDA and of no subclass (fx proxy, DTensor, fake tensor)."""
    return all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type in ("cpu", "cuda") for t in tensors)


def is_capturing(tensor: Tensor) -> bool:
    """Return whether a CUDA graph is being captured, in which nothing can be read on the host."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
