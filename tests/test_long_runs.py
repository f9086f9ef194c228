"""Thousands of steps with gates that open and close: memory, caches and compiled graphs stay as they are."""

import copy
import gc
import itertools
import resource
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

from timm_dgconv import DGConv2d, compact, freeze_groups, group_conv

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory in /proc")

slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Every thread has memory of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def resident() -> float:
    """Memory of this process in MB, without what nobody holds any more."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def network(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_g_resnext", num_classes=5, **kwargs)


def flip(model: nn.Module, seed: int) -> None:
    """Open and close gates, in as many ways as there are seeds."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, DGConv2d):
                module.gate.copy_(module.gate.copysign(torch.randn(module.gate.shape, generator=random)))


def trainer(model: nn.Module, shape: tuple[int, ...]) -> Callable[[], None]:
    """A step of an optimizer, with other gates before each."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    x, count = torch.randn(shape), itertools.count()

    def step() -> None:
        flip(model, next(count) % 16)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def caches() -> dict[str, int]:
    return {
        "spare": len(group_conv._spare),
        "known": len(group_conv._known),
        "layouts": group_conv._layout.cache_info().currsize,
        "pairs": group_conv._Layout._pairs.cache_info().currsize,
    }


def check_flat(step: Callable[[], None], warm_up: int, steps: int) -> None:
    """After the warm-up nothing grows."""
    for _ in range(warm_up):
        step()
    memory, held = resident(), caches()
    objects = len(gc.get_objects())
    for _ in range(steps):
        step()
    after = resident()
    more_objects = len(gc.get_objects())
    print(
        f"\n{warm_up} + {steps} steps: {memory:.1f} MB, then {after:.1f} MB; "
        f"objects {objects}, then {more_objects}; caches {held}, then {caches()}"
    )
    assert after - memory < 8
    assert more_objects - objects < 200
    assert all(size <= held[name] for name, size in caches().items())


@pytest.mark.parametrize(("warm_up", "steps"), [(100, 200), pytest.param(1000, 9000, marks=slow)])
@pytest.mark.parametrize("reading", ["read", "known"])
def test_layer(warm_up: int, steps: int, reading: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reading == "known":  # as on a device from which gates are read once
        monkeypatch.setattr(group_conv, "_READ_DIRECTLY", set())
    torch.manual_seed(0)
    check_flat(trainer(DGConv2d(16, 16, 3, padding=1), (2, 16, 6, 6)), warm_up, steps)


@pytest.mark.parametrize(("warm_up", "steps"), [(60, 60), pytest.param(300, 700, marks=slow)])
@pytest.mark.parametrize("kwargs", [{}, {"complexity_weight": 1e-7, "complexity_target": 0.1}], ids=["free", "steered"])
def test_network(warm_up: int, steps: int, kwargs: dict[str, Any]) -> None:
    check_flat(trainer(network(**kwargs), (2, 3, 32, 32)), warm_up, steps)


def test_caches_have_a_limit() -> None:
    torch.manual_seed(0)
    layout, pairs = group_conv._layout.cache_info().maxsize, group_conv._Layout._pairs.cache_info().maxsize
    step = trainer(DGConv2d(4096, 4096, 1, bias=False), (1, 4096, 1, 1))
    for _ in range(20):
        step()
    for number in range(2 * layout):
        closed = [bool(number >> k & 1) for k in range(12)]
        made = group_conv._layout(tuple(closed), (0, 0))
        for flipped in made.far[:6]:
            made.pairs(torch.empty(4096, 4096, 1, 1, device="meta"), flip=flipped)
    assert caches()["layouts"] == layout
    assert caches()["pairs"] <= pairs
    group_conv._layout.cache_clear()
    group_conv._Layout._pairs.cache_clear()


@pytest.mark.parametrize("flips", [30, pytest.param(300, marks=slow)])
@pytest.mark.parametrize("channels", [16, 3], ids=["layer", "network"])
def test_compiled_once(flips: int, channels: int) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = DGConv2d(16, 16, 3) if channels == 16 else network()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    step = trainer(torch.compile(model, backend=backend, fullgraph=True), (2, channels, 32, 32))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(flips):
            step()
    assert len(graphs) == 1
    torch._dynamo.reset()


def come_and_go(make: Callable[[], nn.Module], shape: tuple[int, ...], count: int) -> None:
    kept: list[weakref.ref[nn.Module]] = []

    def once() -> None:
        model = make()
        trainer(model, shape)()
        kept.append(weakref.ref(model))

    for _ in range(count // 4):
        once()
    memory, held = resident(), caches()
    for _ in range(count):
        once()
    after = resident()
    print(f"\n{count} models: {memory:.1f} MB, then {after:.1f} MB; caches {held}, then {caches()}")
    assert not [reference for reference in kept if reference() is not None]
    assert after - memory < 8
    assert caches()["spare"] <= held["spare"]
    assert caches()["known"] <= held["known"]


def forms(**kwargs: Any) -> nn.Module:
    """A model of which copies are made."""
    model = network(**kwargs)
    compact(model)
    reparameterize_model(model)
    freeze_groups(copy.deepcopy(model))
    return model


@pytest.mark.parametrize("reading", ["read", "known"])
def test_layers_come_and_go(reading: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reading == "known":
        monkeypatch.setattr(group_conv, "_READ_DIRECTLY", set())
    come_and_go(lambda: DGConv2d(16, 16, 3, padding=1), (1, 16, 4, 4), 500)


@pytest.mark.parametrize("count", [20, pytest.param(500, marks=slow)])
@pytest.mark.parametrize("kwargs", [{}, {"complexity_weight": 1e-7, "complexity_target": 0.1}], ids=["free", "steered"])
def test_networks_come_and_go(count: int, kwargs: dict[str, Any]) -> None:
    come_and_go(lambda: forms(**kwargs), (2, 3, 32, 32), count)


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=slow)])
def test_refused_state_dicts_leave_nothing(count: int) -> None:
    model, state = network(), network().state_dict()

    def load() -> None:
        with pytest.raises(RuntimeError, match="size mismatch"):
            model.load_state_dict({**state, "fc.bias": torch.ones(3)})
        model.load_state_dict(state)

    check_flat(load, 20, count)
