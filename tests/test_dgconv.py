"""DGConv2d as a torch module."""

import copy
import io
import pickle
from pathlib import Path

import onnx
import onnx.reference
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import timm_dgconv
from timm_dgconv import DGConv2d

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
    ),
]


def conv_with(num_open: int = 2, in_channels: int = 16, out_channels: int = 16, **kwargs: object) -> DGConv2d:
    conv = DGConv2d(in_channels, out_channels, 3, padding=1, **kwargs)
    with torch.no_grad():
        conv.gate.fill_(-1e-8)[:num_open] = 1e-8
    return conv


def masked(conv: DGConv2d, x: torch.Tensor) -> torch.Tensor:
    """What the layer computes, by a plain dense convolution."""
    weight = conv.weight * conv.connectivity().detach()[:, :, None, None]
    return nn.functional.conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation)


@pytest.mark.parametrize("channels", [(16, 16), (32, 16), (12, 20), (6, 10)])
def test_other_channel_counts(channels: tuple[int, int]) -> None:
    conv = conv_with(1, *channels)
    x = torch.randn(2, channels[0], 5, 4)
    assert_close(conv(x), masked(conv, x))
    assert conv.gate.shape == (timm_dgconv.grouping.num_bits(*channels),)


def test_is_a_group_convolution() -> None:
    conv = conv_with(2, 16, 16, sort=True)
    fixed = nn.Conv2d(16, 16, 3, padding=1, groups=conv.num_groups)
    with torch.no_grad():
        for group, block in enumerate(fixed.weight.chunk(conv.num_groups)):
            block.copy_(conv.weight[group * 4 : group * 4 + 4, group * 4 : group * 4 + 4])
        fixed.bias.copy_(conv.bias)
    x = torch.randn(2, 16, 5, 5)
    assert_close(conv(x), fixed(x))


def test_initial_gates_come_from_the_generator() -> None:
    torch.manual_seed(1)
    first = DGConv2d(1024, 1024, 1, bias=False).gate
    torch.manual_seed(1)
    assert torch.equal(DGConv2d(1024, 1024, 1, bias=False).gate, first)
    assert (first.abs() == 1e-8).all()
    many = torch.stack([DGConv2d(16, 16, 1).gate for _ in range(200)])
    assert 0.4 < float((many > 0).float().mean()) < 0.6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_dtypes(device: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    conv = conv_with(2).to(device, dtype, memory_format=memory_format)
    x = torch.randn(2, 16, 6, 6).to(device, dtype).to(memory_format=memory_format).requires_grad_()
    y = conv(x)
    y.backward(torch.ones_like(y))
    assert y.dtype == conv.weight.grad.dtype == conv.gate.grad.dtype == x.grad.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    reference = copy.deepcopy(conv).double().cpu()
    reference.zero_grad()
    expected = reference(x.detach().double().cpu())
    expected.backward(torch.ones_like(expected))
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 3e-2)
    for value, wanted in [
        (y, expected),
        (conv.weight.grad, reference.weight.grad),
        (conv.gate.grad, reference.gate.grad),
    ]:
        assert_close(value.double().cpu(), wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device: str, dtype: torch.dtype) -> None:
    conv = conv_with(2).to(device)
    x = torch.randn(2, 16, 6, 6, device=device)
    with torch.autocast(device, dtype):
        y = conv(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert conv.gate.grad.dtype == torch.float32
    assert_close(y.float(), masked(conv, x), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_and_back_keeps_the_connectivity(dtype: torch.dtype) -> None:
    conv = DGConv2d(64, 64, 1)
    before = conv.connectivity()
    assert torch.equal(conv.to(dtype).connectivity().float(), before)
    assert torch.equal(conv.float().connectivity(), before)


def test_copies() -> None:
    conv = conv_with(2, sort=True)
    other = DGConv2d(16, 16, 3, padding=1, sort=True)
    other.load_state_dict(conv.state_dict())
    file = io.BytesIO()
    torch.save(conv, file)
    file.seek(0)
    x = torch.randn(1, 16, 4, 4)
    for copied in [other, copy.deepcopy(conv), pickle.loads(pickle.dumps(conv)), torch.load(file, weights_only=False)]:
        assert torch.equal(copied(x), conv(x))
        assert copied.num_groups == conv.num_groups == 4
    assert set(conv.state_dict()) == {"weight", "bias", "gate"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sort", [False, True])
def test_compile(device: str, sort: bool) -> None:
    conv = conv_with(2, sort=sort).to(device)
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
        conv.gate.neg_()  # the open set is data, not part of the graph
    assert_close(compiled(x), conv(x), rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("how", ["script", "trace", "fx", "fx+script", "export"])
def test_graphs(how: str, sort: bool) -> None:
    conv = conv_with(2, sort=sort)
    x = torch.randn(2, 16, 6, 6)
    if how == "script":
        graph = torch.jit.script(conv)
    elif how == "trace":
        graph = torch.jit.trace(conv, x)
    elif how == "fx":
        graph = torch.fx.symbolic_trace(conv)
        assert [n.target for n in graph.graph.nodes if n.op == "call_function"].count(
            timm_dgconv.grouping.connectivity
        ) == 1
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


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_script_and_export_survive_a_file() -> None:
    conv = conv_with(2)
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
    """Its operations have no sign bit; in half precision these gates are +-0.0."""
    if dynamo and torch.__version__ < (2, 6):
        pytest.skip("its exporter wants another onnxscript")
    conv = conv_with(2, 12, 20, sort=sort).to(dtype).eval()
    with torch.no_grad():
        conv.gate[0].neg_()
    x, path = torch.randn(2, 12, 6, 6).to(dtype), tmp_path / "conv.onnx"
    torch.onnx.export(conv, (x,), path, dynamo=dynamo)
    graph = onnx.reference.ReferenceEvaluator(str(path))
    (output,) = graph.run(None, {graph.input_names[0]: x.numpy()})
    assert_close(torch.from_numpy(output), conv(x).detach(), rtol=1e-2, atol=1e-2)

    with torch.no_grad():
        conv.gate[1] = float("nan")
    torch.onnx.export(conv, (x,), path, dynamo=dynamo)
    graph = onnx.reference.ReferenceEvaluator(str(path))
    (output,) = graph.run(None, {graph.input_names[0]: x.numpy()})
    assert torch.from_numpy(output).isnan().all()


def test_meta_device_and_dtype() -> None:
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


def test_complexity_of_a_model() -> None:
    model = nn.Sequential(conv_with(2), nn.ReLU(), conv_with(3), nn.Conv2d(16, 16, 1))
    total = timm_dgconv.complexity(model)
    assert total.item() == 2**6 + 2**7
    total.backward()
    assert_close(model[2].gate.grad, torch.full((4,), 2**7 * torch.log(torch.tensor(2.0)).item()))
    assert timm_dgconv.complexity(model.half()).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_no_host_transfer_in_eval() -> None:
    conv = conv_with(2).cuda().eval()
    x = torch.randn(2, 16, 6, 6, device="cuda")
    with torch.inference_mode():
        conv(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            conv(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


class TestBadInput:
    @pytest.mark.parametrize(("args", "named"), [((3, 3), "in_channels=3"), ((16, 15), "out_channels=15")])
    def test_odd_channels(self, args: tuple[int, int], named: str) -> None:
        with pytest.raises(ValueError, match=rf"{named}.*even"):
            DGConv2d(*args, 3)

    def test_groups(self) -> None:
        with pytest.raises(TypeError, match=r"groups=32.*torch.nn.Conv2d"):
            DGConv2d(64, 64, 3, groups=32)

    def test_other_arguments(self) -> None:
        with pytest.raises(TypeError, match="padding_mode='reflect'"):
            DGConv2d(64, 64, 3, padding_mode="reflect")

    def test_gate_of_the_wrong_length(self) -> None:
        state_dict = DGConv2d(32, 32, 3).state_dict()
        model = nn.Sequential(DGConv2d(16, 16, 3))
        state_dict["weight"] = torch.zeros(16, 16, 3, 3)
        state_dict["bias"] = torch.zeros(16)
        with pytest.raises(RuntimeError, match=r"0: the checkpoint has 5 gates.*expected 4"):
            model.load_state_dict({f"0.{key}": value for key, value in state_dict.items()})

    def test_model_without_dgconv(self) -> None:
        with pytest.raises(ValueError, match="Sequential has no DGConv2d"):
            timm_dgconv.complexity(nn.Sequential(nn.Conv2d(2, 2, 1)))
