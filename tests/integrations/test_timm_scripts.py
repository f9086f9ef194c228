"""timm's scripts know the models without a change.

The scripts are in timm's repository only. TIMM_SCRIPTS_DIR is a checkout of a release of it.
"""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

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

RECIPES = Path(__file__).parents[1] / "hub_configs"
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


def test_train(trained: Run) -> None:
    assert list(trained.epochs) == [0, 1]
    assert len(evaluations(trained.log)) == 2
    of_average = evaluations(trained.log, "Test (EMA)")
    assert [(round(loss, 3), top1) for loss, top1 in trained.epochs.values()] == of_average


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*/args.yaml")), ids=lambda recipe: recipe.parent.name)
def test_train_with_a_recipe(recipe: Path, images: Path, tmp_path: Path) -> None:
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


# Run a script, and kill it at the n-th (from 0) optimizer step, os.replace or os.link, or after it has written a share
# of the n-th checkpoint.
KILLED = """
    import io, itertools, os, runpy, signal, sys, torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    where, when, *sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(sys.argv[0])
    count, save = itertools.count(), torch.save

    def die(*args):
        if next(count) == int(when):
            os.kill(os.getpid(), signal.SIGKILL)

    def write_share(state, path):
        buffer = io.BytesIO()
        save(state, buffer)
        with open(path, "wb", buffering=0) as file:
            start = int(float(where) * len(buffer.getvalue()))
            file.write(buffer.getvalue()[:start])
            die()
            file.write(buffer.getvalue()[start:])

    if where == "step":
        register_optimizer_step_post_hook(die)
    elif where in ("replace", "link"):
        real = getattr(os, where)
        setattr(os, where, lambda *args: die() or real(*args))
    else:
        torch.save = write_share
    runpy.run_path(sys.argv[0], run_name="__main__")
"""

# Run a script, and save the restored checkpoint before the first step.
RESTORED = """
    import os, runpy, sys

    path, *sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(sys.argv[0])
    from timm.utils import CheckpointSaver

    class Saver(CheckpointSaver):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._save(path, 0)

    import timm.utils
    timm.utils.CheckpointSaver = Saver
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("where", "when", "files", "resumes"),
    [
        ("step", 6, ["checkpoint-0", "last", "model_best"], "last"),  # in the second of three epochs
        pytest.param("0", 1, ["checkpoint-0", "last", "model_best", "tmp"], "last", marks=pytest.mark.slow),
        ("0.5", 1, ["checkpoint-0", "last", "model_best", "tmp"], "last"),  # in the second checkpoint
        pytest.param("0.999", 1, ["checkpoint-0", "last", "model_best", "tmp"], "last", marks=pytest.mark.slow),
        # The old file is deleted, and the new one is complete and not renamed yet.
        pytest.param("replace", 1, ["checkpoint-0", "model_best", "tmp"], "checkpoint-0", marks=pytest.mark.slow),
        # The new file has one of its two names. The first epoch made two links.
        pytest.param("link", 2, ["checkpoint-0", "last", "model_best"], "last", marks=pytest.mark.slow),
    ],
)
def test_resume_after_a_kill(
    where: str, when: int, files: list[str], resumes: str, images: Path, tmp_path: Path
) -> None:
    """Every file except tmp.pth.tar is complete, and train.py restores gates, momentum and average from it."""
    model = [*TINY[:4], "complexity_target=0.2", *DATA, *CPU]
    options = [*TRAIN, *EMA, "--opt", "momentum", "--epochs", "3"]
    run = [SCRIPTS / "train.py", "--data-dir", images, "--output", tmp_path, *model, *options]
    command = [sys.executable, "-c", dedent(KILLED), where, str(when), *run, "--experiment", "killed"]
    killed = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-5000:]
    names = [name.removesuffix(".pth.tar") for name in os.listdir(tmp_path / "killed") if name.endswith(".pth.tar")]
    assert sorted(names) == files
    whole = {
        name: torch.load(tmp_path / "killed" / f"{name}.pth.tar", weights_only=False)
        for name in files
        if name != "tmp" or where == "replace"
    }
    saved = whole[resumes]
    assert saved["epoch"] == (1 if where == "link" else 0)

    last = tmp_path / "killed" / f"{resumes}.pth.tar"
    restored = tmp_path / "restored.pt"
    command = [sys.executable, "-c", dedent(RESTORED), restored, *run, "--experiment", "on", "--resume", last]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-5000:]
    assert [int(row["epoch"]) for row in read_csv(tmp_path / "on" / "summary.csv")] == [*range(saved["epoch"] + 1, 3)]
    found = torch.load(restored, weights_only=False)
    assert any(name.endswith("gate") for name in found["state_dict"])
    assert len(found["optimizer"]["state"]) == len(saved["optimizer"]["state"]) > 0
    assert all("momentum_buffer" in state for state in found["optimizer"]["state"].values())
    torch.testing.assert_close(found["optimizer"]["state"], saved["optimizer"]["state"], rtol=0, atol=0)
    for weights in ("state_dict", "state_dict_ema"):
        torch.testing.assert_close(found[weights], saved[weights], rtol=0, atol=0)
    gates = [name for name in saved["state_dict"] if name.endswith("gate")]
    assert not any(torch.equal(saved["state_dict"][name], saved["state_dict_ema"][name]) for name in gates)


@pytest.mark.parametrize(
    ("checkpoint", "kind", "args"),
    [
        (".", "Test (EMA)", ["--use-ema"]),  # all checkpoints in the folder
        ("last.pth.tar", "Test", []),
        ("last.pth.tar", "Test", ["--reparam"]),
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
    # Other kernels and folded norms round differently in bfloat16.
    tolerance = 2e-2 if {"--channels-last", "--reparam"} & set(args) else ROUNDING
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


def test_inference(trained: Run, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("pandas", reason="timm's inference.py needs pandas")
    options = ["--checkpoint", trained.folder / "last.pth.tar", "--include-index", "--label-type", "none"]
    results = ["--results-dir", tmp_path, "--results-file", "results.csv"]
    script("inference.py", "--data-dir", images, *TINY, *CPU, *AMP, *options, *results)
    rows = read_csv(tmp_path / "results.csv")
    assert sorted(row["filename"] for row in rows) == sorted(path.name for path in images.glob("validation/*/*"))
    right = [row["filename"].startswith(sorted(COLOURS)[int(row["index"])]) for row in rows]
    assert 100 * sum(right) / len(right) == trained.epochs[1].top1  # inference.py uses the averaged model


def test_benchmark(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    tiny = ["--model", "test_g_resnext", "--num-classes", "4", "--img-size", "64", "--batch-size", "4"]
    few = ["--num-warm-iter", "1", "--num-bench-iter", "5"]
    script("benchmark.py", *tiny, *CPU, *few, "--bench", "both", "--results-file", results, "--results-format", "json")
    scores = json.loads(results.read_text())
    assert scores["infer_samples_per_sec"] > 0
    assert scores["train_samples_per_sec"] > 0


def test_g_resnext50(images: Path, tmp_path: Path) -> None:
    model = ["--model", "g_resnext50", "--model-kwargs", "zero_init_last=False", *DATA, *CPU]
    options = ["--batch-size", "32", "--lr", "2e-3", "--warmup-epochs", "0", "--epochs", "1", "--checkpoint-hist", "1"]
    run = train(images, tmp_path / "run", *model, *options)
    last = run.folder / "last.pth.tar"
    as_train = ["--batch-size", "32", "--use-train-size"]  # validate.py crops for the test size if there is one
    log = script("validate.py", "--data-dir", images, *model, *as_train, "--checkpoint", last).stderr
    shutil.rmtree(run.folder)  # 0.5 GB
    (loss, top1) = evaluations(log)[0]
    assert top1 == run.epochs[0].top1
    assert loss == pytest.approx(run.epochs[0].loss, abs=ROUNDING)


@pytest.mark.parametrize("accumulated", ["1", "4"])
def test_complexity_weight(accumulated: str, images: Path, tmp_path: Path) -> None:
    """One optimizer step with and without the weight: the gates differ by lr * weight * gradient of its log."""
    import timm

    from timm_dgconv import complexity

    lr, weight = 0.05, 0.1
    torch.manual_seed(0)
    model = timm.create_model("test_g_resnext", num_classes=4, zero_init_last=False)
    names = [name for name, _ in model.named_parameters() if name.endswith("gate")]
    gates = [model.get_parameter(name) for name in names]
    with torch.no_grad():
        for gate in gates:
            gate.copy_(torch.where(torch.rand_like(gate) < 0.5, -0.5, 0.5))
    torch.save(model.state_dict(), tmp_path / "initial.pth")
    expected = torch.autograd.grad(complexity(model).log(), gates)
    batches = ["--batch-size", str(64 // int(accumulated)), "--grad-accum-steps", accumulated, "--epochs", "1"]
    sgd = ["--opt", "momentum", "--momentum", "0", "--weight-decay", "0", "--clip-grad", "1"]
    rates = ["--lr", str(lr), "--warmup-epochs", "0", "--initial-checkpoint", tmp_path / "initial.pth"]
    stepped = []
    for value in (weight, 0):
        kwargs = ["--model-kwargs", "zero_init_last=False", f"complexity_weight={value}"]
        run = train(images, tmp_path / f"{value}", *TINY, *CPU, *batches, *sgd, *rates, *kwargs)
        stepped.append(torch.load(run.folder / "last.pth.tar", weights_only=False)["state_dict"])
    for name, term in zip(names, expected, strict=True):
        torch.testing.assert_close(stepped[0][name] - stepped[1][name], -lr * weight * term, rtol=2e-2, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_average_of_checkpoints(dtype: torch.dtype, tmp_path: Path) -> None:
    """The sign of the averaged gate decides. The average of opposite gates is 0.0, which is open."""
    import timm

    from timm_dgconv import DGConv2d

    models = [timm.create_model("test_g_resnext", num_classes=4).to(dtype) for _ in range(2)]
    for sign, model in zip((1, -1), models, strict=True):
        with torch.no_grad():
            model.layer1[0].conv2.gate.copy_(torch.tensor([3.0, -1.0, 1.0, -3.0]) + sign * 2)  # 2 and 8 groups
            model.layer2[0].conv2.gate.fill_(sign * 1e-8)
            model.layer3[0].conv2.gate.fill_(-1e-8)
    for number, model in enumerate(models):
        torch.save({"state_dict": model.state_dict()}, tmp_path / f"checkpoint-{number}.pth.tar")
    averaged = tmp_path / "averaged.pth"
    script("avg_checkpoints.py", "--input", tmp_path, "--no-sort", "--output", averaged)
    model = timm.create_model("test_g_resnext", num_classes=4, checkpoint_path=str(averaged))
    for name, value in model.named_parameters():
        mean = sum(other.get_parameter(name).double() for other in models) / 2
        torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-9)
    convs = [module for module in model.modules() if isinstance(module, DGConv2d)]
    assert [conv.num_groups for conv in convs[:3]] == [4, 1, 16]
    assert model.eval()(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_convert_and_inspect_a_run(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A training with one input channel and another stem. validate.py scores the converted folders as train.py did."""
    from timm_dgconv.cli import main

    network = ["zero_init_last=False", "stem_type=deep", "stem_width=8", "avg_down=True"]
    options = ["--in-chans", "1", "--batch-size", "8", "--validation-batch-size", "32", "--lr", "0.05", "--epochs", "3"]
    kwargs = ["--warmup-epochs", "0", "--model-kwargs", *network, "complexity_weight=1.0"]
    run = train(images, tmp_path / "run", "--model", "test_g_resnext", *DATA, *CPU, *options, *kwargs)
    checkpoints = [str(run.folder / f"checkpoint-{epoch}.pth.tar") for epoch in range(3)]
    plot = tmp_path / "groups.png"
    assert main(["inspect", *checkpoints, "--model", "test_g_resnext", "--json", "--plot", str(plot)]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert [report["epoch"] for report in reports] == [0, 1, 2]
    weights = torch.load(checkpoints[2], weights_only=False)["state_dict"]
    closed = [int(gate.lt(0).sum()) for name, gate in weights.items() if name.endswith("gate")]
    assert [layer["groups"] for layer in reports[2]["layers"]] == [2**number for number in closed]
    assert plot.read_bytes().startswith(b"\x89PNG")

    for form in ([], ["--compact"]):
        out = tmp_path / f"out{len(form)}"
        assert main(["convert", checkpoints[2], "--model", "test_g_resnext.mine", "--out", str(out), *form]) == 0
        config = json.loads((out / "config.json").read_text())
        assert config["model_args"]["in_chans"] == config["pretrained_cfg"]["input_size"][0] == 1
        assert config["model_args"]["stem_width"] == 8
        assert "complexity_weight" not in config["model_args"]
        if SCRIPTS_TIMM >= (1, 0, 26):  # older versions cannot load a folder
            model = ["--model", f"local-dir:{out}", "--pretrained", "--in-chans", "1", *DATA, *CPU]
            log = script("validate.py", "--data-dir", images, *model, "--batch-size", "32").stderr
            ((loss, top1),) = evaluations(log)
            assert top1 == pytest.approx(run.epochs[2].top1, abs=1e-3)
            assert loss == pytest.approx(run.epochs[2].loss, abs=ROUNDING)


def load(file: Path) -> torch.nn.Module:
    """Load a file into a model, with all its weights."""
    import timm

    return timm.create_model("test_g_resnext", num_classes=4, checkpoint_path=str(file)).eval()


def test_average_of_a_run(trained: Run, tmp_path: Path) -> None:
    checkpoints = [trained.folder / f"checkpoint-{epoch}.pth.tar" for epoch in range(2)]
    weights = [torch.load(file, weights_only=False)["state_dict_ema"] for file in checkpoints]
    gates = [key for key in weights[0] if key.endswith("gate")]
    assert not any(torch.equal(weights[0][key], weights[1][key]) for key in gates)
    output = ["--output", tmp_path / "averaged.safetensors", "--safetensors"]
    script("avg_checkpoints.py", "--input", trained.folder, "--filter", "checkpoint-*.pth.tar", *output)
    averaged = load(tmp_path / "averaged.safetensors").state_dict()
    for key in [*gates, "layer2.0.conv2.weight", "layer2.0.bn2.running_var"]:
        expected = (weights[0][key].double() + weights[1][key].double()) / 2
        torch.testing.assert_close(averaged[key].double(), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("safetensors", [False, True])
def test_clean_checkpoint(safetensors: bool, trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # clean_checkpoint.py writes a temporary file there
    name = "clean.safetensors" if safetensors else "clean.pth"
    options = ["--output", tmp_path / name, *(["--safetensors"] if safetensors else [])]
    script("clean_checkpoint.py", "--checkpoint", trained.folder / "last.pth.tar", *options)
    (file,) = tmp_path.iterdir()  # with a hash in its name
    expected = torch.load(trained.folder / "last.pth.tar", weights_only=False)["state_dict_ema"]
    torch.testing.assert_close(load(file).state_dict(), dict(expected), rtol=0, atol=0)


@pytest.mark.parametrize("reparam", [False, True])
def test_onnx_export(reparam: bool, trained: Run, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs what timm's onnx_export.py wrote")
    checkpoint, file = trained.folder / "last.pth.tar", tmp_path / "model.onnx"
    options = ["--model", "test_g_resnext", "--num-classes", "4", "--img-size", "64", "--checkpoint", checkpoint]
    script("onnx_export.py", file, *options, "--check-forward", *(["--reparam"] if reparam else []))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for count in (1, 3):
        x = torch.randn(count, 3, 64, 64)
        (logits,) = session.run(None, {"input0": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), load(checkpoint)(x).detach(), rtol=1e-4, atol=1e-4)


def test_original_checkpoint(original: tuple[Path, torch.Tensor, torch.Tensor], images: Path, tmp_path: Path) -> None:
    """The file of the original release loads with all options of the scripts for files."""
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
        for name in ("conv1.weight", "layer4.2.conv2.conv.weight", "layer3.0.conv2.gate"):
            assert torch.equal(state_dict[name.replace(".conv.", ".")], weights[f"module.{name}"])
        shutil.rmtree(run.folder)  # 0.5 GB


def test_unknown_argument_is_named(images: Path, tmp_path: Path) -> None:
    unknown = ["--model-kwargs", "nonsense=1"]
    result = script("train.py", "--data-dir", images, "--output", tmp_path, *TINY, *CPU, *unknown, fails=True)
    assert "'nonsense'" in result.stderr.splitlines()[-1]
    assert str(SCRIPTS / "timm" / "models") in result.stderr  # the scripts use the timm next to them


@pytest.mark.gpu
def test_train_on_cuda(images: Path, tmp_path: Path) -> None:
    cuda = ["--device", "cuda", "--amp", "--channels-last"]
    run = train(images, tmp_path / "run", *TINY, *cuda, *TRAIN, "--epochs", "1")
    assert list(run.epochs) == [0]
    assert np.isfinite(run.epochs[0].loss)


@pytest.mark.parametrize("steering", [[], ["complexity_target=0.1"]], ids=["free", "steered"])
def test_train_stops_when_it_diverges(images: Path, tmp_path: Path, steering: list[str]) -> None:
    """The last line names the nan gates."""
    kwargs = ["--model-kwargs", "zero_init_last=False", *steering]
    args = ["--model", "test_g_resnext", *kwargs, *DATA, *CPU, *TRAIN, "--lr", "1e30", "--epochs", "3"]
    result = script("train.py", "--data-dir", images, "--output", tmp_path, *args, fails=True)
    assert re.search(r"RuntimeError: gates of a DGConv2d are nan: .*diverged", result.stderr.strip().splitlines()[-1])
