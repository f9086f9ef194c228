"""A state dict that is refused leaves a model as it was; one that is taken loads as torch loads it."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

import timm_dgconv
from timm_dgconv import DGConv2d

State = dict[str, Any]
TINY = {"layers": (1, 1, 1, 1), "cardinality": 4, "base_width": 16, "channels": (16, 32, 48, 96)}  # test_g_resnext
GATE, WEIGHT = "layer3.0.conv2.gate", "layer3.0.conv2.weight"


def network(seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_g_resnext", num_classes=5, **kwargs)


def other() -> State:
    """What another network has, the running statistics too."""
    model = network(1)
    model.train()(torch.randn(2, 3, 32, 32))
    return model.state_dict()


def resnext() -> State:
    return ResNet(Bottleneck, num_classes=5, **TINY).state_dict()


def without(*names: str, state: State | None = None) -> State:
    return {name: value for name, value in (state or other()).items() if name not in names}


def quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(5), 1.0, 0, torch.qint8)


REFUSED: dict[str, Callable[[], State]] = {
    "another shape, last": lambda: {**other(), "fc.bias": torch.ones(3)},
    "another shape, first": lambda: {**other(), "conv1.weight": torch.ones(3)},
    "missing": lambda: without("fc.bias"),
    "unexpected": lambda: {**other(), "more": torch.ones(1)},
    "unexpected in a layer": lambda: {**other(), "layer4.0.conv2.more": torch.ones(1)},
    "gates of another length": lambda: {**other(), GATE: torch.ones(3)},
    "gates that are none": lambda: {**other(), GATE: "open"},
    "a weight that is none": lambda: {**other(), WEIGHT: None},
    "a layer without weight": lambda: without(WEIGHT),
    "three groups": lambda: {**without(GATE), WEIGHT: torch.ones(48, 16, 3, 3)},
    "three groups of a ResNeXt": lambda: {**resnext(), WEIGHT: torch.ones(48, 16, 3, 3)},
    "a ResNeXt of other classes": lambda: {**resnext(), "fc.weight": torch.ones(3, 384), "fc.bias": torch.ones(3)},
    "the original's, of another width": lambda: {
        **without(WEIGHT),
        "layer3.0.conv2.conv.weight": torch.ones(64, 64, 3, 3),
    },
    "sparse": lambda: {**other(), "fc.weight": other()["fc.weight"].to_sparse()},
    "quantized": lambda: {**other(), "fc.bias": quantized()},
    "without values": lambda: {**other(), "fc.bias": torch.ones(5, device="meta")},
    "nothing": dict,
}


def contents(module: nn.Module) -> State:
    """Every tensor and its values, by name."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: (id(tensor), tensor.detach().clone()) for name, tensor in tensors.items()}


def assert_same(module: nn.Module, before: State) -> None:
    after = contents(module)
    assert list(after) == list(before)
    for name, (identity, values) in after.items():
        assert identity == before[name][0], name
        assert torch.equal(values, before[name][1]), name


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("kind", list(REFUSED))
def test_refused(kind: str, steered: bool, assign: bool) -> None:
    state = REFUSED[kind]()
    if assign and kind in ("sparse", "quantized", "without values"):
        return  # torch takes them
    entries = dict(state)
    model = network(complexity_weight=1e-7 if steered else 0.0)
    before = contents(model)
    with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict for GResNeXt"):
        model.load_state_dict(state, assign=assign)
    assert_same(model, before)
    assert state.keys() == entries.keys()
    assert all(state[name] is entries[name] for name in entries)


@pytest.mark.parametrize("kind", ["another shape, last", "gates of another length", "three groups"])
def test_refused_by_a_compact_model(kind: str) -> None:
    model = network()
    compact = timm_dgconv.compact(model)
    before = contents(compact)
    with pytest.raises(RuntimeError, match="in loading state_dict"):
        compact.load_state_dict(REFUSED[kind]())
    assert_same(compact, before)


def test_refused_by_a_layer() -> None:
    conv = DGConv2d(16, 16, 3)
    before = contents(conv)
    good = {"weight": torch.ones(16, 16, 3, 3), "bias": torch.ones(16), "gate": torch.ones(4)}
    for change in ({"bias": torch.ones(3)}, {"gate": torch.ones(3)}, {"gate": None}, {"more": torch.ones(1)}):
        for assign in (False, True):
            with pytest.raises(RuntimeError, match="Error"):
                conv.load_state_dict({**good, **change}, assign=assign)
            assert_same(conv, before)
    with pytest.raises(TypeError, match="dict-like"):
        conv.load_state_dict([])
    conv.load_state_dict(good)
    assert torch.equal(conv.gate, good["gate"])


def test_interrupted() -> None:
    """Whatever stops the loading, the model stays as it was."""
    model = network()
    before = contents(model)

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.fc.register_load_state_dict_pre_hook(stop)
    for assign in (False, True):
        with pytest.raises(KeyboardInterrupt):
            model.load_state_dict(other(), assign=assign)
        assert_same(model, before)
    handle.remove()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["whole", "missing", "unexpected", "another shape, last", "without values", "nothing"])
def test_as_torch_loads(kind: str, strict: bool, assign: bool) -> None:
    """The same result or message, and after success the same model."""
    state = other() if kind == "whole" else REFUSED[kind]()
    ours, theirs, said = network(), network(), []
    for load in (ours.load_state_dict, nn.Module.load_state_dict.__get__(theirs)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                said.append((load(copy.copy(state), strict=strict, assign=assign), None))
            except RuntimeError as error:
                said.append((None, str(error)))
        said[-1] += ([str(warning.message) for warning in caught],)
    assert said[0] == said[1]
    if said[0][0] is not None:
        for (name, value), same in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert value.is_meta == same.is_meta
            assert value.is_meta or torch.equal(value, same), name
            if assign and name in state:
                assert value.data_ptr() == state[name].data_ptr()
        assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in theirs.parameters()]


def test_hooks_run_once_and_see_what_was_loaded() -> None:
    model, state, seen = network(), other(), []
    model.register_load_state_dict_pre_hook(lambda module, *args: seen.append("before"))
    model.load_state_dict(state)
    assert seen == ["before"]
    model = network()
    model.fc.register_load_state_dict_post_hook(lambda module, keys: seen.append(module.bias.detach().clone()))
    model.load_state_dict(state)
    assert len(seen) == 2
    assert torch.equal(seen[1], state["fc.bias"])


def test_models_on_the_meta_device() -> None:
    for state in (other(), resnext()):
        model = network(device="meta")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.load_state_dict(state, assign=True)
        assert torch.equal(model.fc.bias, state["fc.bias"])
        assert not any(tensor.is_meta for tensor in model.state_dict().values())
    model = network(device="meta")
    before = contents_of_meta(model)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(REFUSED["another shape, last"](), assign=True)
    assert contents_of_meta(model) == before


def contents_of_meta(module: nn.Module) -> State:
    return {name: (id(tensor), tensor.device) for name, tensor in module.named_parameters()}


def test_nan_gates_load_and_are_an_error_when_they_count() -> None:
    """torch judges no values when it loads, and reading them would wait for the device."""
    model = network()
    model.load_state_dict({**other(), GATE: torch.tensor([1.0, float("nan"), 1.0, 1.0])})
    with pytest.raises(RuntimeError, match="gates of a DGConv2d are nan"):
        model(torch.randn(1, 3, 32, 32))
