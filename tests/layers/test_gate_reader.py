"""Gates are read once per forward call, and each pass sees the gates as they are when it begins."""

import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
import torch.distributed.fsdp
from conftest import DEVICES, FORMS, HAS_OPERATOR, Patch, gates, layers, set_gates
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from timm_dgconv import DGConv2d, freeze_groups, groupable
from timm_dgconv.layers import gate_reader
from timm_dgconv.ops import autograd


@pytest.fixture(autouse=True, scope="module")
def as_cuda() -> Iterator[None]:
    """Let the CPU behave as CUDA does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate_reader, "READ_DIRECTLY", set())
        yield


def near_zero(model: nn.Module) -> nn.Module:
    """Gates that a step of 0.02 flips."""
    set_gates(model, lambda gate: torch.where(torch.rand_like(gate) < 0.5, -0.01, 0.01))
    return model.double().eval()


def network(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return near_zero(timm.create_model("test_g_resnext", num_classes=3, zero_init_last=False, **kwargs))


def reference(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A copy that computes the masked dense form in all layers, and is no owner that could end a reading."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
        if isinstance(module, DGConv2d):
            module.forward = module.masked_dense  # type: ignore[method-assign]
    return twin.forward


def results(forward: Any, x: Tensor, parameters: Any, change: Callable[[], None] = lambda: None) -> list[Any]:
    """Output and gradients."""
    leaves = [x, *parameters]
    y = forward(x)
    change()
    for leaf in leaves:
        leaf.grad = None
    if y.requires_grad:
        y.square().mean().backward()
    return [y.detach(), *(None if leaf.grad is None else leaf.grad.clone() for leaf in leaves)]


def check(model: nn.Module, x: Tensor, change: Callable[[], None] = lambda: None) -> None:
    """Compare with the masked dense form. The gates change between forward and backward."""
    twin = reference(model)
    found = results(model, x, model.parameters(), change)
    expected = results(twin, x, twin.__self__.parameters())  # type: ignore[attr-defined]
    assert [value is None for value in found] == [value is None for value in expected]
    pairs = [pair for pair in zip(found, expected, strict=True) if pair[0] is not None]
    assert_close(*map(list, zip(*pairs, strict=True)), rtol=1e-6, atol=1e-9)


def flip(model: nn.Module) -> None:
    """Change gates and not their version, as fused optimizers and collectives do."""
    for gate in gates(model):
        gate.data.neg_()


class Net(nn.Module):
    """Runs its layers in any order, and with activation checkpointing if it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.order, self.recompute = [2, 0, 1], ""

    def forward(self, x: Tensor) -> Tensor:
        for n in self.order:
            layer = self.layers[n]
            if self.recompute:
                x = checkpoint(layer, x, use_reentrant=self.recompute == "reentrant").sigmoid()
            else:
                x = layer(x).sigmoid()
        return x


def nets(seed: int) -> tuple[nn.Module, Tensor]:
    """A network that owns networks, in one of the forms."""
    torch.manual_seed(seed)
    inner = [groupable(Net(), **FORMS[seed % 3]), Net()]
    model = groupable(nn.Sequential(*inner), where=lambda name, conv: not name.startswith("0."), **FORMS[seed % 3])
    return near_zero(model), torch.randn(1, 8, 4, 4, dtype=torch.float64, requires_grad=True)


def step(optimizer: Callable[..., torch.optim.Optimizer], **kwargs: Any) -> Callable[[nn.Module], None]:
    """A step that flips about half of the gates."""

    def change(model: nn.Module) -> None:
        for gate in gates(model):
            gate.grad = torch.randn_like(gate)
        optimizer(gates(model), lr=0.02, **kwargs).step()

    return change


def numpy(model: nn.Module) -> None:
    for gate in gates(model):
        gate.detach().numpy()[:] *= -1


def load(model: nn.Module, assign: bool = False) -> None:
    state_dict = {name: -value if "gate" in name else value for name, value in model.state_dict().items()}
    model.load_state_dict(state_dict, assign=assign)


def swap(model: nn.Module) -> None:
    for layer in layers(model):
        name = "sorted_gate" if layer.sort else "unsorted_gate"
        setattr(layer, name, nn.Parameter(-layer.gate.detach(), layer.gate.requires_grad))


def other_form(model: nn.Module) -> None:
    for layer in layers(model):
        layer.set_sort(not layer.sort)


def configure(name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: [setattr(net, name, value) for net in model] and None


def interrupt(error: type[BaseException]) -> Callable[[Any], None]:
    """Stop a forward pass in its middle, as by Ctrl-C in a notebook or by a bug in a hook."""

    def run(model: Any) -> None:
        def stop(*_: Any) -> None:
            raise error

        hook = model[1].layers[0].register_forward_pre_hook(stop)
        with pytest.raises(error):
            model(torch.randn(1, 8, 4, 4, dtype=torch.float64))
        hook.remove()

    return run


def inside(model: Any) -> None:
    def again(*_: Any) -> None:
        hook.remove()
        with torch.no_grad():
            model(x)

    x = torch.randn(1, 8, 4, 4, dtype=torch.float64)
    hook = model[1].layers[0].register_forward_pre_hook(again)
    check(model, x)


CHANGES: dict[str, Callable[[Any], None]] = {
    "in place": lambda model: set_gates(model, torch.neg),
    "data": flip,
    "numpy": numpy,
    "inference mode": torch.inference_mode()(lambda model: set_gates(model, torch.neg)),
    "SGD": step(torch.optim.SGD),
    "fused AdamW": step(torch.optim.AdamW, fused=True),
    "load": load,
    "assign": lambda model: load(model, assign=True),
    "swap": swap,
    "form": other_form,
    "frozen": freeze_groups,
    "": lambda model: None,
    "learning": lambda model: freeze_groups(model, frozen=False) and None,
}
EVENTS: dict[str, Callable[[Any], None]] = {
    **CHANGES,
    "order": configure("order", [0, 2, 1]),
    "another order": configure("order", [1, 0, 2, 0]),
    "reentrant": configure("recompute", "reentrant"),
    "non-reentrant": configure("recompute", "non-reentrant"),
    "no recomputation": configure("recompute", ""),
    "float": lambda model: model.float().double() and None,
    "exception": interrupt(ValueError),
    "interrupt": interrupt(KeyboardInterrupt),
    "a pass inside a pass": inside,
}
LATE = ["", "data", "numpy", "fused AdamW", "assign", "swap", "form"]  # torch refuses backward after the others
PARTS: dict[str, Callable[[Any], nn.Module]] = {
    "model": lambda model: model,
    "owner inside": lambda model: model[0],
    "no owner": lambda model: model[1],
    "layer": lambda model: model[0].layers[2],
}
MODES: dict[str, Any] = {"train": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}

events = st.lists(
    st.one_of(
        st.sampled_from([*EVENTS, "deepcopy", "pickle"]),
        st.tuples(*(st.sampled_from(list(names)) for names in (PARTS, MODES, LATE)), st.booleans()),
    ),
    max_size=10,
)


def check_pass(model: Any, x: Tensor, part: str, mode: str, change: str) -> None:
    if any(net.recompute for net in model):  # a recomputation has the gates of its own time
        change = ""
    with MODES[mode]():
        check(PARTS[part](model), x, lambda: torch.inference_mode(False)(CHANGES[change])(model))


@pytest.mark.parametrize("examples", [25, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_each_pass_has_the_gates_that_it_began_with(examples: int) -> None:
    settings(max_examples=examples)(given(st.integers(0, 100), events)(check_sequence))()


def check_sequence(seed: int, sequence: list[Any]) -> None:
    model, x = nets(seed)
    with ThreadPoolExecutor(1) as other_thread:
        for event in [*sequence, ("model", "train", "data", False)]:
            if event == "deepcopy":
                model = copy.deepcopy(model)
            elif event == "pickle":
                model = pickle.loads(pickle.dumps(model))
            elif isinstance(event, str):
                EVENTS[event](model)
            elif event[-1]:
                other_thread.submit(check_pass, model, x, *event[:-1]).result()
            else:
                check_pass(model, x, *event[:-1])


@pytest.fixture
def transfers(monkeypatch: Patch) -> list[str]:
    """The readings of gates from a device."""
    found: list[str] = []
    read_gates, read_alone = autograd.read_gates, gate_reader.read_alone
    monkeypatch.setattr(autograd, "read_gates", lambda gates: found.append("pass") or read_gates(gates))
    monkeypatch.setattr(gate_reader, "read_alone", lambda layer: found.append("layer") or read_alone(layer))
    return found


def replicate(model: nn.Module) -> nn.Module:
    """A replica as DataParallel makes it: shallow copies of modules, whose parameters are copied tensors."""
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, child if child is None else replicas[child])
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            setattr(replica, name, value if value is None else value.clone())
    return replicas[model]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "network": network,
    "features": lambda: timm.create_model("test_g_resnext", features_only=True).double(),
    "groupable": lambda: groupable(timm.create_model("test_resnet")).double(),
    "owners inside": lambda: nn.Sequential(nn.Conv2d(3, 8, 1).double(), nets(0)[0]),
    "deepcopy": lambda: copy.deepcopy(network()),
    "pickle": lambda: pickle.loads(pickle.dumps(network())),
    "replica": lambda: replicate(network()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_forward_call_has_one_transfer(name: str, transfers: list[str]) -> None:
    run, x = NETWORKS[name](), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for grad_mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        transfers.clear()
        with grad_mode():
            y = run(x)
        assert transfers == ["pass"]
        if isinstance(y, Tensor) and y.requires_grad:
            y.sum().backward()
            assert transfers == ["pass"]
    if name == "network":
        freeze_groups(run)
        run(x)
        assert transfers == ["pass"] * 2


def test_a_recomputation_has_one_transfer_per_layer(transfers: list[str]) -> None:
    model = network()
    model.set_grad_checkpointing()
    y = model(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert transfers == ["pass"]
    y.sum().backward()
    assert transfers == ["pass"] + ["layer"] * len(layers(model))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["network", "owners inside"])
def test_a_network_compiles_once_and_a_call_has_one_transfer(name: str, training: bool, transfers: list[str]) -> None:
    torch._dynamo.reset()
    model, x = NETWORKS[name](), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.set_grad_enabled(training):
        for _ in range(2):
            compiled(x)
    for _ in range(2):
        transfers.clear()
        with torch.autograd.profiler.profile() as profile, torch.set_grad_enabled(training):
            y = compiled(x)
            if training:
                y.sum().backward()
        readings = [event.name for event in profile.function_events].count("timm_dgconv::read_gates")
        assert readings == HAS_OPERATOR
        assert transfers == ["pass"] * HAS_OPERATOR
        twin: Any = reference(model)
        assert_close(y, twin(x))
        if training:
            wanted = torch.autograd.grad(twin(x).sum(), list(twin.__self__.parameters()))
            assert_close([p.grad for p in model.parameters()], list(wanted))
        model.zero_grad()
        flip(model)
    assert backend.frame_count == 1


@pytest.mark.gpu
def test_a_training_step_on_cuda_has_one_transfer(monkeypatch: Patch) -> None:
    monkeypatch.setattr(gate_reader, "READ_DIRECTLY", {"cpu"})
    model, x = network().float().cuda(), torch.randn(2, 3, 32, 32, device="cuda")
    for _ in range(2):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            model(x).sum().backward()
            torch.cuda.synchronize()
    assert sum(event.count for event in profile.key_averages() if "DtoH" in event.key) == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("change", ["SGD", "Adam", "AdamW", pytest.param("CUDA graph", marks=pytest.mark.gpu)])
def test_gates_that_change_without_a_new_version_are_read(change: str, device: str) -> None:
    model, x = network().to(device), torch.randn(2, 3, 32, 32, dtype=torch.float64, device=device)
    if change == "CUDA graph":
        graph: Any = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            for gate in gates(model):
                gate.neg_()
        step = graph.replay
    else:
        options = {} if change == "SGD" else {"betas": (0.0, 0.0)}
        step = getattr(torch.optim, change)(gates(model), 0.02, fused=True, weight_decay=0.0, **options).step

    def change_gates() -> None:
        for gate in gates(model):
            gate.grad = gate.detach().sign()
        step()

    for _ in range(4):
        before = [gate.signbit() for gate in gates(model)]
        check(model, x, change_gates)
        assert all((gate.signbit() != bits).all() for gate, bits in zip(gates(model), before, strict=True))


def test_gates_that_are_exchanged_during_a_pass_are_read() -> None:
    """As meta-learning does with torch.func.functional_call."""
    model, x = network(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    hook = model.conv1.register_forward_pre_hook(lambda *_: swap(model))
    y = model(x)
    hook.remove()
    assert_close(y, reference(model)(x))


def test_a_network_can_be_transformed() -> None:
    model = network()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().mean())(parameters)
    model(x).square().mean().backward()
    assert_close(list(grads.values()), [p.grad for p in model.parameters()], rtol=1e-9, atol=1e-12)
