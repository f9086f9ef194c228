"""The compact form computes the same in any network, of modules whose types any tool knows."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from conftest import gates, trained
from timm.layers import BatchNormAct2d
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.testing import assert_close

from timm_dgconv import DGConv2d, compact, groupable

FORMS: list[dict[str, Any]] = [{}, {"sort": False}]

pytestmark = pytest.mark.parametrize("form", FORMS, ids=str)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    """torch refuses `out=` with gradients, and copies of weights that a hook has computed with gradients."""
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def learned(model: nn.Module) -> nn.Module:
    """Gates of which some are closed, and other numbers in each channel."""
    for gate in gates(model):
        gate.copy_(torch.tensor([1.0, -1.0] * 8)[: len(gate)])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 2)
        elif isinstance(module, nn.PReLU):
            module.weight.normal_()
    return model.double().eval()


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.float64)


# 8. Networks that are hard to trace


class Net(nn.Module):
    """A bottleneck, whose middle learns its groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 8, 1)
        self.side = nn.Conv2d(3, 16, 1)

    def forward(self, x: Tensor) -> Any:
        return self.conv3(self.bn2(self.conv2(self.bn1(self.conv1(x)))))


class InPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        y.add_(self.side(x))
        return self.conv3(y)


class Out(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        torch.add(y, self.side(x), out=y)
        return self.conv3(y)


class OptionalArgument(Net):
    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = self.conv2(self.conv1(x))
        return self.conv3(y if skip is None else y + skip)


class UsedWeight(Net):
    """An autoencoder, which decodes with the weight of its encoder."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        return F.conv_transpose2d(y.exp(), self.conv1.weight)


class TiedStatistics(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bn3 = nn.BatchNorm2d(16)
        self.double()  # makes new buffers
        self.bn3.running_mean = self.bn2.running_mean

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), self.bn3(self.side(x))


class Keeping(Net):
    """Its loss reads the attribute."""

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.conv2(self.conv1(x))
        return self.conv3(self.hidden)


class ActivationInNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bn2 = BatchNormAct2d(16, act_layer=nn.PReLU, act_kwargs={"num_parameters": 16})


@pytest.mark.parametrize(
    "kind", [InPlace, Out, OptionalArgument, UsedWeight, TiedStatistics, Keeping, ActivationInNorm]
)
def test_compact_computes_the_same_in_any_network(kind: type[Net], form: dict[str, Any]) -> None:
    model = learned(groupable(kind(), **form))
    small, x = compact(model), images(6)
    args = (x, torch.randn(2, 16, 6, 6).double()) if kind is OptionalArgument else (x,)
    assert_close(small(*args), model(*args))
    if kind is Keeping:
        assert_close(small.hidden, model.hidden)


def test_compact_has_the_intermediates_of_an_hrnet(form: dict[str, Any]) -> None:
    model = learned(groupable(timm.create_model("hrnet_w18_small", num_classes=3), **form))
    small, x = compact(model), images(64)
    assert_close(small.forward_intermediates(x), model.forward_intermediates(x))


# 9. Types and meanings of modules


def types(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("name", ["test_g_resnet", "test_g_resnext"])
def test_compact_has_convolutions_of_torch_only(name: str, form: dict[str, Any]) -> None:
    model = trained(name, **form).double().eval()
    small, x = compact(model), images()
    assert {kind for kind in types(small).values() if issubclass(kind, nn.Conv2d)} == {nn.Conv2d}
    assert_close(small(x), model(x))


@pytest.mark.parametrize("name", ["test_resnet", "resnet18", "test_efficientnet"])
def test_compact_of_a_converted_network_has_the_types_of_its_source(name: str, form: dict[str, Any]) -> None:
    source = timm.create_model(name, num_classes=3)
    model = learned(groupable(copy.deepcopy(source), **form))
    small, x = compact(model), images(64)
    assert types(small) == types(source)
    assert_close(small(x), model(x))


def layer(form: dict[str, Any], **kwargs: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """A learned layer, its compact form, and an input."""
    conv = learned(DGConv2d(16, 16, 3, **form, **kwargs))
    return conv, compact(conv), torch.randn(2, 16, 5, 5).double()


def test_torch_folds_a_norm_into_a_compact_layer(form: dict[str, Any]) -> None:
    conv, small, x = layer(form)
    norm = learned(nn.Sequential(conv, nn.BatchNorm2d(16)))[1]
    assert_close(fuse_conv_bn_eval(small, norm)(x), norm(conv(x)))


def test_a_tool_can_build_a_compact_layer_again_from_its_attributes(form: dict[str, Any]) -> None:
    """As ultralytics does to fold norms."""
    conv, small, x = layer(form)
    again = nn.Conv2d(small.in_channels, small.out_channels, small.kernel_size, groups=small.groups).double()
    again.weight.copy_(small.weight)
    again.bias.copy_(small.bias)
    assert_close(again(x), conv(x))


def test_row_i_of_a_compact_weight_computes_channel_i(form: dict[str, Any]) -> None:
    """Pruners remove both."""
    _, small, x = layer(form, bias=False)
    before = small(x)
    prune.ln_structured(small, "weight", 0.5, n=2, dim=0)
    pruned = small.weight.flatten(1).count_nonzero(1) == 0
    assert pruned.sum() == 8
    assert_close(small(x), before * ~pruned[:, None, None])


# 10. Weights that a hook computes


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "prune": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "weight_norm": lambda conv: nn.utils.weight_norm(conv),
    "spectral_norm": lambda conv: nn.utils.spectral_norm(conv),
    "parametrization": lambda conv: parametrizations.weight_norm(conv),
}


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.(weight|spectral)_norm:FutureWarning")
@pytest.mark.parametrize("hook", list(HOOKS))
@pytest.mark.parametrize("path", ["conv1", "layer2.0.conv3", "layer2.0.downsample.0"])
def test_norms_are_folded_only_into_weights_that_stay(path: str, hook: str, form: dict[str, Any]) -> None:
    model = trained(**form).double().eval()
    conv = model.get_submodule(path)
    HOOKS[hook](conv)
    if hook == "weight_norm":  # another weight than the one that the hook began with
        conv.weight_g.mul_(1.5)
    x = images()
    expected = model(x)
    assert_close(reparameterize_model(model)(x), expected)
    assert_close(reparameterize_model(compact(model))(x), expected)


# 11. What users have put on a layer


def double_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def shift_input(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return (args[0] + 1,), kwargs


@pytest.mark.parametrize("form_of", [compact, reparameterize_model])
@pytest.mark.parametrize("hook", [double_output, shift_input])
@pytest.mark.parametrize("name", ["test_g_resnet", "test_g_resnext"])
def test_hooks_of_a_layer_stay(
    name: str, hook: Callable[..., Any], form_of: Callable[[nn.Module], nn.Module], form: dict[str, Any]
) -> None:
    model = trained(name, **form).double().eval()
    x, conv = images(), model.layer2[0].conv2
    before = model(x)
    if hook is double_output:
        conv.register_forward_hook(hook)
    else:
        conv.register_forward_pre_hook(hook, with_kwargs=True)
    expected = model(x)
    assert not torch.allclose(expected, before)
    assert_close(form_of(model)(x), expected)


def test_backward_hooks_of_a_layer_stay(form: dict[str, Any]) -> None:
    model, calls = trained(**form), []
    model.layer2[0].conv2.register_full_backward_hook(lambda *_: calls.append(1))
    with torch.enable_grad():
        compact(model)(images().float()).sum().backward()
    assert calls == [1]


class Scaled(DGConv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def own_forward(model: Any) -> None:
    conv = model.layer2[0].conv2
    forward = conv.forward
    conv.forward = lambda x: 2 * forward(x)


def subclass(model: Any) -> None:
    conv = model.layer2[0].conv2
    conv.__class__ = Scaled


def pruned(model: Any) -> None:
    prune.l1_unstructured(model.layer2[0].conv2, "weight", 0.5)
    model(images())


def parametrized(model: Any) -> None:
    parametrizations.weight_norm(model.layer2[0].conv2)


@pytest.mark.parametrize("change", [own_forward, subclass, pruned, parametrized])
def test_a_layer_that_computes_something_else_is_refused_by_name(
    change: Callable[[nn.Module], None], form: dict[str, Any]
) -> None:
    model = trained(**form).double().eval()
    change(model)
    with pytest.raises(ValueError, match=r"layer2\.0\.conv2"):
        compact(model)
