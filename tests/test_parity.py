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

NUM_CASES = 8
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}
RUNS = pytest.mark.parametrize(
    ("device", "dtype", "autocast", "rtol"),
    [
        pytest.param("cpu", torch.float64, False, 1e-9, id="float64"),
        pytest.param("cuda", torch.float32, False, 1e-4, id="float32", marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float32, True, 5e-2, id="bfloat16", marks=pytest.mark.gpu),
    ],
)


def _assert_close(value: Tensor, expected: Tensor, rtol: float) -> None:
    """Sums of many rounded products are measured against the largest value."""
    assert_close(value.double().cpu(), expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


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
    return spec, tensors, conv


@RUNS
@pytest.mark.parametrize("case", range(NUM_CASES))
def test_a_layer_has_the_numbers_of_the_original(
    parity: Vectors, case: int, device: str, dtype: torch.dtype, autocast: bool, rtol: float
) -> None:
    spec, expected, conv = _case(parity, case)
    complexity = conv.complexity()
    assert complexity == conv.connectivity().sum() == expected["regularizer"]
    complexity.backward()
    _assert_close(conv.gate.grad, expected["grad_regularizer"], 1e-9)
    conv.zero_grad()
    conv.to(device, dtype)
    x = expected["x"].to(device, dtype).requires_grad_()
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        y = conv(x)
    y.backward(expected["grad_y"].to(device, y.dtype))
    found = {"y": y, "grad_x": x.grad, "grad_weight": conv.weight.grad}
    if spec["bias"]:
        expected["grad_bias"], found["grad_bias"] = expected["grad_y"].sum((0, 2, 3)), conv.bias.grad
    if not spec["sort"]:  # the vectors have no gradients of sorted gates
        found["grad_gate"] = conv.gate.grad
    for name, value in found.items():
        _assert_close(value, expected[name], rtol)


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
@pytest.mark.parametrize("name", ["g_resnext50", "g_resnext101"])
def test_a_network_on_cuda_has_the_numbers_of_the_original(parity: Vectors, name: str) -> None:
    expected, metadata = parity(name)
    model, x, _ = _network(name, metadata)
    model, x = model.to("cuda", torch.float32), x.to("cuda", torch.float32)
    with torch.inference_mode():
        for autocast, rtol in [(False, 1e-3), (True, 5e-2)]:
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                logits = model(x)
            _assert_close(logits, expected["logits"], rtol)
