"""Training loops in which a step is more, or something else, than one call of a torch optimizer."""

import copy
import gc
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import timm
import torch
from conftest import HAS_OPERATOR, gates, layers, set_gates
from test_steering import LR, check_term, density, loss_of, network, values
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

from timm_dgconv import DGConv2d, complexity, freeze_groups, hold_target, steer

TARGET = 0.2


class OpensGates(torch.optim.SGD):
    """Changes parameters after the step of its base class."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(group.get("shift", 0))
        return loss


def test_a_step_inside_of_a_step_is_no_step() -> None:
    model = network()
    torch.optim.SGD(model.parameters(), 0.0)  # torch hooks the step of a class when it is first used
    check_term(model, OpensGates(gates(model), LR).step)


def test_a_step_that_raised_is_over() -> None:
    model = network()
    optimizer = torch.optim.SGD(gates(model), LR)

    def fails() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fails)
    check_term(model, optimizer.step)


@pytest.mark.parametrize("opt", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_that_maximizes_closes_gates_too(opt: type[torch.optim.Optimizer]) -> None:
    ends = []
    for maximize in (False, True):
        model = network()
        opt(gates(model), LR, maximize=maximize).step()  # type: ignore[call-arg]
        ends.append(values(model))
    assert_close(*ends)


class Averager:
    """Averages parameters with those of a process whose gates are open."""

    def average_parameters(self, params: Iterable[Any]) -> None:
        with torch.no_grad():
            for group in params:
                for parameter in group["params"]:
                    parameter.add_(2.0)


OUTERMOST: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "opens gates": lambda gates: OpensGates([{"params": gates, "shift": 2.0}], LR),
    "averages": lambda gates: PostLocalSGDOptimizer(torch.optim.SGD(gates, LR), Averager()),
    "lookahead": lambda gates: create_optimizer_v2(gates, opt="lookahead_momentum", lr=0.2, weight_decay=0.0),
}


@pytest.mark.parametrize("optimizer", OUTERMOST)
def test_the_target_is_held_after_the_outermost_step(optimizer: str) -> None:
    """These optimizers change gates after the step of another one."""
    model = network(1e-9, complexity_target=TARGET)
    set_gates(model, lambda gate: -torch.rand_like(gate))
    outermost = OUTERMOST[optimizer](gates(model))
    for _ in range(60):
        for gate in gates(model):
            gate.grad = torch.randn_like(gate)
        outermost.step()
        assert density(model) <= TARGET
    assert density(model) > TARGET / 2


def test_an_optimizer_per_parameter_steps_in_backward() -> None:
    model = network(complexity_target=TARGET)
    optimizers = {parameter: torch.optim.SGD([parameter], LR) for parameter in model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        before = density(model)
        loss_of(model).backward()
        assert density(model) <= max(TARGET, before)
    (steering,) = {conv.steered.steering for conv in model.modules() if isinstance(conv, DGConv2d)}
    assert steering.taken == 3


def moves(model: nn.Module, step: Callable[[], Any]) -> bool:
    before = values(model)
    step()
    return any(not torch.equal(*pair) for pair in zip(values(model), before, strict=True))


def test_steps_are_counted_per_model() -> None:
    model = network(gate_steps=3)
    first, second = gates(model)[:2], gates(model)[2:]
    pair = [torch.optim.SGD(part, LR) for part in (first, second)]
    assert moves(model, lambda: [optimizer.step() for optimizer in pair])
    other = torch.optim.SGD(gates(model), LR)  # as after a change of the learning rate
    assert moves(model, other.step)
    assert moves(model, other.step)
    assert not moves(model, other.step)
    copied = copy.deepcopy(model)
    assert not moves(copied, torch.optim.SGD(gates(copied), LR).step)


@pytest.mark.parametrize("opt", ["adamw", "lookahead_momentum"])
def test_gates_stop_within_the_target(opt: str) -> None:
    model = network(1e-9, complexity_target=0.1, gate_steps=2)
    set_gates(model, lambda gate: 0.05)
    for gate in gates(model):
        gate.grad = torch.full_like(gate, -1.0)
    optimizer = create_optimizer_v2(gates(model), opt=opt, lr=LR, weight_decay=0.1)
    assert [moves(model, optimizer.step) for _ in range(7)] == [True] * 2 + [False] * 5
    assert 0.05 < density(model) <= 0.1


def test_copied_layers_have_the_target_of_their_model() -> None:
    """PEFT's `modules_to_save` has frozen layers and copies that train."""
    model = nn.ModuleList(DGConv2d(16, 16, 1) for _ in range(4))
    steer(model, 1e-9, 0.5)
    set_gates(model, lambda gate: 0.1 + torch.rand_like(gate))
    model.requires_grad_(False)
    trained = nn.ModuleList(copy.deepcopy(conv).requires_grad_(True) for conv in model[:2])
    steps = [conv.gate.detach().clone() for conv in trained]
    for _ in range(30):
        for conv, step in zip(trained, steps, strict=True):
            conv.gate.grad = step
        torch.optim.SGD(trained.parameters(), 0.1).step()
    # Two of four layers are frozen and dense, so the others have no share of the target left.
    assert [conv.num_groups for conv in trained] == [16, 16]
    used = [*trained, *model[2:]]
    assert sum(complexity(conv).item() for conv in used) <= 0.5 * 4 * 256 + 2 * 16


def test_steps_of_copied_layers_count() -> None:
    model = nn.ModuleList(DGConv2d(16, 16, 1) for _ in range(3))
    steer(model, target=0.5, steps=8)
    trained = copy.deepcopy(model[0])
    model.requires_grad_(False)
    optimizer = torch.optim.SGD(trained.parameters(), 1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(9):
            optimizer.zero_grad()
            trained(torch.randn(2, 16, 4, 4)).square().mean().backward()
            gradient = trained.gate.grad.clone()
            optimizer.step()
    assert not gradient.any()  # the gates stand still


def train(model: nn.Module, step: Callable[[], Any], count: int = 8) -> None:
    for _ in range(count):
        model.train()(torch.randn(2, 3, 32, 32)).square().mean().backward()
        step()
        model.zero_grad()


def descend(model: nn.Module, rate: float = 1e-4) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(rate * parameter.grad)


COMPILED = pytest.param("aot_eager", marks=pytest.mark.skipif(not HAS_OPERATOR, reason="no operator in graphs"))


@pytest.mark.parametrize("backend", [None, COMPILED])
def test_gates_that_no_torch_optimizer_changes_are_noticed_once(backend: str | None) -> None:
    model = network(complexity_target=TARGET)
    if backend is not None:
        model.compile(backend=backend)
    other = nn.Linear(2, 2)
    torch.optim.AdamW(other.parameters()).step()
    with pytest.warns(UserWarning, match=r"without a step .*last step was of AdamW.*hold_target") as warned:
        train(model, lambda: descend(model), 20)
    assert len(warned) == 1


@pytest.mark.skipif(not HAS_OPERATOR, reason="no operator in graphs")
def test_a_compiled_network_holds_its_target() -> None:
    model = network(10.0, complexity_target=TARGET)
    set_gates(model, lambda gate: 0.05)
    model.compile(backend="aot_eager")
    optimizer = torch.optim.AdamW(gates(model), 0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer.step, 40)
    assert TARGET / 2 < density(model) <= TARGET


@pytest.mark.skipif(not HAS_OPERATOR, reason="no operator in graphs")
def test_a_compiled_network_does_not_look_for_gates_without_an_address() -> None:
    """Sharded gates have none. Fake ones stand for them."""
    model, other = network(complexity_target=TARGET), network(complexity_target=TARGET).train()
    fake = FakeTensorMode().from_tensor(layers(other)[0].gate.detach())
    layers(other)[0].sorted_gate = nn.Parameter(fake)
    model.compile(backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, lambda: descend(model), 1)


def test_usual_loops_are_not_warned_of() -> None:
    model = network(complexity_target=TARGET)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)

    def sharpness_aware() -> None:
        descend(model, -1e-4)
        model.zero_grad()
        model(torch.randn(2, 3, 32, 32)).square().mean().backward()
        optimizer.step()

    def in_evaluation() -> None:
        with torch.no_grad():
            model(torch.randn(2, 3, 32, 32))
        descend(model)
        model.eval()(torch.randn(2, 3, 32, 32))

    held = network(complexity_target=TARGET)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(held, lambda: [descend(held), hold_target(held)])
        train(model, optimizer.step)
        train(model, sharpness_aware)
        for _ in range(8):
            model.zero_grad()
            loss_of(model).backward()
            in_evaluation()


@pytest.mark.parametrize("frozen", [False, True])
def test_an_average_can_be_brought_within_the_target(frozen: bool) -> None:
    model = network(complexity_target=TARGET)
    set_gates(model, lambda gate: 0.1 + torch.rand_like(gate))
    average = AveragedModel(model)
    freeze_groups(average, frozen)
    assert density(average) == 1
    before = values(average)
    hold_target(average)
    assert TARGET / 2 < density(average) <= TARGET
    assert density(model) == 1
    for gate, start in zip(gates(average), before, strict=True):
        assert_close(gate.abs(), start)


def test_only_a_target_can_be_held() -> None:
    with pytest.raises(ValueError, match=r"GResNet has no complexity_target; use timm_dgconv\.steer"):
        hold_target(network())


def test_a_copy_of_a_part_does_not_take_its_place() -> None:
    """A snapshot, or the momentum encoder of a backbone."""
    model: Any = timm.create_model("test_g_resnext", complexity_target=0.1, init_groups=1)
    snapshot, optimizer = copy.deepcopy(model.layer4), torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(30):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 64, 64)).square().mean().backward()
        optimizer.step()
    assert density(model) <= 0.1
    assert snapshot[0].conv2.num_groups == 1


def test_a_copy_of_what_is_left_of_a_network_is_steered() -> None:
    whole = timm.create_model("test_g_resnext", complexity_target=0.5, init_groups=1)
    model = nn.Sequential(*list(whole.children())[:-3])
    del whole
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    average = copy.deepcopy(model)
    for _ in range(30):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 64, 64)).square().mean().backward()
        optimizer.step()
    assert sum(conv.num_groups > 1 for conv in layers(model)) > 0
    hold_target(average)
    assert sum(conv.num_groups > 1 for conv in layers(average)) > 0


def test_gates_of_which_a_process_has_a_part_cannot_be_held() -> None:
    model = network(complexity_target=TARGET)
    gate = layers(model)[0].gate
    gate.data = gate.detach()[:0]  # as DeepSpeed's ZeRO 3 does
    with pytest.raises(RuntimeError, match=r"gates of layer1\.0\.conv2 are sharded.*GatheredParameters"):
        hold_target(model)


def test_layers_that_tracing_has_left_behind_are_noticed() -> None:
    model = timm.create_model("test_g_resnext", features_only=True, feature_cls="fx", complexity_target=0.1)
    gc.collect()
    with pytest.warns(UserWarning, match=r"gates whose DGConv2d layers are gone.*keep the model"):
        torch.optim.SGD(model.parameters(), 0.1).step()


def test_a_layer_has_one_target() -> None:
    shared, *others = (DGConv2d(16, 16, 1) for _ in range(3))
    first, second = (nn.Sequential(shared, other) for other in others)
    steer(first, target=0.25)
    with pytest.raises(ValueError, match="0 is steered with 1 layers of another model; steer one model that has all"):
        steer(second, target=1.0)
    steer(nn.Sequential(first, second), target=0.5)


def test_a_target_needs_steps() -> None:
    with pytest.raises(ValueError, match=r"gate_steps=0 lets no step reach complexity_target=0\.5; use more steps"):
        timm.create_model("test_g_resnext", complexity_target=0.5, gate_steps=0)
