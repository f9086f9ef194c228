"""One model in many threads, and many models in as many threads."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import conv_with, gates, trained
from timm.utils import reparameterize_model
from torch import Tensor, nn

from timm_dgconv import compact, freeze_groups

THREADS = 8
TIMEOUT = 120  # seconds, for a thread that waits for ever

STEERED = {"complexity_target": 0.1}

pytestmark = pytest.mark.timeout(2 * TIMEOUT)


def network(**kwargs: Any) -> nn.Module:
    """A network whose gates are so close to zero that a few steps flip some."""
    model = trained(num_classes=5, **kwargs)
    with torch.no_grad():
        for gate in gates(model):
            gate.mul_(0.01)
    return model


def freeze(model: nn.Module) -> nn.Module:
    frozen = copy.deepcopy(model)
    freeze_groups(frozen)
    return frozen


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
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_inference_while_copies_are_made(mode: Callable[[], torch.inference_mode]) -> None:
    model = network().eval()
    inputs = [torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(n)) for n in range(THREADS)]
    with mode():
        expected = [model(x) for x in inputs]
    done = threading.Event()

    def infer(n: int) -> bool:
        with mode():
            return all(torch.equal(model(inputs[n]), expected[n]) for _ in range(25))

    def copies() -> int:
        made = 0
        while not done.is_set() or not made:
            for form in (reparameterize_model, compact, freeze, copy.deepcopy):
                with torch.no_grad():
                    torch.testing.assert_close(form(model)(inputs[0]), expected[0], rtol=1e-4, atol=1e-4)
                made += 1
        return made

    with ThreadPoolExecutor(THREADS + 1) as pool:
        copying = pool.submit(copies)
        try:
            results = list(pool.map(infer, range(THREADS), timeout=TIMEOUT))
        finally:
            done.set()
        assert copying.result(timeout=TIMEOUT) >= 4
    assert results == [True] * THREADS


@pytest.mark.usefixtures("gate_reads")
@pytest.mark.parametrize("kwargs", [{}, {"complexity_weight": 0.1}, STEERED], ids=["free", "weight", "target"])
def test_training_of_copies(kwargs: dict[str, Any]) -> None:
    model = network(**kwargs)
    copies = [copy.deepcopy(model) for _ in range(THREADS)]
    expected = [train(copy.deepcopy(model), seed) for seed in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        got = list(pool.map(train, copies, range(THREADS), timeout=TIMEOUT))
    for ours, alone in zip(got, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, alone, strict=True))


def test_backward_passes_of_one_layer() -> None:
    """Several threads compute gradients at once, in memory that is used again."""
    conv = conv_with("10101", 32, 32, padding=1, dtype=torch.float64)
    inputs = [torch.randn(2, 32, 6, 6, dtype=torch.float64) for _ in range(THREADS)]

    def gradients(n: int) -> list[Tensor]:
        results = torch.autograd.grad(conv(inputs[n]).square().sum(), list(conv.parameters()))
        return [grad.clone() for grad in results]

    expected = [gradients(n) for n in range(THREADS)]

    def repeat(n: int) -> bool:
        return all(
            torch.equal(grad, alone) for _ in range(50) for grad, alone in zip(gradients(n), expected[n], strict=True)
        )

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(repeat, range(THREADS), timeout=TIMEOUT))


def test_models_come_and_go() -> None:
    """A step looks at all models that are steered, while other threads make and drop models."""

    def work(seed: int) -> bool:
        return all(t.isfinite().all() for n in range(3) for t in train(network(**STEERED), 3 * seed + n, 2))

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(work, range(THREADS), timeout=TIMEOUT))
