"""Quantizers, pruners and adapters of other libraries, on the learnable, the compact and the deployed form.

docs/libraries.md has the table of what they do.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import Patch
from test_clients import FORMS, images, in_form
from torch import Tensor, nn

from timm_dgconv import DGConv2d, compact, groupable

FIXED = FORMS[1:]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def convs(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def assert_near(found: Any, expected: Tensor) -> None:
    """int8 is near: the largest difference is below a fifth of the largest logit."""
    assert (torch.as_tensor(found) - expected).abs().max() < 0.2 * expected.abs().max()


@pytest.mark.client("onnxruntime")
@pytest.mark.parametrize("form", FORMS)
def test_onnx_runtime_quantizes_all_convolutions(form: str, tmp_path: Path) -> None:
    import onnx
    import onnxruntime
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        batches = iter([{"images": images(64).numpy()}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    model = in_form(form)
    paths = [str(tmp_path / name) for name in ("model.onnx", "folded.onnx", "int8.onnx")]
    torch.onnx.export(model, (images(64),), paths[0], dynamo=True, input_names=["images"], verbose=False)
    quant_pre_process(*paths[:2])
    quantization.quantize_static(*paths[1:], Reader(), activation_type=quantization.QuantType.QUInt8, per_channel=True)
    nodes = onnx.load(paths[2]).graph.node
    makers = {output: node.op_type for node in nodes for output in node.output}
    inputs = [makers.get(name) for node in nodes if node.op_type == "Conv" for name in node.input[:2]]
    assert inputs == 2 * len(convs(model)) * ["DequantizeLinear"]
    session = onnxruntime.InferenceSession(paths[2], providers=["CPUExecutionProvider"])
    assert_near(session.run(None, {"images": images(64).numpy()})[0], model(images(64)))


def source(node: Any, number: int) -> Any:
    """The node of OpenVINO that computes an input of a node, before it is pooled, scaled or reshaped."""
    maker = node.input_value(number).get_node()
    passing = ("Convert", "MaxPool", "Multiply", "Reshape", "Subtract")
    return source(maker, 0) if maker.get_type_name() in passing else maker


@pytest.mark.client("nncf")
@pytest.mark.parametrize("form", FIXED)
def test_nncf_quantizes_all_convolutions_for_openvino(form: str) -> None:
    import nncf
    import openvino

    model = in_form(form)
    network = openvino.convert_model(model, example_input=images(64))
    int8 = nncf.quantize(network, nncf.Dataset([images(64).numpy()]))
    layers = [node for node in int8.get_ordered_ops() if "Convolution" in node.get_type_name()]
    assert len(layers) == len(convs(model))
    assert {source(layer, 0).get_type_name() for layer in layers} == {"FakeQuantize"}
    assert {source(layer, 1).get_element_type() for layer in layers} == {openvino.Type.i8}
    run = openvino.compile_model(int8, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert_near(run(images(64).numpy())[0], model(images(64)))


@pytest.mark.client("torchao")
@pytest.mark.parametrize("form", FORMS)
def test_torchao_quantizes_forms_whose_weights_are_parameters(form: str) -> None:
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    model = in_form(form)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    graph = torch.export.export(model, (images(64),)).module()
    if form == "learnable":
        with pytest.raises(ValueError, match="Expected get_attr node"):
            prepare_pt2e(graph, quantizer)
        return
    prepared = prepare_pt2e(graph, quantizer)
    with torch.no_grad():
        prepared(images(64))
        int8 = convert_pt2e(prepared)
        assert_near(int8(images(64)), model(images(64)))
    nodes = [node for node in int8.graph.nodes if "conv2d" in str(node.target)]
    assert len(nodes) == len(convs(model))
    assert all("dequantize" in str(arg.target) for node in nodes for arg in node.args[:2])


@pytest.mark.client("nvidia-modelopt")
@pytest.mark.parametrize("form", FORMS)
def test_modelopt_quantizes_convolutions_without_gates(form: str) -> None:
    import modelopt.torch.quantization as mtq

    model = in_form(form)
    int8 = mtq.quantize(copy.deepcopy(model), mtq.INT8_DEFAULT_CFG, lambda net: net(images(64)))
    assert [hasattr(conv, "weight_quantizer") for conv in convs(int8)] == [
        not isinstance(conv, DGConv2d) for conv in convs(model)
    ]
    assert_near(int8(images(64)), model(images(64)))


def prune(model: nn.Module, **kwargs: Any) -> nn.Module:
    import torch_pruning as tp

    importance = tp.importance.MagnitudeImportance()
    pruner = tp.pruner.BasePruner(model, images(64), importance, ignored_layers=[model.fc], **kwargs)
    pruner.step()
    return model


@pytest.mark.client("torch-pruning")
def test_torch_pruning_cannot_prune_the_learnable_form() -> None:
    with pytest.raises(RuntimeError, match=r"channels must not be changed .*groupable"):
        prune(in_form("learnable"), pruning_ratio=0.25)(images(64))


@pytest.mark.client("torch-pruning")
def test_a_pruned_network_learns_groups() -> None:
    torch.manual_seed(0)
    model = prune(timm.create_model("resnet18", num_classes=4), pruning_ratio=0.25, round_to=16).eval()
    expected = model(images(64))
    learnable = groupable(model)
    assert {conv.in_channels for conv in convs(learnable) if isinstance(conv, DGConv2d)} == {48, 96, 192, 384}
    torch.testing.assert_close(learnable(images(64)), expected, rtol=1e-3, atol=1e-4)
    learnable(images(64)).sum().backward()
    torch.testing.assert_close(compact(learnable)(images(64)), expected, rtol=1e-3, atol=1e-4)


KINDS = ["LoraConfig", "LoHaConfig", "LoKrConfig", "AdaLoraConfig", "IA3Config", "OFTConfig", "BOFTConfig", "HRAConfig"]


@pytest.mark.client("peft")
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_with_gates_takes_no_adapter(kind: str) -> None:
    import peft

    kwargs: dict[str, Any] = {
        "AdaLoraConfig": {"total_step": 10},
        "IA3Config": {"feedforward_modules": []},
        "OFTConfig": {"oft_block_size": 0, "r": 4},
    }.get(kind, {})
    with pytest.raises(TypeError, match="takes no adapter"):
        peft.get_peft_model(in_form("learnable"), getattr(peft, kind)(target_modules=["conv2"], **kwargs))


@pytest.mark.client("ultralytics")
def test_a_network_of_ultralytics_learns_groups_and_is_fused(monkeypatch: Patch) -> None:
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    from ultralytics import YOLO

    torch.manual_seed(0)
    model = YOLO("yolov8n.yaml").model.eval()
    expected = model(images(64))[0]
    groupable(model, lambda name, conv: conv.kernel_size == (3, 3) and conv.in_channels > 3)
    torch.testing.assert_close(model(images(64))[0], expected, rtol=1e-3, atol=1e-3)
    for conv in convs(model):
        if isinstance(conv, DGConv2d):
            conv.reset_gate(2)
    expected = model(images(64))[0]
    for form in (model, compact(model)):
        torch.testing.assert_close(
            copy.deepcopy(form).fuse(verbose=False)(images(64))[0], expected, rtol=1e-3, atol=1e-3
        )
