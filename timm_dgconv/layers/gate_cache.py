"""Which gates are closed, known on the host.

A group convolution can be built only if the host knows which gates are closed. Gates on the CPU are read directly,
which costs microseconds. Reading gates on another device waits for it. So the layers of a G-ResNeXt read their gates in
one transfer per forward pass. In other models call `share_reader`. Under torch.compile each layer reads its own gates.

The version of a parameter does not tell whether its values have changed. Fused optimizers, `.data` edits, collectives
of torch.distributed and replayed CUDA graphs leave the version as it is. So a reading serves one forward pass only.
"""

import math
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from timm_dgconv import _compat

READ_DIRECTLY = {"cpu"}
"""Types of the devices whose gates are read every time. If it is empty, the CPU behaves as CUDA does."""


class LayerReader:
    """Reads the gates of one layer. Layers with the same reader share one transfer.

    A reading serves a layer for one forward pass. A layer without a reading reads its gates and the gates of the layers
    after it, so the first layer of a pass reads for all of them, and the pass sees every change of the gates before it.
    Each thread has its own readings.

    After a change that leaves the version of a gate as it is, call `clear` in two cases: the gate is frozen
    (`requires_grad=False`), since frozen gates are read once per version; or the last pass did not run all layers, and
    the next pass begins with a layer that it did not run.
    """

    def __init__(self, reader: "GateReader") -> None:
        self.reader = reader

    def __reduce__(self) -> Any:  # copied layers share the copied reader
        return LayerReader, (self.reader,)

    def clear(self) -> None:
        """Forget the readings of this thread, of all layers that share the reader."""
        self.reader.local.__dict__.clear()

    def closed(self, layer: Any) -> tuple[bool, ...]:
        """Return which gates of a layer are closed, for one forward pass.

        Args:
            layer: The DGConv2d that has these gates, or its replica by DataParallel.

        Raises:
            RuntimeError: If a gate is nan or has no value.
        """
        if _compat.is_replica(layer):  # reading its copy of the gates would need a transfer of its own
            original = self.reader.layers.get(self)
            layer = (original and original()) or layer
        gate = layer.gate
        if gate.device.type in READ_DIRECTLY or type(gate) is not nn.Parameter:
            return closed_on_host(gate)
        readings = self.reader.local.__dict__.setdefault("readings", weakref.WeakKeyDictionary())
        reading = readings.get(self)
        if reading is None or reading[0] is not gate or reading[1] != state(gate):
            self.reader.read(self, layer, readings)
            reading = readings[self]
        if gate.requires_grad:
            del readings[self]
        return _closed(reading[2])


class GateReader:
    """The state that the layers of one model share to read their gates in one transfer, see `LayerReader`."""

    def __init__(self) -> None:
        self.layers: Any = weakref.WeakKeyDictionary()  # LayerReader -> weak reference to the layer, in order
        self.local = threading.local()
        self.lock = threading.Lock()

    def __reduce__(self) -> Any:
        return GateReader, ()

    def read(self, first: LayerReader, layer: Any, readings: Any) -> None:
        """Read the gates of a layer and of the layers after it, on one device, either frozen or learnable gates.

        Args:
            first: The gates of the layer. They are added at the end of the order if they are new.
            layer: The layer.
            readings: LayerReader -> (gate, state, values); updated in place.
        """
        with self.lock:
            self.layers[first] = weakref.ref(layer)
            order = list(self.layers.items())
        like = (layer.gate.device, layer.gate.requires_grad)
        gates = {
            key: other.gate
            for key, ref in order[[key for key, _ in order].index(first) :]
            if (other := ref()) is not None
            and type(other.gate) is nn.Parameter
            and (other.gate.device, other.gate.requires_grad) == like
        }
        states = {key: state(gate) for key, gate in gates.items()}
        for key, values in zip(gates, read_together(list(gates.values())), strict=True):
            readings[key] = gates[key], states[key], values


def share_reader(layers: Iterable[Any]) -> None:
    """Let DGConv2d layers read their gates together, in one transfer per forward pass."""
    reader = GateReader()
    for layer in layers:
        layer.gate_reader = LayerReader(reader)
        reader.layers[layer.gate_reader] = weakref.ref(layer)


def closed_on_host(gate: Tensor) -> tuple[bool, ...]:
    """Read which gates are closed.

    Args:
        gate: Gates of shape (K,). All processes that share a DTensor must make this call.

    Raises:
        RuntimeError: If a gate is nan or has no value.
    """
    if gate.is_meta:
        raise RuntimeError("gates of a DGConv2d are on the meta device and have no values; load weights first")
    full_tensor = getattr(gate, "full_tensor", None)  # a DTensor
    return _closed(gate.tolist() if full_tensor is None else full_tensor().tolist())


def _closed(values: Sequence[float]) -> tuple[bool, ...]:
    if any(math.isnan(value) for value in values):
        raise RuntimeError(
            f"gates of a DGConv2d are nan: {list(values)}; the training has diverged: go back to an earlier checkpoint "
            "and use a smaller learning rate or gradient clipping"
        )
    return tuple(map(is_closed, values))


def is_closed(value: float) -> bool:
    """Return whether a gate with this value is closed. Its sign bit decides, as in `grouping.closed_gates`."""
    return math.copysign(1, value) < 0


def read_together(gates: Sequence[Tensor]) -> list[list[float]]:
    """Read the values of several gates, in one transfer per device."""
    values: list[list[float]] = [[] for _ in gates]
    for device in {gate.device for gate in gates}:
        indices = [n for n, gate in enumerate(gates) if gate.device == device]
        flat = iter(torch.cat([gates[n].detach().float() for n in indices]).tolist())
        for n in indices:
            values[n] = [next(flat) for _ in range(gates[n].numel())]
    return values


def state(gate: Tensor) -> tuple[int, ...]:
    """Return version and address of gates, which change with the gates, except in the cases above."""
    return () if gate.is_inference() else (_compat.version(gate), gate.data_ptr())


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
    return all(type(t) in (Tensor, nn.Parameter) and t.device.type in ("cpu", "cuda") for t in tensors)


def is_capturing(tensor: Tensor) -> bool:
    """Return whether a CUDA graph is being captured, in which nothing can be read on the host."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
