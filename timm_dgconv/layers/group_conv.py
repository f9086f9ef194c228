"""The group convolution that a DGConv2d computes, once its groups are learned."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GroupConv2d(nn.Conv2d):
    """A torch.nn.Conv2d whose groups need not be ranges of channels.

    A DGConv2d connects channels whose indices differ in open bits. As a group convolution it needs other orders of the
    input and output channels. `timm_dgconv.compact` moves these orders into the weights of other layers, if it can.

    Args:
        *args: Arguments of torch.nn.Conv2d.
        **kwargs: Arguments of torch.nn.Conv2d.

    Attributes:
        in_order: Order of shape (C_in,) in which the convolution reads the input channels, or None for their own order.
        out_order: Order of shape (C_out,) in which the output has the channels of the convolution, or None.

    Shape:
        As torch.nn.Conv2d.
    """

    in_order: Tensor | None
    out_order: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("in_order", None)
        self.register_buffer("out_order", None)

    def set_orders(self, in_order: Tensor | None, out_order: Tensor | None) -> None:
        """Set both orders. An order that changes nothing becomes None."""
        for name, order in (("in_order", in_order), ("out_order", out_order)):
            if order is not None and torch.equal(order, torch.arange(len(order), device=order.device)):
                order = None
            setattr(self, name, order)

    def num_orders(self) -> int:
        """Return how many of the two orders move channels."""
        return sum(order is not None for order in (self.in_order, self.out_order))

    def forward(self, input: Tensor) -> Tensor:
        """Convolve the input."""
        in_order, out_order = self.in_order, self.out_order  # torch.jit.script narrows local variables only
        if in_order is not None:
            input = input.index_select(-3, in_order)
        output = F.conv2d(input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return output if out_order is None else output.index_select(-3, out_order)

    def fuse(self) -> nn.Conv2d:
        """Return the module for inference, as `timm.utils.reparameterize_model` requests it.

        This is a torch.nn.Conv2d if no channels move.
        """
        if self.num_orders():
            return self
        conv = group_conv_like(self, self.groups, nn.Conv2d)
        conv.load_state_dict(self.state_dict())
        return conv

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load the orders, which exist only in some layers."""
        for name, channels in (("in_order", self.in_channels), ("out_order", self.out_channels)):
            has_order = f"{prefix}{name}" in state_dict
            setattr(self, name, torch.arange(channels, device=self.weight.device) if has_order else None)
        super()._load_from_state_dict(state_dict, prefix, *args)


def group_conv_like(conv: nn.Conv2d, groups: int, kind: Any = GroupConv2d) -> Any:
    """Return a new group convolution with the shape, device, dtype and flags of another convolution.

    Args:
        conv: The other convolution.
        groups: Number of groups.
        kind: Class of the new convolution.
    """
    result = kind(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=groups,
        bias=conv.bias is not None,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    ).train(conv.training)
    for new, old in zip(result.parameters(), (conv.weight, conv.bias), strict=False):
        new.requires_grad_(old is not None and old.requires_grad)
    return result
