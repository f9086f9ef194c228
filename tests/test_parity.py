"""The numbers of the original release, in float64 and on CUDA also in lower precision."""

import json
from typing import Any

import pytest
import timm
import torch
from conftest import Vectors, original_state_dict, uniform
from torch import Tensor, nn
from torch.testing import assert_close

import timm_dgconv
from timm_dgconv import DGConv2d

TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}
NUM_CASES = 8


def _case(parity: Vectors, case: int) -> tuple[dict[str, Any], dict[str, Tensor], DGConv2d]:
    """The options of a layer, the tensors that are known of it, and the layer."""
    tensors, metadata = parity("dgconv2d")
    spec = json.loads(metadata["cases"])[case]
    tensors = {key.split(".", 1)[1]: value for key, value in tensors.items() if key.startswith(f"case{case}.")}
    options = {name: spec[name] for name in ("kernel_size", "stride", "padding", "dilation", "bias", "sort")}
    conv = DGConv2d(spec["channels"], spec["channels"], **options, nested=False, dtype=torch.float64)
    # The files of the original release have no sorted gates, so they are called `gate` in both forms here.
    state_dict = {key: tensors[key] for key in ("weight", "bias", "gate") if key in tensors}
    if spec["sort"]:
        state_dict["sorted_gate"] = state_dict.pop("gate")
    conv.load_state_dict(state_dict)
    assert conv.sort == spec["sort"]
    return spec, tensors, conv


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", range(NUM_CASES))
def test_a_layer_has_the_numbers_of_the_original(
    parity: Vectors, case: int, memory_format: torch.memory_format
) -> None:
    spec, expected, conv = _case(parity, case)
    conv.to(memory_format=memory_format)
    x = expected["x"].to(memory_format=memory_format).requires_grad_()
    y = conv(x)
    assert_close(y, expected["y"], **TOLERANCE)
    y.backward(expected["grad_y"])
    assert_close(x.grad, expected["grad_x"], **TOLERANCE)
    assert_close(conv.weight.grad, expected["grad_weight"], **TOLERANCE)
    if spec["bias"]:
        assert_close(conv.bias.grad, expected["grad_y"].sum((0, 2, 3)), **TOLERANCE)
    assert ("grad_gate" in expected) == (not spec["sort"])
    if not spec["sort"]:
        assert_close(conv.gate.grad, expected["grad_gate"], **TOLERANCE)


@pytest.mark.parametrize("case", range(NUM_CASES))
def test_the_regularizer_has_the_numbers_of_the_original(parity: Vectors, case: int) -> None:
    _, expected, conv = _case(parity, case)
    complexity = conv.complexity()
    assert_close(complexity.reshape(1), expected["regularizer"], **TOLERANCE)
    assert_close(conv.connectivity().sum().reshape(1), expected["regularizer"], **TOLERANCE)
    complexity.backward()
    assert_close(conv.gate.grad, expected["grad_regularizer"], **TOLERANCE)


def _network(name: str, expected: dict[str, Any]) -> tuple[nn.Module, Tensor, int]:
    """The network of the parity vectors, its input, and the key of the input."""
    model = timm.create_model(name, dtype=torch.float64).eval()  # nested, until it loads the checkpoint
    state_dict = original_state_dict(model, int(expected["key0"]))
    missing, unexpected = model.load_state_dict(
        {key.replace("conv2.conv.weight", "conv2.weight"): value for key, value in state_dict.items()}, strict=False
    )
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    size, key = int(expected["size"]), int(expected["input_key"])
    return model, torch.from_numpy(uniform(2 * 3 * size * size, key)).reshape(2, 3, size, size), key


@pytest.mark.parametrize("name", ["g_resnext50", pytest.param("g_resnext101", marks=pytest.mark.slow)])
def test_a_network_has_the_numbers_of_the_original(parity: Vectors, name: str) -> None:
    expected, metadata = parity(name)
    model, x, key = _network(name, metadata)
    logits = model(x)
    regularizer = timm_dgconv.complexity(model)
    assert_close(logits, expected["logits"], **TOLERANCE)
    assert_close(regularizer.reshape(1), expected["regularizer"], **TOLERANCE)
    weight = torch.from_numpy(uniform(2000, key + 1)).reshape(2, 1000)
    wanted = {key.removeprefix("grad."): value for key, value in expected.items() if key.startswith("grad.")}
    parameters = {key.replace("unsorted_gate", "gate"): value for key, value in model.named_parameters()}
    assert {key for key in parameters if key.endswith("gate")} <= wanted.keys()
    loss = (logits * weight).sum() + 1e-6 * regularizer
    inputs = [parameters[key.replace("conv2.conv.weight", "conv2.weight")] for key in wanted]
    for (key, value), grad in zip(wanted.items(), torch.autograd.grad(loss, inputs), strict=True):
        assert_close(grad, value, **TOLERANCE, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.gpu
@pytest.mark.parametrize("case", range(NUM_CASES))
@pytest.mark.parametrize(("autocast", "rtol"), [(False, 1e-4), (True, 5e-2)], ids=["float32", "bfloat16"])
def test_a_layer_on_cuda_has_the_numbers_of_the_original(
    parity: Vectors, case: int, autocast: bool, rtol: float
) -> None:
    _, expected, conv = _case(parity, case)
    conv.to("cuda", torch.float32)
    x = expected["x"].to("cuda", torch.float32).requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        y = conv(x)
    y.backward(expected["grad_y"].to("cuda", y.dtype))
    grads = {"grad_x": x.grad, "grad_weight": conv.weight.grad, "grad_gate": conv.gate.grad, "y": y}
    for key, value in grads.items():
        if key in expected:
            # Sums of many rounded products: measured against the largest value, not each.
            assert_close(value.double().cpu(), expected[key], rtol=rtol, atol=rtol * float(expected[key].abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["g_resnext50", "g_resnext101"])
def test_a_network_on_cuda_has_the_numbers_of_the_original(parity: Vectors, name: str) -> None:
    expected, metadata = parity(name)
    model, x, _ = _network(name, metadata)
    model, x, wanted = model.to("cuda", torch.float32), x.to("cuda", torch.float32), expected["logits"]
    with torch.inference_mode():
        for autocast, rtol in [(False, 1e-3), (True, 5e-2)]:
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                logits = model(x)
            assert_close(logits.double().cpu(), wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))
