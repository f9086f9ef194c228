"""Programs that run a network on a CPU: torch, torch.compile, ONNX Runtime, OpenVINO, and int8 with torchao.

Each function takes a network in inference mode and example images, and returns a function from images to logits. The
number of images is fixed. The extra `clients` has the packages.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[Tensor], Tensor]


def eager(net: nn.Module, x: Tensor) -> Run:
    """Return the network."""
    return net


def compiled(net: nn.Module, x: Tensor) -> Run:
    """Use torch.compile."""
    return torch.compile(net)


def onnx_runtime(net: nn.Module, x: Tensor) -> Run:
    """Export to ONNX and run it in ONNX Runtime."""
    import onnxruntime

    program: Any = torch.onnx.export(net, (x,), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options)
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def openvino(net: nn.Module, x: Tensor, precision: str | None = None) -> Run:
    """Convert to OpenVINO, which computes in bfloat16 on processors that have it."""
    import openvino

    config: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    if precision:
        config["INFERENCE_PRECISION_HINT"] = precision
    graph = openvino.convert_model(net, example_input=x, input=list(x.shape))
    model = openvino.compile_model(graph, "CPU", config)
    return lambda images: torch.from_numpy(model(images.numpy())[0])


def openvino_float32(net: nn.Module, x: Tensor) -> Run:
    """Convert to OpenVINO and compute in float32."""
    return openvino(net, x, "f32")


def int8(net: nn.Module, x: Tensor) -> Run:
    """Quantize weights and activations with torchao, calibrated with the example images, for oneDNN's int8 kernels."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared: Any = prepare_pt2e(torch.export.export(net, (x,)).module(), quantizer)
    with torch.no_grad():
        prepared(x)
    quantized: Run = lower_pt2e_quantized_to_x86(convert_pt2e(prepared), (x,))
    return quantized


RUNTIMES = {
    "eager": eager,
    "torch.compile": compiled,
    "onnxruntime": onnx_runtime,
    "openvino": openvino,
    "openvino-float32": openvino_float32,
    "int8": int8,
}
