"""Dynamic grouping convolution: a convolution that learns its number of groups."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_dgconv import _compat
from timm_dgconv.layers import gate_reader
from timm_dgconv.layers.checkpoints import GATE_NAMES, INITIAL_GATE, contiguous_gates, remap_state_dict
from timm_dgconv.ops import algebra, autograd
from timm_dgconv.ops.grouped import diagonal_blocks
from timm_dgconv.ops.naive import connectivity, masked_conv2d

IntOrPair = int | tuple[int, int]


def check_flags(**flags: Any) -> None:
    """Refuse arguments that are not bools, since any string is true.

    Raises:
        TypeError: If one is neither True nor False.
    """
    for name, value in flags.items():
        if value not in (False, True):
            raise TypeError(f"{name}={value!r} is not a bool; use True or False")


class DGConv2d(nn.Conv2d):
    """Dynamic grouping convolution (DGConv, https://arxiv.org/abs/1908.05867): a convolution that learns its groups.

    The layer has one gate per power of two that divides both channel counts. A gate is open if its sign bit is 0. With
    m closed gates the layer computes a group convolution with 2^m groups. The forward pass binarises the gates, and the
    straight-through estimator trains them.

    Each group is a range of channels, and the gates that can flip next, those nearest to zero, receive the slope of
    what their flip would do. The paper has two other forms, see `sort` and `nested`. `timm_dgconv/ops/README.md`
    derives all three.

    An average of models (EMA, SWA) averages the values of the gates, and the sign of the average decides. float16
    rounds the initial gates to +-0.0, and an average does not preserve the sign of zeros.

    Args:
        in_channels: Number of input channels C_in.
        out_channels: Number of output channels C_out. Both counts must be even.
        kernel_size: Kernel size.
        stride: Stride.
        padding: Padding on all sides, or "same" or "valid".
        dilation: Dilation.
        bias: Add a learnable bias.
        padding_mode: As in torch.nn.Conv2d.
        sort: Let the closed gates act on the most significant bits of the channel index, so that each group is a range
            of channels (an option of the original release). With False, gate k acts on bit k, the most significant bit
            first: an open gate connects the channels whose indices differ in its bit (the networks of the paper).
        nested: Give gates the slope of their flip, as above. With False, every gate learns the slope of its bit, as in
            the original release. ``sort=False`` always does.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        groups: Not supported, since the layer learns its groups.

    Attributes:
        weight: Weight of shape (C_out, C_in, kernel height, kernel width). The forward pass uses the connected part.
        bias: Bias of shape (C_out,) or None.
        gate: Gates of shape (K,), where 2^K is the largest power of two that divides C_in and C_out. The parameter is
            named `sorted_gate` if `sort` is true, and `unsorted_gate` otherwise: a checkpoint says how its gates are
            read. Loading one sets `sort`.

    Shape:
        Input (N, C_in, H, W) or (C_in, H, W), output (N, C_out, H_out, W_out) or (C_out, H_out, W_out), as
        torch.nn.Conv2d.

    Raises:
        ValueError: If a channel count is not even.
        TypeError: If `groups` is given, or if `sort` or `nested` is not a bool.

    Examples:
        >>> conv = DGConv2d(64, 64, kernel_size=3, padding=1, bias=False)
        >>> conv(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 64, 7, 7])
        >>> conv.num_groups in (1, 2, 4, 8, 16, 32, 64)
        True
    """

    sorted_gate: Tensor
    unsorted_gate: Tensor
    __constants__ = [*nn.Conv2d.__constants__, "nested", "sort"]  # noqa: RUF012
    # torch.jit.script compiles properties, and a graph cannot read the gates on the host.
    __jit_unused_properties__ = ("closed", "gate", "num_bits", "num_groups")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: str | IntOrPair = 0,
        dilation: IntOrPair = 1,
        *,
        bias: bool = True,
        padding_mode: str = "zeros",
        sort: bool = True,
        nested: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        groups: None = None,
    ) -> None:
        if groups is not None:
            raise TypeError(
                f"DGConv2d learns its groups and takes no groups={groups!r}; for a fixed number of groups use "
                f"torch.nn.Conv2d(..., groups={groups!r})"
            )
        check_flags(sort=sort, nested=nested)
        num_bits = algebra.num_bits(in_channels, out_channels)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            bias=bias,
            padding_mode=padding_mode,  # type: ignore[arg-type]
            device=device,
            dtype=dtype,
        )
        self.add_gates(nn.Parameter(torch.empty(num_bits, device=device, dtype=dtype)), sort, nested)
        self.reset_gate()

    def add_gates(self, gate: nn.Parameter, sort: bool, nested: bool) -> None:
        """Add the gates to a convolution without gates. `timm_dgconv.groupable` converts convolutions with this."""
        self.sort, self.nested = bool(sort), bool(nested)  # 1 and 0 come from a command line
        self.gate_reading = None  # of a graph that is being compiled, see `timm_dgconv.layers.gate_reader`
        self.steered: Any = None  # see `timm_dgconv.optim.steering`
        # No checkpoint has set the gates, and `reset_gate` had this argument: see `timm_dgconv.layers.checkpoints`.
        self.gates_are_new = True
        self.initial_groups: int | None = None
        self.register_parameter(GATE_NAMES[sort], gate)
        self._channels_of_gates = (self.out_channels, self.in_channels)

    def reset_parameters(self) -> None:
        """Initialise weight and bias as torch.nn.Conv2d does, and the gates as `reset_gate` does."""
        super().reset_parameters()
        if hasattr(self, "sort"):  # torch.nn.Conv2d.__init__ calls this before the gates exist
            self.reset_gate()

    @torch.no_grad()
    def reset_gate(self, groups: int | None = None) -> None:
        """Initialise the gates.

        Args:
            groups: Start with this number of contiguous groups, and gates at
                `timm_dgconv.layers.checkpoints.PRETRAINED_GATE` from zero. By default every gate is +1e-8 or -1e-8 at
                random, so that the first step can flip any gate (original release).

        Raises:
            ValueError: If the layer cannot have this number of groups.
        """
        self.gates_are_new, self.initial_groups = True, groups
        if groups is None:
            self.gate.copy_(torch.where(torch.rand_like(self.gate) < 0.5, -INITIAL_GATE, INITIAL_GATE))
        elif groups in [1 << closed for closed in range(self.gate.numel() + 1)]:
            self.gate.copy_(contiguous_gates(groups, self.gate))
        else:
            raise ValueError(f"groups={groups} must be a power of two and at most {1 << self.gate.numel()}")

    @property
    def gate(self) -> nn.Parameter:
        """The gates of shape (K,)."""
        return self.sorted_gate if self.sort else self.unsorted_gate  # type: ignore[return-value]

    def set_sort(self, sort: bool) -> None:
        """Let the gates act on other bits, see the argument `sort`. The parameter stays and gets another name."""
        if sort != self.sort:
            gate = self.gate
            delattr(self, GATE_NAMES[self.sort])
            self.register_parameter(GATE_NAMES[sort], gate)
            self.sort = sort

    @property
    def num_bits(self) -> int:
        """Number of gates K.

        Raises:
            RuntimeError: If the channels have changed since the layer was built.
        """
        self._refuse_other_channels(tuple(self.weight.shape))
        out_channels, in_channels = self._channels_of_gates
        return algebra.num_bits(in_channels, out_channels)

    def _refuse_other_channels(self, shape: tuple[int, ...]) -> None:
        """Raise if a weight of this shape has other channels than the gates; sharded weights have other dimensions."""
        if shape[:2] != self._channels_of_gates and len(shape) == 4:
            out_channels, in_channels = self._channels_of_gates
            raise RuntimeError(
                f"the weight of a DGConv2d has shape {shape}, and its gates belong to {in_channels} -> {out_channels} "
                "channels; its channels must not be changed (pruners do): prune the network before "
                "timm_dgconv.groupable, or prune timm_dgconv.compact(model)"
            )

    @property
    def closed(self) -> tuple[bool, ...]:
        """Whether each gate is closed.

        Raises:
            RuntimeError: If a gate is nan, or if this process does not have the values of all gates.
        """
        return algebra.read_bits(gate_reader.read_alone(self), sort=False, nested=False).closed

    @property
    def num_groups(self) -> int:
        """Current number of groups; raises as `closed` does."""
        return 1 << sum(self.closed)

    def closed_bits(self) -> tuple[bool, ...]:
        """Return whether each bit of the channel index is closed, the most significant bit first; raises as above."""
        return algebra.read_bits(gate_reader.read_alone(self), self.sort, self.nested).closed

    def connectivity(self) -> Tensor:
        """Return the 0/1 matrix U of shape (C_out, C_in): 1 where an input channel feeds an output channel.

        It has the dtype of the weight and is differentiable in the gates by the straight-through estimator.
        """
        u = connectivity(self.gate, self.out_channels, self.in_channels, self.sort, self.nested)
        return u.to(self.weight.dtype)

    def complexity(self) -> Tensor:
        """Return the number of connected channel pairs; see `timm_dgconv.ops.algebra.complexity`."""
        return algebra.complexity(self.gate, self.out_channels, self.in_channels, self.sort, self.nested)

    def to_group_conv(self, groups: int | None = None) -> nn.Conv2d:
        """Return a torch.nn.Conv2d with the connected part of the weight. It has the hooks of this layer.

        Without `sort`, the groups may not be ranges of channels. Then the result has the smallest contiguous groups
        that hold them, with zeros between the channels that the gates do not connect.

        Args:
            groups: Number of contiguous groups. By default the result computes the same as this layer.

        Raises:
            ValueError: If `groups` does not divide the channel counts, or if the layer computes something else than its
                class: a subclass, a forward pass of its own, or a weight that a hook computes.
            RuntimeError: As `closed`.
        """
        self.refuse_other_forms()  # torch cannot copy a weight that a hook has computed with gradients
        return copy.deepcopy(self, {id(self.weight): self.weight}).to_group_conv_(groups)

    def refuse_other_forms(self) -> None:
        """Raise if the layer computes something else than its class, see `to_group_conv`."""
        has_own_forward = type(self) is not DGConv2d or _compat.FORWARDS & vars(self).keys()
        if has_own_forward or "weight" not in dict(self.named_parameters()):
            raise ValueError(
                f"a {type(self).__name__} whose forward pass or weight is not that of DGConv2d cannot become a "
                "torch.nn.Conv2d; remove what changes it (torch.nn.utils.prune.remove, remove_weight_norm), or leave "
                "the layer out"
            )

    @torch.no_grad()
    def to_group_conv_(self, groups: int | None = None) -> nn.Conv2d:
        """Turn this layer into a torch.nn.Conv2d, in place; see `to_group_conv`."""
        self.refuse_other_forms()
        weight = self.weight
        if groups is None:
            bits = algebra.read_bits(gate_reader.read_alone(self), self.sort, self.nested)
            groups = 1 << bits.prefix
            weight = weight if bits.is_sorted else weight * self.connectivity()[:, :, None, None]
        elif groups < 1 or self.in_channels % groups or self.out_channels % groups:
            raise ValueError(f"groups={groups} does not divide the {self.in_channels} -> {self.out_channels} channels")
        blocks = torch.empty_like(weight[:, : self.in_channels // groups])  # keeps the memory format
        blocks.copy_(diagonal_blocks(weight, groups).flatten(0, 1))
        delattr(self, GATE_NAMES[self.sort])
        for name in (
            "sort",
            "nested",
            "steered",
            "gates_are_new",
            "initial_groups",
            "gate_reading",
            "_channels_of_gates",
        ):
            vars(self).pop(name, None)
        self.weight = nn.Parameter(blocks, self.weight.requires_grad)
        self.groups = groups
        self.__class__ = nn.Conv2d  # type: ignore[assignment]
        return self

    def fuse(self) -> nn.Conv2d:
        """Return the module for inference, as `timm.utils.reparameterize_model` requests it."""
        return self.to_group_conv()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """Load a format that `timm_dgconv.layers.checkpoints` lists, and report what does not fit as torch does."""
        try:
            remap_state_dict(self, state_dict, prefix)
        except ValueError as error:
            *_, error_msgs = args
            error_msgs.append(f"{prefix[:-1]}: {error}" if prefix else str(error))
        else:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        """Return torch.nn.Conv2d's representation, and the form if it is one of the paper's."""
        form = "" if self.sort and self.nested else ", nested=False" if self.sort else ", sort=False"
        return super().extra_repr() + form

    def forward(self, input: Tensor) -> Tensor:
        """Convolve the input with the connected part of the weight."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self.masked_dense(input)
        else:  # torch.jit.script does not compile this branch
            self._refuse_other_channels((self.out_channels, self.in_channels, *self.kernel_size))
            if not autograd.is_grouped(input, self.weight, self.gate):
                gate_reader.refuse_nan(self)
                return self.masked_dense(input)
            values = gate_reader.read(self)
            if self.steered is not None and torch.is_grad_enabled():
                if self.training and isinstance(values, list):
                    self.steered.notice(values)
                if self.steered.steering.settled:
                    values = algebra.settle(values)
            x, padding = self._pad(input if input.ndim == 4 else input.unsqueeze(0))
            geometry = (self.stride, padding, self.dilation)
            y = autograd.dgconv2d(x, self.weight, self.bias, self.gate, values, *geometry, self.sort, self.nested)
            return y if input.ndim == 4 else y.squeeze(0)

    def masked_dense(self, input: Tensor) -> Tensor:
        """Compute the same as a dense convolution with a masked weight, see `timm_dgconv.ops.naive`."""
        x, padding = self._pad(input)
        if self.sort:  # noqa: SIM108, torch.jit.script compiles one branch of a statement
            gate = self.sorted_gate
        else:
            gate = self.unsorted_gate
        weight = self.weight
        if torch.jit.is_scripting() and not torch.is_grad_enabled():  # type: ignore[attr-defined]
            # TorchScript saves what parameters compute for backward, in inference mode, too, where torch refuses it.
            weight, gate = weight.detach(), gate.detach()
        stride, dilation = [self.stride[0], self.stride[1]], [self.dilation[0], self.dilation[1]]
        return masked_conv2d(x, weight, self.bias, gate, stride, padding, dilation, self.sort, self.nested)

    def _pad(self, input: Tensor) -> tuple[Tensor, list[int]]:
        """Pad the input as far as torch.conv2d cannot, and return the padding that is left."""
        if isinstance(self.padding, str):
            before, after = [0, 0], [0, 0]
            if self.padding == "same":
                total = [self.dilation[n] * (self.kernel_size[n] - 1) for n in range(2)]
                before = [total[0] // 2, total[1] // 2]
                after = [total[0] - before[0], total[1] - before[1]]  # one more if the total is odd
        else:
            before = [self.padding[0], self.padding[1]]
            after = before
        if self.padding_mode != "zeros":
            return F.pad(input, [before[1], after[1], before[0], after[0]], mode=self.padding_mode), [0, 0]
        if after != before:
            input = F.pad(input, [0, after[1] - before[1], 0, after[0] - before[0]])
        return input, before


def _refuse_adapters(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """Refuse what PEFT does to a layer that it adapts, whatever the kind of the adapter: make it a `base_layer`."""
    if name == "base_layer" and isinstance(submodule, DGConv2d):
        raise TypeError(
            "a DGConv2d takes no adapter, since an adapter computes weights between the groups, and merging it loses "
            "them; name the layer in modules_to_save, or adapt timm_dgconv.compact(model)"
        )


nn.modules.module.register_module_module_registration_hook(_refuse_adapters)
