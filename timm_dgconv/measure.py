"""Measure what a network costs on this device: each layer with every number of groups, and the whole network."""

import copy
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from timm.utils import reparameterize_model
from torch import nn

import timm_dgconv
from timm_dgconv.models.compact import compact
from timm_dgconv.optim.cost import FORMAT, named_layers
from timm_dgconv.runtimes import RUNTIMES
from timm_dgconv.tracing import image_size, trace, unwrap

_MOST = 1.3  # times the time of the network that its layers may take alone


def measure(
    model: nn.Module,
    input_size: Sequence[int] | None = None,
    name: str = "",
    device: str = "cpu",
    batch_size: int = 1,
    runtime: str = "eager",
    rounds: int = 30,
    channels_last: bool = False,
) -> dict[str, Any]:
    """Measure what a network costs with every number of groups, in milliseconds per batch.

    Each layer is measured alone in its deployed form, a torch.nn.Conv2d with a bias, less the fastest call of a
    network with nothing to do. All cases take turns, so that a change of the machine meets all of them. A runtime may
    be faster with the whole network: if its dense layers alone take up to 1.3 times as long, the costs of all layers
    are scaled to its time.

    Args:
        model: A model with at least one DGConv2d.
        input_size: Channels, height and width of the images. The default is the input size of the pretrained_cfg.
        name: Name of the model, for the table.
        device: Device of torch.
        batch_size: Number of images.
        runtime: One of `timm_dgconv.runtimes.RUNTIMES`.
        rounds: How often each case is measured, at least 2.
        channels_last: Whether the images and weights have the memory format channels_last.

    Returns:
        The content of a file for `timm_dgconv.cost_table`, with medians and quartiles. `write` writes it.

    Raises:
        ValueError: If an argument is out of its range, or if the model has no DGConv2d or no known input size.
        RuntimeError: If the runtime is not installed, or if the layers alone take much longer than the whole network.
    """
    for argument, value, least in (("batch_size", batch_size, 1), ("rounds", rounds, 2)):
        if value < least:
            raise ValueError(f"{argument}={value} is not a number of at least {least}")
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime {runtime!r} is not one of {', '.join(RUNTIMES)}")
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} cannot be measured; use cpu or cuda")
    if runtime not in ("eager", "compile") and torch.device(device).type != "cpu":
        raise ValueError(f"{runtime} is measured on a CPU and not on {device}; use --device cpu")
    model = unwrap(model)
    layers = named_layers(model)
    size = image_size(model, input_size)
    inputs = trace(model, size).inputs
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    dtype = next(iter(layers.values())).weight.dtype

    def prepare(net: nn.Module, shape: Sequence[int]) -> Callable[[], Any]:
        net = net.eval().requires_grad_(False).to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
        x = torch.randn(batch_size, *shape, device=device, dtype=dtype).to(memory_format=memory_format)
        try:
            run = RUNTIMES[runtime](net, x)
        except ImportError as error:
            raise RuntimeError(f"{runtime} needs {error.name}; use pip install 'timm-dgconv[measure]'") from error
        return lambda: run(x)

    dense = copy.deepcopy(model)
    for layer in named_layers(dense).values():
        layer.reset_gate(1)
    keys = {
        name: [(layer.extra_repr(), tuple(x.shape[1:])) for x in inputs.get(name, [])] for name, layer in layers.items()
    }
    shapes = {key: layers[name] for name, found in keys.items() for key in found}
    cases: list[Any] = [
        ("whole", 0),
        ("call", 0),
        *((key, m) for key, layer in shapes.items() for m in range(layer.num_bits + 1)),
    ]
    calls: dict[Any, Callable[[], Any]] = {}
    with tqdm(total=len(cases) * (rounds + 1), desc=f"measure {name}", unit="runs") as bar, torch.no_grad():
        for key, m in cases:
            if key == "whole":
                calls[key, m] = prepare(reparameterize_model(compact(dense).eval()), size)
            elif key == "call":
                calls[key, m] = prepare(nn.ReLU(), (1, 1, 1))
            else:
                calls[key, m] = prepare(_deployed(shapes[key], 1 << m), key[1])
            _seconds(calls[key, m], device)  # warm up
            bar.update()
        times: dict[Any, list[float]] = {case: [] for case in cases}
        for n in range(rounds):
            for case in random.Random(n).sample(cases, len(cases)):  # no case always follows the same one
                times[case].append(1e3 * _seconds(calls[case], device))
                bar.update()
    summaries = {case: statistics.quantiles(found, n=4, method="inclusive") for case, found in times.items()}

    def table(name: str, quartile: int, scale: float) -> list[float]:
        """Return the costs of a layer, summed over its calls."""
        costs = [0.0] * (layers[name].num_bits + 1)
        for key in keys[name]:
            for m in range(len(costs)):
                costs[m] += scale * max(0.0, summaries[key, m][quartile] - min(times["call", 0]))
        return [round(cost, 6) for cost in costs]

    low, whole, high = (round(value, 6) for value in summaries["whole", 0])
    alone = sum(table(name, 1, 1.0)[0] for name in layers)
    if alone > _MOST * whole:
        raise RuntimeError(
            f"the layers alone took {alone:.3g} ms and the whole network {whole:.3g} ms: the machine was not idle, or "
            "the network is too small for this runtime; use more rounds or larger images"
        )
    scale = 1.0 if alone <= whole else 0.999 * whole / alone  # less than the whole after rounding, too
    tables, lows, highs = ({name: table(name, quartile, scale) for name in layers} for quartile in (1, 0, 2))
    spread = {name: list(map(list, zip(lows[name], highs[name], strict=True))) for name in layers}
    packages = ["timm", "torch", *(package for package in ("onnxruntime", "openvino") if package == runtime)]
    return {
        "format": FORMAT,
        "unit": "ms",
        "model": name,
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "runtime": runtime,
        "versions": {"timm-dgconv": timm_dgconv.__version__, **{package: version(package) for package in packages}},
        "input_size": list(size),
        "batch_size": batch_size,
        "channels_last": channels_last,
        "rounds": rounds,
        "whole": whole,
        "layers": tables,
        "quartiles": {"whole": [low, high], "layers": spread},
    }


def write(content: dict[str, Any], path: str | Path) -> None:
    """Write a table, all of it or nothing, with one line per layer."""

    def text(value: Any, indent: str) -> str:
        if not isinstance(value, dict):
            return json.dumps(value)
        lines = [f"{indent} {json.dumps(key)}: {text(entry, indent + ' ')}" for key, entry in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"

    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text(content, "") + "\n", encoding="utf-8")
    part.replace(path)


def _deployed(layer: nn.Conv2d, groups: int) -> nn.Conv2d:
    """Return the convolution that a layer with this number of groups becomes, with random weights and a bias."""
    return nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        groups,
        padding_mode=layer.padding_mode,
        dtype=layer.weight.dtype,
    )


def _seconds(call: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    call()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device} {platform.processor() or platform.machine()}"
