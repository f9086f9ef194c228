"""Programs that run a network: torch, torch.compile, ONNX Runtime and OpenVINO.

Each function takes a network in inference mode and example images, and returns a function from images to logits. The
shape of the images is fixed. ONNX Runtime and OpenVINO run on a CPU and are in the extra `measure`.
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

    def call(images: Tensor) -> Any:
        return net(images)

    call.__code__ = call.__code__.replace()  # torch.compile compiles one code object for a few shapes only
    return torch.compile(call, fullgraph=True)


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
    """Convert to OpenVINO, which computes in bfloat16 on processors that have it if no precision is given."""
    import openvino

    config: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    if precision:
        config["INFERENCE_PRECISION_HINT"] = precision
    graph = openvino.convert_model(net, example_input=x, input=list(x.shape))
    model = openvino.compile_model(graph, "CPU", config)
    return lambda images: torch.from_numpy(model(images.numpy())[0])


RUNTIMES: dict[str, Callable[[nn.Module, Tensor], Run]] = {
    "eager": eager,
    "compile": compiled,
    "onnxruntime": onnx_runtime,
    "openvino": openvino,
}
"""The programs by their names in ``timm-dgconv measure``."""
