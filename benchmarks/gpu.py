"""Check and measure what needs a GPU, in stages.

    python benchmarks/gpu.py                               # all stages, each below ten minutes
    python benchmarks/gpu.py networks --out results
    python benchmarks/gpu.py --dry-run                     # the same code, tiny and on the CPU

Each stage runs in its own process with a time limit, so a crash or a hang costs one stage. The folder of the results
gets STAGE.json, written after every row, and STAGE.log, the output of the process. summary.md has the tables of all
stages in the folder. A stage fails if one of its rows has an error. The exit status is then 1.

The stage scripts needs TIMM_SCRIPTS_DIR, a checkout of a release of timm's repository.
"""

import argparse
import gc
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from bench import BASELINES, FORMS, ONLY_INFERENCE, Row, build, save, step, table, write
from PIL import Image
from torch.utils.benchmark import Timer

REPOSITORY = Path(__file__).resolve().parents[1]
LIMITS = {"tests": 420, "networks": 580, "scripts": 580}
"""Seconds after which a stage is stopped."""

GROUPS = 32

NETWORKS = {"g_resnext50": (256, ("wide_resnet50_2", "resnext101_32x4d")), "g_resnext101": (128, ())}
"""Batch size of the G-ResNeXts, and networks to measure besides the baseline."""

TRAIN = "train.py --epochs 2 --warmup-epochs 0 --lr 0.02 --log-interval 5 --checkpoint-hist 1 --output runs"
VALIDATE = "validate.py --checkpoint runs/amp/last.pth.tar"
SCRIPTS = {
    "amp": f"{TRAIN} --experiment amp",
    "ema": f"{TRAIN} --experiment ema --amp-dtype bfloat16 --model-ema --grad-accum-steps 2",
    "steered": f"{TRAIN} --experiment steered --model-kwargs complexity_target=0.05",
    "fused": f"{TRAIN} --experiment fused --opt adamw --lr 1e-3 --opt-kwargs fused=True",
    "resumed": f"{TRAIN} --experiment resumed --epochs 3 --resume runs/amp/last.pth.tar",
    "validate": VALIDATE,
    "validate_reparam": f"{VALIDATE} --reparam",
    "compiled": f"{TRAIN} --experiment compiled --torchcompile",
    "validate_compiled": f"{VALIDATE} --torchcompile",
}


@dataclass
class Stage:
    """A stage that runs in this process, and its rows."""

    name: str
    out: Path
    dry_run: bool
    rows: list[Row] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> torch.device:
        """The device that the stage checks or measures."""
        return torch.device("cpu" if self.dry_run else "cuda")

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.dry_run:
            torch.cuda.synchronize()

    def add(self, **row: Any) -> None:
        """Print a row and write all rows. A row with the key `error` makes the stage fail."""
        for key in row.keys() & {"error", "skipped", "scores"}:
            row[key] = " ".join(str(row[key]).split()).replace("|", "/")[:300]  # a cell of a Markdown table
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self.save()

    def save(self, result: str = "running") -> None:
        """Write the rows, with what they depend on."""
        facts: Row = {
            "command": f"python benchmarks/gpu.py {self.name}{' --dry-run' if self.dry_run else ''}",
            "cudnn": torch.backends.cudnn.version(),
            "result": result,
            "seconds": round(time.monotonic() - self.start),
        }
        save(self.rows, self.out / f"{self.name}.json", self.device.type, **facts)


def tests(stage: Stage) -> None:
    """Run the tests that need a GPU."""
    path = stage.out / "tests.xml"
    path.unlink(missing_ok=True)
    options = ["-m", "gpu", "-n", "0", "-o", "timeout=200", "-p", "no:cacheprovider", "--junitxml", str(path)]
    code = subprocess.run([sys.executable, "-m", "pytest", *options, "tests"], cwd=REPOSITORY).returncode
    cases = list(ElementTree.parse(path).iter("testcase")) if path.exists() else []
    counts = {tag: sum(case.find(tag) is not None for case in cases) for tag in ("failure", "error", "skipped")}
    row: Row = dict(tests=len(cases), failed=counts["failure"] + counts["error"], not_run=counts["skipped"])
    if code and not (stage.dry_run and code == 5):  # 5: no test was selected
        row["error"] = f"pytest returns {code}, see tests.log"
    elif counts["skipped"] == len(cases) and not stage.dry_run:
        row["error"] = "no test has run"
    stage.add(**row)


def kernels(stage: Stage, call: Callable[[], Any]) -> Row:
    """Return the number of kernels of a call, and the sum of their times."""
    if stage.dry_run:
        return {"kernel_ms": None, "kernels": None}
    with torch.profiler.profile() as profiler:
        call()
        stage.synchronize()
    events: Any = [event for event in profiler.events() if event.device_type.name == "CUDA"]
    microseconds = [event.time_range.elapsed_us() for event in events if not event.is_user_annotation]
    return {"kernel_ms": round(sum(microseconds) / 1e3, 3), "kernels": len(microseconds)}


def networks(stage: Stage) -> None:
    """Measure training and inference of G-ResNeXts and of ResNets. The first network is the baseline of ratios."""
    models = {"test_g_resnext": (2, ())} if stage.dry_run else NETWORKS
    for mode, (model, (batch, others)) in itertools.product(("eager", "default", "reduce-overhead"), models.items()):
        labels = [BASELINES[model], *others, *FORMS]
        baseline: dict[str, float] = {}
        if mode != "eager":
            labels = [BASELINES[model], "learnable", "deployed"] if model == "g_resnext50" else []
        for label, what in itertools.product(labels, ("train", "infer")):
            if what == "train" and (label in ONLY_INFERENCE or mode == "reduce-overhead"):
                continue
            row: Row = dict(model=model, form=label, what=what, mode=mode, batch=batch)
            try:
                row |= _measure_network(stage, **row)
                row["images_per_s"] = round(1e3 * batch / row["ms"])
                if label == BASELINES[model]:
                    baseline[what] = row["ms"]
                row["ratio"] = round(row["ms"] / baseline[what], 3) if what in baseline else None
            except RuntimeError as error:
                row["error"] = str(error)
            stage.add(**row)
    if stage.dry_run:
        stage.add(mode="torch.compile", skipped="takes minutes on a CPU")


def _measure_network(stage: Stage, **case: Any) -> Row:
    """Return the median time, the time until a call returns on an idle device, the kernels, and the peak memory."""
    call = _network(stage, **case)
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    median = timer.blocked_autorange(min_run_time=0.01 if stage.dry_run else 1.0).median
    peak, host = None, []
    if not stage.dry_run:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        stage.synchronize()
        start = time.perf_counter()
        call()
        host.append(time.perf_counter() - start)
    stage.synchronize()
    if not stage.dry_run:
        peak = round(torch.cuda.max_memory_allocated() / 2**20)
    times = {"ms": round(1e3 * median, 4), "host_ms": round(1e3 * min(host), 3)}
    return {**times, **kernels(stage, call), "peak_MiB": peak}


def _network(stage: Stage, model: str, form: str, what: str, mode: str, batch: int) -> Callable[[], Any]:
    """Return a training step or inference of a G-ResNeXt in one of its forms, or of the network with this name."""
    torch.compiler.reset()
    gc.collect()  # models before this one must not count towards the peak memory
    like: Any = dict(device=stage.device, memory_format=torch.channels_last)
    name = model if form in FORMS else form
    net: Any = build(name, form, GROUPS, permuted=True, training=what == "train").to(**like)
    x = torch.randn(batch, 3, *[32 if stage.dry_run else 224] * 2).to(**like)
    run = net if mode == "eager" else torch.compile(net, mode=mode)
    return step(run, net, x, "sgd" if what == "train" else what, torch.bfloat16)


def scripts(stage: Stage) -> None:
    """Run timm's train.py and validate.py on synthetic images."""
    if "TIMM_SCRIPTS_DIR" not in os.environ:
        stage.add(script="all", skipped="set TIMM_SCRIPTS_DIR to a checkout of a release of timm's repository")
        return
    work = stage.out / "work"
    for (split, count), label in itertools.product((("train", 256), ("validation", 64)), range(4)):
        folder = work / "data" / split / str(label)
        folder.mkdir(parents=True)
        for i in range(count // 32 if stage.dry_run else count):
            Image.effect_noise((256, 256), 40 + 40 * label).convert("RGB").save(folder / f"{i}.jpg")
    options = "--data-dir data --num-classes 4 --channels-last --amp"
    if stage.dry_run:
        options += " --amp-dtype bfloat16 --device cpu --workers 1 --batch-size 4 --model test_g_resnext --img-size 64"
    else:
        options += " --amp-dtype float16 --device cuda --workers 8 --batch-size 64 --model g_resnext50"
    for name, command in SCRIPTS.items():
        script, _, arguments = command.partition(" ")
        row: Row = dict(script=name, command=f"{script} {options} {arguments}")
        if stage.dry_run and "--torchcompile" in command:
            stage.add(**row, skipped="takes minutes on a CPU")
            continue
        path = str(Path(os.environ["TIMM_SCRIPTS_DIR"]).resolve() / script)
        words = [sys.executable, path, *options.split(), *arguments.split()]
        log = stage.out / f"scripts_{name}.log"
        start = time.monotonic()
        with log.open("w") as file:
            code = subprocess.run(words, cwd=work, stdout=file, stderr=file).returncode
        row["seconds"] = round(time.monotonic() - start)
        text = log.read_text()
        result = text.rpartition("--result")[2]  # the scripts end with their scores
        row["error" if code or "NaN" in result else "scores"] = result[-300:]
        stage.add(**row)


STAGES: dict[str, Callable[[Stage], None]] = {f.__name__: f for f in (tests, networks, scripts)}


def run_here(name: str, out: Path, dry_run: bool) -> None:
    """Run a stage in this process."""
    # As timm's train.py.
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    stage = Stage(name, out, dry_run)
    stage.save()
    try:
        STAGES[name](stage)
    except Exception as error:
        traceback.print_exc()
        stage.add(error=f"{type(error).__name__}: {error}")
    stage.save("failed" if any("error" in row for row in stage.rows) else "passed")


def run_alone(name: str, out: Path, dry_run: bool) -> None:
    """Run a stage in its own process, and stop it with all processes that it has started when its time is up."""
    path, log = out / f"{name}.json", out / f"{name}.log"
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, name, "--here", "--out", str(out), *["--dry-run"] * dry_run]
    cpu = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if dry_run else {}
    with log.open("w") as file:
        options: Any = dict(stdout=file, stderr=file, env={**os.environ, **cpu}, start_new_session=True)
        process = subprocess.Popen(command, **options)
        try:
            ending = f"ended with exit code {process.wait(LIMITS[name])}"
        except subprocess.TimeoutExpired:
            ending = f"stopped after {LIMITS[name]} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    content = json.loads(path.read_text()) if path.exists() else {"result": "running", "rows": []}
    if content["result"] == "running":
        write({**content, "result": ending}, path)


def summarise(out: Path) -> dict[str, str]:
    """Write summary.md from the files of the stages in a folder. Return the results of the stages."""
    files = {name: json.loads(path.read_text()) for name in STAGES if (path := out / f"{name}.json").exists()}
    overview, sections = [], []
    for name, file in files.items():
        rows = file["rows"]
        counts = {f"{key} rows": sum(key in row for row in rows) for key in ("error", "skipped")}
        facts = {key: file.get(key) for key in ("seconds", "device", "torch", "timm", "cudnn")}
        overview.append({"stage": name, "result": file["result"], "rows": len(rows), **counts, **facts})
        sections.append(f"## {name}\n\n{_first_line(STAGES[name])}")
        sections.append(table(rows))
    (out / "summary.md").write_text("\n\n".join(["# Results on a GPU", table(overview), *sections]) + "\n")
    return {name: file["result"] for name, file in files.items()}


def _first_line(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").partition("\n")[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    stages = "\n".join(f"  {name:9} {_first_line(stage)}" for name, stage in STAGES.items())
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=f"{__doc__}\nstages:\n{stages}", formatter_class=formatter)
    choices = ["all", *STAGES]
    parser.add_argument("stages", nargs="*", default="all", choices=choices, metavar="STAGE", help="stages to run")
    parser.add_argument("--out", type=Path, default="gpu-results", metavar="FOLDER", help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="run everything tiny on the CPU")
    parser.add_argument("--here", action="store_true", help="run the stages in this process, without a time limit")
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --dry-run runs everything on the CPU")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    names = list(STAGES) if "all" in args.stages else args.stages
    for name in names:
        print(f"{name}: output in {out / name}.log", flush=True)
        try:
            (run_here if args.here else run_alone)(name, out, args.dry_run)
        finally:
            shutil.rmtree(out / "work", ignore_errors=True)  # images and checkpoints
            results = summarise(out)
        print(f"{name}: {results[name]}", flush=True)
    print(f"summary in {out / 'summary.md'}")
    return int(any(results[name] != "passed" for name in names))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # no stage outlives this process
    sys.exit(main())
