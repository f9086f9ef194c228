"""One model in many threads, and many models in as many threads."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import set_gates, trained
from torch import Tensor, nn

THREADS = 8
TIMEOUT = 120  # seconds, for a thread that waits for ever

pytestmark = pytest.mark.timeout(2 * TIMEOUT)


def network(**kwargs: Any) -> nn.Module:
    """A network whose gates are so close to zero that a few steps flip some."""
    model = trained(num_classes=5, **kwargs)
    set_gates(model, lambda gate: 0.01 * gate)
    return model


def train(model: nn.Module, seed: int, steps: int = 6) -> list[Tensor]:
    """The weights and gates after some steps."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(2, 3, 32, 32, generator=random)
        model(x).square().mean().backward()
        optimizer.step()
    return [value.detach().clone() for value in model.state_dict().values()]


@pytest.mark.usefixtures("gate_reads")
def test_threads_share_a_model() -> None:
    model, x = network().eval(), torch.randn(THREADS, 1, 3, 32, 32)
    with torch.no_grad():
        expected = [model(image) for image in x]
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(5):
            assert all(map(torch.equal, pool.map(model, x, timeout=TIMEOUT), expected))


@pytest.mark.usefixtures("gate_reads")
@pytest.mark.parametrize("kwargs", [{}, {"sort": False, "complexity_weight": 0.1}, {"complexity_target": 0.1}], ids=str)
def test_threads_train_copies_of_a_model(kwargs: dict[str, Any]) -> None:
    model = network(**kwargs)
    copies = [copy.deepcopy(model) for _ in range(THREADS)]
    expected = [train(copy.deepcopy(model), seed) for seed in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        got = list(pool.map(train, copies, range(THREADS), timeout=TIMEOUT))
    for ours, alone in zip(got, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, alone, strict=True))
