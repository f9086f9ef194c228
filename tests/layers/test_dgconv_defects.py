"""A DGConv2d does what a torch.nn.Conv2d does where users change it, convert it or differentiate it."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import conv_with
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.nn import functional as F
from torch.testing import assert_close

from timm_dgconv import DGConv2d, compact, groupable, skipped_convs

FORMS: list[dict[str, Any]] = [{}, {"sort": False}]

forms = pytest.mark.parametrize("form", FORMS, ids=str)


# 12. Padding


@forms
@pytest.mark.parametrize("when", ["constructed", "set later", "constructed, then compact", "compact, then set"])
@pytest.mark.parametrize("padding", [(2, 1), "same"])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_mode_holds_whenever_it_is_set(mode: str, padding: Any, when: str, form: dict[str, Any]) -> None:
    torch.manual_seed(0)
    given = {"padding_mode": mode} if when.startswith("constructed") else {}
    conv = conv_with("0110", padding=padding, **given, **form).double()
    unpadded = DGConv2d(16, 16, 3, dtype=torch.float64, **form)
    unpadded.load_state_dict(conv.state_dict())
    layer = compact(conv) if "compact" in when else conv
    if "set" in when:
        layer.padding_mode = mode  # type: ignore[assignment]
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    height, width = (1, 1) if padding == "same" else padding
    y, expected = layer(x), unpadded.masked_dense(F.pad(x, (width, width, height, height), mode))
    assert_close(y, expected)
    if layer is conv:
        y.square().sum().backward()
        expected.square().sum().backward()
        assert_close([p.grad for p in conv.parameters()], [p.grad for p in unpadded.parameters()])


# 13. Pruned channels


def count_groups(conv: DGConv2d) -> None:
    conv.num_groups  # noqa: B018


def run(conv: DGConv2d) -> None:
    conv(torch.randn(1, conv.in_channels, 5, 5))


@forms
@pytest.mark.parametrize("use", [count_groups, run])
@pytest.mark.parametrize("channels", [8, 12, 16])  # 16 of 48 channels have as many gates
@pytest.mark.parametrize("side", ["input", "output"])
def test_a_layer_whose_channels_were_changed_under_it_says_so(
    side: str, channels: int, use: Callable[[DGConv2d], Any], form: dict[str, Any]
) -> None:
    conv = conv_with("0110", 48, 48, **form)
    if side == "input":
        conv.in_channels, conv.weight = channels, nn.Parameter(conv.weight.detach()[:, :channels].clone())
    else:
        conv.out_channels, conv.weight = channels, nn.Parameter(conv.weight.detach()[:channels].clone())
        conv.bias = nn.Parameter(conv.bias.detach()[:channels].clone())
    with pytest.raises((RuntimeError, ValueError), match="channels") as error:
        use(conv)
    assert "FullyShardedDataParallel" not in str(error.value)


# 15. A forward of its own


def own_forward(conv: Any) -> None:
    forward = conv.forward
    conv.forward = lambda input: 2 * forward(input)


def own_conv_forward(conv: Any) -> None:
    """Users let pictures repeat so: torch.nn.Conv2d calls this method with its weight."""
    convolve = conv._conv_forward
    conv._conv_forward = lambda input, weight, bias: 2 * convolve(input, weight, bias)


def two_convs(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    convs = {name: nn.Conv2d(16, 16, 3, padding=1, **kwargs) for name in ("first", "second")}
    return nn.Sequential(OrderedDict(convs)).double()


@forms
@pytest.mark.parametrize("change", [own_forward, own_conv_forward])
def test_a_convolution_with_a_forward_of_its_own_is_not_converted(
    change: Callable[[nn.Conv2d], None], form: dict[str, Any]
) -> None:
    model, x = two_convs(), torch.randn(2, 16, 5, 5, dtype=torch.float64)
    change(model.first)
    expected = model(x)
    assert "first" in skipped_convs(model)
    with pytest.raises(ValueError, match="first"):
        groupable(model, where=lambda name, conv: True, **form)
    groupable(model, **form)
    assert type(model.first) is nn.Conv2d
    assert isinstance(model.second, DGConv2d)
    assert_close(model(x), expected)


# 16. Tied convolutions


@forms
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("names", [("weight",), ("weight", "bias")], ids=str)
def test_tied_convolutions_stay_tied(names: tuple[str, ...], groups: int, form: dict[str, Any]) -> None:
    """Tied layers are one function, so their gates are tied, too, if they learn their groups."""
    model, x = two_convs(groups=groups), torch.randn(2, 16, 5, 5, dtype=torch.float64)
    model.third = nn.Conv2d(16, 16, 3, padding=1, dtype=torch.float64)  # to convert if tied ones are not
    for name in names:
        setattr(model.second, name, getattr(model.first, name))
    expected = model(x)
    groupable(model, **form)
    assert_close(model(x), expected)
    apart = [name for name, _ in model.named_parameters() if name.startswith("second.")]
    assert apart == [f"second.{name}" for name in ("weight", "bias") if name not in names]


# 18. Batches of gradients


def gradients(forward: Callable[[Tensor], Tensor], inputs: list[Tensor], batched: bool) -> Any:
    y = forward(inputs[0])
    directions = torch.randn(3, *y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    if batched:
        return torch.autograd.grad(y, inputs, directions, is_grads_batched=True)
    rows = [torch.autograd.grad(y, inputs, direction, retain_graph=True) for direction in directions]
    return tuple(torch.stack(grads) for grads in zip(*rows, strict=True))


def jacobians(forward: Callable[[Tensor], Tensor], inputs: list[Tensor], batched: bool) -> Any:
    return jacobian(forward, inputs[0], vectorize=batched)


def hessians(forward: Callable[[Tensor], Tensor], inputs: list[Tensor], batched: bool) -> Any:
    return hessian(lambda x: forward(x).sigmoid().sum(), inputs[0], vectorize=batched)


@forms
@pytest.mark.parametrize("derivatives", [gradients, jacobians, hessians])
def test_gradients_can_be_batched(derivatives: Callable[..., Any], form: dict[str, Any]) -> None:
    torch.manual_seed(0)
    conv = conv_with("010", 8, 8, **form).double()
    inputs = [torch.randn(1, 8, 4, 4, dtype=torch.float64, requires_grad=True), *conv.parameters()]
    assert_close(derivatives(conv, inputs, batched=True), derivatives(conv.masked_dense, inputs, batched=False))


# 19. Memory of gradients


def larger(grad: Tensor) -> None:
    grad.resize_(2 * grad.numel())


def released(grad: Tensor) -> None:
    """As FullyShardedDataParallel does."""
    grad.untyped_storage().resize_(0)


@forms
@pytest.mark.parametrize("change", [larger, released])
def test_the_memory_of_a_gradient_can_be_resized(change: Callable[[Tensor], None], form: dict[str, Any]) -> None:
    conv, x = conv_with("111100", 64, 64, **form), torch.randn(2, 64, 5, 5)
    for _ in range(2):
        conv.zero_grad()
        conv(x).square().sum().backward()
        first = conv.weight.grad.clone()
        change(conv.weight.grad)
    conv.zero_grad()
    conv(x).square().sum().backward()
    assert_close(conv.weight.grad, first)
