"""Memory, caches and compiled graphs do not grow while gates open and close and while models come and go."""

import copy
import gc
import itertools
import resource
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import gates, trained
from timm.utils import reparameterize_model
from timm_dgconv.layers.layout import get_layout
from torch import nn

from timm_dgconv import DGConv2d, compact, freeze_groups
from timm_dgconv.layers import grad_memory, layout

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory in /proc")

slow = pytest.mark.slow
STEERING = pytest.mark.parametrize("kwargs", [{}, {"complexity_target": 0.1}], ids=["free", "steered"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Every thread has memory of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def resident() -> float:
    """Memory of this process in MB, without garbage."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def trainer(model: nn.Module, shape: tuple[int, ...]) -> Callable[[], None]:
    """A step of an optimizer, after gates have opened and closed in one of 16 ways."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    x, count = torch.randn(shape), itertools.count()

    def step() -> None:
        random = torch.Generator().manual_seed(next(count) % 16)
        with torch.no_grad():
            for gate in gates(model):
                gate.copy_(gate.copysign(torch.randn(gate.shape, generator=random)))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


CACHES = [value for value in vars(layout).values() if hasattr(value, "cache_info")]


def caches() -> dict[str, int]:
    return {
        "gradients": len(grad_memory._free),
        "layouts": get_layout.cache_info().currsize,
        "indices": sum(cache.cache_info().currsize for cache in CACHES),
    }


def check_flat(step: Callable[[], None], warm_up: int, steps: int) -> None:
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
    assert all(caches()[name] <= held[name] for name in ("layouts", "indices"))


@pytest.mark.usefixtures("gate_reads")
@pytest.mark.parametrize(("warm_up", "steps"), [(100, 200), pytest.param(1000, 9000, marks=slow)])
def test_steps_of_a_layer(warm_up: int, steps: int) -> None:
    check_flat(trainer(DGConv2d(16, 16, 3, padding=1), (2, 16, 6, 6)), warm_up, steps)


@pytest.mark.parametrize(("warm_up", "steps"), [(60, 60), pytest.param(300, 700, marks=slow)])
@STEERING
def test_steps_of_a_network(warm_up: int, steps: int, kwargs: dict[str, Any]) -> None:
    check_flat(trainer(trained(num_classes=5, **kwargs), (2, 3, 32, 32)), warm_up, steps)


def test_caches_have_a_limit() -> None:
    for number in range(1 << 12):
        closed = tuple(bool(number >> k & 1) for k in range(12))
        get_layout(closed, 0)
    assert caches()["layouts"] == get_layout.cache_info().maxsize
    get_layout.cache_clear()
    assert all(cache.cache_info().maxsize is not None for cache in CACHES)


@pytest.mark.parametrize("steps", [30, pytest.param(300, marks=slow)])
def test_steps_of_a_compiled_network(steps: int) -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    step = trainer(torch.compile(trained(num_classes=5), backend=backend, fullgraph=True), (2, 3, 32, 32))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(steps):
            step()
    assert len(graphs) == 1
    torch._dynamo.reset()


def check_come_and_go(make: Callable[[], nn.Module], shape: tuple[int, ...], count: int) -> None:
    models: list[weakref.ref[nn.Module]] = []

    def once() -> None:
        model = make()
        trainer(model, shape)()
        models.append(weakref.ref(model))

    for _ in range(count // 4):
        once()
    memory, held = resident(), caches()
    for _ in range(count):
        once()
    after = resident()
    print(f"\n{count} models: {memory:.1f} MB, then {after:.1f} MB; caches {held}, then {caches()}")
    assert not any(model() for model in models)
    assert after - memory < 8
    assert caches()["gradients"] <= held["gradients"]


@pytest.mark.usefixtures("gate_reads")
def test_layers_come_and_go() -> None:
    check_come_and_go(lambda: DGConv2d(16, 16, 3, padding=1), (1, 16, 4, 4), 500)


@pytest.mark.parametrize("count", [20, pytest.param(500, marks=slow)])
@STEERING
def test_networks_come_and_go(count: int, kwargs: dict[str, Any]) -> None:
    def make() -> nn.Module:
        model = trained(num_classes=5, **kwargs)
        compact(model)
        reparameterize_model(model)
        freeze_groups(copy.deepcopy(model))
        return model

    check_come_and_go(make, (2, 3, 32, 32), count)
