"""The compact form (`timm_dgconv.compact`) and the deployed form (`timm.utils.reparameterize_model`)."""

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import trained
from timm.layers import BatchNormAct2d, BlurPool2d, FrozenBatchNormAct2d, create_act, create_norm, create_norm_act
from timm.models import FeatureListNet
from timm.utils import reparameterize_model
from timm_dgconv.models.channel_orders import EQUIVARIANT
from torch import nn
from torch.testing import assert_close

from timm_dgconv import DGConv2d, compact, layer_groups
from timm_dgconv.models.compact import group_layers

PLAIN = {"Conv2d", "Identity", "ReLU", "MaxPool2d", "AdaptiveAvgPool2d", "Flatten", "Linear"}


def kinds(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules() if not list(module.children())}


def num_orders(model: nn.Module) -> int:
    """Number of times that the GroupConv2d layers of a compact model reorder channels."""
    return sum(conv.num_orders() for conv in group_layers(model).values())


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kwargs", "others"),
    [
        ({}, []),
        ({"groups": [4, 1, 8, 2]}, []),
        ({"features_only": True}, []),
        ({"block_args": {"sort": True}}, []),
        ({"stem_type": "deep", "avg_down": True}, ["AvgPool2d"]),
        ({"stem_type": "deep_tiered", "replace_stem_pool": True, "down_kernel_size": 3}, []),
        ({"block_args": {"attn_layer": "se"}}, ["Sigmoid"]),
        ({"block_args": {"attn_layer": "eca"}}, ["Conv1d", "Sigmoid"]),
        (
            {"aa_layer": BlurPool2d, "drop_block_rate": 0.1, "act_layer": "prelu"},
            ["BlurPool2d", "DropBlock2d", "PReLU"],
        ),
        ({"drop_block_rate": 0.1, "drop_path_rate": 0.1}, ["DropBlock2d", "DropPath"]),
        ({"output_stride": 8}, []),
        ({"block_reduce_first": 2}, []),
        ({"norm_layer": BatchNormAct2d}, []),
        ({"norm_layer": partial(FrozenBatchNormAct2d, apply_act=False)}, []),
        ({"norm_layer": "layernorm2d"}, ["LayerNorm2d"]),
        ({"norm_layer": partial(nn.BatchNorm2d, track_running_stats=False)}, ["BatchNorm2d"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("in_eval", [False, True], ids=["train", "eval"])
def test_is_the_same_function(kwargs: dict[str, Any], others: list[str], in_eval: bool, x: torch.Tensor) -> None:
    model = trained(**kwargs).double().train(not in_eval)
    before = copy.deepcopy(model.state_dict())
    for form_of in (compact, reparameterize_model):
        form = form_of(model)
        again = form_of(form).eval()
        form.eval()
        assert_close(form(x.double()), copy.deepcopy(model).eval()(x.double()), rtol=1e-10, atol=1e-10)
        assert_close(again(x.double()), form(x.double()), rtol=0, atol=0)
        assert_close(model.state_dict(), before, rtol=0, atol=0)
        assert "DGConv2d" not in kinds(form)
        if form_of is reparameterize_model:
            assert kinds(form) <= PLAIN | set(others)
        if "groups" not in kwargs:
            assert sum(p.numel() for p in form.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "kwargs", [{}, {"features_only": True}, {"aa_layer": BlurPool2d, "drop_block_rate": 0.1}], ids=str
)
def test_basic_blocks_are_the_same_function(kwargs: dict[str, Any], x: torch.Tensor) -> None:
    """They keep the orders of channels at the residual stream."""
    model = trained("test_g_resnet", **kwargs).double().eval()
    form, deployed = compact(model), reparameterize_model(model)
    for other in (form, deployed, reparameterize_model(form)):
        assert_close(other(x.double()), model(x.double()), rtol=1e-10, atol=1e-10)
        assert 0 < num_orders(other) < sum(conv.to_group_conv().num_orders() for conv in group_layers(model).values())
    assert "BatchNorm2d" not in kinds(deployed)


# The compact form


def test_round_trip_and_training(x: torch.Tensor) -> None:
    model = trained().eval()
    form = compact(model)
    groups = layer_groups(model)
    assert layer_groups(form) == groups
    assert len(set(groups)) > 1
    built = timm.create_model("test_g_resnext", groups=groups).eval()
    built.load_state_dict(form.state_dict())
    assert torch.equal(built(x), form(x))
    built.train()(x).sum().backward()
    assert all(p.grad is not None for p in built.parameters())


def test_frozen_weights_stay_frozen() -> None:
    model = trained().requires_grad_(False)
    for form in (compact(model), reparameterize_model(model)):
        assert not any(parameter.requires_grad for parameter in form.parameters())


def test_goes_back_into_a_model_with_gates(x: torch.Tensor) -> None:
    form = compact(trained()).eval()
    model = timm.create_model("test_g_resnext").eval()
    model.load_state_dict(form.state_dict())
    assert_close(model(x), form(x), rtol=1e-4, atol=1e-5)


def test_refuses_a_model_without_dgconvs() -> None:
    with pytest.raises(ValueError, match=r"ResNet has no DGConv2d.*timm_dgconv\.groupable"):
        compact(timm.create_model("test_resnet"))


# Norms and activations

EQUAL = {
    *("batchnorm", "batchnorm-act", "groupnorm1", "groupnorm1-act", "layernorm2d", "layernorm2d-act", "rmsnorm2d"),
    *("evonormb0-act", "frn-act", "frntlu-act"),
    *("relu", "relu6", "leaky_relu", "elu", "celu", "selu", "prelu", "gelu", "silu", "mish", "hard_swish", "tanh"),
}
MIXING = {"groupnorm", "groupnorm-act", *(f"evonorm{kind}-act" for kind in ("s0", "s0a", "s1", "s1a", "s2", "s2a"))}
UNKNOWN = {  # they treat channels alike, and are not in EQUIVARIANT or cannot be traced
    *("simplenorm2dfp32", "layernorm2dfp32-act", "rmsnorm2dfp32-act", "evonormb1-act", "evonormb2-act", "hard_mish"),
}


def randomized(**kwargs: Any) -> nn.Module:
    """A model with other values in each channel, and gates whose groups are not contiguous."""
    torch.manual_seed(0)
    model = timm.create_model("test_g_resnext", num_classes=3, **kwargs).eval().double()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("gate"):
                value.normal_()[:2] = torch.tensor([1.0, -1.0])
            elif value.ndim == 1:
                value.uniform_(0.5, 2)
    return model


def test_every_norm_and_activation_of_timm(x: torch.Tensor) -> None:
    """Channels are reordered at run time around layers that mix channels, and around layers that are not known."""
    norms = {**create_norm._NORM_MAP, **{f"{name}-act": norm for name, norm in create_norm_act._NORM_ACT_MAP.items()}}
    layers = {name: {"act_layer": name} for name in set().union(*create_act._ACT_LAYERS)}
    for name, norm in norms.items():
        counts = {"groups", "num_groups"} & set(inspect.signature(norm).parameters)
        layers[name] = {"norm_layer": partial(norm, **dict.fromkeys(counts, 4)) if counts else norm}
    x, absorbed, left = x.double(), set(), set()
    for name, kwargs in layers.items():
        try:
            model = randomized(**kwargs)
            expected = model(x)
        except (AssertionError, ImportError, RuntimeError, TypeError, ValueError):
            continue  # not for images, of an optional package, or without the arguments that timm's ResNet passes
        close = partial(assert_close, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        form, deployed = compact(model), reparameterize_model(model)
        close(form(x), expected)
        close(deployed(x), expected)
        (left if num_orders(form) else absorbed).add(name)
        assert num_orders(form) == num_orders(deployed), name
    assert absorbed >= EQUAL
    assert MIXING <= left <= MIXING | UNKNOWN


def test_contiguous_groups_move_no_channels(x: torch.Tensor) -> None:
    """So a norm with groups of its own is no obstacle."""
    model = trained(norm_layer=lambda channels, **kwargs: nn.GroupNorm(4, channels, **kwargs)).eval()
    for conv in (module for module in model.modules() if isinstance(module, DGConv2d)):
        with torch.no_grad():
            conv.gate.copy_(torch.linspace(-1, 1, conv.gate.numel()))
    for form_of in (compact, reparameterize_model):
        form = form_of(model)
        assert num_orders(form) == 0
        assert_close(form(x), model(x), rtol=1e-4, atol=1e-4)


def test_activation_of_a_user(x: torch.Tensor) -> None:
    class Doubled(nn.ReLU):  # its condition cannot be traced
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x) if x.isfinite().all() else x

    model = randomized(act_layer=Doubled)
    model.act1 = nn.ReLU()
    for is_known in (False, True):
        if is_known:
            EQUIVARIANT.add(Doubled)
        for form_of in (compact, reparameterize_model):
            form = form_of(model)
            assert (num_orders(form) == 0) == is_known
            assert_close(form(x.double()), model(x.double()))


# The stem


def list_net(model: nn.Module) -> nn.Module:
    return FeatureListNet(model, out_indices=(0, 1, 2, 3, 4))


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def renewed(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    for value in module.state_dict().values():
        value.uniform_(0.1, 0.5) if value.is_floating_point() else None
    return module


REPLACEMENTS: list[tuple[str, Callable[[Any], nn.Module]]] = [
    ("conv1", renewed),
    ("conv1", lambda old: nn.Sequential(nn.Conv2d(3, 3, 1), old)),
    ("conv1", lambda old: nn.Sequential(old, nn.ReLU())),
    ("conv1.3", renewed),
    ("conv1.6", renewed),
    ("maxpool.0", renewed),
    ("bn1", renewed),
    ("bn1", lambda old: renewed(nn.BatchNorm2d(old.num_features).eval())),
    ("act1", lambda old: nn.SiLU()),
]
DEEP = {"stem_type": "deep", "replace_stem_pool": True}


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, pickled])
@pytest.mark.parametrize(
    ("kwargs", "wrap"),
    [
        ({}, None),
        (DEEP, None),
        ({"features_only": True}, None),
        ({"features_only": True, **DEEP}, None),
        ({"features_only": True, "feature_cls": "dict"}, None),
        ({}, list_net),
        (DEEP, list_net),
    ],
    ids=["plain", "deep", "features", "deep features", "dict", "list net", "deep list net"],
)
def test_replaced_stem(kwargs: dict[str, Any], wrap: Any, copied: Callable[[nn.Module], Any], x: torch.Tensor) -> None:
    """The deployed form has the modules that a user puts into the stem, before or after a copy of the model."""
    for path, replacement in [("", None), *REPLACEMENTS]:
        source = trained(**kwargs).eval()
        model = copied(source if wrap is None else wrap(source))
        if path:
            parent, _, name = path.rpartition(".")
            if parent and "stem_type" not in kwargs:
                continue
            setattr(model.get_submodule(parent), name, replacement(model.get_submodule(path)))
        model = copied(model.double())
        form = reparameterize_model(model)
        assert_close(form(x.double()), model(x.double()), msg=lambda text, path=path: f"{path}: {text}")
        if not path and wrap is None and "feature_cls" not in kwargs:
            assert kinds(form) <= PLAIN


class WithFeatures(nn.Module):
    """A model that is registered twice, as a user's wrapper may have it."""

    def __init__(self, features_first: bool) -> None:
        super().__init__()
        model = trained().eval()
        modules = {"model": model, "features": list_net(model)}
        for name in sorted(modules, reverse=not features_first):
            setattr(self, name, modules[name])

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [*self.features(x), self.model(x)]


@pytest.mark.parametrize("features_first", [True, False])
def test_stem_in_two_places(features_first: bool, x: torch.Tensor) -> None:
    model = WithFeatures(features_first)
    assert_close(reparameterize_model(model)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("conv2", lambda old: nn.Sequential(old, nn.Conv2d(48, 48, 1))),
        ("conv1", lambda old: nn.Sequential(old, nn.Conv2d(48, 48, 1))),
        ("conv3", lambda old: nn.Sequential(nn.Conv2d(48, 48, 1), old)),
        ("conv1", lambda old: nn.Conv2d(old.in_channels, 48, 1, groups=4)),
        ("conv3", lambda old: nn.Conv2d(48, old.out_channels, 1, groups=4)),
    ],
)
def test_replaced_convolution_of_a_block(name: str, replacement: Callable[[Any], nn.Module], x: torch.Tensor) -> None:
    """A dense convolution takes the order of channels, and another one does not."""
    model = randomized()
    block = model.layer3[0]
    setattr(block, name, replacement(block.get_submodule(name)).double())
    is_dense = not any(getattr(module, "groups", 1) > 1 for module in (block.conv1, block.conv3))
    for form_of in (compact, reparameterize_model):
        form = form_of(model)
        assert_close(form(x.double()), model(x.double()))
        assert (num_orders(form) == 0) == is_dense


# The deployed form


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_folded_in_float64(dtype: torch.dtype) -> None:
    model = trained().eval()
    form = reparameterize_model(model.to(dtype))
    exact = reparameterize_model(model.double())
    for ours, theirs in zip(form.state_dict().values(), exact.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs.to(dtype))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "form_of"),
    [("test_g_resnext", reparameterize_model), ("test_g_resnet", compact)],
    ids=["deployed", "compact"],
)
def test_script_pickle_and_export(name: str, form_of: Callable[[nn.Module], nn.Module], x: torch.Tensor) -> None:
    model = trained(name).eval()
    form = form_of(model)
    file = io.BytesIO()
    torch.save(form, file)
    file.seek(0)
    batch = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    exported = torch.export.export(form, (x,), dynamic_shapes=batch).module()
    for other in (torch.jit.script(form), torch.load(file, weights_only=False), exported):
        assert_close(other(x), model(x), rtol=1e-4, atol=1e-4)
    assert exported(x.repeat(3, 1, 1, 1)).shape[0] == 6
    torch.jit.script(trained())  # with the `fuse` in its stem


@pytest.mark.skipif(torch.__version__ < (2, 6), reason="its exporter fails on batch norm")
def test_onnx_is_plain_convolutions(x: torch.Tensor, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    form = reparameterize_model(trained()).eval()
    path = tmp_path / "model.onnx"
    torch.onnx.export(form, (x,), path, dynamo=True, verbose=False)
    ops = {node.op_type for node in onnx.load(path).graph.node}
    assert ops <= {"Conv", "Relu", "MaxPool", "Add", "GlobalAveragePool", "ReduceMean", "Gemm", "Flatten", "Reshape"}
    graph = onnx.reference.ReferenceEvaluator(str(path))
    (output,) = graph.run(None, {graph.input_names[0]: x.numpy()})
    assert_close(torch.from_numpy(output), form(x).detach(), rtol=1e-3, atol=1e-3)
