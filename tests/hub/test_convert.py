"""timm-dgconv convert: checkpoints become folders that timm loads, with the outputs of the checkpoint."""

import argparse
import copy
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from conftest import assert_refused, outputs, trained
from torch import nn
from torch.testing import assert_close

from timm_dgconv import DGConv2d, group_report, layer_groups
from timm_dgconv.cli import main
from timm_dgconv.hub import convert
from timm_dgconv.hub.model import BASELINE

HUB_CONFIGS = Path(__file__).parents[2] / "hub_configs"
TINY = "test_g_resnext.mine"
TIMM = tuple(int(number) for number in re.findall(r"\d+", timm.__version__)[:3])
LOADS_FOLDERS = TIMM >= (1, 0, 26)  # earlier versions read the safetensors file in a folder as a pickle
RECORDS_ARGS = TIMM >= (1, 0, 31)  # in config.json


def load(folder: Path) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True) if LOADS_FOLDERS else convert.reload(folder)


def original(model: nn.Module) -> dict[str, Any]:
    """The checkpoint that the original release would have written of this model."""
    state_dict = {}
    for name, value in model.state_dict().items():
        layer = name.rpartition(".")[0]
        name = name.replace("unsorted_gate", "gate")
        if isinstance(model.get_submodule(layer), DGConv2d) and name.endswith(".weight"):
            state_dict[f"module.{layer}.D"], state_dict[f"module.{layer}.I"] = torch.eye(2), torch.ones(2, 2)
            name = f"{layer}.conv.weight"
        state_dict[f"module.{name}"] = value
    return {"epoch": 120, "arch": "g_resnext50", "state_dict": state_dict, "best_prec1": torch.tensor(78.6)}


def train_checkpoint(model: nn.Module, **model_kwargs: Any) -> dict[str, Any]:
    """The checkpoint that timm's train.py writes."""
    args = argparse.Namespace(lr=0.1, gp=model_kwargs.pop("global_pool", None), model_kwargs=model_kwargs)
    return {"epoch": 3, "arch": "test_g_resnext", "state_dict": model.state_dict(), "args": args}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tiny(**kwargs: Any) -> Any:
    return trained(num_classes=11, **kwargs).eval()


def another() -> nn.Module:
    return timm.create_model("test_g_resnext", num_classes=11, zero_init_last=False).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pth"
    torch.save(tiny().state_dict(), path)
    return str(path)


@pytest.mark.parametrize("compact", [False, True], ids=["plain", "compact"])
@pytest.mark.parametrize(
    "form", ["original.pth.tar", "original_2019.pth.tar", "train.pth.tar", "bare.pt", "safetensors"]
)
def test_every_form_of_checkpoint_keeps_its_outputs(
    form: str, compact: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny(**{"sort": False} if "original" in form or form == "bare.pt" else {})
    source, out = tmp_path / "source" / f"checkpoint.{form.partition('.')[2] or form}", tmp_path / "out"
    source.parent.mkdir()
    if form == "safetensors":
        safetensors.torch.save_file(model.state_dict(), source)
    elif form == "train.pth.tar":
        torch.save(train_checkpoint(another()) | {"state_dict_ema": model.state_dict()}, source)
    elif form == "bare.pt":
        torch.save(copy.deepcopy(model).to(memory_format=torch.channels_last).state_dict(), source)
    else:
        torch.save(original(model), source, _use_new_zipfile_serialization="2019" not in form)
    options = ["--compact"] if compact else []
    assert main(["convert", str(source), "--model", TINY, "--out", str(out), *options]) == 0
    assert names(tmp_path) == ["out", "source"]
    assert names(out) == ["README.md", "config.json", "groups.png", "model.safetensors"]
    first = model.layer1[0].conv2
    row = rf"\| layer1\.0\.conv2 \| {first.in_channels} -> {first.out_channels} \| {first.num_groups} \|"
    assert re.search(row, (out / "README.md").read_text())
    assert ("The numbers of groups per layer are" in (out / "README.md").read_text()) is compact
    printed = capsys.readouterr().out
    for path in out.iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert re.search(rf"{path.name} +{path.stat().st_size:,} bytes  sha256 {digest}\n", printed)

    loaded, expected = load(out), outputs(model)
    assert any(isinstance(module, DGConv2d) for module in loaded.modules()) is not compact
    assert loaded.pretrained_cfg["tag"] == "mine"
    assert_close(outputs(loaded), expected, rtol=0, atol=1e-5 * expected.abs().max().item() if compact else 0)
    config = json.loads((out / "config.json").read_text())
    assert config["num_classes"] == config["pretrained_cfg"]["num_classes"] == 11
    assert config.get("model_args", {}).get("groups") == (layer_groups(model) if compact else None)
    with safetensors.safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_averaged_weights_are_optional(tmp_path: Path) -> None:
    average, other = tiny(), another()
    torch.save({"model": other.state_dict(), "model_ema": average.state_dict()}, tmp_path / "both.pth")
    for option, expected in ([], average), (["--no-ema"], other):
        out = tmp_path / f"out{len(option)}"
        assert main(["convert", str(tmp_path / "both.pth"), "--model", TINY, "--out", str(out), *option]) == 0
        assert torch.equal(outputs(load(out)), outputs(expected))


# Trainings with arguments that change the network.

STEM = dict(stem_type="deep", stem_width=8, avg_down=True)
NETWORKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # arguments of the model, and `args.model_kwargs`
    "in_chans=1": (dict(in_chans=1), dict(complexity_target=0.2)),
    "in_chans=4": (dict(in_chans=4, **STEM), STEM),
    "stem": (STEM, dict(STEM, complexity_weight=0.1)),
    "gp": (dict(global_pool="avgmax"), dict(global_pool="avgmax")),
    "sort": (dict(sort=False), dict(sort=False, freeze_groups=True)),
}


@pytest.mark.parametrize("compact", [False, True], ids=["plain", "compact"])
@pytest.mark.parametrize("network", NETWORKS)
def test_arguments_of_the_network_are_kept(
    network: str, compact: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kwargs, stored = NETWORKS[network]
    model = trained(num_classes=7, **kwargs).eval()
    source, out = tmp_path / "last.pth.tar", tmp_path / "out"
    torch.save(train_checkpoint(model, **stored), source)
    options = ["--compact"] if compact else []
    assert main(["convert", str(source), "--model", TINY, "--out", str(out), *options]) == 0
    tolerance = 1e-5 * outputs(model).abs().max().item() if compact else 0
    assert_close(outputs(load(out)), outputs(model), rtol=0, atol=tolerance)
    config = json.loads((out / "config.json").read_text())
    args = config["model_args"]
    kept = [name for name in kwargs if not (compact and name == "sort")]  # group convolutions have no gates
    assert {name: args[name] for name in kept} == {name: kwargs[name] for name in kept}
    assert not {"complexity_weight", "complexity_target", "freeze_groups", "nested", "num_classes"} & set(args)
    assert config["pretrained_cfg"]["input_size"][0] == kwargs.get("in_chans", 3)

    capsys.readouterr()
    found = []
    for inspected in (source, out):
        assert main(["inspect", str(inspected), "--model", "test_g_resnext", "--json"]) == 0
        found += json.loads(capsys.readouterr().out)
    expected = json.loads(json.dumps(group_report(model).as_dict()))
    assert {**expected, **found[0]} == found[0]
    assert (found[0]["epoch"], found[1]["epoch"]) == (3, None)
    assert found[1]["learned"] == expected["learned"]
    assert main(["publish", str(out), "--repo", "owner/name", "--dry-run"]) == 0


@pytest.mark.parametrize("stored", [{}, dict(STEM, stem_width=16)], ids=["no arguments", "other arguments"])
def test_model_kwargs_override_the_checkpoint(stored: dict[str, Any], tmp_path: Path) -> None:
    model = trained(**STEM).eval()
    source, out = tmp_path / "last.pth.tar", tmp_path / "out"
    torch.save(train_checkpoint(model, **stored), source)
    options = ["--model-kwargs", *(f"{name}={value}" for name, value in STEM.items())]
    assert main(["convert", str(source), "--model", TINY, "--out", str(out), *options]) == 0
    assert main(["inspect", str(source), "--model", "test_g_resnext", *options]) == 0
    assert torch.equal(outputs(load(out)), outputs(model))


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        (["nonsense=1"], "test_g_resnext cannot be built with {'nonsense': 1}: "),
        (["stem_type=deep", "stem_width=x"], "cannot be built with {'stem_type': 'deep', 'stem_width': 'x'}"),
        (["stem_type=deep"], "is a checkpoint of another network than test_g_resnext: "),
    ],
)
@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_wrong_model_kwargs_are_named_in_one_line(
    command: str, kwargs: list[str], said: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model-kwargs", *kwargs, *(["--out", str(tmp_path / "out")] if command == "convert" else [])]
    assert_refused(capsys, [command, checkpoint, "--model", TINY, *options], f"timm-dgconv {command}: ", said)
    assert names(tmp_path) == []


DATA = dict(mean=[0.3], std=[0.2], crop_pct=1.0, interpolation="bilinear")


def test_data_settings_of_the_training_are_kept(tmp_path: Path) -> None:
    model = trained(num_classes=7, in_chans=1).eval()
    checkpoint = train_checkpoint(model)
    vars(checkpoint["args"]).update(DATA, in_chans=1, img_size=48, input_size=None)
    torch.save(checkpoint, tmp_path / "last.pth.tar")
    for source, out, options in ("last.pth.tar", "plain", []), ("plain", "compact", ["--compact"]):
        args = [str(tmp_path / source), "--model", TINY, "--out", str(tmp_path / out), *options]
        assert main(["convert", *args]) == 0
        config = json.loads((tmp_path / out / "config.json").read_text())["pretrained_cfg"]
        assert config["input_size"] == [1, 48, 48]
        assert {name: config[name] for name in DATA} == DATA
        assert "test_input_size" not in config
        card = (tmp_path / out / "README.md").read_text()
        assert "Image size: 48 x 48" in card
        assert card.count('.convert("L")') == 3
    assert_close(outputs(load(tmp_path / "compact")), outputs(model), rtol=0, atol=1e-5)


# The baseline of the original release.


def test_timm_loads_the_converted_baseline_without_this_package(tmp_path: Path) -> None:
    torch.manual_seed(0)
    baseline = timm.create_model("resnext50_32x4d", zero_init_last=False).eval()
    for module in baseline.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    torch.save({"state_dict": {f"module.{k}": v for k, v in baseline.state_dict().items()}}, tmp_path / "b.pth.tar")
    out, expected = tmp_path / "out", outputs(baseline)
    assert main(["convert", str(tmp_path / "b.pth.tar"), "--model", BASELINE, "--out", str(out)]) == 0
    for name in ("README.md", "config.json") if RECORDS_ARGS else ("README.md",):
        assert (out / name).read_bytes() == (HUB_CONFIGS / BASELINE / name).read_bytes()
    code = f"""
import sys, timm, torch
if {LOADS_FOLDERS}:
    model = timm.create_model("local-dir:{out}", pretrained=True)
else:
    model = timm.create_model("resnext50_32x4d", checkpoint_path="{out}/model.safetensors")
assert not [name for name in sys.modules if name.startswith("timm_dgconv")]
images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
with torch.inference_mode():
    torch.save(model.eval()(images), "{tmp_path}/outputs.pt")
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, check=True)
    assert torch.equal(torch.load(tmp_path / "outputs.pt", weights_only=True), expected)

    ours = timm.create_model("g_resnext50", checkpoint_path=out / "model.safetensors")
    assert_close(outputs(ours), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    args = ["--model", "g_resnext50.resnext_mine", "--out", str(tmp_path / "compact"), "--compact"]
    assert main(["convert", str(out / "model.safetensors"), *args]) == 0
    compact = safetensors.torch.load_file(tmp_path / "compact" / "model.safetensors")
    assert all(torch.equal(compact[name], value) for name, value in baseline.state_dict().items())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model", "resnet50.a1_in1k"], "unknown model 'resnet50.a1_in1k'; use g_resnet18.TAG"),
        (["--model", "g_resnext50.a/b"], "unknown model 'g_resnext50.a/b'"),
        (["--out", "HERE"], "exists; use a new folder for --out"),
        (["--out", "HERE/none/out"], "is not a folder; create it"),
        (["--model", BASELINE, "--compact"], "without --compact"),
    ],
)
def test_wrong_options_are_named_in_one_line(
    args: list[str], said: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", TINY, "--out", str(tmp_path / "out"), *(arg.replace("HERE", str(tmp_path)) for arg in args)]
    assert_refused(capsys, ["convert", checkpoint, *options], said)
    assert names(tmp_path) == []


def test_other_outputs_after_the_conversion_are_an_error(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(convert, "reload", lambda folder: another())
    command = ["convert", checkpoint, "--model", TINY, "--out", str(tmp_path / "out")]
    assert_refused(capsys, command, "the outputs of the reloaded model differ by")
    assert names(tmp_path) == []


@pytest.mark.parametrize("point", ["reload", "list_files"])
def test_failed_conversion_leaves_nothing(
    point: str, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(folder: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(convert, point, fail)
    command = ["convert", checkpoint, "--model", TINY, "--out", str(tmp_path / "out")]
    assert_refused(capsys, command, "timm-dgconv convert: no space left on device\n")
    assert names(tmp_path) == []
