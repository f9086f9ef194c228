"""Whoever loads, averages or casts a state dict gets the same function, or hears what is missing."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed.checkpoint as dcp
from conftest import conv_with, gates, trained
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.utils import ModelEma, ModelEmaV2
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

from timm_dgconv import DGConv2d, compact, freeze_groups, layer_groups
from timm_dgconv.layers.checkpoints import PRETRAINED_GATE

NAME = "test_g_resnet"  # groups on a residual stream, whose channels have one order for all blocks
FORMS: list[dict[str, Any]] = [{}, {"sort": False}]

forms = pytest.mark.parametrize("form", FORMS, ids=str)


# Formats of one layer


def original(conv: DGConv2d) -> dict[str, Tensor]:
    """A state dict of the original release, whose gates are unsorted."""
    constants = {"D": torch.eye(2), "I": torch.ones(2, 2)}
    return {"conv.weight": conv.weight, "conv.bias": conv.bias, "gate": conv.gate, **constants}


def earlier(conv: DGConv2d) -> dict[str, Tensor]:
    """A state dict of timm-dgconv 0.2, whose gates are unsorted."""
    return {"weight": conv.weight, "bias": conv.bias, "gate": conv.gate}


FORMATS: dict[Callable[[DGConv2d], dict[str, Tensor]], list[bool]] = {
    original: [False],
    earlier: [False],
    nn.Module.state_dict: [False, True],
}


@pytest.mark.parametrize("write", [original, earlier])
def test_gates_that_do_not_say_how_they_are_read_are_read_unsorted_with_a_warning(
    write: Callable[[DGConv2d], dict[str, Tensor]],
) -> None:
    entries = write(conv_with("0110"))
    conv = conv_with("0110")
    with pytest.warns(UserWarning, match="trained with sort=True, rename its keys from gate to sorted_gate"):
        conv.load_state_dict(entries)
    assert not conv.sort


@forms
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("write", "sort"),
    [(write, sort) for write, sorts in FORMATS.items() for sort in sorts],
    ids=lambda value: getattr(value, "__name__", str(value)),  # both workers collect the same names
)
def test_a_layer_takes_the_form_of_the_gates_that_it_loads(
    write: Callable[[DGConv2d], dict[str, Tensor]], sort: bool, device: str, assign: bool, form: dict[str, Any]
) -> None:
    """A checkpoint keeps its function, its gates and its further training, whatever the layer was built as."""
    source = conv_with("0110", padding=1, sort=sort)
    model = nn.Sequential(DGConv2d(16, 16, 3, padding=1, device=device, **form))
    conv: Any = model[0]
    gate, state_dict = conv.gate, {f"0.{name}": value.detach() for name, value in write(source).items()}
    names = list(state_dict)
    if device == "meta" and not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(state_dict, assign=assign)
    assert list(state_dict) == names, "the caller's dict stays as it is"
    assert conv.sort == sort
    assert assign or conv.gate is gate or device == "meta", "an optimizer knows the parameter"
    assert_close(dict(conv.state_dict()), dict(source.state_dict()))
    x = torch.randn(2, 16, 5, 5)
    grads = []
    for layer in (conv, source):
        y = layer(x)
        grads.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
    assert_close(*grads)


def test_a_loader_that_goes_by_names_misses_gates_that_are_read_in_another_way() -> None:
    names = {form: set(DGConv2d(16, 16, 3, sort=form).state_dict()) for form in (True, False)}
    assert names[True] ^ names[False] == {"sorted_gate", "unsorted_gate"}


@given(st.sampled_from([(16, 16), (48, 96), (24, 8)]), st.integers(0, 3), st.sampled_from(FORMS), st.integers(0, 2**31))
def test_a_layer_loads_a_group_convolution(
    channels: tuple[int, int], closed: int, form: dict[str, Any], seed: int
) -> None:
    torch.manual_seed(seed)
    fixed = nn.Conv2d(*channels, 3, groups=2**closed)
    conv = DGConv2d(*channels, 3, **form)
    fresh = conv.weight.detach().clone()
    conv.load_state_dict(fixed.state_dict())
    assert conv.num_groups == 2**closed
    outside = conv.connectivity() == 0
    assert torch.equal(conv.weight[outside], fresh[outside])
    assert (conv.gate.abs() == PRETRAINED_GATE).all()
    x = torch.randn(1, channels[0], 5, 5)
    assert_close(conv(x), fixed(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"gate": torch.zeros(5)}, r"0: the checkpoint has 5 gates of shape \(5,\), expected 4 for 16 -> 16 channels"),
        ({"gate": "open"}, r'"0\.\w*gate".*expected torch\.Tensor'),
        ({"gate": None, "weight": None}, r'"0\.weight".*expected torch\.Tensor'),
        ({"gate": None, "weight": torch.zeros(16, 5, 3, 3)}, r"3.2 groups; .*must be a power of two up to 16"),
        ({"gate": None, "weight": torch.zeros(16, 4, 5, 5)}, r"expected a group convolution with a weight of shape"),
        ({"bias": torch.zeros(3)}, r"size mismatch for 0\.bias"),
        ({"more": torch.zeros(3)}, r'Unexpected key\(s\) in state_dict: "0\.more"'),
        ({"unsorted_gate": torch.ones(4)}, r'Unexpected key\(s\) in state_dict: "0\.unsorted_gate"'),
    ],
    ids=["length of gate", "gate", "weight", "groups", "kernel", "bias", "unexpected", "two gates"],
)
def test_a_refused_state_dict_is_torchs_error_with_the_reason(change: dict[str, Any], why: str) -> None:
    model = nn.Sequential(DGConv2d(16, 16, 3))
    state_dict: dict[str, Any] = dict(model.state_dict())
    if "gate" in change:
        change = dict(change)
        gate = change.pop("gate")
        del state_dict["0.sorted_gate"]
        change |= {} if gate is None else {"gate": gate}
    state_dict |= {f"0.{name}": value for name, value in change.items()}
    with pytest.raises(RuntimeError, match=rf"(?s)Error\(s\) in loading state_dict for Sequential.*{why}"):
        model.load_state_dict(state_dict)


@forms
@pytest.mark.parametrize("names", [[], ["bias"], ["weight"], ["gate"], ["bias", "gate"]], ids=str)
def test_a_part_of_a_state_dict_changes_nothing_else(names: list[str], form: dict[str, Any]) -> None:
    conv, other = conv_with("0110", **form), conv_with("1100", sort=False)
    conv.gate.data.mul_(1e6)  # gates that have learned: initial ones open for the weight of a convolution
    entries = dict(other.state_dict())
    entries["gate"] = entries.pop("unsorted_gate")
    before = {name: value.clone() for name, value in [("gate", conv.gate), *conv.named_parameters()]}
    found = conv.load_state_dict({name: entries[name] for name in names}, strict=False)
    for name in ("weight", "bias", "gate"):
        assert torch.equal(getattr(conv, name), entries[name] if name in names else before[name])
    assert conv.sort == ("gate" not in names and form.get("sort", True))
    assert len(found.missing_keys) == 3 - len(names)
    assert not found.unexpected_keys


# Loading, averaging and casting models


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=FORMS, ids=str)
def form(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def small(form: dict[str, Any]) -> nn.Module:
    return compact(trained(NAME, num_classes=4, **form)).eval()


def built_like(small: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model(NAME, num_classes=4, groups=layer_groups(small)).eval()


def assert_same(found: Any, expected: nn.Module, x: Tensor) -> None:
    assert_close(found.eval()(x), expected(x), rtol=1e-4, atol=1e-5)


# Partial state dicts


def nothing(small: nn.Module) -> dict[str, Tensor]:
    return {}


def classifier(small: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in small.state_dict().items() if name.startswith("fc.")}


def parameters(small: nn.Module) -> dict[str, Tensor]:
    return dict(small.named_parameters())


@pytest.mark.parametrize("part", [nothing, classifier, parameters])
def test_a_part_of_a_compact_state_dict_changes_nothing_else(
    part: Callable[[nn.Module], dict[str, Tensor]], small: nn.Module, x: Tensor
) -> None:
    before = small(x)
    small.load_state_dict(part(small), strict=False)
    assert_close(small(x), before)


def test_a_refused_state_dict_leaves_a_compact_model_as_it_is(small: nn.Module, x: Tensor) -> None:
    before = small(x)
    with pytest.raises(RuntimeError, match="Missing key"):
        small.load_state_dict(classifier(small))
    assert_close(small(x), before)


def test_a_compact_model_loads_from_shards(small: nn.Module, x: Tensor) -> None:
    again, entries = built_like(small), list(small.state_dict().items())
    for start in range(0, len(entries), 7):
        again.load_state_dict(dict(entries[start : start + 7]), strict=False)
    assert_same(again, small, x)


def test_a_compact_model_takes_an_adapter_of_peft(small: nn.Module, x: Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(copy.deepcopy(small), peft.LoraConfig(target_modules=["fc"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    assert_same(peft.PeftModel.from_pretrained(copy.deepcopy(small), tmp_path), model.eval(), x)


# Trainable parameters alone


def frozen(form: dict[str, Any]) -> nn.Module:
    model = trained(NAME, num_classes=4, **form)
    freeze_groups(model)
    return model.eval()


def trainable(model: nn.Module) -> dict[str, Any]:
    """A state dict without frozen parameters, as Lightning and torch.distributed write it."""
    return get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))


def test_frozen_gates_that_a_strict_load_does_not_find_are_missing(form: dict[str, Any]) -> None:
    model = frozen(form)
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*layer1\.0\.conv1\.\w*gate"):
        model.load_state_dict(trainable(model))


@pytest.mark.parametrize("loader", ["torch", "torch.distributed", "layer"])
def test_frozen_gates_stay_when_only_the_rest_is_loaded(loader: str, form: dict[str, Any], x: Tensor) -> None:
    source, model = frozen(form), frozen(form)
    with torch.no_grad():
        for parameter in source.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)
    state_dict = trainable(source)
    if loader == "torch":
        missing = model.load_state_dict(state_dict, strict=False).missing_keys
        assert missing == [name for name, _ in model.named_parameters() if name.endswith("gate")]
    elif loader == "torch.distributed":
        set_model_state_dict(model, state_dict, options=StateDictOptions(strict=False))
    else:
        for module, other in zip(model.modules(), source.modules(), strict=True):
            values = {**dict(other.named_parameters(recurse=False)), **dict(other.named_buffers(recurse=False))}
            module.load_state_dict({n: v for n, v in values.items() if "gate" not in n}, strict=False)
    assert_close(gates(model), gates(source))
    assert_same(model, source, x)


# Loaders that go by the names of the model


def by_name(small: nn.Module, folder: Path) -> Any:
    """Copy what the model has, as many loaders do, without a call of load_state_dict."""
    again, state_dict = built_like(small), small.state_dict()
    for name, value in again.state_dict().items():
        value.copy_(state_dict[name])
    return again


def by_torch_distributed(small: nn.Module, folder: Path) -> Any:
    dcp.save(small.state_dict(), checkpoint_id=folder)
    again = built_like(small)
    state_dict = again.state_dict()
    dcp.load(state_dict, checkpoint_id=folder)
    again.load_state_dict(state_dict)
    return again


def by_accelerate(small: nn.Module, folder: Path) -> Any:
    accelerate = pytest.importorskip("accelerate")
    save_file(small.state_dict(), folder / "model.safetensors")
    with accelerate.init_empty_weights(include_buffers=True):
        again = built_like(small)
    return accelerate.load_checkpoint_and_dispatch(again, str(folder / "model.safetensors"), device_map={"": "cpu"})


def by_transformers(small: nn.Module, folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    args = {"groups": layer_groups(small)}
    config = transformers.TimmWrapperConfig(architecture=NAME, num_labels=4, model_args=args)
    model = transformers.TimmWrapperForImageClassification(config)
    model.timm_model.load_state_dict(small.state_dict())
    model.save_pretrained(folder)
    return transformers.AutoModelForImageClassification.from_pretrained(folder).timm_model


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("load", [by_name, by_torch_distributed, by_accelerate, by_transformers])
def test_a_compact_model_is_its_tensors_and_its_numbers_of_groups(
    load: Callable[[nn.Module, Path], Any], small: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    assert_same(load(small, tmp_path), small, x)


# Averages and casts


def average_of_timm(small: nn.Module) -> nn.Module:
    average = ModelEma(small, decay=0.9999)
    for _ in range(3):
        average.update(small)
    return average.ema


def second_average_of_timm(small: nn.Module) -> nn.Module:
    average = ModelEmaV2(small, decay=0.9999)
    for _ in range(3):
        average.update(small)
    return average.module


def average_of_torch(small: nn.Module) -> nn.Module:
    average = AveragedModel(small, multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=True)
    for _ in range(3):
        average.update_parameters(small)
    return average.module


@pytest.mark.parametrize("average", [average_of_timm, second_average_of_timm, average_of_torch])
def test_an_average_of_equal_compact_models_is_the_same_function(
    average: Callable[[nn.Module], nn.Module], small: nn.Module, x: Tensor
) -> None:
    assert_same(average(small), small, x)


def test_a_cast_state_dict_has_the_same_groups(form: dict[str, Any]) -> None:
    """bfloat16 has no integers above 256 that are odd."""
    torch.manual_seed(0)
    conv = DGConv2d(512, 512, 1, **form)
    with torch.no_grad():
        conv.gate.normal_()
    small, x = compact(conv), torch.randn(1, 512, 2, 2)
    state_dict = {name: value.bfloat16() for name, value in small.state_dict().items()}
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.copy_(parameter.bfloat16())
    expected = small(x)
    small.load_state_dict(state_dict)
    assert_close(small(x), expected)
