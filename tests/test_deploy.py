"""The form for inference, by timm's own reparameterize_model."""

import copy
import io
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import trained
from timm.layers import BatchNormAct2d, BlurPool2d, FrozenBatchNormAct2d
from timm.utils import reparameterize_model
from torch import nn
from torch.testing import assert_close

from timm_dgconv import DGConv2d

PLAIN = {"Conv2d", "Identity", "ReLU", "MaxPool2d", "AdaptiveAvgPool2d", "Flatten", "Linear"}


def kinds(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules() if not list(module.children())}


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kwargs", "others"),
    [
        ({}, []),
        ({"groups": [4, 1, 8, 2]}, []),
        ({"block_args": {"sort": True}}, []),
        ({"stem_type": "deep", "avg_down": True}, ["AvgPool2d"]),
        ({"stem_type": "deep_tiered", "replace_stem_pool": True, "down_kernel_size": 3}, []),
        ({"block_args": {"attn_layer": "se"}}, ["Sigmoid"]),
        ({"block_args": {"attn_layer": "eca"}}, ["Conv1d", "Sigmoid"]),
        ({"aa_layer": BlurPool2d}, ["BlurPool2d"]),
        ({"act_layer": "prelu"}, ["PReLU"]),
        ({"drop_block_rate": 0.1, "drop_path_rate": 0.1}, ["DropBlock2d", "DropPath"]),
        ({"output_stride": 8}, []),
        ({"block_reduce_first": 2}, []),
        ({"norm_layer": BatchNormAct2d}, []),
        ({"norm_layer": partial(FrozenBatchNormAct2d, apply_act=False)}, []),
        ({"norm_layer": "layernorm2d"}, ["LayerNorm2d"]),
        ({"norm_layer": partial(nn.BatchNorm2d, track_running_stats=False)}, ["BatchNorm2d"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("in_eval", [False, True], ids=["train", "eval"])
def test_is_the_same_function(kwargs: dict[str, Any], others: list[str], in_eval: bool, x: torch.Tensor) -> None:
    model = trained(**kwargs).double().train(not in_eval)
    before = copy.deepcopy(model.state_dict())
    form = reparameterize_model(model).eval()
    assert_close(form(x.double()), model.eval()(x.double()), rtol=1e-10, atol=1e-10)
    assert kinds(form) <= PLAIN | set(others)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    again = reparameterize_model(form)
    assert_close(again(x.double()), form(x.double()), rtol=0, atol=0)


def test_features_only(x: torch.Tensor) -> None:
    model = trained(features_only=True).eval()
    form = reparameterize_model(model)
    assert kinds(form) <= PLAIN
    for ours, theirs in zip(form(x), model(x), strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_norm_with_groups_of_its_own_leaves_the_layer(x: torch.Tensor) -> None:
    model = trained(norm_layer=lambda channels, **kwargs: nn.GroupNorm(4, channels, **kwargs)).eval()
    for conv in (module for module in model.modules() if isinstance(module, DGConv2d)):
        with torch.no_grad():
            conv.gate.copy_(torch.linspace(1, -1, conv.gate.numel()))
    form = reparameterize_model(model)
    assert "DGConv2d" in kinds(form)
    assert_close(form(x), model(x), rtol=1e-5, atol=1e-5)
    for conv in (module for module in model.modules() if isinstance(module, DGConv2d)):
        with torch.no_grad():  # contiguous groups need no permutation
            conv.gate.copy_(torch.linspace(-1, 1, conv.gate.numel()))
    form = reparameterize_model(model)
    assert "DGConv2d" not in kinds(form)
    assert_close(form(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_folded_in_float64(dtype: torch.dtype, x: torch.Tensor) -> None:
    model = trained().eval()
    form = reparameterize_model(model.to(dtype))
    exact = reparameterize_model(model.double())
    for ours, theirs in zip(form.state_dict().values(), exact.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs.to(dtype))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_script_pickle_and_export(x: torch.Tensor) -> None:
    model = trained().eval()
    form = reparameterize_model(model)
    expected = model(x)
    file = io.BytesIO()
    torch.save(form, file)
    file.seek(0)
    batch = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    exported = torch.export.export(form, (x,), dynamic_shapes=batch).module()
    for other in (torch.jit.script(form), torch.load(file, weights_only=False), exported):
        assert_close(other(x), expected, rtol=1e-4, atol=1e-4)
    assert exported(x.repeat(3, 1, 1, 1)).shape[0] == 6
    torch.jit.script(trained())  # with the `fuse` of its stem


def test_onnx_is_plain_convolutions(x: torch.Tensor, tmp_path: Path) -> None:
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        pytest.skip("torch 2.5's exporter")
    import onnx

    form = reparameterize_model(trained()).eval()
    path = tmp_path / "model.onnx"
    torch.onnx.export(form, (x,), path, dynamo=True, verbose=False)
    ops = {node.op_type for node in onnx.load(path).graph.node}
    assert ops <= {"Conv", "Relu", "MaxPool", "Add", "GlobalAveragePool", "ReduceMean", "Gemm", "Flatten", "Reshape"}
    graph = onnx.reference.ReferenceEvaluator(str(path))
    (output,) = graph.run(None, {graph.input_names[0]: x.numpy()})
    assert_close(torch.from_numpy(output), form(x).detach(), rtol=1e-3, atol=1e-3)
