"""Dynamic grouping convolution: a convolution that learns its number of groups."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.common_types import _size_2_t

from timm_dgconv import group_conv, grouping, steering
from timm_dgconv.grouping import connectivity
from timm_dgconv.loading import LoadsWhole

# One node in a torch.fx graph: its shapes do not depend on the input.
torch.fx.wrap("connectivity")

LOADED_GATE = 0.01
"""Distance from zero of the gates of a loaded group convolution.

The smallest of those tried at which fine-tuning moves no gate in the first epoch, and some later; at the initial 1e-8
the first step moves half of them (benchmarks/results/gate_margin.md).
"""


class DGConv2d(LoadsWhole, nn.Conv2d):
    """Dynamic grouping convolution (DGConv, https://arxiv.org/abs/1908.05867): it learns its number of groups.

    One gate for every power of two in the channel counts says whether channels that differ in that bit of their number
    are connected; a gate is open where its sign bit is clear. With m closed gates the layer computes a group
    convolution with 2^m groups. Gates are binarised in the forward pass and trained straight-through.

    An average of such layers (exponential, stochastic, of checkpoints) averages the gates as numbers, and the sign of
    that decides: 0.0 is open, and the groups may be those of none of the averaged layers. Float16 rounds the initial
    gates to zeros, whose signs an average does not keep.

    Args:
        in_channels: Number of input channels C_in.
        out_channels: Number of output channels C_out; both must be even.
        kernel_size: Kernel size.
        stride: Stride.
        padding: Zero padding on all sides, or "same" or "valid".
        dilation: Dilation.
        bias: Add a learnable bias.
        sort: Closed gates act on the most significant bits, so that the groups are contiguous channels.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Attributes:
        weight: Weight of shape (C_out, C_in, kernel height, kernel width); the forward pass uses the connected part.
        bias: Bias of shape (C_out,) or None.
        gate: Gates of shape (K,), K the number of powers of two that C_in and C_out share. gate[0] belongs to the most
            significant bit of the channel number.

    Shape:
        Input (N, C_in, H, W) or (C_in, H, W), output (N, C_out, H_out, W_out) or (C_out, H_out, W_out), as
        torch.nn.Conv2d.

    Raises:
        ValueError: If the channel counts have no common factor two.
        TypeError: For `groups` and other arguments that it does not take.

    Examples:
        >>> conv = DGConv2d(64, 64, kernel_size=3, padding=1, bias=False)
        >>> conv(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 64, 7, 7])
        >>> conv.num_groups in (1, 2, 4, 8, 16, 32, 64)
        True
    """

    # torch.jit.script would compile properties; reading the gates on the host is nothing for a graph.
    __jit_unused_properties__ = ("num_groups",)

    gate: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t = 0,
        dilation: _size_2_t = 1,
        bias: bool = True,
        sort: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unexpected: Any,
    ) -> None:
        if "groups" in unexpected:
            raise TypeError(
                f"DGConv2d takes no groups={unexpected['groups']!r}: it learns them. For a fixed number of groups use "
                f"torch.nn.Conv2d(..., groups={unexpected['groups']!r})"
            )
        if unexpected:
            values = ", ".join(f"{name}={value!r}" for name, value in unexpected.items())
            raise TypeError(
                f"DGConv2d takes no {values}; it takes sort and the arguments of torch.nn.Conv2d up to bias"
            )
        num_bits = grouping.num_bits(in_channels, out_channels)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.sort = sort
        self.spans: group_conv.Spans | None = None
        self.complexity_term: tuple[steering.ComplexityTerm, int] | None = None  # and the place of this layer in it
        self.gate = nn.Parameter(torch.empty(num_bits, device=device, dtype=dtype))
        self.reset_gate()

    def reset_parameters(self) -> None:
        """Initialise weight and bias as torch.nn.Conv2d does, and the gates as `reset_gate` does."""
        super().reset_parameters()
        if hasattr(self, "gate"):  # not yet when torch.nn.Conv2d.__init__ calls
            self.reset_gate()

    def reset_gate(self) -> None:
        """Open or close every gate with probability 1/2, at +-1e-8: the first gradient decides (original release)."""
        with torch.no_grad():
            self.gate.copy_(torch.where(torch.rand_like(self.gate) < 0.5, -1e-8, 1e-8))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of copies and unpickled layers, which are steered as the original is."""
        super().__setstate__({"complexity_term": None, **state})
        if self.complexity_term is not None:
            steering.follow(self)

    @property
    def num_groups(self) -> int:
        """Number of groups now; reads the gates on the host, and raises RuntimeError if one is nan or has no value."""
        return 1 << sum(group_conv.closed_on_host(self.gate))

    def connectivity(self) -> Tensor:
        """The 0/1 matrix U of shape (C_out, C_in), 1 where an input channel feeds an output channel.

        Differentiable in the gates (straight-through), in the dtype of the weight.
        """
        return connectivity(self.gate, self.out_channels, self.in_channels, self.sort).to(self.weight.dtype)

    def complexity(self) -> Tensor:
        """Number of connected channel pairs, a differentiable scalar; see `timm_dgconv.grouping.complexity`."""
        return grouping.complexity(self.gate, self.out_channels, self.in_channels)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """Load this layer's own format, the original release's, or a plain group convolution's weight without gates."""
        try:
            self._adopt(state_dict, prefix)
        except ValueError as error:
            *_, error_msgs = args
            error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
        else:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _adopt(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Rewrite the entries of this layer to its own format, in place."""
        for name in ("weight", "bias"):  # the original release has its convolution in a child
            if f"{prefix}conv.{name}" in state_dict:
                state_dict.setdefault(f"{prefix}{name}", state_dict.pop(f"{prefix}conv.{name}"))
        for name in ("D", "I"):  # its constants: a 2x2 identity and ones
            state_dict.pop(f"{prefix}{name}", None)

        found = {name: state_dict[f"{prefix}{name}"] for name in ("gate", "weight") if f"{prefix}{name}" in state_dict}
        if not all(isinstance(value, Tensor) for value in found.values()):
            return  # torch says so
        gate, weight = found.get("gate"), found.get("weight")
        if gate is not None and gate.shape != self.gate.shape:
            raise ValueError(
                f"the checkpoint has {gate.numel()} gates of shape {tuple(gate.shape)}, expected {self.gate.numel()} "
                f"for {self.in_channels} -> {self.out_channels} channels; load it into a model of the width that it "
                "was saved from"
            )
        if gate is None and weight is not None:
            state_dict[f"{prefix}weight"], state_dict[f"{prefix}gate"] = self._from_group_convolution(weight)

    def _from_group_convolution(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Dense weight and gates that compute the same as a group convolution with this weight.

        Connections between its groups keep this layer's values: at zero, a closed gate would have no gradient. The
        gates are `LOADED_GATE` away from zero.
        """
        shape = (self.out_channels, self.in_channels, *self.kernel_size)
        if weight.ndim != 4 or weight.shape[0] != shape[0] or weight.shape[2:] != shape[2:] or not weight.shape[1]:
            raise ValueError(
                f"the checkpoint has a weight of shape {tuple(weight.shape)} and no gates; expected that of a group "
                f"convolution, ({shape[0]}, {shape[1]} / groups, {shape[2]}, {shape[3]})"
            )
        groups, rest = divmod(shape[1], weight.shape[1])
        num_bits = self.gate.numel()
        if rest or groups not in [1 << closed for closed in range(num_bits + 1)]:
            raise ValueError(
                f"the checkpoint has a group convolution with {shape[1] / weight.shape[1]:g} groups; for {shape[1]} -> "
                f"{shape[0]} channels the number must be a power of two up to {1 << num_bits}"
            )
        if self.weight.is_meta:  # no values to keep
            dense = torch.empty(shape, device=weight.device, dtype=weight.dtype)
            nn.init.kaiming_uniform_(dense, a=math.sqrt(5))  # as torch.nn.Conv2d.reset_parameters
        else:
            dense = self.weight.detach().to(weight.device, weight.dtype, copy=True)
        grouping.group_blocks(dense, groups).copy_(weight.detach().unflatten(0, (groups, -1)))
        gate = torch.full((num_bits,), LOADED_GATE, device=weight.device, dtype=weight.dtype)
        gate[: groups.bit_length() - 1] = -LOADED_GATE  # contiguous groups: the most significant bits are closed
        return dense, gate

    def extra_repr(self) -> str:
        """As torch.nn.Conv2d, with `sort` where it is on."""
        return super().extra_repr() + (", sort=True" if self.sort else "")

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the connected part of the weight."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._masked_dense(input)
        else:  # torch.jit.script does not look at this branch
            if group_conv.is_supported(input, self.weight, self.gate):
                return self._grouped(input)
            group_conv.refuse_nan(self.gate)
            return self._masked_dense(input)

    def _masked_dense(self, input: Tensor) -> Tensor:
        """The form in which the open set is data: for graphs that outlive it."""
        weight = self.weight * self.connectivity()[:, :, None, None]
        return self._conv_forward(input, weight, self.bias)

    def _grouped(self, input: Tensor) -> Tensor:
        """The form in which the open set is known."""
        x = input if input.ndim == 4 else input.unsqueeze(0)
        if isinstance(self.padding, str):
            reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            height, width = (0, 0) if self.padding == "valid" else reach
            x = F.pad(x, (0, width % 2, 0, height % 2))  # where the two sides differ
            padding = (height // 2, width // 2)
        else:
            padding = self.padding  # type: ignore[assignment]
        y = group_conv.dgconv2d(
            x, self.weight, self.bias, self.gate, self.stride, padding, self.dilation, self.sort, self.spans
        )
        return y if input.ndim == 4 else y.squeeze(0)
