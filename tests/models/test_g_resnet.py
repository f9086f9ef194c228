"""The models as timm models: options, graphs, weights and tags. test_timm_suite.py runs timm's own tests."""

import copy
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.models
import timm.optim
import torch
from conftest import Original, forms, gates, jit_is_deprecated, layers
from safetensors.torch import save_file
from timm.models import group_parameters
from timm.models._hub import save_config_for_hf
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.testing import assert_close

from timm_dgconv import DGConv2d, compact, layer_groups
from timm_dgconv.models.base_models import BASE_MODELS, family


def create(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_g_resnext", **{"zero_init_last": False, "num_classes": 10, **kwargs})


@pytest.mark.parametrize("name", BASE_MODELS)
def test_a_model_is_its_base_model_with_dgconvs(name: str) -> None:
    model, fixed = (timm.create_model(n, device="meta") for n in (name, BASE_MODELS[name]))
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    fixed_shapes = {key: value.shape for key, value in fixed.state_dict().items()}
    learned = {n for n, m in model.named_modules() if type(m) is DGConv2d}
    assert shapes.keys() - {f"{n}.sorted_gate" for n in learned} == fixed_shapes.keys()
    convs = {n: m for n, m in fixed.named_modules() if n in learned}
    dense = {f"{n}.weight": (m.out_channels, m.in_channels, *m.kernel_size) for n, m in convs.items()}
    assert {key: shapes[key] for key in fixed_shapes} == {**fixed_shapes, **dense}

    with_groups = timm.create_model(name, groups=[conv.groups for conv in convs.values()], device="meta")
    assert {key: value.shape for key, value in with_groups.state_dict().items()} == fixed_shapes


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        (dict(nonsense=1), TypeError, ["nonsense"]),
        (dict(groups=[4, 4, 4]), ValueError, ["4 layers"]),
        (dict(groups=[4, 4, 5, 4]), ValueError, ["groups: layer3.0.conv2 cannot have 5 groups", "48 -> 48"]),
        (dict(groups="4444"), ValueError, ["4 layers"]),
        (dict(groups=True), ValueError, ["groups=True must be one whole number"]),
        (dict(init_groups=[2, 2, 2, None]), ValueError, ["None] must be one whole number"]),
        (dict(complexity_weight=float("nan")), ValueError, ["nan", "at least 0 and finite"]),
        (dict(complexity_weight="much"), TypeError, ["'much'", "number"]),
        (dict(complexity_weight=0, complexity_target=0.5), ValueError, ["complexity_target=0.5", "complexity_weight"]),
        (dict(complexity_target=0.0), ValueError, ["complexity_target=0.0", "above 0"]),
        (dict(complexity_target=1.5), ValueError, ["complexity_target=1.5", "at most 1"]),
        (dict(gate_bound=0), ValueError, ["gate_bound=0", "freeze_groups=True"]),
        (dict(gate_steps="all"), TypeError, ["gate_steps='all'", "number"]),
        (dict(gate_steps=1.5), TypeError, ["gate_steps=1.5 must be a whole number"]),
        (dict(complexity_target=[0.5]), TypeError, ["complexity_target=[0.5] must be a number"]),
        (dict(complexity_target="ResNeXt"), ValueError, ["complexity_target='ResNeXt' is not a number", "'resnext'"]),
        (dict(nested="false"), TypeError, ["nested='false' is not a bool; use True or False"]),
        (dict(init_groups=3), ValueError, ["init_groups: layer1.0.conv2 cannot have 3", "power of two and at most 16"]),
        (dict(init_groups=[4, 4, 4]), ValueError, ["init_groups=[4, 4, 4] must be one whole number", "4 layers"]),
        (dict(init_groups=4, groups=[1, 1, 1, 1]), ValueError, ["init_groups=4 needs gates", "groups=..."]),
        (dict(complexity_weight=0.1, freeze_groups=True), ValueError, ["needs gates that learn", "freeze_groups=True"]),
        (dict(complexity_weight=0.1, groups=[1, 1, 1, 1]), ValueError, ["needs gates that learn", "groups=..."]),
        (dict(complexity_target="resnext", pointwise=True), ValueError, ["'resnext' is for the 3x3", "number"]),
    ],
    ids=str,
)
def test_bad_arguments_are_named(kwargs: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        timm.create_model("test_g_resnext", **kwargs)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("init_groups", [1, 4, [16, 1, 2, 8]], ids=str)
def test_training_starts_with_a_number_of_groups(init_groups: int | list[int]) -> None:
    model = create(init_groups=init_groups)
    assert layer_groups(model) == ([init_groups] * 4 if isinstance(init_groups, int) else init_groups)
    assert all(torch.equal(gate.abs(), torch.full_like(gate, 0.01)) for gate in gates(model))
    assert layer_groups(create(init_groups=4, freeze_groups=True)) == [4] * 4


@pytest.mark.parametrize("source", ["a checkpoint", "pretrained weights", "a ResNeXt", "a ResNet"])
def test_loaded_groups_replace_init_groups_with_a_warning(source: str, tmp_path: Path) -> None:
    path, number = tmp_path / "weights.pth", 1 if source == "a ResNet" else 2
    torch.save(create(**{"groups" if "ResNe" in source else "init_groups": number}).state_dict(), path)
    kwargs: dict[str, Any] = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    if source in ("a checkpoint", "a ResNet"):
        kwargs = dict(checkpoint_path=path)
    with pytest.warns(UserWarning, match="the groups of the loaded weights replace init_groups=4"):
        model = create(init_groups=4, **kwargs)
    assert layer_groups(model) == [number] * 4
    copy.deepcopy(pickle.loads(pickle.dumps(model)))


def test_the_groups_of_a_resnext_determine_its_widths_only() -> None:
    model = timm.create_model("test_g_resnext", cardinality=6)
    assert model.layer1[0].conv2.in_channels == 24
    assert model.layer1[0].conv2.weight.std() > 0.05


def test_config_has_no_training_arguments(tmp_path: Path) -> None:
    steered = create(complexity_weight=0.1, nested=False)
    save_config_for_hf(steered, tmp_path / "config.json")
    save_config_for_hf(compact(steered), tmp_path / "compact.json")
    features = compact(create(complexity_weight=0.1, features_only=True))
    assert "complexity_weight" not in getattr(features, "_model_args", {})
    save_config_for_hf(create(freeze_groups=True), tmp_path / "frozen.json")
    for file in tmp_path.iterdir():
        assert not re.search("complexity|freeze|nested", file.read_text())


def test_models_are_built_on_a_device_and_in_a_dtype() -> None:
    with torch.device("meta"):  # as transformers does
        assert timm.create_model("test_g_resnext", groups=2).layer1[0].conv2.weight.is_meta
    model = timm.create_model("test_g_resnext", device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    model = create(dtype=torch.float64)
    assert model(torch.randn(2, 3, 64, 64, dtype=torch.float64)).dtype == torch.float64


@jit_is_deprecated
@forms
def test_graphs_compute_the_same(form: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 64, 64)
    scripted = torch.jit.script(create(**form)).train()  # as train.py --torchscript does
    scripted(x).sum().backward()
    model = create(**form).eval()
    assert {(conv.sort, conv.nested) for conv in layers(model)} == {(form.get("sort", True), form.get("nested", True))}
    scripted.load_state_dict(model.state_dict())
    exported = torch.export.export(model, (x,)).module()
    for graph in (scripted.eval(), torch.jit.trace(model, x), torch.fx.symbolic_trace(model), exported):
        assert_close(graph(x), model(x))


def test_gates_do_not_decay_and_have_the_learning_rate_of_their_layer() -> None:
    model = create()
    names_by_layer = group_parameters(model, model.group_matcher())
    assert any("layer1.0.conv2.sorted_gate" in names for names in names_by_layer.values())
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1)
    by_decay, by_layer = (f(model, weight_decay=0.1) for f in (param_groups_weight_decay, param_groups_layer_decay))
    for groups in (optimizer.param_groups, by_decay, by_layer):
        group_of = {id(p): group for group in groups for p in group["params"]}
        assert len(layers(model)) == 4
        for conv in layers(model):
            gate, weight = group_of[id(conv.gate)], group_of[id(conv.weight)]
            assert (gate["weight_decay"], weight["weight_decay"]) == (0, 0.1)
            assert gate.get("lr_scale") == weight.get("lr_scale")


@pytest.mark.parametrize("route", ["checkpoint_path", "overlay", "load_checkpoint", "resume_checkpoint"])
def test_the_original_checkpoint_loads(original: Original, route: str, caplog: pytest.LogCaptureFixture) -> None:
    file, x, logits = original
    if route == "checkpoint_path":  # and train.py --initial-checkpoint
        model = timm.create_model("g_resnext50", checkpoint_path=str(file))
    elif route == "overlay":
        overlay = {"file": str(file)}
        model = timm.create_model("g_resnext50.dgconv_in1k", pretrained=True, pretrained_cfg_overlay=overlay)
    else:  # validate.py --checkpoint, train.py --resume
        model = timm.create_model("g_resnext50")
        getattr(timm.models, route)(model, str(file))
    with torch.inference_mode():
        assert_close(model.eval()(x), logits, rtol=1e-4, atol=1e-4 * logits.abs().max().item())
    assert "converted" not in caplog.text
    assert not any(conv.sort for conv in layers(model))


@pytest.mark.parametrize("name", BASE_MODELS)
def test_a_model_computes_as_its_base_model(name: str, tmp_path: Path) -> None:
    """With one block per stage."""
    torch.manual_seed(1)
    x, one = torch.randn(2, 3, 64, 64), (1, 1, 1, 1)
    depth: dict[str, Any] = {"block_config": one} if "densenet" in name else {"layers": one, "zero_init_last": False}
    fixed = timm.create_model(BASE_MODELS[name], **depth)
    fixed(torch.randn(4, 3, 64, 64))  # statistics in its batch norms
    fixed.eval()
    save_file(fixed.state_dict(), tmp_path / "base.safetensors")
    model = timm.create_model(name, checkpoint_path=tmp_path / "base.safetensors", **depth).eval()
    learned = [conv_name for conv_name, conv in model.named_modules() if isinstance(conv, DGConv2d)]
    assert layer_groups(model) == [fixed.get_submodule(conv_name).groups for conv_name in learned]
    with torch.inference_mode():
        expected = fixed(x)
    logits = model(x)
    assert_close(logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    gradients = torch.autograd.grad(logits.square().sum(), gates(model))
    for gate, gradient in zip(gates(model), gradients, strict=True):
        assert gradient[gate < 0].any() or not (gate < 0).any()


def test_loads_resnext_with_other_classes_and_channels(tmp_path: Path) -> None:
    torch.save(create(groups=4, num_classes=1000).state_dict(), tmp_path / "resnext.pth")
    overlay = {"file": str(tmp_path / "resnext.pth")}
    model = timm.create_model("test_g_resnext", True, num_classes=3, in_chans=1, pretrained_cfg_overlay=overlay).eval()
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 3)
    assert layer_groups(model) == [4, 4, 4, 4]


@pytest.mark.parametrize("name", BASE_MODELS)
def test_a_model_has_the_weights_of_its_base_model(name: str) -> None:
    base = BASE_MODELS[name]
    assert len(timm.list_pretrained(f"{name}.*")) == len(timm.list_pretrained(f"{base}.*"))
    default = "tv2_in1k" if name == "g_resnext101" else timm.get_pretrained_cfg(base).tag
    cfg = timm.get_pretrained_cfg(name)
    assert (cfg.tag, cfg.hf_hub_id) == (f"{family(name)}_{default}", f"timm/{base}.{default}")


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("g_resnext50", ["drive.google.com", "timm-dgconv convert"]),
        ("g_resnext101", ["no weights", "resnext_tv2_in1k"]),
    ],
)
def test_weights_that_are_not_published_are_an_error_that_names_the_ways(name: str, ways: list[str]) -> None:
    with pytest.raises(RuntimeError) as error:
        timm.create_model(f"{name}.dgconv_in1k", pretrained=True)
    assert all(way in str(error.value) for way in [*ways, "pretrained_cfg_overlay=dict(file=PATH)", "hf-hub:"])


def test_warns_that_a_converted_resnext_has_no_learned_groups(caplog: pytest.LogCaptureFixture) -> None:
    weights = timm.create_model("resnext50_32x4d").state_dict()
    cfg = {**timm.get_pretrained_cfg("g_resnext50").to_dict(), "hf_hub_id": None, "url": "file:///no"}
    with pytest.raises(OSError, match=r"no"), caplog.at_level(logging.WARNING):  # there is no such file
        timm.create_model("g_resnext50", pretrained=True, pretrained_cfg=cfg)
    assert re.search(r"g_resnext50\.resnext_a1h_in1k is a converted resnext50_32x4d.*not learned yet", caplog.text)
    caplog.clear()
    timm.create_model("g_resnext50", pretrained=True, pretrained_cfg_overlay={"state_dict": weights})
    assert "converted" not in caplog.text
