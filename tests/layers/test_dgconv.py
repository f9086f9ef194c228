"""DGConv2d as a torch module."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx.reference
import pytest
import torch
from conftest import FORMS, attempt, conv_with, forms, jit_is_deprecated, run_ranks
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.testing import assert_close

from timm_dgconv import DGConv2d, compact, groupable
from timm_dgconv.layers.checkpoints import GATE_NAMES
from timm_dgconv.ops import naive


def saved(module: Any, package: Any, **kwargs: Any) -> Any:
    file = io.BytesIO()
    package.save(module, file)
    file.seek(0)
    return package.load(file, **kwargs)


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


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    "options",
    [
        {"padding": "same"},
        {"padding": "same", "padding_mode": "circular"},
        {"stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)},
    ],
    ids=str,
)
def test_a_layer_has_the_geometry_of_torchs_convolution(options: dict[str, Any]) -> None:
    plain, conv = nn.Conv2d(8, 8, (2, 4), groups=2, **options), DGConv2d(8, 8, (2, 4), **options)
    conv.load_state_dict(plain.state_dict())
    x = torch.randn(2, 8, 9, 10)
    for layer in (conv, conv.masked_dense, conv.to_group_conv()):
        assert_close(layer(x), plain(x))
    assert_close(conv(x[0]), plain(x[0]))  # an image without a batch


REPR = "DGConv2d(16, 16, kernel_size=(3, 3), stride=(1, 1){})"


@pytest.mark.parametrize(("form", "shown"), [(FORMS[0], ""), (FORMS[1], ", nested=False"), (FORMS[2], ", sort=False")])
def test_copies_have_the_groups_and_the_form_of_the_layer(form: dict[str, Any], shown: str) -> None:
    conv = conv_with("0011", **form)
    other = DGConv2d(16, 16, 3, nested=conv.nested)
    other.load_state_dict(conv.state_dict())
    x = torch.randn(1, 16, 4, 4)
    stored = saved(conv, torch, weights_only=False)
    for copied in (other, copy.deepcopy(conv), pickle.loads(pickle.dumps(conv)), stored):
        assert torch.equal(copied(x), conv(x))
        assert copied.num_groups == conv.num_groups == 4
        assert repr(copied) == REPR.format(shown)
        assert [name for name, _ in copied.named_parameters()] == [name for name, _ in conv.named_parameters()]


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
def test_a_layer_becomes_a_plain_convolution(closed: str, memory_format: Any, form: dict[str, Any]) -> None:
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
    assert DGConv2d(12, 24, 3, device="meta").to_group_conv(6).weight.shape == (24, 2, 3, 3)
    for inputs, outputs, groups in ((12, 24, 8), (24, 12, 8), (12, 24, 0)):
        with pytest.raises(ValueError, match=f"groups={groups} does not divide the {inputs} -> {outputs} channels"):
            DGConv2d(inputs, outputs, 3, device="meta").to_group_conv(groups)


@pytest.mark.parametrize("groups", [None, 1, 8, 16])
def test_gates_are_initialised_with_a_number_of_groups(groups: int | None) -> None:
    conv = DGConv2d(16, 16, 3)
    conv.reset_gate(groups)
    assert groups is None or conv.num_groups == groups
    assert set(conv.gate.abs().tolist()) == {float(torch.tensor(1e-8 if groups is None else 0.01))}
    for wrong in (3, 32, 0):
        with pytest.raises(ValueError, match=f"groups={wrong} must be a power of two and at most 16"):
            conv.reset_gate(wrong)


@forms
def test_output_can_be_changed_in_place(form: dict[str, Any]) -> None:
    conv, x = conv_with("0011", **form), torch.randn(2, 16, 5, 5)
    grads = [
        torch.autograd.grad(nn.ReLU(inplace)(conv(x)).square().sum(), list(conv.parameters()))
        for inplace in (False, True)
    ]
    assert_close(*grads)


BATCH = {"input": {0: torch.export.Dim("batch", min=1, max=64)}}
GRAPHS: dict[str, Callable[[DGConv2d, Tensor], Any]] = {
    "script": lambda conv, x: torch.jit.script(conv),
    "saved script": lambda conv, x: saved(torch.jit.script(conv), torch.jit),
    "trace": torch.jit.trace,
    "fx": lambda conv, x: torch.fx.symbolic_trace(conv),
    "fx and script": lambda conv, x: torch.jit.script(torch.fx.symbolic_trace(conv)),
    "export": lambda conv, x: saved(torch.export.export(conv, (x,), dynamic_shapes=BATCH), torch.export).module(),
}


@jit_is_deprecated
@forms
@pytest.mark.parametrize("how", GRAPHS)
def test_gates_are_data_in_graphs(how: str, form: dict[str, Any]) -> None:
    """They flip, learn, and show that a training has diverged."""
    conv, x = conv_with("0011", padding=1, **form), torch.randn(2, 16, 6, 6)
    graph = GRAPHS[how](conv, x)
    gate = dict(graph.named_parameters())[GATE_NAMES[conv.sort]]
    if how == "fx":
        assert [n.target for n in graph.graph.nodes if n.op == "call_function"].count(naive.connectivity) == 1
    for closed in (torch.tensor([False, False, True, True]), torch.tensor([True, False, True, False])):
        with torch.no_grad():
            for values in (conv.gate, gate):
                values.copy_(torch.where(closed, -0.5, 0.5))
        for images in (x, x.repeat(3, 1, 1, 1)):
            assert_close(graph(images), conv(images))
    graph(x).sum().backward()
    assert gate.grad is not None
    for place in (0, 3):
        with torch.no_grad():
            gate.fill_(0.5)[place] = math.nan
        assert graph(x).isnan().all()


@forms
def test_gates_are_data_for_make_fx(form: dict[str, Any]) -> None:
    conv, x = conv_with("0011", padding=1, **form), torch.randn(2, 16, 6, 6)
    graph = make_fx(conv)(x)
    conv.reset_gate(8)
    assert_close(graph(x), conv(x))


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
    conv = conv_with("111", 24, 40, padding=1, **form).to(dtype).eval()
    with torch.no_grad():
        conv.gate[0].neg_()
    x, path = torch.randn(2, 24, 6, 6).to(dtype), tmp_path / "conv.onnx"

    def output() -> Tensor:
        torch.onnx.export(conv, (x,), path, dynamo=dynamo)
        graph = onnx.reference.ReferenceEvaluator(str(path))
        return torch.from_numpy(graph.run(None, {graph.input_names[0]: x.numpy()})[0])

    assert_close(output(), conv(x).detach(), rtol=1e-2, atol=1e-2)
    if not dynamo:
        with torch.no_grad():
            conv.gate[1] = math.nan
        assert output().isnan().all()


@forms
@pytest.mark.parametrize("padding", [(2, 1), "same"])
def test_padding_mode_holds_if_it_is_set_later(padding: Any, form: dict[str, Any]) -> None:
    conv = conv_with("0110", padding=padding, dtype=torch.float64, **form)
    x, (height, width) = torch.randn(2, 16, 6, 6, dtype=torch.float64), (1, 1) if padding == "same" else padding
    outputs = []
    for layer in (conv, compact(conv)):
        layer.padding_mode = "reflect"  # type: ignore[assignment]
        outputs.append(layer(x))
    conv.padding, conv.padding_mode = (0, 0), "zeros"
    assert_close(outputs, 2 * [conv(F.pad(x, (width, width, height, height), "reflect"))])


USES: dict[str, Callable[[Any, Tensor], Any]] = {
    "num_groups": lambda model, x: model[0].num_groups,
    "forward": lambda model, x: model(x),
    "export": lambda model, x: torch.export.export(model, (x,)),
    "compile": lambda model, x: torch.compile(model, backend="eager")(x),
    "fx": lambda model, x: torch.fx.symbolic_trace(model),
    "compact": lambda model, x: compact(model),
}


@forms
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 48), (48, 16), (16, 16)])
def test_a_layer_with_pruned_channels_is_refused(inputs: int, outputs: int, use: str, form: dict[str, Any]) -> None:
    """16 channels have as many gates as 48, and the code of a channel is another one."""
    conv = conv_with("0110", 48, 48, **form)
    conv.in_channels, conv.weight = inputs, nn.Parameter(conv.weight.detach()[:outputs, :inputs].clone())
    conv.out_channels, conv.bias = outputs, nn.Parameter(conv.bias.detach()[:outputs].clone())
    said = rf"shape \({outputs}, {inputs}, 3, 3\), .* 48 -> 48 channels; .*groupable"
    with pytest.raises(RuntimeError, match=f"{said}|Observed exception"):  # torch.export of torch 2.5 hides a message
        USES[use](nn.Sequential(conv), torch.randn(1, inputs, 5, 5))


def test_a_fixed_number_of_groups_is_refused() -> None:
    with pytest.raises(TypeError, match=r"groups=32.*torch.nn.Conv2d"):
        DGConv2d(64, 64, 3, groups=32)
    with pytest.raises(TypeError, match="positional"):
        DGConv2d(64, 64, 3, 1, 1, 1, 32)  # the position of groups in torch.nn.Conv2d


@pytest.mark.parametrize(("name", "value"), [("sort", "false"), ("nested", "false"), ("sort", 2), ("nested", None)])
def test_a_form_is_chosen_with_bools(name: str, value: Any) -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3))
    for build in (lambda **form: DGConv2d(16, 16, 3, **form), lambda **form: groupable(model, **form)):
        with pytest.raises(TypeError, match=f"{name}={value!r} is not a bool; use True or False"):
            build(**{name: value})
    assert type(model[0]) is nn.Conv2d
    assert DGConv2d(16, 16, 3, sort=0).sort is False  # type: ignore[arg-type] # as on a command line


@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64, torch.cfloat], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_mixed_dtypes_are_torchs_error(dtype: torch.dtype, weight: torch.dtype, autocast: bool) -> None:
    conv, plain = DGConv2d(4, 4, 3, dtype=weight), nn.Conv2d(4, 4, 3, dtype=weight)
    x = torch.ones(1, 4, 5, 5).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert attempt(lambda: conv(x).dtype) == attempt(lambda: plain(x).dtype)


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


def test_a_layer_takes_no_adapter() -> None:
    adapter = nn.Module()
    with pytest.raises(TypeError, match="takes no adapter"):
        adapter.base_layer = DGConv2d(8, 8, 3)
    adapter.base_layer = DGConv2d(8, 8, 3).to_group_conv()
