"""Any network's convolutions learn their groups, and compute the same at first."""

import copy
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm_dgconv.models.convert import skipped_convs
from torch import nn
from torch.testing import assert_close

from timm_dgconv import DGConv2d, compact, complexity, freeze_groups, groupable
from timm_dgconv.layers import gate_reader


def create(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5).eval()


def converted(model: nn.Module) -> dict[str, DGConv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, DGConv2d)}


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "test_resnet"])
def test_networks_compute_the_same(name: str) -> None:
    model, x = create(name), torch.randn(2, 3, 64, 64)
    expected = model(x)
    weights = dict(model.named_parameters())
    assert groupable(model) is model
    assert converted(model)
    assert_close(model(x), expected)
    names = {n for n, _ in model.named_parameters() if not n.endswith(".gate")}
    assert names == set(weights)
    assert all(torch.equal(conv.gate.abs(), torch.full_like(conv.gate, 0.01)) for conv in converted(model).values())
    assert not set(converted(model)) & set(skipped_convs(model))


@given(
    bits=st.integers(2, 4),
    closed=st.integers(0, 4),
    factors=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, (2, 1)]),
    bias=st.booleans(),
)
def test_convolutions_compute_the_same(
    bits: int, closed: int, factors: tuple[int, int], stride: int, dilation: int, padding: Any, bias: bool
) -> None:
    groups = 1 << min(closed, bits)
    c_in, c_out = (factor << bits for factor in factors)
    conv = nn.Conv2d(c_in, c_out, 3, stride, padding, dilation, groups, bias, dtype=torch.float64)
    x = torch.randn(2, c_in, 9, 8, dtype=torch.float64)
    expected = conv(x)
    groupable(conv, where=lambda name, conv: True)
    assert type(conv) is DGConv2d
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
    model = nn.Sequential(conv, nn.Sequential(conv))  # registered twice
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


def test_gates_are_read_in_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_reader, "READ_DIRECTLY", set())  # as on CUDA
    model = groupable(create("resnet18"))
    reads = []
    read_together = gate_cache.read_together
    monkeypatch.setattr(gate_cache, "read_together", lambda gates: reads.append(len(gates)) or read_together(gates))
    model(torch.randn(1, 3, 32, 32))
    assert reads == [16]


def test_a_network_learns_towards_a_target() -> None:
    from timm_dgconv.optim.steering import steer

    model = groupable(create("test_resnet")).train()
    dense = complexity(model).item()
    steer(model, target=0.25)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert complexity(model).item() <= 0.25 * dense
    freeze_groups(model)
    assert model(x).isfinite().all()


def test_blocks_that_merge_weights_are_left_alone() -> None:
    """RepVGG adds up the weights of its branches in `reparameterize_model`. It would ignore the gates."""
    model = create("repvgg_a0")
    assert set(skipped_convs(model).values()) == {"its kernel is 1x1", "a RepVggBlock merges its weight with others"}
    with pytest.raises(ValueError, match="RepVggBlock merges its weight"):
        groupable(model)
    with pytest.raises(ValueError, match="conv, which cannot learn its groups: a RepVggBlock"):
        groupable(model, lambda name, conv: name == "stages.0.0.conv_kxk.conv")


def test_where_chooses() -> None:
    model = create("mobilenetv2_100")
    depthwise = "blocks.0.0.conv_dw"
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)
    assert "depthwise" in skipped_convs(model)[depthwise]
    groupable(model, where=lambda name, conv: name == depthwise)
    assert list(converted(model)) == [depthwise]
    assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert set(skipped_convs(model, lambda name, conv: False).values()) == {"`where` does not choose it"}


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(8, 8, 1), "1x1"),
        (nn.Conv2d(8, 8, 3, groups=8), "depthwise"),
        (nn.Conv2d(6, 6, 3), "only one gate"),
        (nn.Conv2d(3, 8, 3), "must both be even"),
        (nn.Conv2d(24, 24, 3, groups=3), "3 groups are not a power of two up to 8"),
        (nn.Conv2d(8, 8, 3, padding_mode="reflect"), "padding_mode='reflect'"),
        (timm.layers.Conv2dSame(8, 8, 3), "Conv2dSame"),
        (timm.layers.ScaledStdConv2d(8, 8, 3), "ScaledStdConv2d"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), "ParametrizedConv2d"),
    ],
    ids=str,
)
def test_reasons(conv: nn.Conv2d, reason: str) -> None:
    model = nn.Sequential(conv, nn.Conv2d(8, 8, 3))
    skipped = skipped_convs(model)
    assert list(skipped) == ["0"]
    assert reason in skipped["0"]
    before = type(conv)
    assert list(converted(groupable(model))) == ["1"]
    assert type(conv) is before


@pytest.mark.parametrize(
    ("model", "where", "error", "words"),
    [
        (lambda: nn.Linear(2, 2), None, ValueError, "Linear has no convolution to convert"),
        (lambda: nn.Conv2d(8, 8, 1), None, ValueError, "Conv2d has no convolution to convert: its kernel is 1x1"),
        (lambda: groupable(create("test_resnet")), None, ValueError, "has DGConv2d layers already"),
        (lambda: create("g_resnext50"), None, ValueError, "has DGConv2d layers already"),
        (
            lambda: create("test_resnet"),
            lambda name, conv: True,
            ValueError,
            "`where` chooses conv1.0, which cannot learn its groups: in_channels=3 and out_channels=16 must",
        ),
        (lambda: "resnet50", None, TypeError, "groupable takes a torch.nn.Module, not a str"),
    ],
    ids=range(6),
)
def test_bad_input(model: Any, where: Any, error: type[Exception], words: str) -> None:
    network = model()
    before = [type(module) for module in network.modules()] if isinstance(network, nn.Module) else []
    with pytest.raises(error, match=words.replace("(", r"\(")):
        groupable(network, where)
    if before:
        assert [type(module) for module in network.modules()] == before


def test_a_compact_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"GResNet is compact; use groupable before timm_dgconv\.compact"):
        groupable(compact(create("test_g_resnext")))
