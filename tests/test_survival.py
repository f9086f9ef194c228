"""Training that goes on from a checkpoint, averages of models, and training loops that do unusual things."""

import copy
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import timm
import torch
from conftest import gates
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils._pytree import tree_flatten

from timm_dgconv import DGConv2d, block_groups, compact, complexity, group_report

STEPS = 20

TRAIN = f"""
    import sys, timm, torch
    from timm.models import load_checkpoint, resume_checkpoint
    from timm.optim import create_optimizer_v2
    from timm.utils import CheckpointSaver, ModelEmaV3
    from torch import nn
    from timm_dgconv import DGConv2d, freeze_groups

    folder, start, weight, *names = sys.argv[1:]
    start = int(start)
    for name in names:  # options of a training, joined by dashes
        torch.manual_seed(start)  # other values, which a checkpoint must replace
        model = timm.create_model(
            "test_g_resnext", num_classes=3, zero_init_last=False, drop_path_rate=0.1,
            complexity_weight=float(weight), complexity_target=0.3 if float(weight) else None,
        )
        gates = [module.gate for module in model.modules() if isinstance(module, DGConv2d)]
        with torch.no_grad():
            for gate in gates:
                gate.mul_(1e5)  # 0.001 from zero
        if "channels_last" in name:
            model.to(memory_format=torch.channels_last)
        rate = 0.002 if "adamw" in name else 0.1
        optimizer = create_optimizer_v2(model, opt=name.split("-")[0], lr=rate, weight_decay=0.01)
        file = f"{{folder}}/{{name}}/checkpoint-{{start - 1}}.pth.tar"
        if start:
            assert resume_checkpoint(model, file, optimizer, log_info=False) == start
        average = ModelEmaV3(model, decay=0.8)
        if start:
            load_checkpoint(average.module, file, use_ema=True)
        saver = CheckpointSaver(model, optimizer, model_ema=average, checkpoint_dir=f"{{folder}}/{{name}}")
        trained = torch.compile(model, backend="aot_eager") if "compiled" in name else model
        signs = []
        for step in range(start, {STEPS}):
            if "frozen" in name and 5 <= step < 15:
                freeze_groups(model)
            elif "frozen" in name:
                freeze_groups(model, frozen=False)
            torch.manual_seed(step)
            x, y = torch.randn(4, 3, 32, 32), torch.randint(3, (4,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(trained.train()(x), y).backward()
            optimizer.step()
            average.update(model)
            signs.append(torch.cat(gates).signbit())
            if step == {STEPS} // 2 - 1:
                saver.save_checkpoint(step)
        end = [model.state_dict(), optimizer.state_dict(), average.state_dict(), signs[-10:]]
        torch.save(end, f"{{folder}}/{{name}}/from{{start}}-{{weight}}.pt")
    """


def bits_of(state: Any) -> list[Any]:
    """The leaves, tensors as bytes."""
    leaves, _ = tree_flatten(state)
    return [leaf.reshape(-1).view(torch.uint8).tolist() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def ends_after_resuming(folder: Path, names: list[str], weight: float = 1e-4) -> Iterator[tuple[Any, Any]]:
    """The ends of trainings that were not interrupted, and of those that went on in another process half-way."""
    for name in names:
        (folder / name).mkdir()
    for start, w in ((0, 1e-4), (STEPS // 2, weight)):
        command = [sys.executable, "-c", dedent(TRAIN), folder, str(start), str(w), *names]
        subprocess.run(command, check=True)
    for name in names:
        files = (folder / name / f"from{start}-{w}.pt" for start, w in ((0, 1e-4), (STEPS // 2, weight)))
        yield tuple(torch.load(file, weights_only=False) for file in files)


@pytest.mark.parametrize(
    "names",
    [
        ["momentum", "adamw", "momentum-frozen"],
        pytest.param(
            ["momentum-channels_last", "lookahead_momentum", "adamw-frozen", "lookahead_momentum-frozen", "lamb"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["momentum-compiled", "adamw-compiled-channels_last"], marks=pytest.mark.slow),
    ],
    ids=",".join,
)
def test_resumed_as_if_uninterrupted(names: list[str], tmp_path: Path) -> None:
    """Parameters, buffers, gates, state of the optimizer, average: every bit."""
    flipped = 0
    for name, (whole, resumed) in zip(names, ends_after_resuming(tmp_path, names), strict=True):
        assert bits_of(whole) == bits_of(resumed), name
        *_, signs = resumed
        assert len(signs) == STEPS // 2
        flipped += sum(int((before != after).sum()) for before, after in itertools.pairwise(signs))
    assert flipped > 0


@pytest.mark.slow
def test_the_term_is_the_models_not_the_checkpoints(tmp_path: Path) -> None:
    ((whole, resumed),) = ends_after_resuming(tmp_path, ["momentum"], weight=0.0)
    assert bits_of(whole) != bits_of(resumed)


def test_frozen_from_a_checkpoint_on(tmp_path: Path) -> None:
    """Timm's optimizers leave frozen gates out, so torch refuses the state of one that had them."""
    model = network()
    optimizer = create_optimizer_v2(model, opt="momentum", lr=0.05, weight_decay=0.01)
    loss_of(model).backward()
    optimizer.step()
    CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path)).save_checkpoint(0)
    file = str(tmp_path / "last.pth.tar")
    resumed = network(freeze_groups=True)
    optimizer = create_optimizer_v2(resumed, opt="momentum", lr=0.05, weight_decay=0.01)
    with pytest.raises(ValueError, match="doesn't match the size"):
        resume_checkpoint(resumed, file, optimizer)
    optimizer = create_optimizer_v2(resumed, opt="momentum", lr=0.05, weight_decay=0.01)
    assert resume_checkpoint(resumed, file) == 1
    loss_of(resumed).backward()
    optimizer.step()
    assert bits_of(gates(resumed)) == bits_of(gates(model))
    assert not torch.equal(convs(resumed)[0].weight, convs(model)[0].weight)


# Averages


def network(**kwargs: Any) -> nn.Module:
    """A tiny G-ResNeXt, every time the same; gates near zero, of either sign."""
    torch.manual_seed(0)
    model = timm.create_model("test_g_resnext", num_classes=3, zero_init_last=False, **kwargs)
    with torch.no_grad():
        for gate in gates(model):
            gate.copy_(0.01 * torch.randn_like(gate))
    return model


def loss_of(model: nn.Module, batch: int = 0) -> torch.Tensor:
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
    return nn.functional.cross_entropy(model(x), torch.arange(4) % 3)


def other(model: nn.Module, gate_values: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """Another model of the same run: weights a little different, gates of these values."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        for gate, start in zip(gates(result), gates(model), strict=True):
            gate.copy_(gate_values(start))
    return result


def by_timm(models: list[nn.Module]) -> nn.Module:
    average = ModelEmaV3(models[0])
    for n, model in enumerate(models):
        average.decay = n / (n + 1)
        average.update(model)
    return average.module


def by_torch(models: list[nn.Module]) -> nn.Module:
    average = AveragedModel(models[0])
    for model in models:
        average.update_parameters(model)
    return average.module


def by_torch_exponentially(models: list[nn.Module]) -> nn.Module:
    average = AveragedModel(models[0], multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for model in models:
        average.update_parameters(model)
    return average.module


AVERAGES = {by_timm: [1 / 3, 1 / 3, 1 / 3], by_torch: [1 / 3, 1 / 3, 1 / 3], by_torch_exponentially: [0.25, 0.25, 0.5]}


@pytest.mark.parametrize(("average", "shares"), AVERAGES.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_average(average: Callable[[list[nn.Module]], nn.Module], shares: list[float]) -> None:
    """Of the gates' values, and their signs decide; of all weights, those of closed pairs too."""
    first = network()
    models = [first, other(first, torch.neg), other(first, lambda gate: torch.randn_like(gate))]
    averaged = average(models).eval()
    expected = network().eval()
    parameters = zip(*(model.parameters() for model in [expected, *models]), strict=True)
    with torch.no_grad():
        for target, *values in parameters:
            target.copy_(sum(share * value for share, value in zip(shares, values, strict=True)))
    for layer, like in zip(convs(averaged), convs(expected), strict=True):
        torch.testing.assert_close(layer.gate, like.gate)
        assert torch.equal(layer.connectivity(), like.connectivity())
        torch.testing.assert_close(layer.weight, like.weight)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(averaged(x), expected(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compact(averaged)(x), expected(x), rtol=1e-4, atol=1e-4)


def convs(model: nn.Module) -> list[DGConv2d]:
    return [module for module in model.modules() if isinstance(module, DGConv2d)]


@pytest.mark.parametrize("average", list(AVERAGES), ids=lambda average: average.__name__)
def test_average_has_groups_of_its_own(average: Callable[[list[nn.Module]], nn.Module]) -> None:
    """Here all its gates are open, above the target that both models keep."""
    first = network(complexity_weight=1e-7, complexity_target=0.3)
    with torch.no_grad():
        for gate in gates(first):
            gate.fill_(3.0)[::2] = -1.0
    second = other(first, lambda gate: 2 - gate)
    averaged = average([first, second])
    assert max(group_report(model).share for model in (first, second)) < 0.3
    assert block_groups(first) != block_groups(averaged) != block_groups(second)
    assert group_report(averaged).share == 1


@pytest.mark.parametrize("size", [1e-8, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("average", list(AVERAGES), ids=lambda average: average.__name__)
def test_average_of_the_same_and_of_opposites(
    average: Callable[[list[nn.Module]], nn.Module], dtype: torch.dtype, size: float
) -> None:
    """The same gates keep their signs, initial ones too; opposite ones are 0.0, which is open."""
    model = network().to(dtype)
    with torch.no_grad():
        for gate in gates(model):
            gate.copy_(torch.where(torch.rand_like(gate) < 0.5, -size, size))
    start = torch.cat(gates(model))
    same = torch.cat(gates(average([model] * 4)))
    assert torch.equal(same.signbit(), start.signbit())
    averaged = average([model, other(model, torch.neg)]).eval()
    opposite = torch.cat(gates(averaged))
    assert not opposite.any()
    assert not opposite.signbit().any()
    x = torch.randn(2, 3, 32, 32).to(dtype)
    y = averaged(x)
    with torch.no_grad():
        for gate in gates(averaged):
            gate.fill_(1.0)
    assert torch.equal(averaged(x), y)


def test_average_goes_on() -> None:
    """A stochastic weight average from training to batch norm update, copied half-way."""
    model = network(complexity_weight=1e-4)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    averaged = AveragedModel(model)
    signs = set()
    for step in range(6):
        optimizer.zero_grad()
        loss_of(model.train(), step).backward()
        optimizer.step()
        averaged.update_parameters(model)
        if step == 2:
            averaged = copy.deepcopy(averaged)
        signs.add(tuple(torch.cat(gates(model)).signbit().tolist()))
    assert len(signs) > 1, "no gate flipped"
    assert int(averaged.n_averaged) == 6
    assert all(gate.grad is None for gate in gates(averaged))  # no optimizer has them, so nothing steers them

    expected = copy.deepcopy(averaged.module)
    batches = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    update_bn(batches, averaged)
    for layer in expected.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # the mean over all batches
    with torch.no_grad():
        for batch in batches:
            expected.train()(batch)
    assert torch.equal(averaged.eval()(batches[0]), expected.eval()(batches[0]))


def test_averaged_weights_in_the_model() -> None:
    model = network(complexity_weight=1e-4)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    average = ModelEmaV3(model, decay=0.5)
    for step in range(5):
        optimizer.zero_grad()
        loss_of(model.train(), step).backward()
        optimizer.step()
        average.update(model)
    x = torch.randn(2, 3, 32, 32)
    assert any(not torch.equal(a, b) for a, b in zip(gates(model), gates(average), strict=True))
    own = copy.deepcopy(model.state_dict())
    before = model.eval()(x)
    model.load_state_dict(average.module.state_dict())
    assert torch.equal(model(x), average(x))
    torch.testing.assert_close(compact(average)(x), average(x), rtol=1e-4, atol=1e-4)
    model.load_state_dict(own)  # and back
    assert torch.equal(model(x), before)


# Loops


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), 0.05, momentum=0.9),
    "fused": lambda model: torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, fused=True),
    "fused adamw": lambda model: torch.optim.AdamW(model.parameters(), 0.01, fused=True),
}


@pytest.mark.parametrize("target", [None, 0.1])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_skipped_step(optimizer: str, target: float | None) -> None:
    """Float16 gradients that are infinite: the step and its term leave nothing behind."""
    ends = []
    for overflows in (False, True):
        model = network(complexity_weight=1e-4, complexity_target=target)
        opt = OPTIMIZERS[optimizer](model)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for step in range(3):
            if step == 1 and overflows:
                before = copy.deepcopy(model.state_dict())
                with torch.autocast("cpu", torch.float16):
                    loss = loss_of(model.eval(), 9)
                (scaler.scale(loss) * 1e8).backward()
                assert not any(gate.grad.isfinite().all() for gate in gates(model))
                scaler.step(opt)
                scaler.update(64.0)
                assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
                opt.zero_grad(set_to_none=False)
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model.eval(), step)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad(set_to_none=False)
        ends.append(model.state_dict())
    assert bits_of(ends[0]) == bits_of(ends[1])


def trained(model: nn.Module, set_to_none: bool = True) -> tuple[list[torch.Tensor], int]:
    """Parameters after some steps, and how many gates have flipped."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    flipped = 0
    for step in range(8):
        optimizer.zero_grad(set_to_none)
        loss_of(model.eval(), step).backward()
        before = torch.cat(gates(model)).signbit()
        optimizer.step()
        flipped += int((torch.cat(gates(model)).signbit() != before).sum())
    return list(model.parameters()), flipped


def test_gradient_checkpointing() -> None:
    model, checkpointed = network(complexity_weight=1e-4), network(complexity_weight=1e-4)
    checkpointed.set_grad_checkpointing()
    (expected, flipped), (got, _) = trained(model), trained(checkpointed)
    assert flipped > 0
    torch.testing.assert_close(got, expected)


def test_gradients_set_to_zero() -> None:
    model, again = network(complexity_weight=1e-4), network(complexity_weight=1e-4)
    (expected, flipped), (got, _) = trained(model), trained(again, set_to_none=False)
    assert flipped > 0
    assert bits_of(got) == bits_of(expected)


@pytest.mark.parametrize("opt", ["momentum", "adamw", "lookahead_momentum"])
def test_learning_rate_zero(opt: str) -> None:
    model = network(complexity_weight=1e-4, complexity_target=0.05)
    optimizer = create_optimizer_v2(model, opt=opt, lr=0.0, weight_decay=0.1)
    before = bits_of(list(model.parameters()))
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model.eval(), step).backward()
        optimizer.step()
    assert bits_of(list(model.parameters())) == before


@pytest.mark.parametrize("make_groups", [param_groups_weight_decay, param_groups_layer_decay])
def test_gates_do_not_decay(make_groups: Callable[..., list[dict[str, Any]]]) -> None:
    model = network()
    groups = {id(p): group for group in make_groups(model, weight_decay=0.1) for p in group["params"]}
    for conv in convs(model):
        assert groups[id(conv.gate)]["weight_decay"] == 0
        assert groups[id(conv.weight)]["weight_decay"] == 0.1
        assert groups[id(conv.gate)].get("lr_scale") == groups[id(conv.weight)].get("lr_scale")


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs(line_search: str | None) -> None:
    """It calls its closure several times a step; every gradient that it sees has the term of that moment once."""
    model = network(complexity_weight=1e-4)
    optimizer = torch.optim.LBFGS(model.parameters(), 0.01, max_iter=4, line_search_fn=line_search)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []  # gradient of the loss alone, and of the term

    def check() -> None:
        if seen:
            task, term = seen[-1]
            torch.testing.assert_close(torch.cat([gate.grad for gate in gates(model)]), task + 1e-4 * term)

    def closure() -> torch.Tensor:
        check()
        optimizer.zero_grad()
        loss = loss_of(model.eval())
        loss.backward()
        task = torch.cat([gate.grad for gate in gates(model)])
        seen.append((task, torch.cat(torch.autograd.grad(complexity(model), gates(model)))))
        return loss

    for _ in range(2):
        optimizer.step(closure)
        check()
    assert len(seen) > 4


class SharpnessAware(torch.optim.Optimizer):
    """As https://arxiv.org/abs/2010.01412 is usually written: two gradients a step, and an optimizer inside."""

    def __init__(self, parameters: Any, base: type[torch.optim.Optimizer], rho: float, **kwargs: Any) -> None:
        super().__init__(parameters, dict(rho=rho, **kwargs))
        self.base = base(self.param_groups, **kwargs)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor]) -> None:  # type: ignore[override]
        closure = torch.enable_grad()(closure)
        closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        start = [p.clone() for p in parameters]
        for p in parameters:
            p.add_(p.grad, alpha=self.param_groups[0]["rho"] / norm)
        closure()
        for p, value in zip(parameters, start, strict=True):
            p.copy_(value)
        self.base.step()


def test_sharpness_aware() -> None:
    """The term is once in either gradient, as if it were a part of the loss."""
    steered, expected = network(complexity_weight=1e-4).double(), network().double()
    for model in (steered, expected):
        optimizer = SharpnessAware(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.05, momentum=0.9)

        def closure(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            x = torch.sin(torch.arange(4 * 3 * 32 * 32, dtype=torch.float64)).view(4, 3, 32, 32)
            loss = nn.functional.cross_entropy(model.eval()(x), torch.arange(4) % 3)
            (loss if model is steered else loss + 1e-4 * complexity(model)).backward()
            return loss

        for _ in range(4):
            optimizer.step(closure)
    torch.testing.assert_close(list(steered.parameters()), list(expected.parameters()), rtol=1e-10, atol=1e-10)
