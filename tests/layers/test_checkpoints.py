"""Whoever loads, averages or casts a state dict gets the same function, or hears what is missing."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
from conftest import conv_with, gates, sorted_or_not, trained
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from timm_dgconv import DGConv2d, freeze_groups, layer_groups
from timm_dgconv.layers.checkpoints import PRETRAINED_GATE

NAME = "test_g_resnet"  # groups on a residual stream, whose channels have one order for all blocks


def original(conv: DGConv2d) -> dict[str, Tensor]:
    """A state dict of the original release, whose gates are unsorted."""
    constants = {"D": torch.eye(2), "I": torch.ones(2, 2)}
    return {"conv.weight": conv.weight, "conv.bias": conv.bias, "gate": conv.gate, **constants}


def earlier(conv: DGConv2d) -> dict[str, Tensor]:
    """A state dict of timm-dgconv 0.2, whose gates are unsorted."""
    return {"weight": conv.weight, "bias": conv.bias, "gate": conv.gate}


Write = Callable[[DGConv2d], dict[str, Tensor]]
FORMATS = [(original, False), (earlier, False), (nn.Module.state_dict, False), (nn.Module.state_dict, True)]


@sorted_or_not
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
# Functions are named without their addresses, so both workers collect the same tests.
@pytest.mark.parametrize(("write", "sort"), FORMATS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_layer_takes_the_form_of_the_gates_that_it_loads(
    write: Write, sort: bool, device: str, assign: bool, form: dict[str, Any]
) -> None:
    """A checkpoint keeps its function, its gates and its further training, whatever the layer was built as.

    Gates that do not say how they are read are read unsorted, with a warning.
    """
    source = conv_with("0110", padding=1, sort=sort)
    model = nn.Sequential(DGConv2d(16, 16, 3, padding=1, device=device, **form))
    conv: Any = model[0]
    gate, state_dict = conv.gate, {f"0.{name}": value.detach() for name, value in write(source).items()}
    names = list(state_dict)
    if device == "meta" and not assign:
        model.to_empty(device="cpu")
    said = "trained with sort=True, rename its keys from gate to sorted_gate"
    with pytest.warns(UserWarning, match=said) if conv.sort and "0.gate" in names else nullcontext():
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
        ({"weight": None}, r'"0\.weight".*expected torch\.Tensor'),
        ({"weight": torch.zeros(16, 5, 3, 3)}, r"3.2 groups; .*must be a power of two up to 16"),
        ({"weight": torch.zeros(16, 7, 3, 3)}, r"2.28571 groups; .*must be a power of two up to 16"),
        ({"weight": torch.zeros(16, 4, 5, 5)}, r"expected a group convolution with a weight of shape"),
        ({"unsorted_gate": torch.ones(4)}, r'Unexpected key\(s\) in state_dict: "0\.unsorted_gate"'),
    ],
    ids=["length of gate", "gate", "weight", "groups", "a rest", "kernel", "two gates"],
)
def test_a_refused_state_dict_is_torchs_error_with_the_reason(change: dict[str, Any], why: str) -> None:
    model = nn.Sequential(DGConv2d(16, 16, 3))
    entries = {**model[0].state_dict(), **change}
    if "unsorted_gate" not in change:
        del entries["sorted_gate"]
    with pytest.raises(RuntimeError, match=rf"(?s)Error\(s\) in loading state_dict for Sequential.*{why}"):
        model.load_state_dict({f"0.{name}": value for name, value in entries.items()})


def test_shards_in_any_order_are_the_whole_state_dict() -> None:
    """Frozen gates can stay where they were initialised for ever."""
    source, x = timm.create_model(NAME, freeze_groups=True, zero_init_last=False).eval(), torch.randn(2, 3, 32, 32)
    state_dict = source.state_dict()
    for names in (sorted(state_dict), sorted(state_dict, reverse=True)):
        model = timm.create_model(NAME, freeze_groups="weight" in names[0], zero_init_last=False).eval()
        for name in names:
            model.load_state_dict({name: state_dict[name]}, strict=False)
        if names[0] < names[-1]:  # the gates of a layer come before its weight
            assert layer_groups(model) == layer_groups(source)
            assert_close(model(x), source(x))


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


@sorted_or_not
def test_frozen_gates_are_missing_and_stay_when_only_the_rest_is_loaded(form: dict[str, Any]) -> None:
    """Lightning and torch.distributed write state dicts without frozen parameters."""
    source, model = (trained(NAME, num_classes=4, **form).eval() for _ in range(2))
    freeze_groups(model)
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if not name.endswith("gate"):
                parameter.mul_(1.1)
    state_dict = {name: value for name, value in source.state_dict().items() if not name.endswith("gate")}
    missing = model.load_state_dict(state_dict, strict=False).missing_keys
    assert missing == [name for name, _ in model.named_parameters() if name.endswith("gate")]
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*layer1\.0\.conv1\.\w*gate"):
        model.load_state_dict(state_dict)
    assert_close(gates(model), gates(source))
    x = torch.randn(2, 3, 32, 32)
    assert_close(model(x), source(x), rtol=1e-4, atol=1e-5)
