"""Fixtures that several test files share."""

import os

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # workers, and the processes that they start, share the cores
    threads = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # a busy machine would show bars where one line is expected

import io
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import settings
from safetensors import safe_open
from torch import nn

from timm_dgconv import DGConv2d
from timm_dgconv.cli import main
from timm_dgconv.layers import gate_reader

# Time limits of single examples say more about the machine than about the code. The same commit passes or fails with
# the same examples everywhere; `pytest --hypothesis-profile=random` draws others.
settings.register_profile("timm-dgconv", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None)
settings.load_profile("timm-dgconv")

# torch.jit knows operators by id(), and torch frees some of them. A tuple at the same address is then an operator
# (findings/torchscript_stale_operator.sh).
register_builtin, operators = torch.jit._builtins._register_builtin, []


def keep_and_register(function: Any, name: str) -> None:
    """Register an operator of TorchScript, and keep it alive."""
    operators.append(function)
    register_builtin(function, name)


torch.jit._builtins._register_builtin = keep_and_register

DATA = Path(__file__).parent / "data"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HAS_OPERATOR = hasattr(torch.compiler, "is_exporting")  # before, torch.compile gets the masked dense form
FORMS: list[dict[str, Any]] = [{}, {"nested": False}, {"sort": False}]  # arguments of a layer
SORT_NESTED = [(True, True), (True, False), (False, False)]  # the same for the operator

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch  # types of fixtures
forms = pytest.mark.parametrize("form", FORMS, ids=str)
sorted_or_not = pytest.mark.parametrize("form", [{}, {"sort": False}], ids=str)
jit_is_deprecated = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest file first, so that no worker runs it alone at the end."""
    items.sort(key=lambda item: "test_timm_suite" not in item.nodeid)


@pytest.fixture(autouse=True)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip a test marked gpu without CUDA. With CUDA, disable TF32 (cuDNN's default) and nondeterminism."""
    if request.node.get_closest_marker("gpu"):
        if not torch.cuda.is_available():
            pytest.skip("needs CUDA")
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture(autouse=True)
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip a test marked client if the library is missing, and keep it off the Hub."""
    marker = request.node.get_closest_marker("client")
    if marker is None:
        return
    try:
        distribution(marker.args[0])
    except PackageNotFoundError:
        pytest.skip(f"{marker.args[0]} is not installed; see the extras clients and mobile")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    monkeypatch.chdir(request.getfixturevalue("tmp_path"))


@pytest.fixture(params=["read every time", "read once per pass"])
def gate_reads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test twice: with gates read as on a CPU, and with gates read as on CUDA."""
    if request.param == "read once per pass":
        monkeypatch.setattr(gate_reader, "READ_DIRECTLY", set())


def conv_with(
    closed: str, in_channels: int = 16, out_channels: int = 16, kernel_size: Any = 3, **kwargs: Any
) -> DGConv2d:
    """A DGConv2d whose gates are closed where the string has a 1. float16 rounds its gates to +-0.0."""
    conv = DGConv2d(in_channels, out_channels, kernel_size, **kwargs)
    with torch.no_grad():
        conv.gate.copy_(torch.tensor([-1e-8 if bit == "1" else 1e-8 for bit in closed]))
    return conv


def layers(model: nn.Module) -> list[DGConv2d]:
    return [module for module in model.modules() if isinstance(module, DGConv2d)]


def gates(model: nn.Module) -> list[nn.Parameter]:
    return [layer.gate for layer in layers(model)]


def set_gates(model: nn.Module, value: Callable[[torch.Tensor], torch.Tensor | float]) -> None:
    """Give every gate a value, a function of the one that it has."""
    with torch.no_grad():
        for gate in gates(model):
            gate.copy_(torch.as_tensor(value(gate)))


def own_forward(conv: Any) -> None:
    """Give a convolution another forward pass."""
    forward = conv.forward
    conv.forward = lambda x: 2 * forward(x)


def attempt(function: Callable[[], Any]) -> Any:
    """The result, or the type of the error."""
    try:
        return function()
    except RuntimeError as error:
        return type(error)


def outputs(model: nn.Module) -> torch.Tensor:
    """What a network of images computes in evaluation mode."""
    stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    images = torch.randn(2, stem.in_channels, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model.eval()(images)


def assert_refused(command: list[str], *said: str) -> None:
    """The command exits with status 2, writes one line of error with these words, and prints nothing else."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        assert main(command) == 2
    error = err.getvalue()
    assert all(words in error for words in said), error
    assert (out.getvalue(), len(error.splitlines())) == ("", 1)


RANK = """
import os, sys, torch, torch.distributed as dist

rank, world, folder, *args = sys.argv[1:]
rank, world = int(rank), int(world)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
"""


def run_ranks(folder: Path, code: str, *args: str, world: int = 2) -> None:
    """Run code in `world` processes of a gloo group. The code can use rank, world, folder and args."""
    script = folder / "rank.py"
    script.write_text(RANK + dedent(code) + "os._exit(0)  # gloo's destructor can wait for itself in torch 2.5\n")
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, script, str(rank), str(world), folder, *args] for rank in range(world)]
    ranks = [subprocess.Popen(command, env=env) for command in commands]
    try:
        assert [rank.wait(timeout=400) for rank in ranks] == [0] * world
    finally:
        for rank in ranks:
            rank.kill()


Original = tuple[Path, torch.Tensor, torch.Tensor]
Vectors = Callable[[str], tuple[dict[str, torch.Tensor], dict[str, Any]]]


def uniform(n: int, key: int) -> np.ndarray:
    """The formula of the parity vectors: n float64 numbers in [-1, 1)."""
    i = np.arange(n, dtype=np.float64)
    v = np.sin(12.9898 * (i % 65536.0) + 78.233 * (i // 65536.0) + 37.719 * key) * 43758.5453
    return (v - np.floor(v)) * 2 - 1


def original_value(name: str, shape: tuple[int, ...], key: int) -> torch.Tensor:
    """Return the value that a parameter or buffer of the original release has in the parity vectors."""
    u = uniform(int(np.prod(shape)), key)
    if name.endswith(".gate"):
        u = np.where(u >= 0, 0.5, -0.5)
    elif name.endswith("running_var"):
        u = 1 + 0.5 * u**2
    elif name.endswith("running_mean"):
        u = 0.1 * u
    elif len(shape) == 1:
        u = 1 + 0.1 * u if name.endswith(".weight") else 0.1 * u
    else:
        u = u * np.sqrt(3 / (u.size / shape[0]))
    return torch.from_numpy(u).reshape(shape)


def original_state_dict(model: torch.nn.Module, key0: int) -> dict[str, torch.Tensor]:
    """Return a state dict of the original release for a model, in float64 and without the constants D and I."""
    shapes = {
        name.replace("conv2.weight", "conv2.conv.weight").replace("sorted_gate", "gate"): tuple(value.shape)
        for name, value in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    return {name: original_value(name, shapes[name], key0 + n) for n, name in enumerate(sorted(shapes))}


def trained(name: str = "test_g_resnext", **kwargs: Any) -> nn.Module:
    """A model with statistics and gates as after a training, still in training mode."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 2)
                module.bias.normal_(std=0.1)
            if isinstance(getattr(module, "gate", None), nn.Parameter):
                module.gate.normal_()
    return model


@pytest.fixture(scope="session")
def parity() -> Vectors:
    """Tensors and metadata of a file in tests/data, numbers computed with the original release in float64."""

    def load(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        with safe_open(DATA / f"{name}.safetensors", framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata()

    return load


@pytest.fixture(scope="session")
def original(parity: Vectors, tmp_path_factory: pytest.TempPathFactory) -> Original:
    """Return a checkpoint of the original release with the weights of the parity vectors, their input and logits."""
    expected, metadata = parity("g_resnext50")
    state_dict = original_state_dict(timm.create_model("g_resnext50", device="meta"), int(metadata["key0"]))
    for name in [name for name in state_dict if name.endswith(".gate")]:
        state_dict[name.replace(".gate", ".D")] = torch.eye(2)
        state_dict[name.replace(".gate", ".I")] = torch.ones(2, 2)
    checkpoint = {
        "epoch": 120,
        "arch": "g_resnext50",
        "state_dict": {f"module.{name}": value.float() for name, value in state_dict.items()},
        "best_acc1": torch.tensor(78.592),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    }
    file = tmp_path_factory.mktemp("original") / "g_resnext50.pth.tar"
    torch.save(checkpoint, file)
    size, input_key = int(metadata["size"]), int(metadata["input_key"])
    x = torch.from_numpy(uniform(2 * 3 * size * size, input_key)).reshape(2, 3, size, size).float()
    return file, x, expected["logits"].float()
