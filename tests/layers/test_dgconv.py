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
from conftest import DEVICES, FORMS, conv_with, forms, jit_is_deprecated, own_forward, run_ranks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from timm_dgconv import DGConv2d, compact, groupable, skipped_convs
from timm_dgconv.ops import algebra, grouped, naive


@pytest.mark.parametrize("channels", [(16, 16), (32, 16), (12, 20), (6, 10)])
def test_a_layer_is_a_group_convolution(channels: tuple[int, int]) -> None:
    conv = DGConv2d(*channels, 3, stride=2, padding=1)
    assert conv.gate.shape == (algebra.num_bits(*channels),)
    fixed = nn.Conv2d(*channels, 3, stride=2, padding=1, groups=conv.num_groups)
    with torch.no_grad():
        fixed.weight.copy_(grouped.diagonal_blocks(conv.weight, conv.num_groups).flatten(0, 1))
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


def test_a_layer_on_the_meta_device_has_shapes_and_no_groups() -> None:
    conv = DGConv2d(8, 8, 3, device="meta", dtype=torch.bfloat16)
    assert conv.gate.is_meta
    assert conv.gate.dtype == torch.bfloat16
    assert conv(torch.empty(1, 8, 5, 5, device="meta", dtype=torch.bfloat16)).shape == (1, 8, 3, 3)
    with pytest.raises(RuntimeError, match="on the meta device and have no values; load weights first"):
        conv.num_groups  # noqa: B018
    conv = conv.to_empty(device="cpu")
    conv.reset_parameters()
    assert conv.connectivity().shape == (8, 8)


def test_an_image_without_a_batch() -> None:
    conv = DGConv2d(8, 8, 3, padding="same")
    x = torch.randn(8, 5, 5)
    assert_close(conv(x), conv(x[None])[0])
    assert conv(x).shape == x.shape


REPR = "DGConv2d(16, 16, kernel_size=(3, 3), stride=(1, 1){})"


@pytest.mark.parametrize(("form", "shown"), [(FORMS[0], ""), (FORMS[1], ", nested=False"), (FORMS[2], ", sort=False")])
def test_copies_have_the_groups_and_the_form_of_the_layer(form: dict[str, Any], shown: str) -> None:
    conv = conv_with("0011", **form)
    other = DGConv2d(16, 16, 3, nested=conv.nested)
    other.load_state_dict(conv.state_dict())
    file = io.BytesIO()
    torch.save(conv, file)
    file.seek(0)
    x = torch.randn(1, 16, 4, 4)
    for copied in [other, copy.deepcopy(conv), pickle.loads(pickle.dumps(conv)), torch.load(file, weights_only=False)]:
        assert torch.equal(copied(x), conv(x))
        assert copied.num_groups == conv.num_groups == 4
        assert repr(copied) == REPR.format(shown)
        assert [name for name, _ in copied.named_parameters()] == [name for name, _ in conv.named_parameters()]


def test_a_layer_alone_loads_no_training_code(tmp_path: Path) -> None:
    (tmp_path / "conv.pickle").write_bytes(pickle.dumps(conv_with("0011")))
    script = """
        import pickle, sys
        with open("conv.pickle", "rb") as file:
            assert pickle.load(file).num_groups == 4
        used = {name.split(".")[1] for name in sys.modules if name.startswith("timm_dgconv.")}
        assert used == {"_autoload", "_compat", "layers", "ops"}, used
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
    # Of 2 * (16 * 16 + 2) parameters, each process has two of the four gates.
    halved = nn.Sequential(DGConv2d(16, 16, 1, bias=False), nn.Conv2d(16, 16, 1, bias=False))
    whole = nn.Sequential(DGConv2d(16, 16, 1))  # the gates come last: process 1 has all of them
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
def test_gates_that_fsdp_has_sharded_are_not_guessed(use_orig_params: bool, tmp_path: Path) -> None:
    """Only a process that holds all gates of a layer knows its number of groups."""
    run_ranks(tmp_path, SHARDED, str(use_orig_params))


# Forms


@forms
def test_the_name_of_the_gates_says_how_they_are_read(form: dict[str, Any]) -> None:
    conv = DGConv2d(16, 16, 3, **form)
    name = "sorted_gate" if conv.sort else "unsorted_gate"
    assert [n for n, _ in conv.named_parameters()] == ["weight", "bias", name]
    assert conv.gate is conv.get_parameter(name)
    with pytest.raises((AttributeError, KeyError)):  # not another parameter that nothing reads
        conv.gate = nn.Parameter(torch.zeros(4))  # type: ignore[misc]
    gate, sort = conv.gate, conv.sort
    for other in (not sort, not sort, sort):
        conv.set_sort(other)
        assert conv.gate is gate
        assert list(conv.state_dict()) == ["weight", "bias", "sorted_gate" if other else "unsorted_gate"]


@forms
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("closed", ["0000", "1100", "0101", "1011", "1111"])
def test_a_layer_becomes_a_plain_convolution(
    closed: str, memory_format: torch.memory_format, form: dict[str, Any]
) -> None:
    conv = conv_with(closed, 48, 16, padding="same", padding_mode="circular", dtype=torch.float64, **form)
    conv = conv.to(memory_format=memory_format).eval()
    conv.weight.requires_grad_(False)
    conv.register_forward_hook(lambda module, args, output: 2 * output)
    x = torch.randn(2, 48, 5, 4, dtype=torch.float64)
    before = {name: value.clone() for name, value in conv.state_dict().items()}
    for small in (conv.to_group_conv(), conv.fuse(), compact(conv)):
        assert type(small) is nn.Conv2d
        assert_close(small(x), conv(x))
        assert small.groups == (conv.num_groups if conv.sort else 2 ** [*closed, "0"].index("0"))
        assert small.weight.numel() == conv.weight.numel() // small.groups
        assert small.weight.is_contiguous(memory_format=memory_format)
        assert small.weight.untyped_storage().data_ptr() != conv.weight.untyped_storage().data_ptr()
        assert (small.weight.requires_grad, small.bias.requires_grad, small.training) == (False, True, False)
        assert vars(small).keys() == vars(nn.Conv2d(2, 2, 1)).keys()
    assert_close(conv.state_dict(), before)


def test_a_layer_becomes_a_convolution_with_any_number_of_groups() -> None:
    conv = DGConv2d(12, 24, 3, device="meta")
    assert conv.to_group_conv(6).weight.shape == (24, 2, 3, 3)
    with pytest.raises(ValueError, match="groups=5 does not divide the 12 -> 24 channels"):
        conv.to_group_conv(5)


@pytest.mark.parametrize("groups", [None, 1, 8, 16])
def test_gates_are_initialised_with_a_number_of_groups(groups: int | None) -> None:
    conv = DGConv2d(16, 16, 3)
    conv.reset_gate(groups)
    assert groups is None or conv.num_groups == groups
    assert set(conv.gate.abs().tolist()) == {float(torch.tensor(1e-8 if groups is None else 0.01))}
    for wrong in (3, 32, 0):
        with pytest.raises(ValueError, match=f"groups={wrong} must be a power of two and at most 16"):
            conv.reset_gate(wrong)


# Dtypes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_results_have_the_dtype_and_format_of_the_input(
    device: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_and_back_keeps_the_groups(dtype: torch.dtype) -> None:
    conv = DGConv2d(64, 64, 1)
    before, closed = conv.connectivity(), conv.closed
    for layer in (conv.to(dtype), conv.float()):
        assert torch.equal(layer.connectivity().float(), before)
        assert layer.closed == closed


# Graphs


@pytest.mark.parametrize("device", DEVICES)
@forms
def test_compiled_gates_are_data(device: str, form: dict[str, Any]) -> None:
    torch._dynamo.reset()
    conv = conv_with("0011", padding=1, **form).to(device)
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
@forms
@pytest.mark.parametrize("how", ["script", "trace", "fx", "fx+script"])
def test_gates_are_data_in_graphs(how: str, form: dict[str, Any]) -> None:
    conv, x = conv_with("0011", padding=1, **form), torch.randn(2, 16, 6, 6)
    graph = torch.fx.symbolic_trace(conv) if "fx" in how else conv
    if how == "fx":
        assert [n.target for n in graph.graph.nodes if n.op == "call_function"].count(naive.connectivity) == 1
    if "script" in how:
        graph = torch.jit.script(graph)
    elif how == "trace":
        graph = torch.jit.trace(conv, x)
    assert_close(graph(x), conv(x))
    with torch.no_grad():
        conv.gate.neg_()
    assert_close(graph(x), conv(x))
    graph(x).sum().backward()
    assert conv.gate.grad is not None


@jit_is_deprecated
@forms
@pytest.mark.parametrize("package", [torch.jit, torch.export])
def test_saved_graphs_compute_the_same(package: Any, form: dict[str, Any]) -> None:
    conv, x, file = conv_with("0011", padding=1, **form), torch.randn(2, 16, 6, 6), io.BytesIO()
    batch = {"input": {0: torch.export.Dim("batch", min=1, max=64)}}
    is_script = package is torch.jit
    package.save(torch.jit.script(conv) if is_script else torch.export.export(conv, (x,), dynamic_shapes=batch), file)
    file.seek(0)
    graph = package.load(file) if is_script else package.load(file).module()
    for images in (x, x.repeat(3, 1, 1, 1)):
        assert_close(graph(images), conv(images))


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*instance-level annotations"
)
@pytest.mark.parametrize(
    ("dynamo", "dtype", "form"),
    [
        (True, torch.float16, {}),
        pytest.param(True, torch.float32, {"sort": False}, marks=pytest.mark.slow),
        *((False, dtype, form) for dtype in (torch.float32, torch.float16) for form in FORMS),
    ],
    ids=str,
)
def test_onnx_reads_the_sign_bit(dynamo: bool, dtype: torch.dtype, form: dict[str, Any], tmp_path: Path) -> None:
    """ONNX has no operation that reads the sign bit, and in half precision these gates are +-0.0."""
    if dynamo and torch.__version__ < (2, 6):
        pytest.skip("its exporter wants another onnxscript")
    conv = conv_with("11", 12, 20, padding=1, **form).to(dtype).eval()
    with torch.no_grad():
        conv.gate[0].neg_()
    x, path = torch.randn(2, 12, 6, 6).to(dtype), tmp_path / "conv.onnx"

    def output() -> Tensor:
        torch.onnx.export(conv, (x,), path, dynamo=dynamo)
        graph = onnx.reference.ReferenceEvaluator(str(path))
        return torch.from_numpy(graph.run(None, {graph.input_names[0]: x.numpy()})[0])

    assert_close(output(), conv(x).detach(), rtol=1e-2, atol=1e-2)
    if not dynamo:
        with torch.no_grad():
            conv.gate[1] = math.nan
        assert output().isnan().all()


# What users change


@forms
@pytest.mark.parametrize("when", ["constructed", "set later", "constructed, then compact", "compact, then set"])
@pytest.mark.parametrize("padding", [(2, 1), "same"])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_mode_holds_whenever_it_is_set(mode: str, padding: Any, when: str, form: dict[str, Any]) -> None:
    torch.manual_seed(0)
    given = {"padding_mode": mode} if when.startswith("constructed") else {}
    conv = conv_with("0110", padding=padding, **given, **form).double()
    unpadded = DGConv2d(16, 16, 3, dtype=torch.float64, **form)
    unpadded.load_state_dict(conv.state_dict())
    layer = compact(conv) if "compact" in when else conv
    if "set" in when:
        layer.padding_mode = mode  # type: ignore[assignment]
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    height, width = (1, 1) if padding == "same" else padding
    y, expected = layer(x), unpadded.masked_dense(F.pad(x, (width, width, height, height), mode))
    assert_close(y, expected)
    if layer is conv:
        y.square().sum().backward()
        expected.square().sum().backward()
        assert_close([p.grad for p in conv.parameters()], [p.grad for p in unpadded.parameters()])


USES: list[Callable[[DGConv2d], Any]] = [
    lambda conv: conv.num_groups,
    lambda conv: conv(torch.randn(1, conv.in_channels, 5, 5)),
]


@forms
@pytest.mark.parametrize("use", USES, ids=["num_groups", "forward"])
@pytest.mark.parametrize("channels", [8, 12, 16])  # 16 of 48 channels have as many gates
@pytest.mark.parametrize("side", ["input", "output"])
def test_a_layer_whose_channels_were_changed_under_it_says_so(
    side: str, channels: int, use: Callable[[DGConv2d], Any], form: dict[str, Any]
) -> None:
    conv = conv_with("0110", 48, 48, **form)
    if side == "input":
        conv.in_channels, conv.weight = channels, nn.Parameter(conv.weight.detach()[:, :channels].clone())
    else:
        conv.out_channels, conv.weight = channels, nn.Parameter(conv.weight.detach()[:channels].clone())
        conv.bias = nn.Parameter(conv.bias.detach()[:channels].clone())
    with pytest.raises((RuntimeError, ValueError), match="channels") as error:
        use(conv)
    assert "FullyShardedDataParallel" not in str(error.value)


def own_conv_forward(conv: Any) -> None:
    """Users let pictures repeat so: torch.nn.Conv2d calls this method with its weight."""
    convolve = conv._conv_forward
    conv._conv_forward = lambda input, weight, bias: 2 * convolve(input, weight, bias)


@forms
@pytest.mark.parametrize("change", [own_forward, own_conv_forward])
def test_a_convolution_with_a_forward_of_its_own_is_not_converted(
    change: Callable[[nn.Conv2d], None], form: dict[str, Any]
) -> None:
    model: Any = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))).double()
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    change(model[0])
    expected = model(x)
    assert skipped_convs(model) == {"0": "it has a forward pass of its own"}
    with pytest.raises(ValueError, match="`where` chooses 0"):
        groupable(model, where=lambda name, conv: True, **form)
    groupable(model, **form)
    assert [type(conv) for conv in model] == [nn.Conv2d, DGConv2d]
    assert_close(model(x), expected)


RESIZE: dict[str, Callable[[Tensor], Any]] = {
    "larger": lambda grad: grad.resize_(2 * grad.numel()),
    "released": lambda grad: grad.untyped_storage().resize_(0),  # as FullyShardedDataParallel does
}


@forms
@pytest.mark.parametrize("change", RESIZE)
def test_the_memory_of_a_gradient_can_be_resized(change: str, form: dict[str, Any]) -> None:
    conv, x = conv_with("111100", 64, 64, **form), torch.randn(2, 64, 5, 5)
    for _ in range(2):
        conv.zero_grad()
        conv(x).square().sum().backward()
        first = conv.weight.grad.clone()
        RESIZE[change](conv.weight.grad)
    conv.zero_grad()
    conv(x).square().sum().backward()
    assert_close(conv.weight.grad, first)


# Bad input


def test_a_fixed_number_of_groups_is_refused() -> None:
    with pytest.raises(TypeError, match=r"groups=32.*torch.nn.Conv2d"):
        DGConv2d(64, 64, 3, groups=32)
    with pytest.raises(TypeError, match="positional"):
        DGConv2d(64, 64, 3, 1, 1, 1, 32)  # the position of groups in torch.nn.Conv2d


def dtype_of_output(layer: nn.Module, x: Tensor) -> Any:
    """The dtype of the output, or the type of the error."""
    try:
        return layer(x).dtype
    except RuntimeError as error:
        return type(error)


@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64, torch.cfloat], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_mixed_dtypes_are_torchs_error(dtype: torch.dtype, weight: torch.dtype, autocast: bool) -> None:
    conv, plain = DGConv2d(4, 4, 3, dtype=weight), nn.Conv2d(4, 4, 3, dtype=weight)
    x = torch.ones(1, 4, 5, 5).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert dtype_of_output(conv, x) == dtype_of_output(plain, x)


@pytest.mark.parametrize("shape", [(4,), (4, 5), (1, 1, 4, 5, 5), (1, 3, 5, 5), (1, 8, 5, 5), (0, 5, 5)])
def test_wrong_shapes_are_torchs_error(shape: tuple[int, ...]) -> None:
    for layer in (nn.Conv2d(4, 4, 3), DGConv2d(4, 4, 3)):
        with pytest.raises(RuntimeError):
            layer(torch.ones(shape))


@jit_is_deprecated
@forms
def test_a_scripted_layer_validates_in_inference_mode_after_a_training_step(form: dict[str, Any]) -> None:
    """train.py --torchscript does. Layers of one configuration share compiled code, so this one has its own."""
    conv = torch.jit.script(DGConv2d(24, 40, 5, **form))
    x = torch.randn(1, 24, 6, 6)
    conv(x).sum().backward()
    with torch.inference_mode():
        y = conv(x)
    assert_close(y, conv(x).detach())
