"""The complexity term and its target in unchanged training loops."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from conftest import HAS_OPERATOR, Patch, forms, gates, layers, set_gates
from timm.optim import create_optimizer_v2
from timm.utils import NativeScaler
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from timm_dgconv import DGConv2d, complexity, freeze_groups, steer
from timm_dgconv.layers import gate_reader

LR, WEIGHT = 0.1, 1e-2


def network(weight: float | None = WEIGHT, size: float = 0.5, **kwargs: Any) -> nn.Module:
    """A tiny G-ResNeXt, the same in each call, whose gates are `size` or `-size`."""
    torch.manual_seed(0)
    kwargs = {"num_classes": 3, "zero_init_last": False, "complexity_weight": weight, **kwargs}
    model = timm.create_model("test_g_resnext", **kwargs)
    set_gates(model, lambda gate: torch.where(torch.rand_like(gate) < 0.5, -size, size))
    return model


def loss_of(model: nn.Module, part: slice = slice(None)) -> torch.Tensor:
    x = torch.sin(torch.arange(8 * 3 * 32 * 32, dtype=model.fc.weight.dtype)).view(8, 3, 32, 32)
    return nn.functional.cross_entropy(model.eval()(x[part]), torch.arange(8)[part] % 3)


def density(model: nn.Module) -> float:
    """Share of a dense network's connections."""
    dense = sum(conv.in_channels * conv.out_channels for conv in model.modules() if isinstance(conv, DGConv2d))
    return complexity(model).item() / dense


def gradient(model: nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(complexity(model).log(), gates(model)))


def values(model: nn.Module) -> list[torch.Tensor]:
    return [gate.detach().clone() for gate in gates(model)]


def check_term(model: nn.Module, step: Callable[[], Any]) -> None:
    """A step of SGD without other gradients moves the gates by the term."""
    before, expected = values(model), gradient(model)
    step()
    for gate, start, term in zip(gates(model), before, expected, strict=True):
        assert_close(gate - start, -LR * WEIGHT * term)


def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss_of(model).backward()
    optimizer.step()


def accumulated(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for n in range(4):
        (loss_of(model, slice(2 * n, 2 * n + 2)) / 4).backward()
    optimizer.step()


def scaled_and_clipped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As timm's train.py does."""
    NativeScaler(device="cpu")(loss_of(model), optimizer, clip_grad=1e-3, parameters=model.parameters())


def with_closure(model: nn.Module, optimizer: torch.optim.Optimizer, named: bool = False) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(closure=closure) if named else optimizer.step(closure)


LOOPS = [plain, accumulated, scaled_and_clipped, with_closure, partial(with_closure, named=True)]  # as Lightning does
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), LR),
    "fused": lambda model: torch.optim.SGD(model.parameters(), LR, fused=True),
    "lookahead": lambda model: create_optimizer_v2(model, opt="lookahead_momentum", lr=LR, weight_decay=0.0),
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@forms
def test_a_step_adds_the_term_once_and_unscaled(form: dict[str, bool], loop: Any, optimizer: str) -> None:
    steered, free = network(**form), network(0, **form)
    expected = gradient(steered)
    for model in (steered, free):
        loop(model, OPTIMIZERS[optimizer](model))
    for gate, without, term in zip(gates(steered), gates(free), expected, strict=True):
        assert_close(gate - without, -LR * WEIGHT * term, rtol=1e-3, atol=1e-7)
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
                assert_close(gate.grad, before + WEIGHT * term)


@pytest.mark.parametrize("kwargs", [{}, {"complexity_target": 0.1}, {"gate_steps": 3}], ids=str)
@pytest.mark.parametrize("opt", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_leaves_nothing_behind(opt: Any, fused: bool, kwargs: dict[str, Any]) -> None:
    """It does not count as one of the gate_steps either."""
    ends = []
    for overflows in (False, True):
        model = network(size=0.01, **kwargs)
        optimizer = opt(model.parameters(), 0.02, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for step in range(3):
            factors = [1e8, 1] if step == 1 and overflows else [1]
            for factor in factors:
                with torch.autocast("cpu", torch.float16):
                    loss = loss_of(model, slice(2 * step, 2 * step + 2))
                (scaler.scale(loss) * factor).backward()
                before = copy.deepcopy(model.state_dict())
                scaler.step(optimizer)
                if factor > 1:
                    assert not any(gate.grad.isfinite().all() for gate in gates(model))
                    assert_close(model.state_dict(), before, rtol=0, atol=0)
                scaler.update(64.0)
                optimizer.zero_grad(set_to_none=False)
        ends.append(model.state_dict())
        assert "gate_steps" not in kwargs or layers(model)[0].steered.steering.taken == 3
    assert_close(*ends, rtol=0, atol=0)


@pytest.mark.parametrize("copied", [lambda net: net, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
@pytest.mark.parametrize("kwargs", [{}, {"features_only": True}], ids=str)
def test_copies_are_steered(copied: Callable[[nn.Module], nn.Module], kwargs: dict[str, Any]) -> None:
    """Also gates that the loss does not reach."""
    model = copied(network(**kwargs))
    check_term(model, torch.optim.SGD(gates(model), LR).step)


def test_weight_zero_ends_it() -> None:
    model = network(complexity_target=0.1)
    steer(model, 0)
    before = values(model)
    for copied in (model, copy.deepcopy(model)):
        torch.optim.SGD(gates(copied), LR).step()
        assert all(gate.grad is None for gate in gates(copied))
        assert_close(values(copied), before, rtol=0, atol=0)


def test_the_complexity_of_a_layer_may_exceed_float16() -> None:
    conv = DGConv2d(1024, 1024, 1, sort=False).half()
    steer(conv, 0.1)
    set_gates(conv, lambda gate: 1.0)
    torch.optim.SGD([conv.gate], 1.0).step()
    assert_close(conv.gate.detach(), torch.full_like(conv.gate, 1.0 - 0.1 * 0.6931472))


def test_sharded_gates_are_refused() -> None:
    conv = DGConv2d(16, 16, 1)
    steer(conv, 1e-7)
    conv.sorted_gate = nn.Parameter(conv.gate.detach()[:2])
    with pytest.raises(RuntimeError, match=r"FullyShardedDataParallel has sharded the gates .*fully_shard"):
        torch.optim.SGD([conv.gate], 1.0).step()


def test_optimizers_without_gates_are_left_alone() -> None:
    model, other = network(), nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), LR).step()
    assert all(gate.grad is None for gate in gates(model))
    torch.optim.SGD([p for p in model.parameters() if all(p is not gate for gate in gates(model))], LR).step()
    assert all(gate.grad is None for gate in gates(model))


@forms
@pytest.mark.parametrize("share", [0.1, 0.99, 1.0, 2.0])
def test_the_term_acts_above_the_target(share: float, form: dict[str, bool]) -> None:
    model = network(**form)
    is_above = share < 1
    steer(model, WEIGHT, share * density(model))
    torch.optim.SGD(model.parameters(), 0.0).step()
    for gate, term in zip(gates(model), gradient(model), strict=True):
        assert_close(gate.grad, WEIGHT * term * is_above)


def test_gates_compete_for_the_target() -> None:
    """A gate that opens takes the place of the open gate nearest to zero, or is refused if it is the nearest itself."""
    for step, expected in ((0.005, [0.01, -0.005, 0.02, 0.03]), (0.015, [-0.01, 0.015, 0.02, 0.03])):
        conv = DGConv2d(16, 16, 1)
        steer(conv, target=0.5)
        conv.gate.data.copy_(torch.tensor([0.01, -1e-9, 0.02, 0.03]))
        conv.gate.grad = torch.tensor([0.0, -step, 0.0, 0.0])
        torch.optim.SGD([conv.gate], 1.0).step()
        assert_close(conv.gate.detach(), torch.tensor(expected))


def test_target_is_held_by_layers_that_share_their_gates() -> None:
    model = nn.Sequential(DGConv2d(16, 16, 1), DGConv2d(16, 16, 1))
    model[1].sorted_gate = model[0].sorted_gate
    steer(model, 1e-6, 0.5)
    set_gates(model, lambda gate: -0.5)
    model[0].gate.grad = torch.full((4,), -1.0)
    torch.optim.SGD(model.parameters(), 1.0).step()  # would open all
    assert complexity(model).item() <= 0.5 * 512
    assert_close(model[0].gate.abs(), torch.full((4,), 0.5))


@pytest.mark.parametrize("target", [None, 0.02])
def test_a_step_reads_all_gates_once_at_most(target: float | None, monkeypatch: Patch) -> None:
    monkeypatch.setattr(gate_reader, "READ_DIRECTLY", set())  # as on CUDA
    model = nn.ModuleList(DGConv2d(64, 64, 1, bias=False) for _ in range(20))
    set_gates(model, lambda gate: 0.5 + torch.rand_like(gate))
    steer(model, 1e-2, target)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    calls: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs)

    for name in ("tolist", "item", "cpu", "numpy", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    for _ in range(3):
        optimizer.zero_grad()
        before = values(model)
        calls.clear()
        optimizer.step()
        assert calls == (["tolist"] if target else [])
        assert all(not torch.equal(gate, start) for gate, start in zip(gates(model), before, strict=True))


@pytest.mark.parametrize("opt", ["momentum", "adamw", "lookahead_momentum"])
@pytest.mark.parametrize("target", [None, 0.2])
def test_gates_learn_within_their_bound(opt: str, target: float | None) -> None:
    model = network(1e-5 if target else 0, complexity_target=target, gate_bound=0.05)
    optimizer = create_optimizer_v2(gates(model), opt=opt, lr=0.1, weight_decay=0.0)
    torch.manual_seed(0)
    patterns = set()
    for _ in range(30):
        for gate in gates(model):
            gate.grad = torch.randn_like(gate)
        optimizer.step()
        assert all(gate.abs().max() <= 0.05 for gate in gates(model))
        patterns.add(tuple(torch.cat(gates(model)).signbit().tolist()))
    assert len(patterns) > 5, "the groups go on learning"


def test_bound_leaves_frozen_gates() -> None:
    model = network(0, gate_bound=0.05)
    freeze_groups(model.layer1)
    model.requires_grad_(True)
    freeze_groups(model.layer1)
    plain(model, torch.optim.SGD(model.parameters(), LR))
    first, *others = gates(model)
    assert (first.abs() == 0.5).all()
    assert all((gate.abs() <= 0.05).all() for gate in others)


def test_gates_that_stand_still_cost_what_frozen_gates_cost() -> None:
    model = network(gate_steps=1)
    optimizer = torch.optim.SGD(model.parameters(), LR)

    def flops() -> int:
        model.zero_grad()
        with FlopCounterMode(display=False) as counter:
            loss_of(model).backward()
        return counter.get_total_flops()

    learning = flops()
    assert all(gate.grad.any() for gate in gates(model))
    optimizer.step()
    settled = flops()
    assert all(torch.equal(gate.grad, torch.zeros_like(gate)) for gate in gates(model))
    freeze_groups(model)
    assert flops() == settled < learning


@pytest.mark.skipif(not HAS_OPERATOR, reason="torch compiles the masked dense form")
def test_compiled_networks_learn_until_their_gates_stand_still() -> None:
    torch._dynamo.reset()
    model, compiles = network(gate_steps=2), CompileCounter()
    run = torch.compile(model.eval(), backend=compiles, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), LR)
    learned = []
    for _ in range(5):
        model.zero_grad()
        run(torch.ones(2, 3, 32, 32)).square().sum().backward()
        learned.append((any(gate.grad.any() for gate in gates(model)), compiles.frame_count))
        optimizer.step()
    assert learned == [(True, 1), (True, 1), (False, 2), (False, 2), (False, 2)]
