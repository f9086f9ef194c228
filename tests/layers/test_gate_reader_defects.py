"""Gates are read once per forward pass of the model, and each pass sees the gates as they are when it begins."""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import gates, run_ranks
from timm.layers import set_reentrant_ckpt, use_reentrant_ckpt
from torch import Tensor, nn
from torch.testing import assert_close

from timm_dgconv import DGConv2d, freeze_groups, groupable
from timm_dgconv.layers import gate_reader

FORMS: list[dict[str, Any]] = [{}, {"sort": False}]


@pytest.fixture
def as_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU behave as CUDA does."""
    monkeypatch.setattr(gate_reader, "READ_DIRECTLY", set())


def near_zero(model: nn.Module) -> nn.Module:
    """Gates that a step of 0.02 flips."""
    with torch.no_grad():
        for gate in gates(model):
            gate.copy_(torch.where(torch.rand_like(gate) < 0.5, -0.01, 0.01))
    return model.double().eval()


def network(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return near_zero(timm.create_model("test_g_resnext", num_classes=3, zero_init_last=False, **kwargs))


def reference(model: nn.Module) -> nn.Module:
    """A copy that computes the masked dense form in all layers."""
    twin = copy.deepcopy(model)
    for layer in twin.modules():
        if isinstance(layer, DGConv2d):
            layer.forward = layer.masked_dense  # type: ignore[method-assign]
    return twin


def outputs(model: nn.Module, x: Tensor, backward: Callable[[Tensor], Any] = Tensor.backward) -> dict[str, Tensor]:
    """Logits and gradients."""
    model.zero_grad()
    y = model(x)
    backward(y.square().mean())
    return {"logits": y, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def check(model: nn.Module, x: Tensor, backward: Callable[[Tensor], Any] = Tensor.backward) -> None:
    expected = outputs(reference(model), x)
    assert_close(outputs(model, x, backward), expected, rtol=1e-6, atol=1e-9)


def flip(model: nn.Module) -> None:
    """Change gates and not their version, as fused optimizers and collectives do."""
    for gate in gates(model):
        gate.data.neg_()


# 1. Recomputation


@pytest.fixture(params=[False, True], ids=["non-reentrant", "reentrant"])
def reentrant(request: pytest.FixtureRequest) -> Iterator[bool]:
    before = use_reentrant_ckpt()
    set_reentrant_ckpt(request.param)
    yield request.param
    set_reentrant_ckpt(before)


@pytest.mark.usefixtures("as_cuda", "reentrant")
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_recomputed_layers_have_the_gates_of_their_own_step(form: dict[str, Any]) -> None:
    """Activation checkpointing runs blocks last to first, on a GPU in the thread of backward."""
    model = network(**form)
    model.set_grad_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), 0.02, weight_decay=0.0, fused=True)
    with ThreadPoolExecutor(1) as other_thread:
        for step in range(6):
            x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            check(model, x, lambda loss: other_thread.submit(loss.backward).result())
            optimizer.step()


# 2. Orders of execution, and parts of models


class Reversed(nn.Module):
    """Runs its layers last to first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            x = layer(x).relu()
        return x


@pytest.mark.usefixtures("as_cuda")
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("name", ["reversed", "fasternet_t0", "twins_pcpvt_small"])
def test_layers_may_run_in_another_order_than_they_were_registered(name: str, form: dict[str, Any]) -> None:
    torch.manual_seed(0)
    if name == "reversed":
        model, x = Reversed(), torch.randn(2, 8, 5, 5, dtype=torch.float64)
    else:
        model, x = timm.create_model(name, num_classes=3), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    near_zero(groupable(model, **form))
    check(model, x)
    for _ in range(2):
        flip(model)
        check(model, x)


def one_layer(model: Any, x: Tensor) -> None:
    model.layer1[0].conv2(torch.randn(1, model.layer1[0].conv2.in_channels, 5, 5, dtype=x.dtype))


def one_stage(model: Any, x: Tensor) -> None:
    model.layer2(model.layer1(model.maxpool(model.conv1(x))))


def interrupted(model: Any, x: Tensor) -> None:
    """As by Ctrl-C in a notebook."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.layer3.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    hook.remove()


@pytest.mark.usefixtures("as_cuda")
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("partial_pass", [one_layer, one_stage, interrupted])
@pytest.mark.parametrize("name", ["test_g_resnext", "test_resnet"])
def test_a_partial_pass_leaves_nothing_for_a_later_one(
    name: str, partial_pass: Callable[[nn.Module, Tensor], None], form: dict[str, Any]
) -> None:
    if name == "test_g_resnext":
        model = network(**form)
    else:
        torch.manual_seed(0)
        model = near_zero(groupable(timm.create_model(name, num_classes=3), **form))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        partial_pass(model, x)
    flip(model)
    for name in ("layer4", "layer3", "layer2"):  # the last first: it reads for no other
        stage = model.get_submodule(name)
        channels = next(module for module in stage.modules() if isinstance(module, nn.Conv2d)).in_channels
        check(stage, torch.randn(2, channels, 5, 5, dtype=torch.float64))
    check(model, x)


def test_fully_sharded_layers_may_run_in_another_order_than_they_were_registered(tmp_path: Path) -> None:
    """An all-gather changes no version, so with any optimizer."""
    run_ranks(
        tmp_path,
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from timm_dgconv import groupable
        from timm_dgconv.layers import gate_reader

        gate_reader.READ_DIRECTLY.clear()
        torch.Tensor.data_ptr = lambda self: 0  # on a GPU an all-gather writes to the same address again

        class Reversed(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = torch.nn.ModuleList(torch.nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

            def forward(self, x):
                for layer in reversed(self.layers):
                    x = layer(x).relu()
                return x

        torch.manual_seed(0)
        alone, sharded = (groupable(Reversed()).double() for _ in range(2))
        with torch.no_grad():
            for layer in alone.layers:
                layer.gate.copy_(torch.tensor([0.01, -0.01, 0.01]))
        sharded.load_state_dict(alone.state_dict())
        fully_shard(sharded, mesh=init_device_mesh("cpu", (world,)))
        for layer in alone.layers:
            layer.forward = layer.masked_dense
        optimizers = [torch.optim.Adam(model.parameters(), 0.02) for model in (alone, sharded)]
        for step in range(5):
            x = torch.randn(2, 8, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            expected, found = alone(x), sharded(x)
            torch.testing.assert_close(found, expected)
            for y, optimizer in zip((expected, found), optimizers):
                optimizer.zero_grad()
                y.square().mean().backward()
                optimizer.step()
        """,
    )


# 3. Frozen gates


def load(model: nn.Module) -> None:
    model.load_state_dict({name: -value if "gate" in name else value for name, value in model.state_dict().items()})


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for gate in gates(model):
            gate.neg_()


@pytest.mark.usefixtures("as_cuda")
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("change", [in_place, load, flip])
def test_frozen_gates_made_in_inference_mode_are_read_in_each_pass(
    change: Callable[[nn.Module], None], form: dict[str, Any]
) -> None:
    with torch.inference_mode():
        model, x = network(**form), torch.randn(2, 3, 32, 32, dtype=torch.float64)
        freeze_groups(model)
        for _ in range(2):
            assert_close(model(x), reference(model)(x))
            change(model)
        assert_close(model(x), reference(model)(x))


@pytest.mark.usefixtures("as_cuda")
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_frozen_gates_may_change_without_a_new_version(form: dict[str, Any]) -> None:
    model, x = network(**form), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    freeze_groups(model)
    for _ in range(3):
        check(model, x)
        flip(model)


# 14. Between forward and backward


def gradients(model: nn.Module, y: Tensor, x: Tensor, create_graph: bool) -> list[Tensor]:
    """First derivatives, and with create_graph second derivatives, too."""
    wanted = [x, *model.parameters()]
    first = torch.autograd.grad(y.square().sum(), wanted, create_graph=create_graph)
    if not create_graph:
        return list(first)
    return [*first, *torch.autograd.grad(first[0].square().sum(), wanted)]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("how", ["compiled", "create_graph"])
@pytest.mark.parametrize("reads", ["read every time", "read once per pass"])
def test_backward_has_the_gates_of_its_forward(
    reads: str, how: str, form: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if reads == "read once per pass":
        monkeypatch.setattr(gate_reader, "READ_DIRECTLY", set())
    torch.manual_seed(0)
    layers = [DGConv2d(8, 8, 3, padding=1, **form) for _ in range(2)]
    model = near_zero(nn.Sequential(layers[0], nn.Sigmoid(), layers[1]))
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    run = torch.compile(model, backend="aot_eager") if how == "compiled" else model
    for _ in range(2):
        twin = reference(model)
        expected = gradients(twin, twin(x), x, how == "create_graph")
        y = run(x)
        flip(model)
        assert_close(gradients(model, y, x, how == "create_graph"), expected)
