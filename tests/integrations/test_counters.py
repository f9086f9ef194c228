"""Counters of multiply-adds count what the table of docs/libraries.md says.

pip install -e ".[test,clients]" && pytest -m client tests/integrations/test_counters.py
"""

import copy
import json
import os
import re
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path

import pytest
import timm
import torch
from conftest import layers
from test_timm_scripts import script
from timm.utils import reparameterize_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_dgconv import compact, group_report

SIZE = (3, 64, 64)
BATCH = (1, *SIZE)
PAGE = (Path(__file__).parents[2] / "docs" / "libraries.md").read_text(encoding="utf-8")
INSTALLED = {found.name for found in distributions()}
ROWS = re.findall(r"^\| (.+?) \| (\d\.\d\d) \| (\d\.\d\d) \| (\d\.\d\d) \|", PAGE, re.MULTILINE)


def learnable() -> nn.Module:
    """Layers with 1, 2, 4, ... groups in turn."""
    model = timm.create_model("g_resnext50").eval()
    for number, conv in enumerate(layers(model)):
        conv.reset_gate(1 << number % (conv.num_bits + 1))
    return model


def count_with_torch(model: nn.Module) -> float:
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(BATCH))
    return counter.get_total_flops() / 2


def count_with_deepspeed(model: nn.Module) -> float:
    from deepspeed.profiling.flops_profiler import get_model_profile

    return get_model_profile(model, BATCH, print_profile=False, as_string=False)[1]


def count_with_calflops(model: nn.Module) -> float:
    from calflops import calculate_flops

    return calculate_flops(model, BATCH, print_results=False, output_as_string=False)[1]


def count_with_ptflops(model: nn.Module, backend: str = "pytorch") -> float:
    from ptflops import get_model_complexity_info

    return get_model_complexity_info(model, SIZE, as_strings=False, print_per_layer_stat=False, backend=backend)[0]


def count_with_thop(model: nn.Module) -> float:
    import thop

    return thop.profile(model, (torch.randn(BATCH),), verbose=False)[0]


COUNTERS: dict[str, tuple[str, Callable[[nn.Module], float]]] = {  # name in the table -> distribution and function
    "`FlopCounterMode` of torch": ("torch", count_with_torch),
    "DeepSpeed": ("deepspeed", count_with_deepspeed),
    "calflops": ("calflops", count_with_calflops),
    'ptflops, `backend="aten"`': ("ptflops", partial(count_with_ptflops, backend="aten")),
    "ptflops": ("ptflops", count_with_ptflops),
    "thop": ("thop", count_with_thop),
    "ultralytics-thop": ("ultralytics-thop", count_with_thop),
    "fvcore": ("fvcore", lambda net: import_module("fvcore.nn").FlopCountAnalysis(net, torch.randn(BATCH)).total()),
    "torchinfo": ("torchinfo", lambda net: import_module("torchinfo").summary(net, BATCH, verbose=0).total_mult_adds),
    "torchprofile": ("torchprofile", lambda net: import_module("torchprofile").profile_macs(net, torch.randn(BATCH))),
}


@pytest.mark.filterwarnings("ignore")  # counters warn about operations that they do not know
@pytest.mark.parametrize(
    ("name", "shares"),
    [pytest.param(name, shares, marks=pytest.mark.client(COUNTERS[name][0])) for name, *shares in ROWS],
)
def test_a_counter_counts_what_the_table_says(name: str, shares: list[str]) -> None:
    if "thop" in name and {"thop", "ultralytics-thop"} <= INSTALLED:
        pytest.skip("thop and ultralytics-thop write the same files; uninstall one of them and install the other again")
    model, (_, count) = learnable(), COUNTERS[name]
    real = group_report(model, SIZE).learned.macs
    counts = [count(copy.deepcopy(form)) for form in (model, compact(model), reparameterize_model(model))]
    assert [f"{found / real:.2f}" for found in counts] == shares
    assert (counts[0] == counts[1]) is (shares[0] == shares[1])


@pytest.mark.skipif("TIMM_SCRIPTS_DIR" not in os.environ, reason="TIMM_SCRIPTS_DIR is not set to a checkout of timm")
@pytest.mark.parametrize(
    ("profiler", "args"),
    [
        pytest.param("deepspeed", [], marks=pytest.mark.client("deepspeed")),
        pytest.param("fvcore", ["--reparam"], marks=pytest.mark.client("fvcore")),
    ],
)
def test_benchmark_prints_the_multiply_adds(profiler: str, args: list[str]) -> None:
    model = learnable()
    torch.save(model.state_dict(), "model.pth")
    options = ["--model", "g_resnext50", "--model-kwargs", "checkpoint_path=model.pth", "--img-size", str(SIZE[1])]
    printed = script("benchmark.py", *options, "--device", "cpu", "--bench", f"profile-{profiler}", *args).stdout
    found = json.loads(printed.partition("--result")[2])["infer_gmacs"]
    assert found == pytest.approx(group_report(model, SIZE).learned.macs / 1e9, abs=0.006)
