"""The complexity term in unchanged training loops, and frozen groups."""

import copy
import gc
import io
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import timm
import torch
from conftest import gates, run_ranks
from timm.optim import create_optimizer_v2
from timm.utils import NativeScaler
from torch import nn

from timm_dgconv import DGConv2d, compact, complexity, freeze_groups, group_report
from timm_dgconv.regularizer import steer

LR, WEIGHT = 0.1, 1e-4


def network(weight: float = WEIGHT, **kwargs: Any) -> nn.Module:
    """A tiny G-ResNeXt, every time the same; gates well away from zero, of either sign."""
    torch.manual_seed(0)
    model = timm.create_model("test_g_resnext", num_classes=3, complexity_weight=weight, **kwargs)
    with torch.no_grad():
        for gate in gates(model):
            gate.copy_(torch.where(torch.rand_like(gate) < 0.5, -0.5, 0.5))
    return model


def loss_of(model: nn.Module, part: slice = slice(None)) -> torch.Tensor:
    x = torch.sin(torch.arange(8 * 3 * 32 * 32.0)).view(8, 3, 32, 32)[part]
    return nn.functional.cross_entropy(model.eval()(x), torch.arange(8)[part] % 3)


def gradient(model: nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(complexity(model), gates(model)))


def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss_of(model).backward()
    optimizer.step()


def accumulated(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for n in range(4):
        (loss_of(model, slice(2 * n, 2 * n + 2)) / 4).backward()
    optimizer.step()


def scaled(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    scaler.scale(loss_of(model)).backward()
    scaler.step(optimizer)
    scaler.update()


def scaled_and_clipped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As train.py of timm does."""
    NativeScaler(device="cpu")(loss_of(model), optimizer, clip_grad=1e-3, parameters=model.parameters())


def with_closure(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.step(closure(model, optimizer))


def with_named_closure(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.step(closure=closure(model, optimizer))


def closure(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], torch.Tensor]:
    """As Lightning steps."""

    def compute() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    return compute


LOOPS = [plain, accumulated, scaled, scaled_and_clipped, with_closure, with_named_closure]
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), LR),
    "fused": lambda model: torch.optim.SGD(model.parameters(), LR, fused=True),
    "lookahead": lambda model: create_optimizer_v2(model, opt="lookahead_momentum", lr=LR, weight_decay=0.0),
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_step(loop: Callable[[nn.Module, torch.optim.Optimizer], None], optimizer: str) -> None:
    steered, free = network(), network(0)
    expected = gradient(steered)
    for model in (steered, free):
        loop(model, OPTIMIZERS[optimizer](model))
    for gate, without, term in zip(gates(steered), gates(free), expected, strict=True):
        torch.testing.assert_close(gate - without, -LR * WEIGHT * term, rtol=1e-3, atol=1e-7)
    others = zip(steered.named_parameters(), free.parameters(), strict=True)
    assert all(torch.equal(p, q) for (name, p), q in others if not name.endswith("gate"))


def test_every_step_has_the_term_once() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        loss_of(model).backward()
        task = [gate.grad.clone() for gate in gates(model)]
        for _ in range(2):  # the second without a new gradient
            optimizer.step()
            for gate, before, term in zip(gates(model), task, gradient(model), strict=True):
                torch.testing.assert_close(gate.grad, before + WEIGHT * term)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_gradients_that_are_views_of_one_tensor(optimizer: str) -> None:
    """As those of DistributedDataParallel(gradient_as_bucket_view=True), which count their versions together."""
    model = network()
    opt = OPTIMIZERS[optimizer](model)
    bucket = torch.zeros(sum(gate.numel() for gate in gates(model)))
    for gate, view in zip(gates(model), bucket.split([gate.numel() for gate in gates(model)]), strict=True):
        gate.grad = view
    for _ in range(2):  # the second without a new gradient
        expected = WEIGHT * torch.cat(gradient(model)) if not bucket.any() else bucket.clone()
        opt.step()
        torch.testing.assert_close(bucket, expected)


def test_gates_that_the_loss_does_not_reach() -> None:
    model = network()
    before = [gate.detach().clone() for gate in gates(model)]
    expected = gradient(model)
    torch.optim.SGD(gates(model), LR).step()
    for gate, start, term in zip(gates(model), before, expected, strict=True):
        torch.testing.assert_close(gate - start, -LR * WEIGHT * term)


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
def test_copies_are_steered(how: Callable[[nn.Module], nn.Module]) -> None:
    model = how(network())
    expected = gradient(model)
    before = [gate.detach().clone() for gate in gates(model)]
    torch.optim.SGD(model.parameters(), LR).step()
    for gate, start, term in zip(gates(model), before, expected, strict=True):
        torch.testing.assert_close(gate - start, -LR * WEIGHT * term)


def test_features_only() -> None:
    model = network(features_only=True)
    before = [gate.detach().clone() for gate in gates(model)]
    expected = gradient(model)
    torch.optim.SGD(model.parameters(), LR).step()
    for gate, start, term in zip(gates(model), before, expected, strict=True):
        torch.testing.assert_close(gate - start, -LR * WEIGHT * term)


def test_half_precision() -> None:
    """A layer's gradient of the complexity is above what float16 holds."""
    conv = DGConv2d(1024, 1024, 1).half()
    steer(conv, 1e-7)
    with torch.no_grad():
        conv.gate.fill_(1.0)
    torch.optim.SGD([conv.gate], 1.0).step()
    moved = torch.full_like(conv.gate, 1.0 - 1e-7 * 0.6931472 * 2**20)
    torch.testing.assert_close(conv.gate.detach(), moved)


def test_sharded_gates_are_refused() -> None:
    conv = DGConv2d(16, 16, 1)
    steer(conv, 1e-7)
    conv.gate = nn.Parameter(conv.gate.detach()[:2])
    with pytest.raises(RuntimeError, match=r"2 of the 4 gates .*fully_shard"):
        torch.optim.SGD([conv.gate], 1.0).step()


@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_are_not_kept() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    loss_of(model).backward(create_graph=True)
    gradients = [weakref.ref(gate.grad) for gate in gates(model)]
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    assert all(reference() is None for reference in gradients)


def test_others_are_left_alone() -> None:
    model, other = network(), nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), LR).step()
    assert all(gate.grad is None for gate in gates(model))
    torch.optim.SGD([p for p in model.parameters() if all(p is not gate for gate in gates(model))], LR).step()
    assert all(gate.grad is None for gate in gates(model))


def test_costs_nothing_unless_asked_for() -> None:
    code = """
        import timm
        from torch.optim import optimizer
        hooks = optimizer._global_optimizer_pre_hooks
        timm.create_model("test_g_resnext")
        timm.create_model("test_g_resnext", complexity_weight=0)
        timm.create_model("test_g_resnext", freeze_groups=True)
        assert len(hooks) == 0
        for _ in range(2):
            timm.create_model("test_g_resnext", complexity_weight=1e-7)
            assert len(hooks) == 1
    """
    subprocess.run([sys.executable, "-c", dedent(code)], check=True)


@pytest.mark.parametrize("target", [1e-3, 0.02, 0.1, 0.2, 0.3, 0.7, 1.0])
def test_target(target: float) -> None:
    """The gates that are pushed take the network to the target if they close, and one more would take it below."""
    model = network(complexity_target=target)
    with torch.no_grad():
        for gate in gates(model):
            gate.copy_(torch.rand_like(gate) - 0.3)
    share = group_report(model).share
    torch.optim.SGD(model.parameters(), 0.0).step()
    pushed = [torch.zeros_like(gate) if gate.grad is None else gate.grad for gate in gates(model)]
    for gate, push, term in zip(gates(model), pushed, gradient(model), strict=True):
        assert ((push == 0) | torch.isclose(push, WEIGHT * term)).all()
        assert not push[gate < 0].any()
        nearest = gate[(gate > 0) & (push != 0)]
        others = gate[(gate > 0) & (push == 0)]
        assert not nearest.numel() or not others.numel() or nearest.max() < others.min()
    assert any(push.any() for push in pushed) == (share > max(target, 0.02))

    with torch.no_grad():
        for gate, push in zip(gates(model), pushed, strict=True):
            gate[push != 0] = -0.5
    if share > target:
        assert group_report(model).share >= target
        for gate in gates(model):
            for k in gate.gt(0).nonzero():
                with torch.no_grad():
                    gate[k] *= -1
                    assert group_report(model).share < target
                    gate[k] *= -1


def test_target_counts_frozen_layers() -> None:
    model = network(complexity_target=0.05)
    with torch.no_grad():
        for gate in gates(model):
            gate.fill_(0.5)
    freeze_groups(model.layer4)  # more than half of all connections, whatever the others do
    torch.optim.SGD(model.parameters(), 0.0).step()
    *others, last = gates(model)
    assert last.grad is None
    assert all(gate.grad.all() for gate in others)


def test_training_does_not_stay_in_the_config(tmp_path: Path) -> None:
    from timm.models._hub import save_config_for_hf

    model = network()
    save_config_for_hf(model, tmp_path / "config.json")
    save_config_for_hf(compact(model), tmp_path / "compact.json")
    assert "complexity_weight" not in compact(network(features_only=True))._model_args
    save_config_for_hf(network(0, freeze_groups=True), tmp_path / "frozen.json")
    for file in tmp_path.iterdir():
        assert "complexity" not in file.read_text()
        assert "freeze" not in file.read_text()


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        (dict(complexity_weight=-1e-7), ValueError, ["complexity_weight=-1e-07", "at least 0"]),
        (dict(complexity_weight=float("nan")), ValueError, ["nan", "at least 0 and finite"]),
        (dict(complexity_weight="much"), TypeError, ["'much'", "number"]),
        (dict(complexity_target=0.5), ValueError, ["complexity_target=0.5", "needs a complexity_weight"]),
        (dict(complexity_weight=1e-7, complexity_target=0.0), ValueError, ["complexity_target=0.0", "above 0"]),
        (dict(complexity_weight=1e-7, complexity_target=1.5), ValueError, ["complexity_target=1.5", "at most 1"]),
        (dict(complexity_weight=1e-7, freeze_groups=True), ValueError, ["no gates", "freeze_groups=True"]),
        (dict(complexity_weight=1e-7, groups=[1, 1, 1, 1]), ValueError, ["no gates", "groups=..."]),
    ],
    ids=str,
)
def test_bad_arguments(kwargs: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        timm.create_model("test_g_resnext", **kwargs)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_distributed(tmp_path: Path) -> None:
    run_ranks(
        tmp_path,
        """
        import timm
        from torch.nn.parallel import DistributedDataParallel
        from timm_dgconv import DGConv2d, complexity

        x = torch.sin(torch.arange(4 * 3 * 32 * 32.0)).view(4, 3, 32, 32)
        moved = {}
        for weight in (1e-4, 0):
            torch.manual_seed(0)
            model = timm.create_model("test_g_resnext", complexity_weight=weight).eval()
            gates = [m.gate for m in model.modules() if isinstance(m, DGConv2d)]
            parallel = DistributedDataParallel(model)
            optimizer = torch.optim.SGD(parallel.parameters(), 0.1)
            term = torch.autograd.grad(complexity(model), gates)
            parallel(x[2 * rank : 2 * rank + 2]).square().mean().backward()
            optimizer.step()
            moved[weight] = torch.cat([gate.detach() for gate in gates])
        expected = -0.1 * 1e-4 * torch.cat(term)
        torch.testing.assert_close(moved[1e-4] - moved[0], expected, rtol=1e-3, atol=1e-7)
        torch.save(moved[1e-4], f"{folder}/gates{rank}.pt")
        """,
    )
    assert torch.equal(*(torch.load(tmp_path / f"gates{rank}.pt") for rank in range(2)))


@pytest.mark.parametrize("opt", ["momentum", "adamw", "lamb"])
def test_frozen(opt: str) -> None:
    model = network(0)
    optimizer = create_optimizer_v2(model, opt=opt, lr=LR, weight_decay=0.1, filter_bias_and_bn=False)
    plain(model, optimizer)  # momentum, and gradients that are not cleared
    freeze_groups(model)
    before = [gate.detach().clone() for gate in gates(model)]
    plain(model, optimizer)
    assert all(torch.equal(gate, start) for gate, start in zip(gates(model), before, strict=True))
    freeze_groups(model, frozen=False)
    optimizer.zero_grad()
    plain(model, optimizer)
    assert not any(torch.equal(gate, start) for gate, start in zip(gates(model), before, strict=True))


def test_frozen_from_the_start() -> None:
    model = timm.create_model("test_g_resnext", freeze_groups=True)
    assert not any(gate.requires_grad for gate in gates(model))
    assert all(p.requires_grad for name, p in model.named_parameters() if not name.endswith("gate"))
    with pytest.raises(ValueError, match="Linear has no DGConv2d"):
        freeze_groups(nn.Linear(2, 2))


@pytest.mark.parametrize("target", [0.02, 0.1, 0.25, 0.5, 1.0])
def test_a_step_opens_nothing_above_the_target(target: float) -> None:
    model = network(complexity_target=target)
    with torch.no_grad():
        for gate in gates(model):
            gate.copy_(-torch.rand_like(gate))  # all closed
            gate.grad = torch.full_like(gate, -2.0)
    before = [gate.detach().clone() for gate in gates(model)]
    fewest = group_report(model).share
    torch.optim.SGD(model.parameters(), 0.5).step()  # would open all
    assert target / 2 < group_report(model).share <= max(target, fewest)
    for gate, start in zip(gates(model), before, strict=True):
        torch.testing.assert_close(gate.abs(), start + 1)
    assert target < 1 or group_report(model).share == 1


@pytest.mark.parametrize("opt", ["momentum", "adamw"])
@pytest.mark.parametrize("drift", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("target", [0.01, 0.05, 0.2])
def test_target_is_reached_and_held(target: float, drift: float, opt: str) -> None:
    """Layers as wide as those of g_resnext50, with noise for gradients and all gates drawn one way or not."""
    torch.manual_seed(0)
    widths = [width for width, blocks in ((128, 3), (256, 4), (512, 6), (1024, 3)) for _ in range(blocks)]
    model = nn.ModuleList(DGConv2d(width, width, 1, bias=False) for width in widths)
    for gate in gates(model):
        nn.init.normal_(gate, 0.05, 0.05)
    steer(model, 1e-2, target)
    optimizer = create_optimizer_v2(gates(model), opt=opt, lr=5e-3, weight_decay=0.0)
    shares, patterns = [], []
    for _ in range(200):
        for gate in gates(model):
            gate.grad = torch.randn_like(gate) - drift
        optimizer.step()
        shares.append(complexity(model).item() / sum(width**2 for width in widths))
        patterns.append(tuple(torch.cat(gates(model)).signbit().tolist()))
    assert shares[0] > target
    reached = next(step for step, share in enumerate(shares) if share <= 1.01 * target)
    assert 0.95 * target <= min(shares[reached:])
    assert max(shares[reached:]) <= 1.01 * target
    assert drift or len(set(patterns[reached:])) > 10, "the groups go on learning"


def test_a_network_below_the_target_goes_no_further() -> None:
    model = network(complexity_target=0.9)
    with torch.no_grad():
        for gate in gates(model):
            gate.copy_(torch.linspace(-0.3, 0.3, len(gate)))
            gate.grad = torch.ones_like(gate)
    share = group_report(model).share
    torch.optim.SGD(model.parameters(), 1.0).step()  # would close all
    assert group_report(model).share == share < 0.9
    for gate in gates(model):
        torch.testing.assert_close(gate.abs(), torch.linspace(-0.3, 0.3, len(gate)).sub(1).abs())


@pytest.mark.parametrize("seed", range(6))
def test_a_target_is_held_by_lookahead(seed: int) -> None:
    """Also by what goes around the step of another optimizer: here an average with gates of some steps before."""
    target, model = 0.2, network(complexity_target=0.2)
    optimizer = create_optimizer_v2(gates(model), opt="lookahead_momentum", lr=0.2, weight_decay=0.0)
    torch.manual_seed(seed)
    share = group_report(model).share
    for _ in range(60):
        for gate in gates(model):
            gate.grad = torch.randn_like(gate)
        optimizer.step()
        before, share = share, group_report(model).share
        assert min(0.95 * target, before) <= share <= max(target, before)


@pytest.mark.parametrize("target", [0.1, 0.25])
def test_a_step_of_several_closures_opens_nothing_above_the_target(target: float) -> None:
    model = network(complexity_target=target)
    with torch.no_grad():
        for gate in gates(model):
            gate.copy_(-torch.rand_like(gate))  # all closed
    optimizer = torch.optim.LBFGS(gates(model), LR, max_iter=5)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((gate - 2).square().sum() for gate in gates(model))
        loss.backward()
        return loss

    optimizer.step(closure)  # would open all
    assert target / 2 < group_report(model).share <= target


def test_layers_that_share_their_gates_open_nothing_above_the_target() -> None:
    model = nn.Sequential(DGConv2d(16, 16, 1), DGConv2d(16, 16, 1))
    model[1].gate = model[0].gate
    nn.init.constant_(model[0].gate, -0.5)
    steer(model, 1e-6, 0.5)
    model[0].gate.grad = -torch.ones(4)
    torch.optim.SGD(model.parameters(), 1.0).step()  # would open all
    assert complexity(model).item() <= 0.5 * 512
    torch.testing.assert_close(model[0].gate.abs(), torch.full((4,), 0.5))
