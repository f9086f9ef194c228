"""Whoever loads, averages or casts a state dict gets the same function, or hears what is missing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import conv_with, gates, sorted_or_not, trained
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.testing import assert_close

from timm_dgconv import DGConv2d, compact, freeze_groups
from timm_dgconv.layers.checkpoints import PRETRAINED_GATE

NAME = "test_g_resnet"  # groups on a residual stream, whose channels have one order for all blocks


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


@sorted_or_not
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


@given(st.sampled_from([(16, 16), (48, 96), (24, 8)]), st.integers(0, 3), st.booleans(), st.integers(0, 2**31))
def test_a_layer_loads_a_group_convolution(channels: tuple[int, int], closed: int, sort: bool, seed: int) -> None:
    torch.manual_seed(seed)
    fixed = nn.Conv2d(*channels, 3, groups=2**closed)
    conv = DGConv2d(*channels, 3, sort=sort)
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


@sorted_or_not
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


# Partial state dicts of models


def nothing(small: nn.Module) -> dict[str, Tensor]:
    return {}


def classifier(small: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in small.state_dict().items() if name.startswith("fc.")}


def parameters(small: nn.Module) -> dict[str, Tensor]:
    return dict(small.named_parameters())


@sorted_or_not
@pytest.mark.parametrize("part", [nothing, classifier, parameters])
def test_a_part_of_a_compact_state_dict_changes_nothing_else(
    part: Callable[[nn.Module], dict[str, Tensor]], form: dict[str, Any]
) -> None:
    small, x = compact(trained(NAME, num_classes=4, **form)).eval(), torch.randn(2, 3, 32, 32)
    before = small(x)
    small.load_state_dict(part(small), strict=False)
    assert_close(small(x), before)


# Trainable parameters alone


def frozen(form: dict[str, Any]) -> nn.Module:
    model = trained(NAME, num_classes=4, **form)
    freeze_groups(model)
    return model.eval()


def trainable(model: nn.Module) -> dict[str, Any]:
    """A state dict without frozen parameters, as Lightning and torch.distributed write it."""
    return get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))


@sorted_or_not
def test_frozen_gates_that_a_strict_load_does_not_find_are_missing(form: dict[str, Any]) -> None:
    model = frozen(form)
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*layer1\.0\.conv1\.\w*gate"):
        model.load_state_dict(trainable(model))


@sorted_or_not
@pytest.mark.parametrize("loader", ["torch", "torch.distributed", "layer"])
def test_frozen_gates_stay_when_only_the_rest_is_loaded(loader: str, form: dict[str, Any]) -> None:
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
    x = torch.randn(2, 3, 32, 32)
    assert_close(model(x), source(x), rtol=1e-4, atol=1e-5)
