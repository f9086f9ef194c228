"""Spans: the sets of bits D' inside the groups of the convolutions that a DGConv computes.

A span contains all open bits. An integer mask lists the closed bits in it. Bit 0 of the mask is the least significant
bit of a channel code. Spans change the speed of a convolution and its rounding, and nothing else.

The fastest spans depend on the device, the dtype, the memory format, the shape and the versions of libraries. So a
tuner measures them where they run, as cuDNN's benchmark mode does. It needs the same permission on CUDA:
`torch.backends.cudnn.benchmark` without a deterministic mode. When a problem has been met three times, the tuner
computes it with each candidate and keeps the fastest one in `tuned`. It logs its decisions at level INFO. The
environment variable TIMM_DGCONV_TUNE=0 turns the tuner off, and TIMM_DGCONV_TUNE=1 turns it on, for CPUs as well.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

_logger = logging.getLogger(__name__)

TUNE = {"0": False, "1": True}.get(os.environ.get("TIMM_DGCONV_TUNE", ""))
"""Whether to measure spans. None means: on CUDA, as torch.backends.cudnn allows."""

MEETINGS = 3
"""How often a problem is met before it is measured. An input shape can occur only once per epoch."""

GAIN = 0.95
"""Largest ratio to the time of the static choice at which another span replaces it."""


class Spans(NamedTuple):
    """The spans of the three convolutions of a layer."""

    output: int = 0
    input_grad: int = 0
    weight_grad: int = 0
    """The convolution for the gradients of the weight and of all gates."""


class Problem(NamedTuple):
    """What the fastest span depends on."""

    convolution: str
    """A field of `Spans`."""
    device: torch.device
    dtype: torch.dtype
    channels_last: bool
    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    geometry: tuple[tuple[int, ...], ...]
    """Stride, padding and dilation."""
    num_closed: int
    permuted: bool
    """Whether the groups of the open bits are not contiguous."""
    learns: bool
    """Whether the gates need gradients."""


tuned: dict[Problem, int] = {}
"""The decisions of the tuner: how many closed bits the span has, the least significant ones."""

_meetings: Counter[Problem] = Counter()


def choose_spans(closed: tuple[bool, ...], in_channels: int, device_type: str, dtype: torch.dtype) -> Spans:
    """Choose the spans without a measurement.

    Args:
        closed: Which bits are closed, the most significant bit first.
        in_channels: Number of input channels.
        device_type: Type of the device, as in torch.device.
        dtype: Dtype of the convolution.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    num_closed = sum(closed)

    def at_least(width: int) -> int:
        """Return the span of groups with at least this number of input channels, as far as there are closed bits."""
        return lowest(closed, ((width - 1) // (in_channels >> num_closed)).bit_length())

    if device_type == "cpu":  # benchmarks/results/speed.md
        return Spans(weight_grad=at_least(8 if half else 16))
    if not half:  # not measured
        return Spans(weight_grad=at_least(64))
    # benchmarks/results/gpu.md. Weight gradients of narrow groups are slow, and so is permuting many pixels.
    dense = at_least(2048)
    is_permuted = not all(closed[:num_closed])
    return Spans(dense, dense, dense) if is_permuted and in_channels <= 256 else Spans(weight_grad=dense)


def lowest(closed: tuple[bool, ...], count: int) -> int:
    """Return the mask of the `count` least significant closed bits, or of all closed bits if there are fewer."""
    return sum([1 << shift for shift, bit in enumerate(reversed(closed)) if bit][:count])


def may_tune(device_type: str) -> bool:
    """Return whether the tuner may measure spans on this type of device."""
    if TUNE is not None:
        return TUNE
    cudnn = torch.backends.cudnn
    allowed = device_type == "cuda" and cudnn.benchmark and not cudnn.deterministic
    return allowed and not torch.are_deterministic_algorithms_enabled()


def tune(problem: Problem, closed: tuple[bool, ...], static: int, run: Callable[[int], Any]) -> int:
    """Return the span for a problem, and measure the candidates if the problem has been met often enough.

    Args:
        problem: The problem.
        closed: Which bits are closed, the most significant bit first.
        static: The span that `choose_spans` has chosen.
        run: Computes the problem with a span.
    """
    if problem not in tuned:
        _meetings[problem] += 1
        if _meetings[problem] < MEETINGS:
            return static
        del _meetings[problem]
        tuned[problem] = _fastest(problem, closed, static, run)
    return lowest(closed, tuned[problem])


def _fastest(problem: Problem, closed: tuple[bool, ...], static: int, run: Callable[[int], Any]) -> int:
    """Measure the candidates and return how many closed bits the fastest one has."""
    usual = static.bit_count()
    candidates = range(sum(closed) + 1)
    milliseconds = {n: 1e3 * _seconds(problem.device, partial(run, lowest(closed, n))) for n in candidates}
    best = min(milliseconds, key=lambda n: milliseconds[n])
    best = best if milliseconds[best] < GAIN * milliseconds[usual] else usual
    _logger.info(
        "%s: %d of %d closed bits in the span, static choice %d; milliseconds by bits: %s",
        problem,
        best,
        sum(closed),
        usual,
        {n: round(ms, 3) for n, ms in milliseconds.items()},
    )
    return best


def _seconds(device: torch.device, run: Callable[[], Any]) -> float:
    """Return the time of the fastest of three runs after a first one, or infinity if the device cannot do it."""
    times = []
    try:
        for _ in range(4):
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    except RuntimeError:  # out of memory, or no algorithm
        return float("inf")
    return min(times[1:])
