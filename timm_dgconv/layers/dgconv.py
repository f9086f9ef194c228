"""Dynamic grouping convolution: a convolution that learns its number of groups."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.common_types import _size_2_t

from timm_dgconv.layers import dgconv_op, gate_cache, grouping
from timm_dgconv.layers.group_conv import GroupConv2d, group_conv_like
from timm_dgconv.layers.grouping import connectivity

# A leaf of torch.fx: otherwise the graph would contain the construction of the connectivity.
torch.fx.wrap("connectivity")

PRETRAINED_GATE = 0.01
"""Distance from zero of the gates of a loaded group convolution.

It is the smallest tested distance at which fine-tuning flips no gate in the first epoch and some gates later. At
the initial distance of 1e-8 the first step flips half of the gates (benchmarks/results/gate_margin.md).
"""


class DGConv2d(nn.Conv2d):
    """Dynamic grouping convolution (DGConv, https://arxiv.org/abs/1908.05867): a convolution that learns its groups.

    The layer has one gate per power of two that divides both channel counts. Gate k belongs to bit k of the channel
    index, the most significant bit first. An open gate connects the channels whose indices differ in its bit. A gate is
    open if its sign bit is 0. With m closed gates the layer computes a group convolution with 2^m groups. The forward
    pass binarises the gates, and the straight-through estimator trains them.

    An average of several layers (EMA, SWA, averaged checkpoints) averages the values of the gates, and the sign of the
    average decides. A gate with average 0.0 is open. The average may have groups that none of the averaged layers has.
    float16 rounds the initial gates to +-0.0, and an average does not preserve the sign of zeros.

    Args:
        in_channels: Number of input channels C_in.
        out_channels: Number of output channels C_out. Both counts must be even.
        kernel_size: Kernel size.
        stride: Stride.
        padding: Zero padding on all sides, or "same" or "valid".
        dilation: Dilation.
        bias: Add a learnable bias.
        sort: Apply the closed gates to the most significant bits, so that each group is a range of channels.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        groups: Not supported, since the layer learns its groups.

    Attributes:
        weight: Weight of shape (C_out, C_in, kernel height, kernel width). The forward pass uses the connected part.
        bias: Bias of shape (C_out,) or None.
        gate: Gates of shape (K,), where 2^K is the largest power of two that divides C_in and C_out. gate[0] belongs to
            the most significant bit of the channel index.

    Shape:
        Input (N, C_in, H, W) or (C_in, H, W), output (N, C_out, H_out, W_out) or (C_out, H_out, W_out), as
        torch.nn.Conv2d.

    Raises:
        ValueError: If a channel count is not even.
        TypeError: If `groups` is given.

    Examples:
        >>> conv = DGConv2d(64, 64, kernel_size=3, padding=1, bias=False)
        >>> conv(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 64, 7, 7])
        >>> conv.num_groups in (1, 2, 4, 8, 16, 32, 64)
        True
    """

    # torch.jit.script compiles properties, and a graph cannot read the gates on the host.
    __jit_unused_properties__ = ("closed", "num_groups")

    gate: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t = 0,
        dilation: _size_2_t = 1,
        *,
        bias: bool = True,
        sort: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        groups: None = None,
    ) -> None:
        if groups is not None:
            raise TypeError(
                f"DGConv2d learns its groups and takes no groups={groups!r}; for a fixed number of groups use "
                f"torch.nn.Conv2d(..., groups={groups!r})"
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
        self.gate = nn.Parameter(torch.empty(num_bits, device=device, dtype=dtype))
        gate_cache.share_reader([self])
        self.reset_gate()

    def reset_parameters(self) -> None:
        """Initialise weight and bias as torch.nn.Conv2d does, and the gates as `reset_gate` does."""
        super().reset_parameters()
        if hasattr(self, "gate"):  # torch.nn.Conv2d.__init__ calls this before the gates exist
            self.reset_gate()

    def reset_gate(self, groups: int | None = None) -> None:
        """Initialise the gates.

        Args:
            groups: Start with this number of contiguous groups, and gates at `PRETRAINED_GATE` from zero. By default
                every gate is +1e-8 or -1e-8 at random, so that the first step can flip any gate (original release).

        Raises:
            ValueError: If the layer cannot have this number of groups.
        """
        if groups is not None and groups not in [1 << n for n in range(len(self.gate) + 1)]:
            raise ValueError(f"groups={groups} must be a power of two and at most {1 << len(self.gate)}")
        with torch.no_grad():
            if groups is None:
                self.gate.copy_(torch.where(torch.rand_like(self.gate) < 0.5, -1e-8, 1e-8))
            else:  # contiguous groups: the most significant bits are closed
                self.gate.fill_(PRETRAINED_GATE)[: groups.bit_length() - 1].neg_()

    @property
    def closed(self) -> tuple[bool, ...]:
        """Whether each gate is closed.

        Raises:
            RuntimeError: If a gate is nan, or if this process does not have the values of all gates.
        """
        num_bits = grouping.num_bits(self.in_channels, self.out_channels)
        if self.gate.numel() != num_bits or not (self.gate.is_meta or self.gate.untyped_storage().nbytes()):
            raise RuntimeError(
                "FullyShardedDataParallel has sharded the gates of a DGConv2d; read them inside "
                "FullyShardedDataParallel.summon_full_params(model), or shard with torch.distributed.fsdp.fully_shard"
            )
        return gate_cache.closed_on_host(self.gate)

    @property
    def num_groups(self) -> int:
        """Current number of groups; raises as `closed` does."""
        return 1 << sum(self.closed)

    def connectivity(self) -> Tensor:
        """Return the 0/1 matrix U of shape (C_out, C_in): 1 where an input channel feeds an output channel.

        It has the dtype of the weight and is differentiable in the gates by the straight-through estimator.
        """
        return connectivity(self.gate, self.out_channels, self.in_channels, self.sort).to(self.weight.dtype)

    def complexity(self) -> Tensor:
        """Return the number of connected channel pairs; see `timm_dgconv.layers.grouping.complexity`."""
        return grouping.complexity(self.gate, self.out_channels, self.in_channels)

    @torch.no_grad()
    def to_group_conv(self, groups: int | None = None) -> GroupConv2d:
        """Return a group convolution with the connected part of the weight.

        Args:
            groups: Number of contiguous groups. The default are the groups of this layer, so the result computes the
                same.

        Raises:
            ValueError: If `groups` does not divide the channel counts.
            RuntimeError: As `closed`.
        """
        weight, bias, orders = self.weight, self.bias, None
        if groups is None:
            groups = self.num_groups
            in_order, out_order = (
                grouping.channel_order(self.gate, channels, self.sort)
                for channels in (self.in_channels, self.out_channels)
            )
            weight, bias = weight[out_order][:, in_order], None if bias is None else bias[out_order]
            orders = in_order, out_order.argsort()
        elif groups < 1 or self.in_channels % groups or self.out_channels % groups:
            raise ValueError(f"groups={groups} does not divide the {self.in_channels} -> {self.out_channels} channels")
        result: GroupConv2d = group_conv_like(self, groups)
        result.weight.copy_(grouping.group_blocks(weight, groups).flatten(0, 1))
        if bias is not None and result.bias is not None:
            result.bias.copy_(bias)
        if orders is not None:
            result.set_orders(*orders)
        return result

    def fuse(self) -> nn.Conv2d:
        """Return the module for inference, as `timm.utils.reparameterize_model` requests it."""
        return self.to_group_conv().fuse()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """Load the format of this layer, of the original release, or of a plain group convolution without gates."""
        try:
            self._remap_state_dict(state_dict, prefix)
        except ValueError as error:
            *_, error_msgs = args
            error_msgs.append(f"{prefix[:-1]}: {error}" if prefix else str(error))
        else:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _remap_state_dict(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Rewrite the entries of this layer to its own format, in place."""
        for name in ("weight", "bias"):  # the original release has a child module `conv`
            if f"{prefix}conv.{name}" in state_dict:
                state_dict.setdefault(f"{prefix}{name}", state_dict.pop(f"{prefix}conv.{name}"))
        for name in ("D", "I"):  # constants of the original release: a 2x2 identity and 2x2 ones
            state_dict.pop(f"{prefix}{name}", None)

        if f"{prefix}in_order" in state_dict or f"{prefix}out_order" in state_dict:
            raise ValueError(
                "the checkpoint is compact and has no weights between its groups; build the model with the `groups` of "
                "its config.json"
            )
        gate, weight = state_dict.get(f"{prefix}gate"), state_dict.get(f"{prefix}weight")
        if isinstance(gate, Tensor) and gate.shape != self.gate.shape:
            raise ValueError(
                f"the checkpoint has {gate.numel()} gates of shape {tuple(gate.shape)}, expected {self.gate.numel()} "
                f"for {self.in_channels} -> {self.out_channels} channels; load it into a model of the width that it "
                "was saved from"
            )
        if f"{prefix}gate" not in state_dict and isinstance(weight, Tensor):
            state_dict[f"{prefix}weight"], state_dict[f"{prefix}gate"] = self._from_group_conv(weight)

    def _from_group_conv(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the dense weight and the gates that compute the same as a group convolution with this weight.

        The gates are `PRETRAINED_GATE` away from zero. The connections between groups keep the values of this layer,
        since zeros would give a closed gate no gradient.
        """
        shape = (self.out_channels, self.in_channels, *self.kernel_size)
        if weight.ndim != 4 or weight.shape[0] != shape[0] or weight.shape[2:] != shape[2:] or not weight.shape[1]:
            raise ValueError(
                f"the checkpoint has a weight of shape {tuple(weight.shape)} and no gates; expected a group "
                f"convolution with a weight of shape ({shape[0]}, {shape[1]} / groups, {shape[2]}, {shape[3]})"
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
        gate = torch.full((num_bits,), PRETRAINED_GATE, device=weight.device, dtype=weight.dtype)
        gate[: groups.bit_length() - 1] = -PRETRAINED_GATE  # contiguous groups: the most significant bits are closed
        return dense, gate

    def extra_repr(self) -> str:
        """Return torch.nn.Conv2d's representation, with `sort` if it is set."""
        return super().extra_repr() + (", sort=True" if self.sort else "")

    def forward(self, input: Tensor) -> Tensor:
        """Convolve the input with the connected part of the weight."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self.masked_dense(input)
        else:  # torch.jit.script does not compile this branch
            if dgconv_op.is_supported(input, self.weight, self.gate):
                return self._grouped(input)
            gate_cache.refuse_nan(self.gate)
            return self.masked_dense(input)

    def masked_dense(self, input: Tensor) -> Tensor:
        """Compute the same as a dense convolution with a masked weight, as the original release does.

        Exported, traced and scripted graphs contain this form, since the gates are data there.
        """
        weight = self.weight * self.connectivity()[:, :, None, None]
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation)

    def _grouped(self, input: Tensor) -> Tensor:
        """Compute a group convolution, whose groups the host knows."""
        x = input if input.ndim == 4 else input.unsqueeze(0)
        if isinstance(self.padding, str):
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            height, width = (0, 0) if self.padding == "valid" else total
            x = F.pad(x, (0, width % 2, 0, height % 2))  # "same" pads one more at the end if the total is odd
            padding = (height // 2, width // 2)
        else:
            padding = self.padding  # type: ignore[assignment]
        reader: Any = self.gate_reader
        closed = None if torch.compiler.is_compiling() else reader.closed(self)
        y = dgconv_op.dgconv2d(
            x, self.weight, self.bias, self.gate, self.stride, padding, self.dilation, self.sort, closed=closed
        )
        return y if input.ndim == 4 else y.squeeze(0)
