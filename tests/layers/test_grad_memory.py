"""The memory of weight gradients: it is used again, and never while a tensor refers to it."""

import pytest
import torch
from conftest import conv_with
from torch import nn
from torch.testing import assert_close

from timm_dgconv.layers import grad_memory


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_memory_is_used_again_when_nothing_refers_to_it(memory_format: torch.memory_format) -> None:
    weight = nn.Parameter(torch.randn(16, 8, 3, 3).to(memory_format=memory_format))
    first = grad_memory.zeros_like(weight)
    assert first.stride() == weight.stride()
    address = first.data_ptr()
    first.fill_(1)
    view = first[1:]
    del first
    second = grad_memory.zeros_like(weight)
    assert second.data_ptr() != address
    assert not second.any()
    assert view.eq(1).all()
    del view
    third = grad_memory.zeros_like(weight)
    assert third.data_ptr() == address
    assert not third.any()


def test_a_held_gradient_is_not_written_to() -> None:
    conv = conv_with("1010")
    x = torch.randn(2, 16, 5, 5)
    conv(x).sum().backward()
    held, before = conv.weight.grad, conv.weight.grad.clone()
    conv.zero_grad()
    conv(2 * x).sum().backward()
    assert torch.equal(held, before)
    assert_close(conv.weight.grad, 2 * before)


def test_the_dtype_of_a_parameter_changes() -> None:
    """model.double() keeps the Parameter, whose last gradient had another size."""
    conv = conv_with("1010", bias=False)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        conv.to(dtype)
        conv.zero_grad()
        x = torch.randn(1, 16, 4, 4, dtype=dtype)
        conv(x).square().sum().backward()
        expected = torch.autograd.grad(conv.masked_dense(x).square().sum(), conv.weight)[0]
        assert_close(conv.weight.grad, expected)


def test_expanded_weight() -> None:
    """The elements of an expanded weight share memory. The elements of its gradient must not."""
    conv = conv_with("1010", kernel_size=1, dtype=torch.float64)
    conv.weight = nn.Parameter(conv.weight[:, :1].detach().expand(16, 16, 1, 1))
    x = torch.randn(1, 16, 4, 4, dtype=torch.float64)
    grads = [torch.autograd.grad(form(x).square().sum(), conv.weight)[0] for form in (conv, conv.masked_dense)]
    assert_close(*grads)
