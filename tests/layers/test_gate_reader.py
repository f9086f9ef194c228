"""Gates on the host: which are closed, and how often they are read from a device."""

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import DEVICES, conv_with, gates, run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from timm_dgconv import DGConv2d, freeze_groups
from timm_dgconv.layers import gate_cache


@pytest.mark.usefixtures("gate_reads")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_sign_bit_closes_a_gate(dtype: torch.dtype) -> None:
    gate = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-45, -1e-8], dtype=dtype)
    assert gate_cache.closed_on_host(gate) == (False, True, False, True, False, True)


def test_gates_on_the_meta_device() -> None:
    with pytest.raises(RuntimeError, match="on the meta device and have no values; load weights first"):
        DGConv2d(8, 8, 1, device="meta").num_groups  # noqa: B018


def test_inference_tensors() -> None:
    conv = conv_with("0011")
    with torch.inference_mode():
        conv.gate = nn.Parameter(-conv.gate)
        assert conv.closed == (True, True, False, False)
        conv.gate.neg_()
        assert conv.closed == (False, False, True, True)


# Changes of gates, most of which leave the version as it is.


def network(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_g_resnext", num_classes=3, zero_init_last=False, **kwargs).eval()
    with torch.no_grad():
        for gate in gates(model):
            gate.copy_(torch.where(torch.rand_like(gate) < 0.5, -0.01, 0.01))
    return model


def step(opt: Callable[..., torch.optim.Optimizer]) -> Callable[[nn.Module], None]:
    """A step of an optimizer that flips about half of the gates."""

    def change(model: nn.Module) -> None:
        for gate in gates(model):
            gate.grad = torch.randn_like(gate)
        opt(gates(model), lr=0.02).step()

    return change


def data(edit: Callable[[Tensor], Any]) -> Callable[[nn.Module], None]:
    return lambda model: [edit(gate.data) for gate in gates(model)] and None


def numpy(model: nn.Module) -> None:
    """Change the memory, as operators do that do not declare their mutations."""
    for gate in gates(model):
        gate.detach().numpy()[:] *= -1


def load(model: nn.Module) -> None:
    model.load_state_dict(
        {name: -value if name.endswith("gate") else value for name, value in model.state_dict().items()}
    )


def swap(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, DGConv2d):
            layer.gate = nn.Parameter(-layer.gate.detach())


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "SGD": step(torch.optim.SGD),
    **{
        f"fused {opt.__name__}": step(lambda params, lr, opt=opt: opt(params, lr=lr, fused=True))
        for opt in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
    },
    "data.copy_": data(lambda gate: gate.copy_(torch.randn_like(gate))),
    "data.neg_": data(Tensor.neg_),
    "numpy": numpy,
    "load_state_dict": load,
    "another parameter": swap,
    "train and eval": lambda model: model.train().eval() and None,
    "half and float": lambda model: model.half().float() and None,
}


@pytest.fixture
def as_cuda() -> Iterator[None]:
    """Let the CPU behave as CUDA does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate_cache, "READ_DIRECTLY", set())
        yield


def check(model: nn.Module, x: Tensor) -> None:
    """Compare the output with the output of the masked dense form."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, DGConv2d)]
    y = model(x)
    for layer in layers:
        layer.forward = layer.masked_dense
    expected = model(x)
    for layer in layers:
        del layer.forward
    assert_close(y, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))


@pytest.mark.usefixtures("as_cuda")
@pytest.mark.parametrize("change", list(CHANGES))
def test_a_forward_pass_sees_changed_gates(change: str) -> None:
    model, x = network(), torch.randn(2, 3, 32, 32)
    check(model, x)
    for _ in range(3):
        CHANGES[change](model)
        check(model, x)
        with torch.no_grad():
            check(model, x)


sequences = st.lists(st.sampled_from([*CHANGES, "forward", "backward", "no_grad", "copy", "pickle"]), max_size=8)


def check_sequence(names: list[str]) -> None:
    model, x = network(), torch.randn(2, 3, 32, 32)
    for name in [*names, "forward"]:
        if name in CHANGES:
            CHANGES[name](model)
        elif name == "copy":
            model = copy.deepcopy(model)
        elif name == "pickle":
            model = pickle.loads(pickle.dumps(model))
        elif name == "backward":
            model(x).sum().backward()
        else:
            with torch.set_grad_enabled(name == "forward"):
                check(model, x)


@pytest.mark.usefixtures("as_cuda")
@settings(max_examples=25)
@given(sequences)
def test_sequences_of_changes(names: list[str]) -> None:
    check_sequence(names)


@pytest.mark.slow
@pytest.mark.usefixtures("as_cuda")
@settings(max_examples=1000)
@given(sequences)
def test_sequences_of_changes_more(names: list[str]) -> None:
    check_sequence(names)


def test_collectives_change_gates(tmp_path: Path) -> None:
    run_ranks(
        tmp_path,
        """
        import timm
        from torch.distributed.optim import ZeroRedundancyOptimizer
        from timm_dgconv import DGConv2d
        from timm_dgconv.layers import gate_cache

        gate_cache.READ_DIRECTLY.clear()
        torch.manual_seed(rank)
        model = torch.nn.Sequential(*(DGConv2d(16, 16, 1, dtype=torch.float64) for _ in range(3)))
        gate_cache.share_reader(model)
        x = torch.randn(2, 16, 3, 3, dtype=torch.float64)

        def check():
            expected = x
            for layer in model:
                expected = layer.masked_dense(expected)
            torch.testing.assert_close(model(x), expected)

        check()
        for layer in model:
            dist.broadcast(layer.gate.data, 0)
        check()
        for layer in model:
            dist.all_reduce(layer.gate.data.mul_(rank - 0.2))
        check()
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1.0, fused=True)
        for _ in range(5):
            model(x).sum().backward()
            optimizer.step()
            check()
        """,
    )


# Transfers.


@pytest.fixture
def reads(as_cuda: None, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors that were read from the device."""
    found: list[Tensor] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: found.append(self) or tolist(self))
    return found


@pytest.mark.parametrize(
    ("kwargs", "per_step"),
    [({}, 1), ({"complexity_weight": 0.1}, 1), ({"complexity_target": 0.1}, 2)],
    ids=["free", "weight", "target"],
)
def test_transfers_per_training_step(kwargs: dict[str, Any], per_step: int, reads: list[Tensor]) -> None:
    model, x = network(**kwargs), torch.randn(2, 3, 32, 32)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=True)
    for step in range(4):
        reads.clear()
        model(x).square().sum().backward()
        optimizer.step()
        assert len(reads) == per_step or step == 0  # with a target the first step reads the gates before it, too
    with torch.inference_mode():
        reads.clear()
        model(x)
        assert len(reads) == 1


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_transfers_of_copies(make: Callable[[nn.Module], nn.Module], reads: list[Tensor]) -> None:
    model, x = network(), torch.randn(2, 3, 32, 32)
    other = make(model)
    other(x)  # the layers meet
    for _ in range(2):
        for each in (model, other):
            reads.clear()
            each(x)
            assert len(reads) == 1


def test_transfers_of_features(reads: list[Tensor]) -> None:
    model, x = timm.create_model("test_g_resnext", features_only=True), torch.randn(2, 3, 32, 32)
    for _ in range(2):
        reads.clear()
        model(x)
        assert len(reads) == 1


def test_frozen_gates_are_read_once(reads: list[Tensor]) -> None:
    model, x = network(), torch.randn(2, 3, 32, 32)
    freeze_groups(model)
    model(x)
    reads.clear()
    model(x).sum().backward()
    model(x)
    assert not reads
    with torch.no_grad():
        gates(model)[1].neg_()
    check(model, x)
    gates(model)[1].data.neg_()
    model.layer1[0].conv2.gate_reader.clear()
    check(model, x)


def test_replicas_read_the_gates_of_the_original(reads: list[Tensor]) -> None:
    """Modules as DataParallel makes them: shallow copies, whose parameters are copied tensors."""
    for model in (network(), copy.deepcopy(network())):
        layers = [module for module in model.modules() if isinstance(module, DGConv2d)]
        replicas = [layer._replicate_for_data_parallel() for layer in layers]
        for layer, replica in zip(layers, replicas, strict=True):
            for name in ("weight", "gate"):
                setattr(replica, name, getattr(layer, name).clone())
            replica.bias = None
        inputs = [torch.randn(1, layer.in_channels, 5, 5) for layer in layers]
        for layer, x in zip(layers, inputs, strict=True):
            layer(x)
        reads.clear()
        for layer, replica, x in zip(layers, replicas, inputs, strict=True):
            assert_close(replica(x), layer.masked_dense(x))
        assert len(reads) == 1


@pytest.mark.parametrize("device", DEVICES[1:])
def test_frozen_gates_need_no_transfer_on_cuda(device: str) -> None:
    model, x = network().to(device), torch.randn(2, 3, 32, 32, device=device)
    freeze_groups(model)
    model(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            model(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
