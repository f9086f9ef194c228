"""Reuse the memory of the gradient of a dense weight.

A DGConv2d stores a dense weight, so it writes a dense gradient that is mostly zeros: 200 MB per step for g_resnext50.
On a CPU the allocator returns tensors of this size to the operating system as soon as they are freed, and each step
pays for fresh pages. Without this file, forward and backward of g_resnext50 take 8 % (channels_last) to 18 % (NCHW)
longer (benchmarks/results/speed.md).
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_free: Any = WeakTensorKeyDictionary()  # weight -> memory of an earlier gradient that nothing refers to any more


def zeros_like(weight: Tensor) -> Tensor:
    """Return zeros in the shape, strides and dtype of a weight, in the memory of an earlier result if that is free."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
    if weight.device.type != "cpu" or extent != weight.numel() or not extent:
        return torch.zeros_like(weight)
    memory = _free.pop(weight, None)
    if memory is None or len(memory) != weight.nbytes:  # model.double() keeps the Parameter and changes its size
        memory = bytearray(weight.nbytes)
    view = memoryview(memory)  # lives as long as the last tensor on this memory
    weakref.finalize(view, _release, weakref.ref(weight), memory).atexit = False
    return torch.frombuffer(view, dtype=weight.dtype).zero_().as_strided(weight.shape, weight.stride())


def _release(weight: "weakref.ref[Tensor]", memory: bytearray) -> None:
    owner = weight()
    if owner is not None:
        _free[owner] = memory
