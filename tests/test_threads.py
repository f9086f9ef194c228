"""One model in many threads, and many models in as many."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

from timm_dgconv import DGConv2d, compact, freeze_groups, group_conv

THREADS = 8
TIMEOUT = 120  # seconds, for a thread that waits for ever

pytestmark = pytest.mark.timeout(2 * TIMEOUT)


def network(seed: int = 0, weight: float = 0.0, target: float | None = None) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model("test_g_resnext", num_classes=5, complexity_weight=weight, complexity_target=target)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, DGConv2d):
                module.gate.copy_(torch.randn_like(module.gate) * 0.01)
    return model


@pytest.fixture(params=["read", "known"])
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates as on a CPU, and as on a device from which they are read once, which this test plays."""
    if request.param == "known":
        monkeypatch.setattr(group_conv, "_READ_DIRECTLY", set())


@pytest.mark.usefixtures("reading")
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


def freeze(model: nn.Module) -> nn.Module:
    frozen = copy.deepcopy(model)
    freeze_groups(frozen)
    return frozen


def trained(model: nn.Module, seed: int, steps: int = 6) -> list[Tensor]:
    """The weights and gates after some steps."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(2, 3, 32, 32, generator=random)
        model(x).square().mean().backward()
        optimizer.step()
    return [value.detach().clone() for value in model.state_dict().values()]


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("steering", [(0.0, None), (1e-4, None), (1e-4, 0.1)], ids=["free", "weight", "target"])
def test_training_of_copies(steering: tuple[float, float | None]) -> None:
    model = network(0, *steering)
    copies = [copy.deepcopy(model) for _ in range(THREADS)]
    expected = [trained(copy.deepcopy(model), seed) for seed in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        got = list(pool.map(trained, copies, range(THREADS), timeout=TIMEOUT))
    for ours, alone in zip(got, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, alone, strict=True))


def test_backward_passes_of_one_model() -> None:
    """Gradients that several threads ask for at once, of memory that is used again."""
    conv = DGConv2d(32, 32, 3, padding=1, dtype=torch.float64)
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
    """While others are trained, whose steps look at all models that are steered."""

    def work(seed: int) -> bool:
        return all(
            torch.stack([t.double().sum() for t in trained(network(seed, 1e-4, 0.1), n, 2)]).isfinite().all()
            for n in range(3)
        )

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(work, range(THREADS), timeout=TIMEOUT))
