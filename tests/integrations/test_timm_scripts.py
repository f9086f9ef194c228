"""timm's scripts know the models without a change.

The scripts are in timm's repository only. TIMM_SCRIPTS_DIR is a checkout of a release of it.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

SCRIPTS = Path(os.environ.get("TIMM_SCRIPTS_DIR", "")).resolve()
SCRIPTS_TIMM = (0,)
if (SCRIPTS / "timm" / "version.py").exists():
    SCRIPTS_TIMM = tuple(map(int, re.findall(r"\d+", (SCRIPTS / "timm" / "version.py").read_text())[:3]))
pytestmark = pytest.mark.skipif(
    "TIMM_SCRIPTS_DIR" not in os.environ, reason="TIMM_SCRIPTS_DIR is not set to a checkout of timm's repository"
)

RECIPES = Path(__file__).parents[2] / "hub_configs"
COLOURS = {"blue": (60, 60, 200), "green": (60, 200, 60), "grey": (128, 128, 128), "red": (200, 60, 60)}
IMAGES = {"train": 16, "validation": 8}  # per class

DATA = ["--num-classes", "4", "--img-size", "64", "--workers", "1"]
# With zero_init_last=True a block starts as the identity, and its convolution has little effect in the first epochs.
TINY = ["--model", "test_g_resnext", "--model-kwargs", "zero_init_last=False", *DATA]
CPU = ["--device", "cpu"]
AMP = ["--amp", "--amp-dtype", "bfloat16"]
TRAIN = ["--batch-size", "8", "--validation-batch-size", "32", "--lr", "0.05", "--warmup-epochs", "0"]
# With this decay the averaged model differs from the trained one and from the initial one.
EMA = ["--model-ema", "--model-ema-decay", "0.5", "--grad-accum-steps", "2"]

ROUNDING = 6e-4  # train.py prints three digits of a loss, validate.py four


class Scores(NamedTuple):
    loss: float
    top1: float


class Run(NamedTuple):
    """The files and logs of a run of train.py."""

    folder: Path
    log: str
    epochs: dict[int, Scores]  # of the evaluation in summary.csv


def script(name: str, *args: str | Path, fails: bool = False) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([sys.executable, SCRIPTS / name, *args], capture_output=True, text=True)
    assert bool(result.returncode) is fails, f"{name} exited with {result.returncode}\n{result.stderr[-5000:]}"
    return result


def train(images: Path, folder: Path, *args: str | Path) -> Run:
    log = script("train.py", "--data-dir", images, "--output", folder.parent, "--experiment", folder.name, *args).stderr
    rows = read_csv(folder / "summary.csv")
    epochs = {int(row["epoch"]): Scores(float(row["eval_loss"]), float(row["eval_top1"])) for row in rows}
    return Run(folder, log, epochs)


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def evaluations(log: str, kind: str = "Test") -> list[Scores]:
    """Return the scores in the log of a script. An evaluation logs one line, since its images are one batch."""
    found = re.findall(rf"^{re.escape(kind)}: .* Loss: .*?\( *([\d.]+)\) +Acc@1: .*?\( *([\d.]+)\)", log, re.MULTILINE)
    return [Scores(float(loss), float(top1)) for loss, top1 in found]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder with a colour per class, and too much noise for a top-1 of 100 %."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, count in IMAGES.items():
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.array(colour) + random.normal(0, 60, 3) + random.normal(0, 40, (48, 48, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{name}_{i}.png")
    return root


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("train") / "first"
    return train(images, folder, *TINY, *CPU, *AMP, *TRAIN, *EMA, "--epochs", "2")


def test_train_logs_the_averaged_model(trained: Run) -> None:
    assert list(trained.epochs) == [0, 1]
    assert len(evaluations(trained.log)) == 2
    of_average = evaluations(trained.log, "Test (EMA)")
    assert [(round(loss, 3), top1) for loss, top1 in trained.epochs.values()] == of_average


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*/args.yaml")), ids=lambda recipe: recipe.parent.name)
def test_train_takes_our_recipes(recipe: Path, images: Path, tmp_path: Path) -> None:
    few = ["--batch-size", "16", "--epochs", "1", "--amp-dtype", "bfloat16"]
    run = train(images, tmp_path / "run", "--config", recipe, *DATA, *CPU, *few)
    assert list(run.epochs) == [0]
    assert f"Model {recipe.parent.name.replace('.', '_')} created" in run.log


def test_train_resumes(trained: Run, images: Path, tmp_path: Path) -> None:
    last = trained.folder / "last.pth.tar"
    resumed = train(images, tmp_path / "on", *TINY, *CPU, *AMP, *TRAIN, *EMA, "--epochs", "3", "--resume", last)
    assert f"Loaded checkpoint '{last}' (epoch 1)" in resumed.log
    assert f"Loaded state_dict_ema from checkpoint '{last}'" in resumed.log
    assert list(resumed.epochs) == [2]
    assert resumed.epochs[2].loss < trained.epochs[0].loss


@pytest.mark.parametrize(
    ("checkpoint", "kind", "args"),
    [
        (".", "Test (EMA)", ["--use-ema"]),  # all checkpoints in the folder
        ("last.pth.tar", "Test", []),
        ("model_best.pth.tar", "Test (EMA)", ["--use-ema", "--channels-last"]),
    ],
)
def test_validate_scores_as_train(
    checkpoint: str, kind: str, args: list[str], trained: Run, images: Path, tmp_path: Path
) -> None:
    results = tmp_path / "results.json"
    options = ["--checkpoint", trained.folder / checkpoint, "--results-file", results, "--results-format", "json"]
    log = script("validate.py", "--data-dir", images, *TINY, *CPU, *AMP, "--batch-size", "32", *args, *options).stderr
    of_epoch = evaluations(trained.log, kind)
    best = max(trained.epochs, key=lambda epoch: trained.epochs[epoch].top1)
    epochs = {"checkpoint-0.pth.tar": 0, "checkpoint-1.pth.tar": 1, "last.pth.tar": 1, "model_best.pth.tar": best}
    scored = json.loads(results.read_text())
    scored = scored if isinstance(scored, list) else [{"checkpoint": checkpoint, **scored}]
    names = epochs if checkpoint == "." else [checkpoint]
    assert {Path(result["checkpoint"]).name: round(result["top1"], 3) for result in scored} == {
        name: of_epoch[epochs[name]].top1 for name in names
    }
    tolerance = 2e-2 if "--channels-last" in args else ROUNDING  # other kernels round differently in bfloat16
    losses = [of_epoch[epochs[name]].loss for name in names]
    assert [loss for loss, _ in evaluations(log)] == pytest.approx(losses, abs=tolerance)


def test_reparam_scores_the_same(trained: Run, images: Path) -> None:
    """In float32, to the printed digits."""
    options = ["--batch-size", "32", "--checkpoint", trained.folder / "last.pth.tar"]
    logs = [
        script("validate.py", "--data-dir", images, *TINY, *CPU, *options, *args).stderr for args in ([], ["--reparam"])
    ]
    (plain,), (deployed,) = (evaluations(log) for log in logs)
    assert deployed.top1 == plain.top1
    assert deployed.loss == pytest.approx(plain.loss, abs=1.5e-4)


def test_inference_finds_the_classes(trained: Run, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("pandas", reason="timm's inference.py needs pandas")
    options = ["--checkpoint", trained.folder / "last.pth.tar", "--include-index", "--label-type", "none"]
    results = ["--results-dir", tmp_path, "--results-file", "results.csv"]
    script("inference.py", "--data-dir", images, *TINY, *CPU, *AMP, *options, *results)
    rows = read_csv(tmp_path / "results.csv")
    assert sorted(row["filename"] for row in rows) == sorted(path.name for path in images.glob("validation/*/*"))
    right = [row["filename"].startswith(sorted(COLOURS)[int(row["index"])]) for row in rows]
    assert 100 * sum(right) / len(right) == trained.epochs[1].top1  # inference.py uses the averaged model


def test_benchmark_measures_both_passes(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    tiny = ["--model", "test_g_resnext", "--num-classes", "4", "--img-size", "64", "--batch-size", "4"]
    few = ["--num-warm-iter", "1", "--num-bench-iter", "5"]
    script("benchmark.py", *tiny, *CPU, *few, "--bench", "both", "--results-file", results, "--results-format", "json")
    scores = json.loads(results.read_text())
    assert scores["infer_samples_per_sec"] > 0
    assert scores["train_samples_per_sec"] > 0


def test_convert_and_inspect_a_run(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A training with one input channel and another stem. validate.py scores the converted folders as train.py did."""
    from timm_dgconv.cli import main

    network = ["zero_init_last=False", "stem_type=deep", "stem_width=8", "avg_down=True"]
    options = ["--in-chans", "1", "--batch-size", "8", "--validation-batch-size", "32", "--lr", "0.05", "--epochs", "3"]
    kwargs = ["--warmup-epochs", "0", "--model-kwargs", *network, "complexity_weight=1.0"]
    run = train(images, tmp_path / "run", "--model", "test_g_resnext", *DATA, *CPU, *options, *kwargs)
    checkpoints = [str(run.folder / f"checkpoint-{epoch}.pth.tar") for epoch in range(3)]
    assert main(["inspect", *checkpoints, "--model", "test_g_resnext", "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert [report["epoch"] for report in reports] == [0, 1, 2]
    weights = torch.load(checkpoints[2], weights_only=False)["state_dict"]
    closed = [int(gate.lt(0).sum()) for name, gate in weights.items() if name.endswith("gate")]
    assert [layer["groups"] for layer in reports[2]["layers"]] == [2**number for number in closed]

    for form in ([], ["--compact"]):
        out = tmp_path / f"out{len(form)}"
        assert main(["convert", checkpoints[2], "--model", "test_g_resnext.mine", "--out", str(out), *form]) == 0
        if SCRIPTS_TIMM >= (1, 0, 26):  # older versions cannot load a folder
            model = ["--model", f"local-dir:{out}", "--pretrained", "--in-chans", "1", *DATA, *CPU]
            log = script("validate.py", "--data-dir", images, *model, "--batch-size", "32").stderr
            ((loss, top1),) = evaluations(log)
            assert top1 == pytest.approx(run.epochs[2].top1, abs=1e-3)
            assert loss == pytest.approx(run.epochs[2].loss, abs=ROUNDING)


def load(file: Path) -> Any:
    """Load a file into a model, with all its weights."""
    import timm

    return timm.create_model("test_g_resnext", num_classes=4, checkpoint_path=str(file)).eval()


@pytest.mark.parametrize("safetensors", [False, True])
def test_a_cleaned_checkpoint_has_the_averaged_model(
    safetensors: bool, trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # clean_checkpoint.py writes a temporary file there
    name = "clean.safetensors" if safetensors else "clean.pth"
    options = ["--output", tmp_path / name, *(["--safetensors"] if safetensors else [])]
    script("clean_checkpoint.py", "--checkpoint", trained.folder / "last.pth.tar", *options)
    (file,) = tmp_path.iterdir()  # with a hash in its name
    expected = torch.load(trained.folder / "last.pth.tar", weights_only=False)["state_dict_ema"]
    torch.testing.assert_close(load(file).state_dict(), dict(expected), rtol=0, atol=0)


@pytest.mark.parametrize("reparam", [False, True])
def test_exported_onnx_computes_the_same(reparam: bool, trained: Run, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs what timm's onnx_export.py wrote")
    checkpoint, file = trained.folder / "last.pth.tar", tmp_path / "model.onnx"
    options = ["--model", "test_g_resnext", "--num-classes", "4", "--img-size", "64", "--checkpoint", checkpoint]
    script("onnx_export.py", file, *options, "--check-forward", *(["--reparam"] if reparam else []))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for count in (1, 3):
        x = torch.randn(count, 3, 64, 64)
        (logits,) = session.run(None, {"input0": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), load(checkpoint)(x).detach(), rtol=1e-4, atol=1e-4)


def test_all_options_load_the_file_of_the_original_release(
    original: tuple[Path, torch.Tensor, torch.Tensor], images: Path, tmp_path: Path
) -> None:
    file, *_ = original
    weights = torch.load(file, weights_only=True)["state_dict"]
    model = ["--model", "g_resnext50", "--img-size", "64", "--workers", "1", "--batch-size", "32", *CPU]
    log = script("validate.py", "--data-dir", images, *model, "--checkpoint", file).stderr
    assert np.isfinite(evaluations(log)[0].loss)

    still = ["--epochs", "1", "--lr", "1e-30", "--min-lr", "0", "--weight-decay", "0"]
    still += ["--warmup-epochs", "0", "--checkpoint-hist", "1"]
    for option in (["--initial-checkpoint"], ["--pretrained", "--pretrained-path"]):
        run = train(images, tmp_path / option[-1].strip("-"), *model, *still, *option, file)
        state_dict = torch.load(run.folder / "last.pth.tar", weights_only=False)["state_dict"]
        for ours, theirs in (("weight", "conv.weight"), ("unsorted_gate", "gate")):
            assert torch.equal(state_dict[f"layer3.0.conv2.{ours}"], weights[f"module.layer3.0.conv2.{theirs}"])
        shutil.rmtree(run.folder)  # 0.5 GB


@pytest.mark.parametrize("steering", [[], ["complexity_target=0.1"]], ids=["free", "steered"])
def test_a_diverged_training_stops_with_a_line_about_its_gates(
    images: Path, tmp_path: Path, steering: list[str]
) -> None:
    kwargs = ["--model-kwargs", "zero_init_last=False", *steering]
    args = ["--model", "test_g_resnext", *kwargs, *DATA, *CPU, *TRAIN, "--lr", "1e30", "--epochs", "3"]
    result = script("train.py", "--data-dir", images, "--output", tmp_path, *args, fails=True)
    assert re.search(r"RuntimeError: gates of a DGConv2d are nan: .*diverged", result.stderr.strip().splitlines()[-1])
