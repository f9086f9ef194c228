"""Any network's convolutions learn their groups, and compute the same at first."""

import copy
from typing import Any

import pytest
import timm
import torch
from conftest import FORMS, outputs, set_gates, trained
from hypothesis import given
from hypothesis import strategies as st
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.testing import assert_close

from timm_dgconv import DGConv2d, compact, groupable, skipped_convs


def create(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5).eval()


def converted(model: nn.Module) -> dict[str, DGConv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, DGConv2d)}


@given(data=st.data())
def test_convolutions_compute_the_same(data: st.DataObject) -> None:
    draw, bits = data.draw, data.draw(st.integers(2, 4))
    channels = [draw(st.integers(1, 3)) << bits for _ in range(2)]
    groups = 1 << draw(st.integers(0, bits))
    padding: Any = draw(st.sampled_from([0, 1, (2, 1), "same"]))
    stride = 1 if padding == "same" else draw(st.integers(1, 2))
    mode = draw(st.sampled_from(["zeros", "circular"]))
    options = dict(dilation=draw(st.integers(1, 2)), bias=draw(st.booleans()), padding_mode=mode, dtype=torch.float64)
    conv = nn.Conv2d(*channels, 3, stride, padding, groups=groups, **options)
    x = torch.randn(2, channels[0], 9, 8, dtype=torch.float64)
    expected = conv(x)
    form = draw(st.sampled_from(FORMS))
    groupable(conv, where=lambda name, conv: True, **form)
    assert type(conv) is DGConv2d
    assert (conv.sort, conv.nested) == (form.get("sort", True), form.get("nested", True))
    assert conv.num_groups == groups
    assert_close(conv(x), expected)


@pytest.mark.parametrize("groups", [1, 4])
def test_a_convolution_keeps_its_properties(groups: int) -> None:
    conv = nn.Conv2d(16, 32, 3, groups=groups, dtype=torch.bfloat16, padding="same").eval()
    conv.to(memory_format=torch.channels_last).requires_grad_(False)
    calls = []
    conv.register_forward_hook(lambda *args: calls.append(args))
    conv.register_forward_pre_hook(lambda *args, **kwargs: calls.append(args), with_kwargs=True)
    conv.note = "of the user"  # type: ignore[assignment]
    weight = conv.weight
    model: Any = nn.Sequential(conv, nn.Sequential(conv))  # registered twice
    groupable(model)
    assert model[0] is model[1][0] is conv
    assert (weight is conv.weight) == (groups == 1)
    for parameter in conv.parameters():
        assert parameter.dtype == torch.bfloat16
        assert not parameter.requires_grad
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not conv.training
    assert conv.note == "of the user"
    x = torch.randn(1, 16, 5, 5, dtype=torch.bfloat16)
    assert conv(x).shape == (1, 32, 5, 5)
    assert len(calls) == 2
    assert_close(copy.deepcopy(conv)(x), conv(x))


@pytest.mark.parametrize("groups", [1, 4])
def test_tied_convolutions_stay_tied(groups: int) -> None:
    model: Any = nn.Sequential(*(nn.Conv2d(16, 16, 3, groups=groups) for _ in range(2)))
    model[1].weight = model[0].weight
    x = torch.randn(1, 16, 7, 7)
    expected = model(x)
    groupable(model)
    assert model[0].weight is model[1].weight
    assert model[0].gate is model[1].gate
    assert_close(model(x), expected)


class Fuses(nn.Sequential):
    """A block that folds its norm, as those of ultralytics do."""

    def fuse(self) -> nn.Module:
        return fuse_conv_bn_eval(*self)


def test_blocks_that_merge_weights_are_left_alone_unless_they_are_chosen() -> None:
    """RepVGG adds up the weights of its branches in `reparameterize_model`. It would ignore the gates."""
    repvgg = create("repvgg_a0")
    assert set(skipped_convs(repvgg).values()) == {"its kernel is 1x1", "a RepVggBlock merges its weight with others"}
    with pytest.raises(ValueError, match="RepVggBlock merges its weight"):
        groupable(repvgg)
    model: Any = nn.Sequential(Fuses(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16))).eval()
    groupable(model, lambda name, conv: True)
    model[0][0].gate.data[0] *= -1
    model[0][1].running_var.uniform_(0.5, 2)
    x = torch.randn(1, 16, 5, 5)
    deployed = reparameterize_model(compact(model))
    assert type(deployed[0]) is nn.Conv2d
    assert_close(deployed(x), model(x))


def test_blocks_that_fold_their_gates_are_converted() -> None:
    """The compact form of a network of this package, for example after its channels were pruned."""
    model = compact(trained("g_resnext50", layers=(1, 1, 1, 1), channels=(16, 16, 16, 16), zero_init_last=False)).eval()
    expected = outputs(model)
    again = groupable(model, sort=False)
    assert "groups" not in getattr(again, "_model_args", {})
    assert len(converted(again)) == 4
    assert_close(outputs(again), expected)
    set_gates(again, torch.neg)
    assert_close(outputs(reparameterize_model(again)), outputs(again), rtol=1e-4, atol=1e-4)


def test_where_chooses_any_convolution() -> None:
    model, x, depthwise = create("mobilenetv2_100"), torch.randn(1, 3, 32, 32), "blocks.0.0.conv_dw"
    expected = model(x)
    assert "depthwise" in skipped_convs(model)[depthwise]
    groupable(model, where=lambda name, conv: name in (depthwise, "blocks.1.0.conv_pw"))
    assert list(converted(model)) == [depthwise, "blocks.1.0.conv_pw"]
    assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert set(skipped_convs(model, lambda name, conv: False).values()) == {"`where` does not choose it"}
    groupable(create("g_resnext50"), where=lambda name, conv: name == "layer1.0.conv1")


def with_own(method: str) -> nn.Conv2d:
    """Users let pictures repeat so: torch.nn.Conv2d calls `_conv_forward` with its weight."""
    conv = nn.Conv2d(8, 8, 3)
    setattr(conv, method, getattr(conv, method))
    return conv


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(8, 8, 1), "1x1"),
        (nn.Conv2d(8, 8, 3, groups=8), "depthwise"),
        (nn.Conv2d(6, 6, 3), "only one gate"),
        (nn.Conv2d(3, 8, 3), "must both be even"),
        (nn.Conv2d(24, 24, 3, groups=3), "3 groups are not a power of two up to 8"),
        (timm.layers.Conv2dSame(8, 8, 3), "Conv2dSame"),
        (timm.layers.ScaledStdConv2d(8, 8, 3), "ScaledStdConv2d"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), "ParametrizedConv2d"),
        (with_own("forward"), "it has a forward pass of its own"),
        (with_own("_conv_forward"), "it has a forward pass of its own"),
    ],
    ids=str,
)
def test_convolutions_that_cannot_learn_are_left_out_with_a_reason(conv: nn.Conv2d, reason: str) -> None:
    model = nn.Sequential(conv, nn.Conv2d(8, 8, 3))
    skipped = skipped_convs(model)
    assert list(skipped) == ["0"]
    assert reason in skipped["0"]
    before = type(conv)
    assert list(converted(groupable(model))) == ["1"]
    assert type(conv) is before


def test_a_weight_that_another_kind_of_module_shares_is_left_out() -> None:
    model: Any = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ConvTranspose2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    model[1].weight = model[0].weight
    assert list(converted(groupable(model))) == ["2"]
    assert "shares its weight" in skipped_convs(model)["0"]


@pytest.mark.parametrize(
    ("model", "where", "error", "words"),
    [
        (lambda: nn.Linear(2, 2), None, ValueError, "Linear has no convolution to convert"),
        (lambda: nn.Conv2d(8, 8, 1), None, ValueError, "Conv2d has no convolution to convert: its kernel is 1x1"),
        (lambda: groupable(create("test_resnet")), None, ValueError, "has DGConv2d layers already"),
        (
            lambda: create("test_resnet"),
            lambda name, conv: True,
            ValueError,
            r"`where` chooses conv1.0, which cannot learn its groups: in_channels=3 and out_channels=16 must",
        ),
        (lambda: "resnet50", None, TypeError, "groupable takes a torch.nn.Module, not a str"),
        (lambda: create("test_resnet"), "layer1", TypeError, "where='layer1' is not a function"),
    ],
)
def test_bad_input_is_refused_and_nothing_changes(model: Any, where: Any, error: type[Exception], words: str) -> None:
    network = model()
    before = [type(module) for module in network.modules()] if isinstance(network, nn.Module) else []
    with pytest.raises(error, match=words):
        groupable(network, where)
    if before:
        assert [type(module) for module in network.modules()] == before
