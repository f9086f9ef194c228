"""Orders of channels move into the weights around a group convolution only where the network computes the same."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from timm_dgconv import DGConv2d, compact, groupable
from timm_dgconv.models.compact import group_layers

C = 8


def conv(c_in: int = C, c_out: int = C, size: int = 1, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, size, padding=size // 2, **kwargs)


def dgconv(c_in: int = C, c_out: int = C, gate: tuple[int, ...] = (1, -1, 1)) -> DGConv2d:
    """A DGConv2d that needs an order of channels at both ends."""
    result = DGConv2d(c_in, c_out, 3, padding=1)
    with torch.no_grad():
        result.gate.copy_(torch.tensor(gate))
    return result


class Net(nn.Module):
    """A dense convolution, a DGConv2d and a dense convolution, with something in between."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.first, self.group, self.last = conv(), dgconv(), conv()
        for name, module in modules.items():
            setattr(self, name, module)
        self.run = forward

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        return self.run(self, x) if extra is None else self.run(self, x) + extra


def check(model: nn.Module, orders: int) -> nn.Module:
    """Compare with the compact form, in both modes, and count the orders that remain."""
    x = torch.randn(2, C, 5, 5, dtype=torch.float64)
    for module in model.double().modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(value, 0.5, 1.5)  # type: ignore[arg-type]
    small = compact(model)
    for training in (False, True):
        forms = [copy.deepcopy(form).train(training) for form in (small, model)]
        assert_close(forms[0](x), forms[1](x))
        assert_close(forms[0](x), copy.deepcopy(small).train(training)(x))
    assert sum(layer.num_orders() for layer in group_layers(small).values()) == orders
    return small


def squeeze_and_excite(net: Any, x: Tensor) -> Tensor:
    y = net.group(net.first(x))
    return net.last(y * net.expand(F.relu(net.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid())


def auxiliary_head(net: Any, x: Tensor) -> Tensor:
    y = net.group(net.first(x))
    return net.last(y) + (y if net.training else 0)


@pytest.mark.parametrize(
    ("forward", "modules", "orders"),
    [
        (lambda net, x: net.last(net.group(net.first(x))), {}, 0),
        (lambda net, x: net.last(net.relu(net.group(net.relu(net.first(x))))), {"relu": nn.ReLU()}, 0),
        (lambda net, x: net.last(F.relu(net.group(net.norm(net.first(x))))), {"norm": nn.BatchNorm2d(C)}, 0),
        (lambda net, x: net.last(net.thin(net.group(net.first(x)))), {"thin": conv(size=3, groups=C)}, 0),
        (squeeze_and_excite, {"squeeze": conv(C, 2), "expand": conv(2, C)}, 0),
        (lambda net, x: net.last((z := net.first(x)) + net.group(z)), {}, 0),
        (lambda net, x: net.last(net.again(net.group(net.first(x)))), {"again": dgconv()}, 0),
        (lambda net, x: net.last(net.again(net.group(net.first(x)))), {"again": dgconv(gate=(-1, 1, -1))}, 1),
        # What reads or writes there needs the channels as they are.
        (lambda net, x: net.group(net.first(x)), {}, 1),
        (lambda net, x: net.last(net.group(x)), {}, 1),
        (lambda net, x: net.last(z := net.group(net.first(x))) + z, {}, 1),
        (lambda net, x: net.last(net.norm(net.group(net.first(x)))), {"norm": nn.GroupNorm(2, C)}, 1),
        (lambda net, x: net.last(net.fixed(net.group(net.first(x)))), {"fixed": conv(groups=2)}, 1),
        (lambda net, x: net.last(net.group(net.first(x)).softmax(1)), {}, 1),
        (lambda net, x: net.last(net.group(net.first(x)).mean(1, keepdim=True).expand(-1, C, -1, -1)), {}, 1),
        (lambda net, x: net.last(net.group(net.first(x)) * net.gate(x)), {"gate": conv(C, 1)}, 1),
        (lambda net, x: net.last(torch.cat([net.group(net.first(x))], 1)), {}, 1),
        (auxiliary_head, {}, 1),
        # A module that is called twice has one weight.
        (lambda net, x: net.last(net.group(net.first(net.first(x)))), {}, 1),
        (lambda net, x: net.last(net.group(net.group(net.first(x)))), {}, 2),
        (lambda net, x: net.last(net.norm(net.group(net.norm(net.first(x))))), {"norm": nn.BatchNorm2d(C)}, 2),
    ],
)
def test_orders_that_remain(forward: Any, modules: dict[str, nn.Module], orders: int) -> None:
    torch.manual_seed(0)
    check(Net(forward, **copy.deepcopy(modules)), orders)


@given(
    gates=st.lists(st.tuples(*[st.sampled_from([-1, 1])] * 3), min_size=1, max_size=4),
    between=st.lists(st.sampled_from(["relu", "norm", "conv", "skip", "mix"]), min_size=5, max_size=5),
)
def test_chains_compute_the_same(gates: list[tuple[int, ...]], between: list[str]) -> None:
    class Block(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    kinds: dict[str, Callable[[], nn.Module]] = {
        "relu": nn.ReLU,
        "norm": lambda: nn.BatchNorm2d(C),
        "conv": conv,
        "skip": lambda: Block(conv(), nn.ReLU(), conv()),
        "mix": lambda: nn.GroupNorm(4, C),
    }
    layers = [kinds[between[0]]()]
    for gate, kind in zip(gates, between[1:], strict=False):
        layers += [dgconv(gate=gate), kinds[kind]()]
    model = nn.Sequential(*layers).double().eval()
    x = torch.randn(2, C, 4, 4, dtype=torch.float64)
    assert_close(compact(model)(x), model(x))


def test_hooks_see_the_channels_as_they_are() -> None:
    model = Net(lambda net, x: net.last(net.norm(net.group(net.first(x)))), norm=nn.BatchNorm2d(C))
    seen: list[Tensor] = []
    model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))  # type: ignore[union-attr]
    check(model, 1)
    assert_close(seen[-4], seen[-3])


@pytest.mark.parametrize(
    ("info", "orders"),
    [
        ([dict(num_chs=C, reduction=1, module="norm")], 1),
        (["of", "a", "user"], 0),
        (lambda: "a method, as in the blocks of EfficientNet", 0),
    ],
)
def test_features_stay_as_they_are(info: Any, orders: int) -> None:
    model = Net(lambda net, x: net.last(net.norm(net.group(net.first(x)))), norm=nn.BatchNorm2d(C))
    model.feature_info = info
    check(model, orders)


def test_tied_weights_stay_as_they_are() -> None:
    model = Net(lambda net, x: net.last(net.group(net.first(x))) + net.other(x), other=conv())
    model.other.weight = model.first.weight  # type: ignore[union-attr]
    check(model, 1)


def test_inside_a_module_that_cannot_be_traced() -> None:
    class Checked(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.isfinite().all() else x

    check(nn.Sequential(conv(), Checked(nn.Sequential(conv(), dgconv(), nn.ReLU(), conv()), dgconv()), conv()), 2)


def test_tracing_leaves_nothing_in_the_model() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        net.seen = net.first(x)
        return net.last(net.group(net.seen))

    model = Net(forward)
    model.seen = None  # type: ignore[assignment]
    assert compact(model).seen is None


@pytest.mark.parametrize(
    ("name", "needed", "absorbed"),
    [("resnet18", 28, 7), ("resnet50", 30, 30), ("densenet121", 90, 45), ("cspresnet50", 32, 29), ("vgg11_bn", 14, 2)],
)
def test_networks_of_timm(name: str, needed: int, absorbed: int) -> None:
    torch.manual_seed(0)
    model = groupable(timm.create_model(name, num_classes=3)).eval()
    for layer in group_layers(model).values():
        with torch.no_grad():
            layer.gate[torch.rand_like(layer.gate) < 0.5] *= -1  # type: ignore[union-attr]
    x = torch.randn(1, 3, 64, 64)
    small = compact(model)
    assert_close(small(x), model(x), rtol=1e-3, atol=1e-4)
    if hasattr(model, "forward_intermediates"):  # in newer versions of timm
        for ours, theirs in zip(small.forward_intermediates(x)[1], model.forward_intermediates(x)[1], strict=True):
            assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    alone = sum(layer.to_group_conv().num_orders() for layer in group_layers(model).values())  # type: ignore[union-attr]
    assert alone - sum(layer.num_orders() for layer in group_layers(small).values()) > 0.1 * alone
