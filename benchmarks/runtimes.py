"""Programs that run a network on a CPU: those of the package, some of their options, int8, and mobile ones.

The extra `clients` has the packages of the first ones, and the extra `mobile` those of `MOBILE` except TVM.
"""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from timm_dgconv.runtimes import RUNTIMES as OF_THE_PACKAGE
from timm_dgconv.runtimes import Run, compiled, openvino


def frozen(net: nn.Module, x: Tensor) -> Run:
    """Use torch.compile, which treats the weights as constants and stores them as oneDNN reads them ("freezing")."""
    run = compiled(net, x)
    with torch._inductor.config.patch(freezing=True), torch.inference_mode():
        run(x)
    return run


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


def onnxruntime_int8(net: nn.Module, x: Tensor) -> Run:
    """Export to ONNX, and quantize weights and activations with ONNX Runtime, calibrated with the example images."""
    import onnxruntime
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(quantization.CalibrationDataReader):  # type: ignore[misc]
        batches = iter([{"images": x.numpy()}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with TemporaryDirectory() as folder:
        exported, folded, quantized = (f"{folder}/{name}.onnx" for name in ("exported", "folded", "quantized"))
        torch.onnx.export(net, (x,), exported, dynamo=True, input_names=["images"], verbose=False)
        quant_pre_process(exported, folded)
        uint8 = quantization.QuantType.QUInt8
        quantization.quantize_static(folded, quantized, Images(), activation_type=uint8, per_channel=True)
        session = onnxruntime.InferenceSession(quantized, options)
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def nncf(net: nn.Module, x: Tensor) -> Run:
    """Convert to OpenVINO, and quantize weights and activations with NNCF, calibrated with the example images."""
    import nncf
    import openvino

    graph = openvino.convert_model(net, example_input=x, input=list(x.shape))
    config = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    model = openvino.compile_model(nncf.quantize(graph, nncf.Dataset([x.numpy()])), "CPU", config)
    return lambda images: torch.from_numpy(model(images.numpy())[0])


def executorch(net: nn.Module, x: Tensor) -> Run:
    """Convert to ExecuTorch with XNNPACK's kernels. It has a thread for each core that this process may use."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    edge = to_edge_transform_and_lower(torch.export.export(net, (x,)), partitioner=[XnnpackPartitioner()])
    buffer = edge.to_executorch().buffer
    program = Runtime.get().load_program(buffer)
    keep: Any = program.load_method("forward"), program, buffer  # a method keeps neither of them alive
    return lambda images: keep[0].execute([images])[0]


def litert(net: nn.Module, x: Tensor) -> Run:
    """Convert to LiteRT, which has XNNPACK's kernels, too."""
    import litert_torch
    from ai_edge_litert.interpreter import Interpreter

    with TemporaryDirectory() as folder:
        path = Path(folder, "model.tflite")
        litert_torch.convert(net, (x,)).export(str(path))
        interpreter = Interpreter(model_content=path.read_bytes(), num_threads=torch.get_num_threads())
    run = interpreter.get_signature_runner()
    (name,), (output,) = run.get_input_details(), run.get_output_details()
    return lambda images: torch.from_numpy(run(**{name: images.numpy()})[output])


def ncnn(net: nn.Module, x: Tensor, float16: bool = False) -> Run:
    """Convert to ncnn with pnnx. ncnn takes one image at a time."""
    import ncnn
    import pnnx

    network = ncnn.Net()
    network.opt.num_threads = torch.get_num_threads()
    network.opt.use_fp16_storage = float16  # of activations
    with TemporaryDirectory() as folder:
        pnnx.export(net, f"{folder}/model.pt", (x[:1],), fp16=float16)
        network.load_param(f"{folder}/model.ncnn.param")
        network.load_model(f"{folder}/model.ncnn.bin")

    def logits(image: Tensor) -> Tensor:
        with network.create_extractor() as extractor:
            pixels = image.contiguous().numpy()  # ncnn.Mat does not keep it
            extractor.input("in0", ncnn.Mat(pixels))
            return torch.tensor(extractor.extract("out0")[1].numpy())

    return lambda images: torch.stack([logits(image) for image in images])


def ncnn_float16(net: nn.Module, x: Tensor) -> Run:
    """Convert to ncnn with weights and activations in float16, its default."""
    return ncnn(net, x, float16=True)


def iree(net: nn.Module, x: Tensor) -> Run:
    """Compile with IREE for this processor."""
    import iree.compiler
    import iree.runtime
    from iree.turbine import aot

    code = iree.compiler.compile_str(
        str(aot.export(net, x).mlir_module),
        input_type="torch",
        target_backends=["llvm-cpu"],
        extra_args=["--iree-llvmcpu-target-cpu=host"],
    )
    config = iree.runtime.Config("local-sync" if torch.get_num_threads() == 1 else "local-task")
    module: Any = iree.runtime.load_vm_module(iree.runtime.VmModule.copy_buffer(config.vm_instance, code), config)
    return lambda images: torch.from_numpy(module.main(images.numpy()).to_host())


def tvm(net: nn.Module, x: Tensor) -> Run:
    """Compile with TVM for this processor, without a search for fast schedules."""
    import tvm
    from tvm import relax
    from tvm.relax.frontend.torch import from_exported_program

    module = from_exported_program(torch.export.export(net, (x,)))
    machine = relax.VirtualMachine(tvm.compile(module, target="llvm"), tvm.cpu())
    return lambda images: torch.from_numpy(machine["main"](tvm.runtime.tensor(images.numpy()))[0].numpy())


MOBILE = {
    "executorch": executorch,
    "litert": litert,
    "ncnn": ncnn,
    "ncnn-float16": ncnn_float16,
    "iree": iree,
    "tvm": tvm,
}
"""Programs for phones and small devices. Learnable networks are for none of them, except ncnn."""
RUNTIMES = {
    **{"torch.compile" if name == "compile" else name: run for name, run in OF_THE_PACKAGE.items()},
    "torch.compile-freezing": frozen,
    "openvino-float32": partial(openvino, precision="f32"),
    "int8": int8,
    "onnxruntime-int8": onnxruntime_int8,
    "nncf": nncf,
    **MOBILE,
}
