"""Memory does not grow while gates open and close and while models come and go."""

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
from conftest import set_gates, trained
from timm.utils import reparameterize_model
from torch import nn

from timm_dgconv import compact, freeze_groups

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory in /proc")

STEERING = pytest.mark.parametrize("kwargs", [{}, {"complexity_target": 0.1}, {"sort": False}], ids=str)


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


def trainer(model: nn.Module) -> Callable[[], None]:
    """A step of an optimizer, after gates have opened and closed in one of 16 ways."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    x, count = torch.randn(2, 3, 32, 32), itertools.count()

    def step() -> None:
        random = torch.Generator().manual_seed(next(count) % 16)
        set_gates(model, lambda gate: gate.copysign(torch.randn(gate.shape, generator=random)))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


@pytest.mark.usefixtures("gate_reads")
@pytest.mark.parametrize(("warm_up", "steps"), [(60, 60), pytest.param(100, 300, marks=pytest.mark.slow)])
@STEERING
def test_steps_keep_no_memory(warm_up: int, steps: int, kwargs: dict[str, Any]) -> None:
    step = trainer(trained(num_classes=5, **kwargs))
    for _ in range(warm_up):
        step()
    memory, objects = resident(), len(gc.get_objects())
    for _ in range(steps):
        step()
    assert resident() - memory < 8
    assert len(gc.get_objects()) - objects < 200


@STEERING
def test_networks_come_and_go(kwargs: dict[str, Any]) -> None:
    models: list[weakref.ref[nn.Module]] = []

    def once() -> None:
        model = trained(num_classes=5, **kwargs)
        trainer(model)()
        for form in (compact, reparameterize_model, lambda model: freeze_groups(copy.deepcopy(model))):
            form(model)
        models.append(weakref.ref(model))

    for _ in range(5):
        once()
    memory = resident()
    for _ in range(20):
        once()
    assert resident() - memory < 8
    assert not any(model() for model in models)
