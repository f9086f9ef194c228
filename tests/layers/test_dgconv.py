"""DGConv2d as a torch module."""

import copy
import io
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx.reference
import pytest
import torch
from conftest import DEVICES, conv_with, run_ranks
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from timm_dgconv import DGConv2d
from timm_dgconv.layers import grouping
from timm_dgconv.layers.dgconv import PRETRAINED_GATE

jit_is_deprecated = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning"
)


@pytest.mark.parametrize("channels", [(16, 16), (32, 16), (12, 20), (6, 10)])
def test_is_a_group_convolution(channels: tuple[int, int]) -> None:
    conv = DGConv2d(*channels, 3, stride=2, padding=1, sort=True)
    assert conv.gate.shape == (grouping.num_bits(*channels),)
    fixed = nn.Conv2d(*channels, 3, stride=2, padding=1, groups=conv.num_groups)
    with torch.no_grad():
        fixed.weight.copy_(grouping.group_blocks(conv.weight, conv.num_groups).flatten(0, 1))
        fixed.bias.copy_(conv.bias)
    x = torch.randn(2, channels[0], 5, 4)
    assert_close(conv(x), fixed(x))


def test_initial_gates_come_from_the_generator() -> None:
    torch.manual_seed(1)
    first = DGConv2d(1024, 1024, 1, bias=False).gate
    torch.manual_seed(1)
    assert torch.equal(DGConv2d(1024, 1024, 1, bias=False).gate, first)
    assert (first.abs() == 1e-8).all()
    many = torch.stack([DGConv2d(16, 16, 1).gate for _ in range(200)])
    assert 0.4 < float((many > 0).float().mean()) < 0.6


def test_meta_device() -> None:
    conv = DGConv2d(8, 8, 3, device="meta", dtype=torch.bfloat16)
    assert conv.gate.is_meta
    assert conv.gate.dtype == torch.bfloat16
    assert conv(torch.empty(1, 8, 5, 5, device="meta", dtype=torch.bfloat16)).shape == (1, 8, 3, 3)
    conv = conv.to_empty(device="cpu")
    conv.reset_parameters()
    assert conv.connectivity().shape == (8, 8)


def test_unbatched_and_string_padding() -> None:
    conv = DGConv2d(8, 8, 3, padding="same")
    x = torch.randn(8, 5, 5)
    assert_close(conv(x), conv(x[None])[0])
    assert conv(x).shape == x.shape


def test_copies() -> None:
    conv = conv_with("0011", sort=True)
    other = DGConv2d(16, 16, 3, sort=True)
    other.load_state_dict(conv.state_dict())
    file = io.BytesIO()
    torch.save(conv, file)
    file.seek(0)
    x = torch.randn(1, 16, 4, 4)
    for copied in [other, copy.deepcopy(conv), pickle.loads(pickle.dumps(conv)), torch.load(file, weights_only=False)]:
        assert torch.equal(copied(x), conv(x))
        assert copied.num_groups == conv.num_groups == 4
        assert repr(copied) == "DGConv2d(16, 16, kernel_size=(3, 3), stride=(1, 1), sort=True)"


def test_unpickled_in_a_process_without_training(tmp_path: Path) -> None:
    """A layer alone loads no training code and registers no hooks of optimizers."""
    (tmp_path / "conv.pickle").write_bytes(pickle.dumps(conv_with("0011")))
    script = """
        import pickle, sys
        with open("conv.pickle", "rb") as file:
            assert pickle.load(file).num_groups == 4
        used = {name.split(".")[1] for name in sys.modules if name.startswith("timm_dgconv.")}
        assert used == {"_autoload", "_compat", "layers"}, used
        from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
        assert not _global_optimizer_pre_hooks
        assert not _global_optimizer_post_hooks
    """
    subprocess.run([sys.executable, "-c", f"if True:{script}"], cwd=tmp_path, check=True)


SHARDED = """
    import pytest
    from torch import nn
    from torch.distributed.fsdp import FullyShardedDataParallel
    from timm_dgconv import DGConv2d

    use_orig_params = args[0] == "True"
    torch.manual_seed(0)
    # 2 * (16 * 16 + 2) parameters: each process has two of the four gates.
    halved = nn.Sequential(DGConv2d(16, 16, 1, bias=False), nn.Conv2d(16, 16, 1, bias=False))
    # The gates come last: process 1 has all of them.
    whole = nn.Sequential(DGConv2d(16, 16, 1))
    for model, owners in ((halved, []), (whole, [1] if use_orig_params else [])):
        conv, x = model[0], torch.randn(2, 16, 3, 3)
        groups, y = conv.num_groups, model(x)
        sharded = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        for _ in range(2):
            if rank in owners:
                assert conv.num_groups == groups
            else:
                with pytest.raises(RuntimeError, match=r"summon_full_params\\(model\\).*fully_shard"):
                    print(f"rank {rank}: {conv.num_groups} groups, expected {groups}")
            with FullyShardedDataParallel.summon_full_params(sharded):
                assert conv.num_groups == groups
            output = sharded(x)
            torch.testing.assert_close(output, y)
            output.sum().backward()
"""


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_gates_that_fsdp_has_sharded(use_orig_params: bool, tmp_path: Path) -> None:
    """Only a process that holds all gates of a layer knows its number of groups."""
    run_ranks(tmp_path, SHARDED, str(use_orig_params))


# Dtypes.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_dtypes(device: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    conv = conv_with("0011", padding=1).to(device, dtype, memory_format=memory_format)
    x = torch.randn(2, 16, 6, 6).to(device, dtype).to(memory_format=memory_format).requires_grad_()
    y = conv(x)
    y.backward(torch.ones_like(y))
    assert y.dtype == conv.weight.grad.dtype == conv.gate.grad.dtype == x.grad.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    reference = copy.deepcopy(conv).double().cpu()
    reference.zero_grad()
    expected = reference(x.detach().double().cpu())
    expected.sum().backward()
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 3e-2)
    for value, wanted in [
        (y, expected),
        (conv.weight.grad, reference.weight.grad),
        (conv.gate.grad, reference.gate.grad),
    ]:
        assert_close(value.double().cpu(), wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


@pytest.mark.parametrize("gate", [(1, 1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, -1), (-1, -1, -1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_output_can_be_changed_in_place(gate: tuple[int, ...], memory_format: torch.memory_format) -> None:
    conv = DGConv2d(8, 8, 3)
    with torch.no_grad():
        conv.gate.copy_(torch.tensor(gate))
    x = torch.randn(2, 8, 5, 5).to(memory_format=memory_format)
    grads = []
    for inplace in (False, True):
        y = nn.ReLU(inplace)(conv(x))
        grads.append(torch.autograd.grad(y.square().sum(), list(conv.parameters())))
    assert_close(grads[1], grads[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device: str, dtype: torch.dtype) -> None:
    conv = conv_with("0011", padding=1).to(device)
    x = torch.randn(2, 16, 6, 6, device=device)
    with torch.autocast(device, dtype):
        y = conv(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert conv.gate.grad.dtype == torch.float32
    assert_close(y.float(), conv.masked_dense(x), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_and_back_keeps_the_groups(dtype: torch.dtype) -> None:
    conv = DGConv2d(64, 64, 1)
    before, closed = conv.connectivity(), conv.closed
    for layer in (conv.to(dtype), conv.float()):
        assert torch.equal(layer.connectivity().float(), before)
        assert layer.closed == closed


# Graphs.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sort", [False, True])
def test_compile(device: str, sort: bool) -> None:
    conv = conv_with("0011", padding=1, sort=sort).to(device)
    x = torch.randn(2, 16, 6, 6, device=device, requires_grad=True)
    compiled = torch.compile(conv, fullgraph=True)
    grads = []
    for layer in (conv, compiled):
        conv.zero_grad()
        x.grad = None
        layer(x).square().sum().backward()
        grads.append([x.grad, conv.weight.grad, conv.bias.grad, conv.gate.grad])
    assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        conv.gate.neg_()  # the gates are data, not a part of the graph
    assert_close(compiled(x), conv(x), rtol=1e-3, atol=1e-3)


@jit_is_deprecated
@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("how", ["script", "trace", "fx", "fx+script", "export"])
def test_graphs(how: str, sort: bool) -> None:
    conv = conv_with("0011", padding=1, sort=sort)
    x = torch.randn(2, 16, 6, 6)
    if how == "script":
        graph = torch.jit.script(conv)
    elif how == "trace":
        graph = torch.jit.trace(conv, x)
    elif how == "fx":
        graph = torch.fx.symbolic_trace(conv)
        assert [n.target for n in graph.graph.nodes if n.op == "call_function"].count(grouping.connectivity) == 1
    elif how == "fx+script":
        graph = torch.jit.script(torch.fx.symbolic_trace(conv))
    else:
        graph = torch.export.export(conv, (x,)).module()
    assert_close(graph(x), conv(x))
    if how != "export":  # there parameters are copies
        with torch.no_grad():
            conv.gate.neg_()
        assert_close(graph(x), conv(x))
        graph(x).sum().backward()
        assert conv.gate.grad is not None


@jit_is_deprecated
def test_saved_graphs() -> None:
    conv = conv_with("0011", padding=1)
    x = torch.randn(2, 16, 6, 6)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(conv), file)
    file.seek(0)
    assert_close(torch.jit.load(file)(x), conv(x))
    file = io.BytesIO()
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.export.save(torch.export.export(conv, (x,), dynamic_shapes={"input": {0: batch}}), file)
    file.seek(0)
    graph = torch.export.load(file).module()
    assert_close(graph(x), conv(x))
    assert graph(x.repeat(3, 1, 1, 1)).shape[0] == 6


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_onnx(dynamo: bool, dtype: torch.dtype, sort: bool, tmp_path: Path) -> None:
    """ONNX has no operation that reads the sign bit, and in half precision these gates are +-0.0."""
    if dynamo and torch.__version__ < (2, 6):
        pytest.skip("its exporter wants another onnxscript")
    conv = conv_with("11", 12, 20, padding=1, sort=sort).to(dtype).eval()
    with torch.no_grad():
        conv.gate[0].neg_()
    x, path = torch.randn(2, 12, 6, 6).to(dtype), tmp_path / "conv.onnx"

    def output() -> Tensor:
        torch.onnx.export(conv, (x,), path, dynamo=dynamo)
        graph = onnx.reference.ReferenceEvaluator(str(path))
        return torch.from_numpy(graph.run(None, {graph.input_names[0]: x.numpy()})[0])

    assert_close(output(), conv(x).detach(), rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        conv.gate[1] = math.nan
    assert output().isnan().all()


# State dicts.


def test_loads_the_format_of_the_original_release() -> None:
    conv = DGConv2d(16, 16, 3)
    gate, weight = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.randn(16, 16, 3, 3)
    state_dict = {
        "conv.weight": weight,
        "conv.bias": torch.randn(16),
        "gate": gate,
        "D": torch.eye(2),
        "I": torch.ones(2, 2),
    }
    conv.load_state_dict(state_dict)
    assert torch.equal(conv.weight, weight)
    assert torch.equal(conv.gate, gate)
    assert set(state_dict) == {"conv.weight", "conv.bias", "gate", "D", "I"}, "the caller's dict stays as it is"
    assert set(conv.state_dict()) == {"weight", "bias", "gate"}


@given(st.sampled_from([(16, 16), (48, 96), (24, 8)]), st.integers(0, 3), st.booleans(), st.integers(0, 2**31))
def test_loads_a_group_convolution(channels: tuple[int, int], closed: int, sort: bool, seed: int) -> None:
    torch.manual_seed(seed)
    fixed = nn.Conv2d(*channels, 3, groups=2**closed)
    conv = DGConv2d(*channels, 3, sort=sort)
    fresh = conv.weight.detach().clone()
    conv.load_state_dict(fixed.state_dict())
    assert conv.num_groups == 2**closed
    outside = conv.connectivity() == 0
    assert torch.equal(conv.weight[outside], fresh[outside])
    assert (conv.gate.abs() == PRETRAINED_GATE).all()
    x = torch.randn(1, channels[0], 5, 5)
    assert_close(conv(x), fixed(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"gate": torch.zeros(5)}, r"0: the checkpoint has 5 gates of shape \(5,\), expected 4 for 16 -> 16 channels"),
        ({"gate": "open"}, r'"0\.gate".*expected torch\.Tensor'),
        ({"gate": None, "weight": None}, r'"0\.weight".*expected torch\.Tensor'),
        ({"bias": torch.zeros(3)}, r"size mismatch for 0\.bias"),
        ({"more": torch.zeros(3)}, r'Unexpected key\(s\) in state_dict: "0\.more"'),
    ],
    ids=["length of gate", "gate", "weight", "bias", "unexpected"],
)
def test_refuses_state_dicts(change: dict[str, Any], why: str) -> None:
    model = nn.Sequential(DGConv2d(16, 16, 3))
    state_dict = {**model.state_dict(), **{f"0.{name}": value for name, value in change.items()}}
    with pytest.raises(RuntimeError, match=rf"(?s)Error\(s\) in loading state_dict for Sequential.*{why}"):
        model.load_state_dict(state_dict)


# Bad input.


@pytest.mark.parametrize(("args", "named"), [((3, 3), "in_channels=3"), ((16, 15), "out_channels=15")])
def test_refuses_odd_channels(args: tuple[int, int], named: str) -> None:
    with pytest.raises(ValueError, match=rf"{named}.*even"):
        DGConv2d(*args, 3)


def test_refuses_groups() -> None:
    with pytest.raises(TypeError, match=r"groups=32.*torch.nn.Conv2d"):
        DGConv2d(64, 64, 3, groups=32)
    with pytest.raises(TypeError, match="positional"):
        DGConv2d(64, 64, 3, 1, 1, 1, 32)  # the position of groups in torch.nn.Conv2d


def attempt(function: Callable[[], Tensor]) -> Any:
    """The dtype of the result, or the type of the error."""
    try:
        return function().dtype
    except RuntimeError as error:
        return type(error)


FLOAT = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("weight", FLOAT, ids=str)
@pytest.mark.parametrize("dtype", [*FLOAT, torch.int64, torch.uint8, torch.bool, torch.cfloat], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_mixed_dtypes_are_torchs_error(dtype: torch.dtype, weight: torch.dtype, autocast: bool) -> None:
    conv, plain = DGConv2d(4, 4, 3, dtype=weight), nn.Conv2d(4, 4, 3, dtype=weight)
    x = torch.ones(1, 4, 5, 5).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert attempt(lambda: conv(x)) == attempt(lambda: plain(x))


@pytest.mark.parametrize("shape", [(4,), (4, 5), (1, 1, 4, 5, 5), (1, 3, 5, 5), (1, 8, 5, 5), (0, 5, 5)])
def test_wrong_shapes_are_torchs_error(shape: tuple[int, ...]) -> None:
    for layer in (nn.Conv2d(4, 4, 3), DGConv2d(4, 4, 3)):
        with pytest.raises(RuntimeError):
            layer(torch.ones(shape))
