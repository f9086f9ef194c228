"""The models as timm models: everything a timm ResNet can do. timm's own tests of them run in test_timm_suite.py."""

import copy
import io

import pytest
import timm
import timm.optim
import torch
from timm.layers import BlurPool2d
from timm.models import group_parameters
from timm.utils import ModelEmaV3
from torch import nn
from torch.testing import assert_close

import timm_dgconv
from timm_dgconv import DGConv2d

NAMES = ["g_resnext50", "g_resnext101", "test_g_resnext"]


def create(**kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_g_resnext", **{"zero_init_last": False, "num_classes": 10, **kwargs})


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64)


def test_registered() -> None:
    assert set(NAMES) <= set(timm.list_models("*g_resnext*"))
    assert timm.list_models(module="g_resnext")


@pytest.mark.parametrize(
    ("name", "resnext"), [("g_resnext50", "resnext50_32x4d"), ("g_resnext101", "resnext101_32x8d")]
)
def test_is_a_resnext_with_dgconvs(name: str, resnext: str) -> None:
    model, fixed = (timm.create_model(n, device="meta") for n in (name, resnext))
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    fixed_shapes = {key: value.shape for key, value in fixed.state_dict().items()}
    gates = {key for key in shapes if key.endswith(".gate")}
    assert shapes.keys() - gates == fixed_shapes.keys()
    assert {key.removesuffix("gate") for key in gates} == {
        f"{n}." for n, m in model.named_modules() if type(m) is DGConv2d
    }
    differ = {key for key in fixed_shapes if shapes[key] != fixed_shapes[key]}
    assert differ == {key for key in fixed_shapes if key.endswith(".conv2.weight")}
    assert all(shapes[key][1] == 32 * fixed_shapes[key][1] for key in differ)


def test_tiny_model_is_tiny_and_has_other_channel_counts() -> None:
    model = timm.create_model("test_g_resnext")
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert any(m.in_channels & (m.in_channels - 1) for m in model.modules() if isinstance(m, DGConv2d))


@pytest.mark.parametrize("name", ["g_resnext50.dgconv_in1k", "g_resnext101.dgconv_in1k", "test_g_resnext"])
def test_default_cfg(name: str) -> None:
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.license == "mit"
    assert cfg.paper_ids == "arXiv:1908.05867"
    assert cfg.origin_url == "https://github.com/d-li14/dgconv.pytorch"
    assert not cfg.has_weights
    if name != "test_g_resnext":
        assert (cfg.input_size, cfg.crop_pct, cfg.interpolation) == ((3, 224, 224), 0.875, "bilinear")
        assert (cfg.mean, cfg.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"in_chans": 1},
        {"global_pool": "avgmax"},
        {"global_pool": "catavgmax"},
        {"output_stride": 16},
        {"output_stride": 8},
        {"drop_rate": 0.3, "drop_path_rate": 0.2, "drop_block_rate": 0.1},
        {"act_layer": "silu"},
        {"act_layer": "gelu"},
        {"norm_layer": "groupnorm1"},
        {"aa_layer": BlurPool2d},
        {"aa_layer": nn.AvgPool2d},
        {"block_args": {"attn_layer": "se"}},
        {"block_args": {"sort": True}},
        {"stem_type": "deep", "stem_width": 32, "avg_down": True},
        {"replace_stem_pool": True},
        {"block_reduce_first": 2},
        {"layers": (2, 1, 1, 1), "base_width": 32},
    ],
    ids=str,
)
def test_options_of_a_timm_resnet(kwargs: dict[str, object]) -> None:
    model = create(**kwargs)
    size = 128 if "drop_block_rate" in kwargs else 64  # timm < 1.0.23 wants its blocks smaller than the features
    x = torch.randn(2, kwargs.get("in_chans", 3), size, size)
    model(x).square().sum().backward()
    convs = [m for m in model.modules() if isinstance(m, DGConv2d)]
    assert len(convs) == sum(kwargs.get("layers", (1, 1, 1, 1)))
    assert all(conv.gate.grad is not None for conv in convs)
    assert any(conv.gate.grad.abs().max() > 0 for conv in convs)
    stride = kwargs.get("output_stride", 32)
    assert model.eval().forward_features(x).shape[-1] == size // stride
    if kwargs == {"block_args": {"sort": True}}:
        assert all(conv.sort for conv in convs)


def test_scriptable_and_traceable(x: torch.Tensor) -> None:
    model = create(scriptable=True).eval()
    for graph in (torch.jit.script(model), torch.jit.trace(model, x), torch.fx.symbolic_trace(model)):
        assert_close(graph(x), model(x))


def test_compile_and_export(x: torch.Tensor) -> None:
    model = create()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # test_dgconv.py has the default backend
    for m in (compiled, reference):
        m(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert_close(
            p.grad, q.grad, rtol=1e-3, atol=1e-3 * q.grad.abs().max().item(), msg=lambda t, name=name: f"{name}: {t}"
        )
    model.eval()
    assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.skipif(torch.__version__ < (2, 6), reason="its exporter fails on batch norm")
def test_onnx(x: torch.Tensor, tmp_path: object) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = create().eval()
    file = f"{tmp_path}/model.onnx"
    torch.onnx.export(model, (x,), file, dynamo=True)
    onnx.checker.check_model(file)


def test_features(x: torch.Tensor) -> None:
    model = create(features_only=True, out_indices=(1, 3, 4))
    features = model(x)
    assert [f.shape[1] for f in features] == model.feature_info.channels() == [64, 192, 384]
    final, intermediates = create().eval().forward_intermediates(x, indices=2)
    assert_close(final, intermediates[-1])


def test_reset_classifier_and_checkpointing(x: torch.Tensor) -> None:
    model = create()
    reference = copy.deepcopy(model)
    model.set_grad_checkpointing()
    for m in (model, reference):
        m(x).square().sum().backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert_close(p.grad, q.grad)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, 384)


def test_parameter_groups() -> None:
    model = create()
    groups = group_parameters(model, model.group_matcher())
    assert "layer1.0.conv2.gate" in {
        name for names in groups.values() for name in ([names] if isinstance(names, str) else names)
    }
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    gates = {id(p) for name, p in model.named_parameters() if name.endswith(".gate")}
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert len(gates) == 4
    assert not gates & decayed


def test_device_and_dtype() -> None:
    model = timm.create_model("test_g_resnext", device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    model = create(dtype=torch.float64)
    assert model(torch.randn(2, 3, 64, 64, dtype=torch.float64)).dtype == torch.float64


def test_ema_and_state_dict(x: torch.Tensor) -> None:
    model = create().eval()
    ema = ModelEmaV3(model, decay=0.5)
    ema.update(model)
    assert_close(ema.module(x), model(x))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = create().eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), model(x))


def test_gates_learn(x: torch.Tensor) -> None:
    """A budget alone closes every gate; the gradient of complexity reaches them through an ordinary optimizer."""
    model = create()
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x).sum() * 0 + timm_dgconv.complexity(model)).backward()
        optimizer.step()
    convs = [m for m in model.modules() if isinstance(m, DGConv2d)]
    assert all(conv.num_groups == 2 ** conv.gate.numel() for conv in convs)


def test_unknown_argument() -> None:
    with pytest.raises(TypeError, match=r"nonsense=1.*drop_path_rate"):
        timm.create_model("test_g_resnext", nonsense=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_no_host_transfer_in_eval() -> None:
    model = create().cuda().eval()
    x = torch.randn(2, 3, 64, 64, device="cuda")
    with torch.inference_mode():
        model(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
