"""The fast form against the masked dense form, for every width of the groups in which weight gradients are computed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from conftest import DEVICES, SORT_NESTED
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from timm_dgconv.ops import autograd, grouped
from timm_dgconv.ops.algebra import read_bits
from timm_dgconv.ops.naive import connectivity, masked_conv2d

GEOMETRY: Any = ([1, 2], [1, 0], [1, 1])
EXACT = dict(rtol=1e-10, atol=1e-10)


class Problem(NamedTuple):
    """A layer."""

    gate: tuple[float, ...]
    form: tuple[bool, bool]
    q_out: int
    q_in: int
    kernel_size: tuple[int, int]
    channels_last: bool

    @property
    def channels(self) -> tuple[int, int]:
        return self.q_out << len(self.gate), self.q_in << len(self.gate)

    def random(self, *shape: int) -> Tensor:
        return grouped.in_format(torch.randn(shape, dtype=torch.float64), self.channels_last)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    gate = draw(st.lists(st.sampled_from([-0.5, -0.25, 0.25, 0.5]), min_size=1, max_size=5))
    q_out, q_in, *kernel_size = (draw(st.integers(1, 3)) for _ in range(4))
    torch.manual_seed(draw(st.integers(0, 1000)))
    form = draw(st.sampled_from(SORT_NESTED))
    return Problem(tuple(gate), form, q_out, q_in, (kernel_size[0], kernel_size[1]), draw(st.booleans()))


widths = st.sampled_from([1, 2, 3, 4, 8, 16, 1024])


class Convolutions(TorchDispatchMode):
    """Records the number of groups of the convolutions for weights and gates."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default and args[-1][1]:
            self.groups.append(args[-2])
        elif func is torch.ops.aten.convolution.default:
            self.groups.append(args[-1])
        return func(*args, **(kwargs or {}))


def check(problem: Problem, width: int, device: str) -> None:
    gate = torch.tensor(problem.gate, dtype=torch.float64, requires_grad=True)
    x = problem.random(2, problem.channels[1], 5, 6).requires_grad_()
    weight = problem.random(*problem.channels, *problem.kernel_size).requires_grad_()
    y = masked_conv2d(x, weight, None, gate, *GEOMETRY, *problem.form)
    grad = problem.random(*y.shape)
    expected = torch.autograd.grad(y, [x, weight, gate], grad)
    grad, x, weight, gate = (tensor.detach().to(device) for tensor in (grad, x, weight, gate))
    options = (problem.gate, *GEOMETRY, *problem.form)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(grouped, "MIN_CHANNELS", dict.fromkeys(grouped.MIN_CHANNELS, width))
        output = autograd._output(x, weight, None, gate, *options)
        for needs_gate in (True, False):
            with Convolutions() as convolutions:
                grads = autograd._gradients(grad, x, weight, gate, *options, (True, True, needs_gate))
            found = [tensor.cpu() for tensor in (output, *grads)[: 3 + needs_gate]]
            assert_close(found, [y.detach(), *expected[: 2 + needs_gate]], **EXACT)
            assert grads[1].stride() == weight.stride()
            assert not found[2][connectivity(gate.cpu(), *problem.channels, *problem.form) == 0].any()
            bits = read_bits(problem.gate, *problem.form)
            plan = grouped.plan_layer(weight, grad.dtype, bits, needs_gate)
            counted = [plan.wide_groups, *[plan.groups] * len(plan.outside)]
            assert sorted(convolutions.groups) == sorted(counted)
            assert len(counted) == 1 or not problem.form[1], "nested layers compute one convolution, of any width"


@given(problems(), widths)
def test_all_widths_agree_with_the_masked_dense_form(problem: Problem, width: int) -> None:
    check(problem, width, "cpu")


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("form", SORT_NESTED)
@pytest.mark.parametrize("width", [1, 4, 1024])
def test_all_widths_agree_on_cuda(width: int, form: tuple[bool, bool], channels_last: bool, device: str) -> None:
    check(Problem((0.5, -0.5, 0.25, -0.25, -1.0), form, 2, 1, (3, 3), channels_last), width, device)


@pytest.mark.parametrize("arrange", [lambda w: w[:, :1].expand_as(w), lambda w: w.transpose(2, 3)])
@pytest.mark.parametrize("form", SORT_NESTED)
def test_a_weight_in_no_memory_format_gets_a_gradient_of_its_own_memory(
    form: tuple[bool, bool], arrange: Callable[[Tensor], Tensor]
) -> None:
    """The elements of an expanded weight share memory. The elements of its gradient must not."""
    weight = arrange(torch.randn(16, 16, 3, 3, dtype=torch.float64))
    leaf, gate = weight.clone().requires_grad_(), torch.tensor([0.5, -0.5, 1.0, -1.0], dtype=torch.float64)
    x, options = torch.randn(1, 16, 4, 4, dtype=torch.float64), (gate.tolist(), *GEOMETRY, *form)
    y = masked_conv2d(x, leaf, None, gate, *GEOMETRY, *form)
    assert_close(autograd._output(x, weight, None, gate, *options), y, **EXACT)
    _, grad, _ = autograd._gradients(torch.ones_like(y), x, weight, gate, *options, (False, True, False))
    assert_close(grad, torch.autograd.grad(y.sum(), leaf)[0], **EXACT)
    grad.add_(1)  # fails if elements share memory
