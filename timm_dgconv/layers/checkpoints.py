"""The formats of state dicts that a DGConv2d understands, rewritten to its own format when they are loaded.

| format | weight | gates |
|---|---|---|
| this package | `weight` of shape (C_out, C_in, k, k) | `sorted_gate` (contiguous groups) or `unsorted_gate` |
| timm-dgconv 0.2 | `weight` of shape (C_out, C_in, k, k) | `gate`, unsorted |
| the original release | `conv.weight` of shape (C_out, C_in, k, k), constants `D` and `I` | `gate`, unsorted |
| a convolution | `weight` of shape (C_out, C_in / groups, k, k) | none |

The name of the gates says how they are read. So a loader that goes by names never reads them in another way.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from timm_dgconv.ops.algebra import closed_gates
from timm_dgconv.ops.grouped import diagonal_blocks

PRETRAINED_GATE = 0.01
"""Distance from zero of the gates of a loaded group convolution.

It is the smallest tested distance at which fine-tuning flips no gate in the first epoch and some gates later. At
the initial distance of 1e-8 the first step flips half of the gates (benchmarks/results/gate_margin.md).
"""

INITIAL_GATE = 1e-8
"""Distance from zero of new gates, as in the original release. The first step can flip any gate."""

GATE_NAMES = {True: "sorted_gate", False: "unsorted_gate"}
"""Whether the groups are contiguous -> name of the parameter."""


def remap_state_dict(layer: Any, state_dict: dict[str, Any], prefix: str) -> None:
    """Rewrite the entries of a DGConv2d to its own format, in place, and let it read its gates as they say.

    Raises:
        ValueError: If the entries do not fit the layer.
    """
    for name in ("weight", "bias"):  # the original release has a child module `conv`
        if f"{prefix}conv.{name}" in state_dict:
            state_dict.setdefault(f"{prefix}{name}", state_dict.pop(f"{prefix}conv.{name}"))
    for name in ("D", "I"):  # constants of the original release: a 2x2 identity and 2x2 ones
        state_dict.pop(f"{prefix}{name}", None)
    if f"{prefix}gate" in state_dict:
        if layer.sort:
            warnings.warn(
                "the checkpoint is of timm-dgconv 0.2 or of the original release, so its gates are read unsorted; if "
                "it was trained with sort=True, rename its keys from gate to sorted_gate",
                stacklevel=2,
            )
        state_dict.setdefault(f"{prefix}unsorted_gate", state_dict.pop(f"{prefix}gate"))

    found = [sort for sort, name in GATE_NAMES.items() if f"{prefix}{name}" in state_dict]
    for sort in found[:1]:
        gate = state_dict[f"{prefix}{GATE_NAMES[sort]}"]
        if isinstance(gate, Tensor) and gate.shape != layer.gate.shape:
            raise ValueError(
                f"the checkpoint has {gate.numel()} gates of shape {tuple(gate.shape)}, expected {layer.gate.numel()} "
                f"for {layer.in_channels} -> {layer.out_channels} channels; load it into a model of the width that it "
                "was saved from"
            )
        layer.set_sort(sort)
        layer.gates_are_new = False
    weight = state_dict.get(f"{prefix}weight")
    if not found and isinstance(weight, Tensor):
        # The weight of a DGConv2d has the shape of a convolution with one group, and may stand for itself: in a shard,
        # or beside frozen gates that were not saved. So it opens gates only if they have nothing to lose.
        gate = layer.gate
        can_open = gate.requires_grad and layer.gates_are_new and (gate.is_meta or _are_initial(gate, layer))
        are_open = gate.requires_grad and not can_open and not bool(closed_gates(gate).any())
        if weight.shape == layer.weight.shape and not can_open:
            state_dict |= {f"{prefix}{GATE_NAMES[layer.sort]}": gate.detach()} if are_open else {}
            return
        state_dict[f"{prefix}weight"], gate = from_conv(layer, weight)
        state_dict[f"{prefix}{GATE_NAMES[layer.sort]}"] = gate


def _are_initial(gate: Tensor, layer: Any) -> bool:
    """Return whether gates have the values that `DGConv2d.reset_gate` has given them."""
    if layer.initial_groups is None:
        return bool((gate.abs() <= INITIAL_GATE).all())
    return torch.equal(gate, contiguous_gates(layer.initial_groups, gate))


@torch.no_grad()
def from_conv(layer: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the dense weight and the gates with which a DGConv2d computes the same as a convolution.

    The gates are `PRETRAINED_GATE` away from zero. The connections between groups keep the values of the layer, since
    zeros would give a closed gate no gradient.

    Args:
        layer: The DGConv2d.
        weight: Weight of the convolution, of shape (C_out, C_in / groups, kernel height, kernel width).

    Raises:
        ValueError: If the shape does not fit, or if the layer cannot have as many groups.
    """
    shape = (layer.out_channels, layer.in_channels, *layer.kernel_size)
    if weight.ndim != 4 or weight.shape[0] != shape[0] or weight.shape[2:] != shape[2:] or not weight.shape[1]:
        raise ValueError(
            f"the checkpoint has a weight of shape {tuple(weight.shape)} and no gates; expected a group "
            f"convolution with a weight of shape ({shape[0]}, {shape[1]} / groups, {shape[2]}, {shape[3]})"
        )
    groups, rest = divmod(shape[1], weight.shape[1])
    num_bits = layer.gate.numel()
    if rest or groups not in [1 << closed for closed in range(num_bits + 1)]:
        raise ValueError(
            f"the checkpoint has a group convolution with {shape[1] / weight.shape[1]:g} groups; for {shape[1]} -> "
            f"{shape[0]} channels the number must be a power of two up to {1 << num_bits}"
        )
    if layer.weight.is_meta:  # no values to keep
        dense = torch.empty(shape, device=weight.device, dtype=weight.dtype)
        nn.init.kaiming_uniform_(dense, a=math.sqrt(5))  # as torch.nn.Conv2d.reset_parameters
    else:
        dense = layer.weight.detach().to(weight.device, weight.dtype, copy=True)
    diagonal_blocks(dense, groups).copy_(weight.detach().unflatten(0, (groups, -1)))
    return dense, contiguous_gates(groups, torch.empty(num_bits, device=weight.device, dtype=weight.dtype))


def contiguous_gates(groups: int, like: Tensor) -> Tensor:
    """Return gates for a number of contiguous groups: the gates of the most significant bits are closed."""
    gate = torch.full_like(like, PRETRAINED_GATE)
    gate[: groups.bit_length() - 1] = -PRETRAINED_GATE
    return gate
