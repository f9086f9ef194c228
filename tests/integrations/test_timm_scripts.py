"""timm's scripts know the models without a change.

The scripts are in timm's repository only. TIMM_SCRIPTS_DIR is a checkout of a release of it.
"""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import Capture, Patch
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
TRAIN = ["--batch-size", "8", "--validation-batch-size", "32", "--lr", "0.05", "--warmup-epochs", "0"]
# With this decay the averaged model differs from the trained one and from the initial one.
EMA = ["--model-ema", "--model-ema-decay", "0.5", "--grad-accum-steps", "2"]

ROUNDING = 1.5e-3  # train.py prints three digits of a loss, validate.py four


class Scores(NamedTuple):
    loss: float
    top1: float


class Run(NamedTuple):
    """The files and logs of a run of train.py."""

    folder: Path
    log: str
    epochs: dict[int, Scores]  # of the evaluation in summary.csv


def script(name: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([sys.executable, SCRIPTS / name, *args], capture_output=True, text=True)
    assert result.returncode == 0, f"{name} exited with {result.returncode}\n{result.stderr[-5000:]}"
    return result


def train(images: Path, folder: Path, *args: str | Path) -> Run:
    log = script("train.py", "--data-dir", images, "--output", folder.parent, "--experiment", folder.name, *args).stderr
    with open(folder / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    epochs = {int(row["epoch"]): Scores(float(row["eval_loss"]), float(row["eval_top1"])) for row in rows}
    return Run(folder, log, epochs)


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
    return train(images, tmp_path_factory.mktemp("train") / "run", *TINY, *CPU, *TRAIN, *EMA, "--epochs", "2")


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*/args.yaml")), ids=lambda recipe: recipe.parent.name)
def test_train_takes_our_recipes(recipe: Path, images: Path, tmp_path: Path) -> None:
    few = ["--batch-size", "16", "--epochs", "1", "--amp-dtype", "bfloat16"]
    run = train(images, tmp_path / "run", "--config", recipe, *DATA, *CPU, *few)
    assert list(run.epochs) == [0]
    assert f"Model {recipe.parent.name.replace('.', '_')} created" in run.log


@pytest.mark.parametrize(
    ("args", "kind"), [([], "Test"), (["--reparam"], "Test"), (["--use-ema"], "Test (EMA)")], ids=str
)
def test_validate_scores_as_train(args: list[str], kind: str, trained: Run, images: Path) -> None:
    options = ["--batch-size", "32", "--checkpoint", trained.folder / "last.pth.tar"]
    (found,) = evaluations(script("validate.py", "--data-dir", images, *TINY, *CPU, *options, *args).stderr)
    expected = evaluations(trained.log, kind)[-1]
    assert found.top1 == expected.top1
    assert found.loss == pytest.approx(expected.loss, abs=ROUNDING)


OTHERS: dict[str, list[str]] = {  # with their arguments
    "benchmark.py": [*CPU, "--bench", "both", "--num-bench-iter", "5", "--batch-size", "4", "--results-file", "OUT"],
    "inference.py": [*CPU, "--checkpoint", "RUN/last.pth.tar", "--data-dir", "IMAGES", "--results-dir", "."],
    "onnx_export.py": ["OUT", "--checkpoint", "RUN/last.pth.tar", "--reparam"],
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_scripts_take_networks(name: str, trained: Run, images: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    if name == "inference.py":
        pytest.importorskip("pandas", reason="timm's inference.py needs pandas")
    monkeypatch.chdir(tmp_path)
    places = {"RUN": str(trained.folder), "IMAGES": str(images), "OUT": "out.json"}
    args = [re.sub("RUN|IMAGES|OUT", lambda found: places[found[0]], arg) for arg in OTHERS[name]]
    script(name, *args, "--model", "test_g_resnext", "--num-classes", "4", "--img-size", "64")
    assert list(tmp_path.iterdir()), "it writes a file"


def test_convert_and_inspect_a_run(images: Path, tmp_path: Path, capsys: Capture) -> None:
    """A training with one input channel and another stem. validate.py scores the converted folders as train.py did."""
    from timm_dgconv.cli import main

    network = ["zero_init_last=False", "stem_type=deep", "stem_width=8", "avg_down=True"]
    options = ["--in-chans", "1", "--batch-size", "8", "--validation-batch-size", "32", "--lr", "0.05", "--epochs", "3"]
    kwargs = ["--warmup-epochs", "0", "--model-kwargs", *network, "complexity_weight=1.0"]
    run = train(images, tmp_path / "run", "--model", "test_g_resnext", *DATA, *CPU, *options, *kwargs)
    checkpoints = [str(run.folder / f"checkpoint-{epoch}.pth.tar") for epoch in range(3)]
    assert main(["inspect", *checkpoints, "--model", "test_g_resnext", "--json"]) == 0
    assert [report["epoch"] for report in json.loads(capsys.readouterr().out)] == [0, 1, 2]

    for form in ([], ["--compact"]):
        out = tmp_path / f"out{len(form)}"
        assert main(["convert", checkpoints[2], "--model", "test_g_resnext.mine", "--out", str(out), *form]) == 0
        if SCRIPTS_TIMM >= (1, 0, 26):  # older versions cannot load a folder
            model = ["--model", f"local-dir:{out}", "--pretrained", "--in-chans", "1", *DATA, *CPU]
            log = script("validate.py", "--data-dir", images, *model, "--batch-size", "32").stderr
            ((loss, top1),) = evaluations(log)
            assert top1 == pytest.approx(run.epochs[2].top1, abs=1e-3)
            assert loss == pytest.approx(run.epochs[2].loss, abs=ROUNDING)
