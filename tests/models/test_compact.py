"""The compact form (`timm_dgconv.compact`) and the deployed form (`timm.utils.reparameterize_model`).

They compute the same in any network, of modules whose types any tool knows.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from conftest import forms, gates, jit_is_deprecated, own_forward, sorted_or_not, trained
from timm.layers import BatchNormAct2d, BlurPool2d, FrozenBatchNormAct2d, GroupNorm, GroupNormAct, get_norm_act_layer
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

from timm_dgconv import DGConv2d, compact, groupable, layer_groups
from timm_dgconv.layers.checkpoints import PRETRAINED_GATE

Form = Callable[[nn.Module], Any]
BOTH = pytest.mark.parametrize("form_of", [compact, reparameterize_model], ids=["compact", "deployed"])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.float64)


def learned(model: nn.Module) -> nn.Module:
    """Gates whose groups are not contiguous if they are not sorted, and other numbers in each channel."""
    with torch.no_grad():
        for gate in gates(model):
            gate.copy_(torch.tensor([1.0, -1.0] * 8)[: len(gate)])
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
        for name, value in model.named_parameters():
            if value.ndim == 1 and not name.endswith("gate"):
                value.uniform_(0.5, 2)
    return model.double().eval()


def types(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(module) for name, module in model.named_modules()}


def plain_types(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: nn.Conv2d if kind is DGConv2d else kind for name, kind in types(model).items()}


NETWORKS: list[tuple[str, dict[str, Any]]] = [
    ("test_g_resnext", {}),
    ("test_g_resnext", {"groups": [4, 1, 8, 2]}),
    ("test_g_resnext", {"pointwise": True}),
    ("test_g_resnext", {"features_only": True}),
    ("test_g_resnext", {"stem_type": "deep", "avg_down": True}),
    ("test_g_resnext", {"stem_type": "deep_tiered", "replace_stem_pool": True, "down_kernel_size": 3}),
    ("test_g_resnext", {"block_args": {"attn_layer": "se"}}),
    ("test_g_resnext", {"aa_layer": BlurPool2d, "drop_block_rate": 0.1, "act_layer": "prelu"}),
    ("test_g_resnext", {"drop_path_rate": 0.1, "output_stride": 8, "block_reduce_first": 2}),
    ("test_g_resnext", {"norm_layer": partial(FrozenBatchNormAct2d, apply_act=False)}),
    ("test_g_resnext", {"norm_layer": "layernorm2d"}),
    ("test_g_resnext", {"norm_layer": partial(nn.BatchNorm2d, track_running_stats=False)}),
    ("test_g_resnet", {}),
    ("test_g_resnet", {"features_only": True, "aa_layer": BlurPool2d}),
    ("g_densenet121", {"block_config": (2, 2, 2, 2)}),
]


@forms
@pytest.mark.parametrize(("name", "kwargs"), NETWORKS, ids=str)
def test_networks_of_this_package_compute_the_same(name: str, kwargs: dict[str, Any], form: dict[str, Any]) -> None:
    model = trained(name, **form, **kwargs).double()
    x, before = images(64), copy.deepcopy(model.state_dict())
    expected = copy.deepcopy(model).eval()(x)
    small, deployed = compact(model), reparameterize_model(model)
    assert small.training
    assert types(small) == plain_types(model)
    assert len(layer_groups(small)) == len(layer_groups(model)) > 0
    for other in (small, deployed, reparameterize_model(small), compact(small)):
        assert_close(other.eval()(x), expected, rtol=1e-10, atol=1e-10)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    names = [name for name, module in deployed.named_modules() if getattr(module, "running_mean", None) is not None]
    assert name == "g_densenet121" or all(norm.startswith(("bn1", "conv1", "maxpool")) for norm in names), (
        "only the stem's is left"
    )
    if "groups" not in kwargs:
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    if not kwargs:
        model.eval()
        assert_close(small.forward_features(x), model.forward_features(x))
        if hasattr(model, "forward_intermediates"):  # timm 1.0.21 has none for HRNet
            assert_close(small.forward_intermediates(x), model.forward_intermediates(x))
        assert_close(small.train()(x), model.train()(x))


@sorted_or_not
@pytest.mark.parametrize("name", ["test_resnet", "resnet18", "densenet121", "test_efficientnet", "hrnet_w18_small"])
def test_a_converted_network_computes_the_same_and_has_the_types_of_its_source(name: str, form: dict[str, Any]) -> None:
    source, x = timm.create_model(name, num_classes=3).double().eval(), images(64)
    model = groupable(copy.deepcopy(source), **form)
    assert_close(model(x), source(x))
    assert all(torch.equal(gate.abs(), torch.full_like(gate, PRETRAINED_GATE)) for gate in gates(model))
    small = compact(learned(model))
    assert types(small) == types(source)
    assert not small._forward_pre_hooks, "the hooks that read gates are gone"
    for other in (small, reparameterize_model(model)):
        assert_close(other(x), model(x))
    if hasattr(model, "forward_intermediates"):  # timm 1.0.21 has none for HRNet
        assert_close(small.forward_intermediates(x), model.forward_intermediates(x))
    assert_close(small.train()(x), model.train()(x))


class Unusual(nn.Module):
    """In-place statements, an optional argument, a kept output, tied statistics and weights, and a reused weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)
        self.conv2, self.again = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.again.weight = self.conv2.weight
        self.bn2 = BatchNormAct2d(16, act_layer=nn.PReLU, act_kwargs={"num_parameters": 16})
        self.conv3, self.side = nn.Conv2d(16, 8, 1), nn.Conv2d(3, 16, 1)
        self.double()  # makes new buffers
        self.bn1.running_mean = self.bn2.running_mean

    @torch.no_grad()
    def forward(self, x: Tensor, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self.again(F.relu(self.conv2(self.bn1(self.conv1(x)))))
        y.add_(self.side(x))
        torch.add(y, self.side(x), out=y)
        self.hidden = self.bn2(y)  # read by a loss
        y = self.hidden if skip is None else self.hidden + skip
        return self.conv3(y), F.conv_transpose2d(y, self.conv1.weight)


@sorted_or_not
def test_an_unusual_network_computes_the_same(form: dict[str, Any]) -> None:
    model: Any = learned(groupable(Unusual(), **form))
    small, x = compact(model), images(6)
    assert small.bn1.running_mean is small.bn2.running_mean
    assert small.again.weight is small.conv2.weight
    for args in ((x,), (x, torch.randn(2, 16, 6, 6).double())):
        assert_close(small(*args), model(*args))
        assert_close(small.hidden, model.hidden)


# Orders of channels, which unsorted groups need. They move into the neighbours of a bottleneck's convolution.

MOVE: dict[str, dict[str, Any]] = {
    "norm with an activation": {"norm_layer": BatchNormAct2d},
    **{name: {"act_layer": name} for name in ("relu", "relu6", "leaky_relu", "elu", "celu", "selu", "silu", "mish")},
}
STAY: dict[str, dict[str, Any]] = {
    "groupnorm": {"norm_layer": partial(GroupNorm, num_groups=4)},
    "groupnorm-act": {"norm_layer": partial(GroupNormAct, num_groups=4)},
    **{
        f"evonorm{kind}": {"norm_layer": partial(get_norm_act_layer(f"evonorm{kind}"), groups=4)}
        for kind in ("s0", "s0a", "s1", "s1a", "s2", "s2a")
    },
}


def has_moved(model: Any, small: Any) -> bool:
    """Whether the compact convolution has the groups of the learned one, and no zeros between them."""
    assert not all(model.layer3[0].conv2.closed[: sum(model.layer3[0].conv2.closed)]), "contiguous without a move"
    return small.layer3[0].conv2.groups == model.layer3[0].conv2.num_groups


@BOTH
@pytest.mark.parametrize("name", [*MOVE, *STAY])
def test_orders_move_through_the_norms_and_activations_that_are_known(name: str, form_of: Form) -> None:
    model, x = learned(timm.create_model("test_g_resnext", sort=False, **{**MOVE, **STAY}[name])), images()
    assert_close(form_of(model)(x), model(x))
    assert has_moved(model, compact(model)) == (name in MOVE)


def tie(block: Any) -> None:
    block.conv3.weight = nn.Parameter(block.conv3.weight)
    block.downsample[0].tied = block.conv3.weight


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda block: None,
    "a longer conv1": lambda block: setattr(block, "conv1", nn.Sequential(block.conv1, nn.Conv2d(48, 48, 1))),
    "a longer conv3": lambda block: setattr(block, "conv3", nn.Sequential(nn.Conv2d(48, 48, 1), block.conv3)),
    "groups before": lambda block: setattr(block, "conv1", nn.Conv2d(128, 48, 1, groups=4)),
    "groups after": lambda block: setattr(block, "conv3", nn.Conv2d(48, 192, 1, groups=4)),
    "a hook": lambda block: block.bn1.register_forward_hook(
        lambda module, args, y: y * torch.arange(48)[:, None, None]
    ),
    "a tied weight": tie,
}


@BOTH
@pytest.mark.parametrize("change", CHANGES)
def test_orders_move_into_plain_neighbours_only(change: str, form_of: Form) -> None:
    model = trained(sort=False)
    CHANGES[change](model.layer3[0])
    model, x = learned(model), images()
    assert_close(form_of(model)(x), model(x))
    assert has_moved(model, compact(model)) == (change == "nothing")


@forms
@pytest.mark.parametrize(("name", "kwargs"), [NETWORKS[n] for n in (0, 2, -3, -1)], ids=str)
def test_a_compact_model_loads_into_its_groups_and_into_gates(name: str, kwargs: Any, form: dict[str, Any]) -> None:
    model, x = trained(name, **form, **kwargs).eval(), images().float()
    small = compact(model)
    groups = layer_groups(small)
    if "sort" not in form or (name, kwargs) == NETWORKS[0]:  # its dense 1x1 layers take the orders of channels
        assert groups == layer_groups(model)
    assert len(set(groups)) > 1
    built = timm.create_model(name, groups=groups, **kwargs).eval()
    built.load_state_dict(small.state_dict())
    assert torch.equal(built(x), small(x))
    again = timm.create_model(name, **kwargs).eval()
    again.load_state_dict(small.state_dict())
    assert_close(again(x), small(x), rtol=1e-4, atol=1e-5)


@BOTH
def test_frozen_weights_stay_frozen(form_of: Form) -> None:
    model = trained().requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in form_of(model).parameters())
    assert all(parameter.requires_grad for parameter in form_of(trained()).parameters())


def test_a_model_without_gates_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ResNet has no DGConv2d.*timm_dgconv\.groupable"):
        compact(timm.create_model("test_resnet"))


# What users have put on a layer: hooks, forward passes and weights of their own

WEIGHT_HOOKS: dict[str, Form] = {
    "prune": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "weight_norm": lambda conv: nn.utils.weight_norm(conv),
    "spectral_norm": lambda conv: nn.utils.spectral_norm(conv),
    "parametrization": lambda conv: parametrizations.weight_norm(conv),
}


@torch.no_grad()  # torch refuses copies of weights that a hook has computed with gradients
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.(weight|spectral)_norm:FutureWarning")
@pytest.mark.parametrize("hook", list(WEIGHT_HOOKS))
@pytest.mark.parametrize("path", ["conv1", "layer2.0.conv3", "layer2.0.downsample.0"])
@sorted_or_not
def test_norms_are_folded_only_into_weights_that_stay(form: dict[str, Any], path: str, hook: str) -> None:
    model = trained(**form).double().eval()
    conv: Any = model.get_submodule(path)
    WEIGHT_HOOKS[hook](conv)
    if hook == "weight_norm":  # another weight than the one that the hook began with
        conv.weight_g.mul_(1.5)
    x = images()
    expected = model(x)
    assert_close(reparameterize_model(model)(x), expected)
    assert_close(reparameterize_model(compact(model))(x), expected)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "double the output": lambda conv: conv.register_forward_hook(lambda module, args, output: 2 * output),
    "shift the input": lambda conv: conv.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True
    ),
}


@BOTH
@sorted_or_not
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", ["test_g_resnet", "test_g_resnext"])
def test_hooks_of_a_layer_stay(name: str, hook: str, form: dict[str, Any], form_of: Form) -> None:
    model: Any = trained(name, **form).double().eval()
    x = images()
    before = model(x)
    HOOKS[hook](model.layer2[0].conv2)
    expected = model(x)
    assert not torch.allclose(expected, before)
    assert_close(form_of(model)(x), expected)


def scaled_per_channel(module: nn.Module, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (gradients[0] * torch.linspace(0.5, 2, gradients[0].shape[1]).view(1, -1, 1, 1),)


@pytest.mark.parametrize("name", ["conv1", "conv2", "conv3"])
def test_backward_hooks_see_the_channels_of_the_model(name: str) -> None:
    model: Any = trained("test_g_resnext", sort=False).double()
    model.layer1[0].get_submodule(name).register_full_backward_pre_hook(scaled_per_channel)
    x = images()
    grads = [torch.autograd.grad(net(x).square().sum(), net.conv1.weight) for net in (model.eval(), compact(model))]
    assert_close(*grads)


def test_a_convolution_that_two_norms_follow_keeps_them() -> None:
    model: Any = trained("g_resnet18", layers=(1, 1, 1, 1), num_classes=3).double().eval()
    model.layer1[0].conv2 = model.layer1[0].conv1
    x = images()
    assert_close(reparameterize_model(model)(x), model(x))


class Scaled(DGConv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def subclass(conv: Any) -> None:
    conv.__class__ = Scaled


@BOTH
@pytest.mark.parametrize("change", [own_forward, subclass, WEIGHT_HOOKS["prune"], WEIGHT_HOOKS["parametrization"]])
def test_a_layer_that_computes_something_else_is_refused_by_name(change: Callable[[Any], Any], form_of: Form) -> None:
    model: Any = trained().eval()
    change(model.layer2[0].conv2)
    with torch.set_grad_enabled(form_of is compact):  # timm copies first, and torch copies no weight with a gradient
        model(images().float())
    with pytest.raises(ValueError, match=r"layer2\.0\.conv2" if form_of is compact else r"conv2"):
        form_of(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_folded_in_float64(dtype: torch.dtype) -> None:
    model = trained().eval()
    form = reparameterize_model(model.to(dtype))
    exact = reparameterize_model(model.double())
    for ours, theirs in zip(form.state_dict().values(), exact.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs.to(dtype))


@BOTH
@forms
@jit_is_deprecated
def test_exported_graphs_have_no_index_and_no_operator_of_this_package(form: dict[str, Any], form_of: Form) -> None:
    model, x = trained(**form).eval(), images().float()
    small = form_of(model)
    program = torch.export.export(small, (x,))
    assert not {word for word in ("index", "gather", "timm_dgconv") if word in str(program.graph)}
    for graph in (program.module(), torch.jit.script(small)):
        assert_close(graph(x), model(x), rtol=1e-4, atol=1e-4)
