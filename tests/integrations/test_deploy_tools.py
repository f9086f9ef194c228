"""Tools take compact and deployed networks. Those for phones and small devices have one operator per group convolution.

pip install -e ".[test,clients,mobile]" && pytest -m client tests/integrations/test_deploy_tools.py
"""

import importlib
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import Patch, trained
from test_docs import deploy_programs
from timm.utils import reparameterize_model
from torch import nn
from torch.testing import assert_close

from timm_dgconv import compact

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
NETWORKS: dict[str, dict[str, Any]] = {
    "bottlenecks": dict(name="g_resnext50", layers=(1, 1, 1, 1), channels=(32, 64, 64, 64)),
    "unsorted bottlenecks": dict(name="g_resnext50", layers=(1, 1, 1, 1), channels=(32, 64, 64, 64), sort=False),
    "unsorted basic blocks": dict(name="g_resnet18", channels=(16, 32, 64, 128), sort=False),
}
DISTRIBUTIONS = {
    "torch.compile-freezing": "torch",
    "onnxruntime-int8": "onnxruntime",
    "nncf": "nncf",
    "executorch": "executorch",
    "litert": "litert-torch",
    "ncnn": "pnnx",
    "ncnn-float16": "pnnx",
    "iree": "iree-turbine",
    "tvm": "apache-tvm",
}
TOLERANCES = {"ncnn-float16": 5e-3, "onnxruntime-int8": 0.2, "nncf": 0.2}  # of float32: 1e-5


def network(which: str = "bottlenecks") -> nn.Module:
    return trained(**NETWORKS[which], num_classes=10, zero_init_last=False).eval()


def images(count: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def groups(model: nn.Module) -> list[int]:
    """The numbers of groups of the convolutions that have more than one."""
    found = [module.groups for module in model.modules() if isinstance(module, nn.Conv2d) and module.groups > 1]
    assert found
    return found


@pytest.fixture
def runtimes(monkeypatch: Patch) -> dict[str, Callable[..., Any]]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("runtimes").RUNTIMES


def cases(distributions: dict[str, str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.client(client), id=name) for name, client in distributions.items()]


@pytest.mark.parametrize("which", list(NETWORKS))
@pytest.mark.parametrize("form", [compact, reparameterize_model])
@pytest.mark.parametrize("runtime", cases(DISTRIBUTIONS))
def test_a_tool_computes_the_same(
    runtime: str, form: Callable[[nn.Module], nn.Module], which: str, runtimes: dict[str, Callable[..., Any]]
) -> None:
    model, x = network(which), images(2)
    run = runtimes[runtime](form(model).eval(), x)
    with torch.inference_mode():
        expected = model(x)
        outputs = run(x)
    assert_close(outputs, expected, rtol=0, atol=TOLERANCES.get(runtime, 1e-5) * expected.abs().max().item())


@pytest.mark.parametrize(
    "runtime", cases({name: DISTRIBUTIONS[name] for name in ("executorch", "litert", "iree", "tvm")})
)
def test_an_error_names_an_operator_that_reads_gates(runtime: str, runtimes: dict[str, Callable[..., Any]]) -> None:
    with pytest.raises(Exception, match="__xor__" if runtime == "iree" else "signbit"):
        runtimes[runtime](network(), images())


@pytest.mark.client("executorch")
def test_executorch_delegates_the_whole_network() -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    exported = torch.export.export(compact(network()), (images(),))
    graph = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).exported_program().graph
    called = [getattr(node.target, "__name__", "") for node in graph.nodes if node.op == "call_function"]
    assert called == ["executorch_call_delegate", "getitem"]


@pytest.mark.client("litert-torch")
def test_litert_has_one_convolution_per_layer_in_two_delegates() -> None:
    import litert_torch
    from ai_edge_litert.interpreter import Interpreter

    model = compact(network())
    litert_torch.convert(model, (images(),)).export("model.tflite")
    interpreter = Interpreter("model.tflite")
    interpreter.allocate_tensors()
    called = Counter(operator["op_name"] for operator in interpreter._get_ops_details())
    assert called["CONV_2D"] == sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert called["DELEGATE"] == 2  # before and after the padding of the max pooling


@pytest.mark.client("pnnx")
def test_ncnn_has_one_layer_per_group_convolution() -> None:
    import pnnx

    model = compact(network())
    pnnx.export(model, "model.pt", (images(),))
    lines = Path("model.ncnn.param").read_text().splitlines()
    found = [int(re.findall(r" 7=(\d+)", line)[0]) for line in lines if line.startswith("ConvolutionDepthWise")]
    assert found == groups(model)
    pnnx.export(network(), "learnable.pt", (images(),))
    assert "ConvolutionDepthWise" not in Path("learnable.ncnn.param").read_text()
    assert Path("learnable.ncnn.bin").stat().st_size > 1.5 * Path("model.ncnn.bin").stat().st_size


@pytest.mark.client("coremltools")
def test_core_ml_has_one_convolution_per_layer() -> None:
    import coremltools

    def convert(model: nn.Module) -> Any:
        exported = torch.export.export(model, (images(),)).run_decompositions({})
        return coremltools.convert(exported, skip_model_load=True)

    model = compact(network())
    operators = convert(model)._mil_program.functions["main"].operations
    found = [int(operator.groups.val) for operator in operators if operator.op_type == "conv"]
    assert [number for number in found if number > 1] == groups(model)
    with pytest.raises(NotImplementedError, match="signbit"):
        convert(network())


@pytest.mark.client("iree-turbine")
def test_iree_has_one_operation_per_group_convolution() -> None:
    import iree.compiler
    import iree.turbine.aot

    model = compact(network())
    graph = iree.compiler.compile_str(
        str(iree.turbine.aot.export(model, images()).mlir_module),
        input_type="torch",
        target_backends=["llvm-cpu"],
        extra_args=["--compile-to=input"],
    )
    found = Counter(re.findall(r"linalg\.(conv\w+)", graph.decode()))
    assert found["conv_2d_ngchw_gfchw"] == len(groups(model))


@pytest.mark.client("apache-tvm")
def test_tvm_has_one_convolution_per_layer() -> None:
    from tvm.relax.frontend.torch import from_exported_program

    model = compact(network())
    text = from_exported_program(torch.export.export(model, (images(),))).script()
    found = [int(number) for number in re.findall(r"conv2d\(.*?groups=(\d+)", text)]
    assert [number for number in found if number > 1] == groups(model)


PROGRAMS = {name: DISTRIBUTIONS[name] for name in ("executorch", "ncnn", "iree", "tvm")}
PROGRAMS |= {"litert_torch": "litert-torch", "coremltools": "coremltools"}


@pytest.mark.parametrize("tool", cases(PROGRAMS))
def test_the_program_of_the_page_computes_the_same(tool: str, monkeypatch: Patch) -> None:
    small = partial(timm.create_model, layers=(1, 1, 1, 1), channels=(32, 64, 64, 64), zero_init_last=False)
    monkeypatch.setattr(timm, "create_model", small)
    names: dict[str, Any] = {}
    programs = deploy_programs()
    for name in ("timm", "torch", tool):
        exec(compile(programs[name], name, "exec"), names)
    if tool == "coremltools":
        assert Path("g_resnext50.mlpackage").exists()
    else:
        outputs = torch.as_tensor(names["outputs"])
        expected = names["model"](names["images"]).detach()[: None if outputs.ndim == 2 else 1].reshape_as(outputs)
        assert_close(outputs, expected, rtol=0, atol=5e-3 * expected.abs().max().item())
