"""Which spans a layer is computed with: the static choice, the tuner, and the switches of both."""

import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from conftest import conv_with
from hypothesis import given
from hypothesis import strategies as st
from timm_dgconv.layers.spans import Problem, Spans, choose_spans, lowest
from torch import Tensor
from torch.testing import assert_close

from timm_dgconv import DGConv2d
from timm_dgconv.layers import dgconv_op, layout, spans

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
closed_bits = st.lists(st.booleans(), min_size=1, max_size=11).map(tuple)


@pytest.fixture(autouse=True)
def fresh_tuner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "TUNE", None)
    monkeypatch.setattr(spans, "tuned", {})
    monkeypatch.setattr(spans, "_meetings", Counter())


def mask_of(closed: tuple[bool, ...]) -> int:
    return int("".join("1" if bit else "0" for bit in closed), 2)


# The static choice.


@given(closed_bits, st.integers(0, 10))
def test_lowest(closed: tuple[bool, ...], count: int) -> None:
    span = lowest(closed, count)
    assert span & ~mask_of(closed) == 0
    assert span.bit_count() == min(count, sum(closed))
    others = mask_of(closed) & ~span
    assert not others or others & -others > span  # every other closed bit is more significant


@given(closed_bits, st.integers(1, 5), st.sampled_from(["cpu", "cuda"]), st.sampled_from(DTYPES))
def test_static_choice(closed: tuple[bool, ...], q_in: int, device_type: str, dtype: torch.dtype) -> None:
    """A span has as many closed bits as wide enough groups need. On CUDA, small permuted layers are dense."""
    in_channels = q_in << len(closed)
    chosen = choose_spans(closed, in_channels, device_type, dtype)
    assert all(span & ~mask_of(closed) == 0 for span in chosen)
    half = dtype.itemsize == 2
    width = {"cpu": (16, 8), "cuda": (64, 2048)}[device_type][half]
    group = in_channels >> sum(closed)
    count = next((n for n in range(sum(closed)) if group << n >= width), sum(closed))
    assert chosen.weight_grad == lowest(closed, count)
    is_permuted = any(closed) and not all(closed[: sum(closed)])
    dense = device_type == "cuda" and half and is_permuted and in_channels <= 256
    assert chosen[:2] == ((chosen.weight_grad,) * 2 if dense else (0, 0))


def train(conv: DGConv2d, x: Tensor, form: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """Output and gradients of a layer, or of another form of it."""
    x = x.detach().requires_grad_()
    y = (form or conv)(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *conv.parameters()])]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_static_choice_in_both_memory_formats(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[Any, ...]] = []
    monkeypatch.setattr(dgconv_op, "get_layout", lambda *args: used.append(args) or layout.get_layout(*args))
    conv = conv_with("101011", 64, 64, dtype=dtype)
    x = torch.randn(2, 64, 5, 5, dtype=dtype)
    train(conv, x)
    contiguous, used[:] = list(used), []
    train(conv.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last))
    assert used == contiguous
    closed = conv.closed
    assert used == [(closed, span) for span in choose_spans(closed, 64, "cpu", dtype)]


# When the tuner measures.


def layer_and_input(closed: str = "1010", **kwargs: Any) -> tuple[DGConv2d, Tensor]:
    torch.manual_seed(0)
    conv = conv_with(closed, padding=1, dtype=torch.float64, **kwargs)
    return conv, torch.randn(2, 16, 5, 5, dtype=torch.float64)


def test_off_on_cpu() -> None:
    conv, x = layer_and_input()
    for _ in range(spans.MEETINGS + 2):
        train(conv, x)
    assert not spans.tuned
    assert not spans._meetings


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Turn the tuner on, and return the spans that it measures. All of them are equally fast."""
    measured: list[int] = []
    monkeypatch.setattr(spans, "TUNE", True)
    monkeypatch.setattr(spans, "_seconds", lambda device, run: measured.append(run.args[0]) or 1.0)
    return measured


def test_measures_at_the_third_meeting(measured: list[int]) -> None:
    conv, x = layer_and_input()
    for meeting in range(1, 6):
        train(conv, x)
        assert measured == ([] if meeting < 3 else [0b0000, 0b0010, 0b1010] * 3)
        assert {problem.convolution for problem in spans.tuned} == (set() if meeting < 3 else set(Spans._fields))
    assert not spans._meetings


def test_layers_with_the_same_problem_meet_it_together(measured: list[int]) -> None:
    """Which bits are closed does not matter, if equally many are and if they are permuted in both."""
    (conv, x), (other, _) = layer_and_input("0110"), layer_and_input("0011")
    for layer in (conv, other, conv):
        assert not measured
        train(layer, x)
    assert len(spans.tuned) == 3
    assert measured == [0b0000, 0b0010, 0b0110] * 3


def test_other_problems_are_met_anew(measured: list[int]) -> None:
    conv, x = layer_and_input("1100")
    variants: list[Callable[[], Any]] = [
        lambda: conv(x),
        lambda: conv(x[:1]),
        lambda: conv(x[..., :4]),
        lambda: conv(x.contiguous(memory_format=torch.channels_last)),
        lambda: conv.float()(x.float()),
        lambda: conv_with("1100", padding=1, stride=2, dtype=torch.float64)(x),
        lambda: conv_with("1100", padding=2, dilation=2, dtype=torch.float64)(x),
        lambda: conv_with("1100", kernel_size=1, dtype=torch.float64)(x),
        lambda: conv_with("0110", padding=1, dtype=torch.float64)(x),
        lambda: conv_with("1110", padding=1, dtype=torch.float64)(x),
    ]
    for number, variant in enumerate(variants):
        for _ in range(spans.MEETINGS):
            assert len(spans.tuned) == number
            variant()
        assert len(spans.tuned) == number + 1


def test_frozen_gates_are_another_problem(measured: list[int]) -> None:
    conv, x = layer_and_input()
    for learns in (True, False):
        conv.gate.requires_grad_(learns)
        for _ in range(spans.MEETINGS):
            conv(x).sum().backward()
    problems = [problem for problem in spans.tuned if problem.convolution == "weight_grad"]
    assert [problem.learns for problem in problems] == [True, False]
    assert len([problem for problem in spans.tuned if problem.convolution == "output"]) == 1


def test_nothing_to_measure(measured: list[int]) -> None:
    conv, x = layer_and_input()
    dense, _ = layer_and_input("0000")
    for _ in range(spans.MEETINGS + 1):
        dense(x)
        dgconv_op.dgconv2d(x, conv.weight, conv.bias, conv.gate, (1, 1), (1, 1), (1, 1), spans=(0, 0, 0))
    assert not measured
    assert not spans.tuned


@pytest.fixture
def torch_flags() -> Iterator[None]:
    enabled = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(enabled)


@pytest.mark.usefixtures("torch_flags")
@pytest.mark.parametrize("benchmark", [False, True], ids=["no benchmark", "benchmark"])
@pytest.mark.parametrize("cudnn", [False, True], ids=["any cuDNN", "deterministic cuDNN"])
@pytest.mark.parametrize("torch_too", [False, True], ids=["any algorithms", "deterministic algorithms"])
def test_permission(benchmark: bool, cudnn: bool, torch_too: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", cudnn)
    torch.use_deterministic_algorithms(torch_too)
    assert spans.may_tune("cuda") == (benchmark and not cudnn and not torch_too)
    assert not spans.may_tune("cpu")
    for switch in (False, True):
        monkeypatch.setattr(spans, "TUNE", switch)
        assert spans.may_tune("cuda") == spans.may_tune("cpu") == switch


# What the tuner chooses.


def decide(closed: tuple[bool, ...], static: int, run: Callable[[int], Any]) -> int:
    """Let the tuner meet a problem until it has decided, and return how many closed bits are in the span."""
    shapes = ((2, 16, 5, 5), (16, 16, 3, 3))
    device = torch.device("cpu")
    problem = Problem("output", device, torch.float32, False, *shapes, ((1, 1),) * 3, sum(closed), False, True)
    for _ in range(spans.MEETINGS - 1):
        assert spans.tune(problem, closed, static, run) == static
    span = spans.tune(problem, closed, static, run)
    assert span == lowest(closed, spans.tuned[problem])
    assert spans.tune(problem, closed, static, lambda _: pytest.fail("measured twice")) == span
    return span.bit_count()


@pytest.mark.parametrize(
    ("milliseconds", "static", "expected"),
    [
        ([1, 1, 1], 0, 0),
        ([0.96, 1, 0.96], 1, 1),
        ([0.94, 1, 1], 1, 0),
        ([0.94, 1, 0.93], 1, 2),
        ([1, 0.5, 0.6], 2, 1),
        ([1, 2, 3], 2, 0),
        ([3, 2, 1], 2, 2),
    ],
    ids=str,
)
def test_another_span_must_be_clearly_faster(
    milliseconds: list[float], static: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = (True, False, True)
    monkeypatch.setattr(spans, "_seconds", lambda device, run: milliseconds[run.args[0].bit_count()])
    assert decide(closed, lowest(closed, static), lambda span: None) == expected


@pytest.mark.parametrize(
    ("too_large", "static", "expected"), [({1, 2}, 0, 0), ({1, 2}, 2, 0), ({0, 1, 2}, 1, 1)], ids=str
)
def test_spans_without_enough_memory_are_passed_over(too_large: set[int], static: int, expected: int) -> None:
    closed = (True, False, True)

    def run(span: int) -> None:
        if span.bit_count() in too_large:
            raise torch.OutOfMemoryError

    assert decide(closed, lowest(closed, static), run) == expected


def test_other_errors_are_raised() -> None:
    def run(span: int) -> None:
        raise ValueError("of the problem")

    with pytest.raises(ValueError, match="of the problem"):
        decide((True,), 0, run)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_time_is_the_fastest_of_three_runs_after_a_first_one(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, durations, events = 0, iter([1, 7, 5, 6]), []

    def run() -> None:
        nonlocal clock
        clock += next(durations)
        events.append("run")

    monkeypatch.setattr(spans.time, "perf_counter", lambda: clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append(f"wait for {device}"))
    assert spans._seconds(torch.device(device), run) == 5
    assert events == (["run"] if device == "cpu" else ["run", "wait for cuda"]) * 4


# Layers with the tuner.


@pytest.mark.parametrize("closed", ["1010", "1111", "0001"])
def test_results_do_not_depend_on_the_choice(closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "TUNE", True)
    conv, x = layer_and_input(closed)
    expected = train(conv, x, conv.masked_dense)
    for best in range(closed.count("1") + 1):
        spans.tuned.clear()
        times = partial(lambda best, device, run: abs(run.args[0].bit_count() - best) + 1.0, best)
        monkeypatch.setattr(spans, "_seconds", times)
        for _ in range(spans.MEETINGS + 1):
            assert_close(train(conv, x), expected)
        assert list(spans.tuned.values()) == [best] * 3


def test_decisions_are_kept_and_logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a stub: the times decide."""
    monkeypatch.setattr(spans, "TUNE", True)
    conv, x = layer_and_input()
    expected = train(conv, x, conv.masked_dense)
    with caplog.at_level(logging.INFO, logger="timm_dgconv"):
        for _ in range(spans.MEETINGS + 2):
            assert_close(train(conv, x), expected)
    assert len(caplog.records) == len(spans.tuned) == 3
    for record, (problem, count) in zip(caplog.records, spans.tuned.items(), strict=True):
        assert record.levelno == logging.INFO
        assert "\n" not in record.message
        assert record.message.startswith(f"{problem}: {count} of 2 closed bits in the span")
        assert count in range(3)


# Switches.


@pytest.fixture
def dense_calls(monkeypatch: pytest.MonkeyPatch) -> list[DGConv2d]:
    calls: list[DGConv2d] = []
    masked_dense = DGConv2d.masked_dense
    monkeypatch.setattr(DGConv2d, "masked_dense", lambda conv, x: calls.append(conv) or masked_dense(conv, x))
    return calls


def test_masked_dense_form(dense_calls: list[DGConv2d], monkeypatch: pytest.MonkeyPatch) -> None:
    conv, x = layer_and_input()
    expected = train(conv, x)
    assert not dense_calls
    monkeypatch.setattr(dgconv_op, "MASKED_DENSE", True)
    assert_close(train(conv, x), expected)
    assert dense_calls == [conv]
    monkeypatch.setattr(dgconv_op, "MASKED_DENSE", False)
    assert_close(train(conv, x), expected)
    assert dense_calls == [conv]


CODE = """
import torch
from timm_dgconv import DGConv2d
from timm_dgconv.layers import spans

calls = []
masked_dense = DGConv2d.masked_dense
DGConv2d.masked_dense = lambda conv, x: calls.append(conv) or masked_dense(conv, x)
conv = DGConv2d(16, 16, 3)
torch.nn.init.constant_(conv.gate, -1)
for _ in range(3):
    conv(torch.ones(1, 16, 4, 4))
torch.backends.cudnn.benchmark = True
print(spans.TUNE, spans.may_tune("cuda"), len(spans.tuned), len(calls))
"""


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "None True 0 0"),
        ({"TIMM_DGCONV_TUNE": "0", "TIMM_DGCONV_MASKED_DENSE": "1"}, "False False 0 3"),
        ({"TIMM_DGCONV_TUNE": "1", "TIMM_DGCONV_MASKED_DENSE": "0"}, "True True 1 0"),
    ],
    ids=["unset", "TUNE=0, MASKED_DENSE=1", "TUNE=1, MASKED_DENSE=0"],
)
def test_environment_variables(variables: dict[str, str], expected: str) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("TIMM_DGCONV_")}
    command = [sys.executable, "-c", CODE]
    assert subprocess.check_output(command, env={**env, **variables}, text=True).strip() == expected
