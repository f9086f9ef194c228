"""Convert and publish, and the way back: folders and the Hub, with the real client against hub_server."""

import argparse
import copy
import hashlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard
from PIL import Image
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn
from torch.testing import assert_close

import timm_dgconv
from timm_dgconv import DGConv2d, hub
from timm_dgconv.cli import main

HUB_CONFIGS = Path(__file__).parents[1] / "hub_configs"
NAMES = ["g_resnext50.dgconv_in1k", "g_resnext101.dgconv_in1k", hub.BASELINE]
TINY = "test_g_resnext.mine"
RECORDS_ARGS = hasattr(timm.models, "get_model_args")  # in config.json, timm >= 1.0.31
SCRIPTS = os.environ.get("TIMM_SCRIPTS_DIR")


def loads_folders(version: str) -> bool:
    """Before 1.0.26 timm took the safetensors file in a folder for a pickle."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3]) >= (1, 0, 26)


def has_scripts() -> bool:
    return SCRIPTS is not None and loads_folders(Path(SCRIPTS, "timm", "version.py").read_text())


def randomized(name: str, seed: int = 0, **kwargs: Any) -> nn.Module:
    """A model of which every number matters: timm starts with zeros at the end of each block."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(name, **kwargs).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 0.5, 0.1)
                nn.init.normal_(module.bias, 0, 0.1)
                nn.init.normal_(module.running_mean, 0, 0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def original(model: nn.Module) -> dict[str, Any]:
    """The checkpoint that the original release would have written of this model."""
    state_dict = {}
    for name, value in model.state_dict().items():
        layer = name.rpartition(".")[0]
        if isinstance(model.get_submodule(layer), DGConv2d) and name.endswith(".weight"):
            state_dict[f"module.{layer}.D"], state_dict[f"module.{layer}.I"] = torch.eye(2), torch.ones(2, 2)
            name = f"{layer}.conv.weight"
        state_dict[f"module.{name}"] = value
    return {"epoch": 120, "arch": "g_resnext50", "state_dict": state_dict, "best_prec1": torch.tensor(78.6)}


def outputs(model: nn.Module, size: int = 64) -> Tensor:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model.eval()(images)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return randomized("test_g_resnext", num_classes=11)


@pytest.fixture(scope="module")
def checkpoint(tiny: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pth.tar"
    torch.save(original(tiny), path)
    return path


@pytest.fixture(scope="module")
def folder(checkpoint: Path) -> Path:
    """A converted folder."""
    path = checkpoint.with_name("tiny")
    assert main(["convert", str(checkpoint), "--model", TINY, "--out", str(path)]) == 0
    return path


@pytest.mark.parametrize("compact", [False, True], ids=["plain", "compact"])
@pytest.mark.parametrize("form", ["original", "original_2019", "train.py", "bare.pt", "safetensors"])
def test_convert(tiny: nn.Module, form: str, compact: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "source" / "checkpoint.pth.tar", tmp_path / "out"
    source.parent.mkdir()
    if form == "safetensors":
        source = source.with_suffix(".safetensors")
        tensors = {name: value.contiguous() for name, value in tiny.state_dict().items()}
        safetensors.torch.save_file(tensors, source)
    elif form == "train.py":
        other = randomized("test_g_resnext", seed=1, num_classes=11).state_dict()
        state = {"state_dict": other, "state_dict_ema": tiny.state_dict(), "args": argparse.Namespace(lr=0.1)}
        torch.save(state, source)
    elif form == "bare.pt":
        source = source.with_suffix(".pt")
        torch.save(copy.deepcopy(tiny).to(memory_format=torch.channels_last).state_dict(), source)
    else:
        torch.save(original(tiny), source, _use_new_zipfile_serialization=form == "original")
    args = ["convert", str(source), "--model", TINY, "--out", str(out), *(["--compact"] if compact else [])]
    assert main(args) == 0
    assert names(tmp_path) == ["out", "source"]
    assert names(out) == ["README.md", "config.json", "model.safetensors"]
    printed = capsys.readouterr().out
    for path in out.iterdir():
        assert re.search(rf"{path.name} +{path.stat().st_size:,} bytes  sha256 {sha256(path)}\n", printed)

    model = (
        timm.create_model(f"local-dir:{out}", pretrained=True) if loads_folders(timm.__version__) else hub._reload(out)
    )
    assert any(isinstance(module, DGConv2d) for module in model.modules()) is not compact
    assert model.pretrained_cfg["tag"] == "mine"
    if compact:
        assert_close(outputs(model), outputs(tiny), rtol=0, atol=1e-5)
    else:
        assert torch.equal(outputs(model), outputs(tiny))
    config = json.loads((out / "config.json").read_text())
    assert config["num_classes"] == config["pretrained_cfg"]["num_classes"] == 11
    assert config.get("model_args", {}).get("groups") == (timm_dgconv.block_groups(tiny) if compact else None)
    with safetensors.safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_convert_without_the_averaged_weights(tiny: nn.Module, tmp_path: Path) -> None:
    other = randomized("test_g_resnext", seed=1, num_classes=11)
    torch.save({"model": other.state_dict(), "model_ema": tiny.state_dict()}, tmp_path / "both.pth")
    for option, expected in ([], tiny), (["--no-ema"], other):
        out = tmp_path / f"out{len(option)}"
        assert main(["convert", str(tmp_path / "both.pth"), "--model", TINY, "--out", str(out), *option]) == 0
        assert torch.equal(outputs(hub._reload(out)), outputs(expected))


def test_convert_baseline(tmp_path: Path) -> None:
    """The second file of the original release: timm alone loads the folder, and g_resnext50 its weights."""
    baseline = randomized("resnext50_32x4d")
    torch.save({"state_dict": {f"module.{k}": v for k, v in baseline.state_dict().items()}}, tmp_path / "b.pth.tar")
    out = tmp_path / "out"
    assert main(["convert", str(tmp_path / "b.pth.tar"), "--model", hub.BASELINE, "--out", str(out)]) == 0
    for name in ("README.md", "config.json") if RECORDS_ARGS else ("README.md",):
        assert (out / name).read_bytes() == (HUB_CONFIGS / hub.BASELINE / name).read_bytes()
    code = f"""
import sys, timm, torch
if {loads_folders(timm.__version__)}:
    model = timm.create_model("local-dir:{out}", pretrained=True)
else:
    model = timm.create_model("resnext50_32x4d", checkpoint_path="{out}/model.safetensors")
assert not [name for name in sys.modules if name.startswith("timm_dgconv")]
images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
with torch.inference_mode():
    torch.save(model.eval()(images), "{tmp_path}/outputs.pt")
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, check=True)
    assert torch.equal(torch.load(tmp_path / "outputs.pt", weights_only=True), outputs(baseline))

    ours = timm.create_model("g_resnext50", checkpoint_path=out / "model.safetensors")
    assert_close(outputs(ours), outputs(baseline), rtol=0, atol=1e-5 * outputs(baseline).abs().max().item())
    # And through convert, compact: the same numbers come out as went in.
    args = ["--model", "g_resnext50.resnext_mine", "--out", str(tmp_path / "compact"), "--compact"]
    assert main(["convert", str(out / "model.safetensors"), *args]) == 0
    weights = tmp_path / "compact" / "model.safetensors"
    assert weights.stat().st_size < 101e6
    loaded = safetensors.torch.load_file(weights)
    assert all(torch.equal(loaded[name], value) for name, value in baseline.state_dict().items())


class Code:
    """What a pickle of this does when it is loaded."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


ODD_ENTRIES: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "nan gates": ("layer3.0.conv2.gate", lambda gate: torch.where(gate > 0, float("nan"), gate)),
    "expanded": ("fc.weight", lambda weight: torch.ones(()).expand(1 << 30, weight.shape[1])),
    "sparse": ("fc.weight", Tensor.to_sparse),
    "complex": ("fc.weight", lambda weight: weight.to(torch.complex64)),
    "no values": ("fc.weight", lambda weight: weight.to("meta")),
}


def _write_refused(kind: str, tiny: nn.Module, path: Path, marker: Path) -> None:
    good = tiny.state_dict()
    if kind == "another width":
        torch.save(timm.create_model("test_g_resnext", channels=(32, 32, 48, 96)).state_dict(), path)
    elif kind == "another network":
        torch.save(timm.create_model("test_resnet").state_dict(), path)
    elif kind == "code":
        torch.save({"state_dict": good, "x": Code(f"touch {marker}")}, path)
    elif kind == "plain pickle with code":
        path.write_bytes(pickle.dumps(Code(f"touch {marker}")))
    elif kind == "old pickle with code":
        path.write_bytes(pickle.dumps(Code(f"touch {marker}"), protocol=2))
    elif kind == "three groups":
        weight = good["layer3.0.conv2.weight"]
        gated = {name: value for name, value in good.items() if name != "layer3.0.conv2.gate"}
        torch.save({**gated, "layer3.0.conv2.weight": weight[:, : weight.shape[1] // 3].clone()}, path)
    elif kind in ODD_ENTRIES:
        name, value = ODD_ENTRIES[kind]
        torch.save({**good, name: value(good[name])}, path)
    elif kind == "compressed":
        torch.save(good, path)
        with zipfile.ZipFile(path) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in contents.items():
                archive.writestr(name, data)
    elif kind == "a name of two lines":
        torch.save({**good, "more\n\x1b[31m" + "x" * 5000: torch.ones(1)}, path)
    elif kind == "no finite numbers":
        torch.save({**good, "fc.bias": good["fc.bias"] * float("nan")}, path)
    elif kind.startswith("truncated"):
        if path.suffix == ".safetensors":
            safetensors.torch.save_file({k: v.clone() for k, v in good.items()}, path)
        else:
            torch.save(good, path, _use_new_zipfile_serialization=kind != "truncated, 2019")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind != "missing":
        contents = {"empty": b"", "a page": b"<!DOCTYPE html><html>virus scan", "noise": bytes(range(256)) * 9}
        if kind in contents:
            path.write_bytes(contents[kind])
        else:
            torch.save({"a list": [1, 2], "nothing": {}, "other entries": {"net": good}}[kind], path)


@pytest.mark.parametrize(
    ("kind", "suffix", "said"),
    [
        ("missing", ".pth", "there is no file"),
        ("empty", ".pth", "is empty"),
        ("empty", ".safetensors", "is empty"),
        ("truncated", ".pth", "is truncated or damaged"),
        ("truncated, 2019", ".pth.tar", "is truncated or damaged"),
        ("truncated", ".safetensors", "is truncated or damaged"),
        ("a page", ".pth", "is no checkpoint"),
        ("noise", ".bin", "is no checkpoint"),
        ("a list", ".pt", "is no checkpoint"),
        ("nothing", ".pth", "has no state dict that timm knows"),
        ("other entries", ".pth", "entry 'net' is a "),
        ("another network", ".pth", "is a checkpoint of another network than test_g_resnext: "),
        ("another width", ".pth", "is a checkpoint of another network than test_g_resnext: "),
        ("three groups", ".pth", "layer3.0.conv2: the checkpoint has a group convolution with 3 groups"),
        ("no finite numbers", ".pth", "are not finite"),
        ("nan gates", ".pth", "is broken: layer3.0.conv2.gate has gates that are nan"),
        ("expanded", ".pth", "entry 'fc.weight' has 412,316,860,416 numbers, of which the file has 4 bytes"),
        ("sparse", ".pth", "entry 'fc.weight' is a tensor of another kind (torch.sparse_coo, torch.float32)"),
        ("complex", ".pth", "entry 'fc.weight' is a tensor of another kind (torch.strided, torch.complex64)"),
        ("no values", ".pth", "entry 'fc.weight' is a tensor of another kind (meta)"),
        ("compressed", ".pth", "save it again with torch.save"),
        ("a name of two lines", ".pth", "test_g_resnext has no more"),
        ("code", ".pth", "wants to run posix.system when it is loaded: refused, not executed"),
        ("plain pickle with code", ".pt", "refused, not executed"),
        ("old pickle with code", ".bin", "wants to run posix.system when it is loaded: refused"),
    ],
)
def test_convert_refuses(
    tiny: nn.Module, kind: str, suffix: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / f"source{suffix}"
    _write_refused(kind, tiny, source, tmp_path / "executed")
    before = names(tmp_path)
    assert main(["convert", str(source), "--model", TINY, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("timm-dgconv convert: ")
    assert str(source) in error
    assert said in error
    assert len(error.splitlines()) == 1
    assert names(tmp_path) == before, "nothing is left, and nothing was executed"


@pytest.mark.parametrize(
    "kind", ["nan gates", "expanded", "sparse", "complex", "no values", "compressed", "three groups"]
)
def test_inspect_refuses(kind: str, tiny: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source.pth"
    _write_refused(kind, tiny, source, tmp_path / "executed")
    assert main(["inspect", str(source), "--model", TINY]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"timm-dgconv inspect: {source} ")
    assert len(error.splitlines()) == 1


@pytest.mark.filterwarnings("error")
def test_inspect_of_what_cannot_be_mapped(tiny: nn.Module, tmp_path: Path) -> None:
    """A file of 2019 that has an archive behind it looks like one."""
    source, archive = tmp_path / "source.pth.tar", tmp_path / "archive"
    torch.save(original(tiny), source, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("x", "")
    source.write_bytes(source.read_bytes() + archive.read_bytes())
    assert main(["inspect", str(source), "--model", TINY]) == 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model", "resnet50.a1_in1k"], "unknown model 'resnet50.a1_in1k'; expected g_resnext50.TAG"),
        (["--model", "g_resnext50"], "unknown model 'g_resnext50'"),
        (["--model", "g_resnext50.a/b"], "unknown model 'g_resnext50.a/b'"),
        (["--out", "HERE"], "exists; name a new folder with --out"),
        (["--out", "HERE/none/out"], "is no folder; create it"),
        (["--model", hub.BASELINE, "--compact"], "without --compact"),
    ],
)
def test_convert_refuses_options(
    args: list[str], said: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", TINY, "--out", str(tmp_path / "out"), *(arg.replace("HERE", str(tmp_path)) for arg in args)]
    assert main(["convert", str(checkpoint), *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert names(tmp_path) == []


@pytest.mark.parametrize("point", ["hub._describe", "hub._files"])
def test_killed_conversion_leaves_nothing_that_looks_whole(point: str, checkpoint: Path, tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
from timm_dgconv import cli, hub
{point} = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
cli.main(sys.argv[1:])
"""
    args = ["convert", checkpoint, "--model", TINY, "--out", tmp_path / "out"]
    result = subprocess.run([sys.executable, "-c", code, *args], check=False)
    assert result.returncode == -signal.SIGKILL
    assert [name.startswith(".out.partial-") for name in names(tmp_path)] == [True]
    assert main(list(map(str, args))) == 0, "it does not stand in the way of the next run"


@pytest.mark.parametrize("point", ["_describe", "_reload", "_files"])
def test_failed_conversion_leaves_nothing(
    point: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(hub, point, fail)
    assert main(["convert", str(checkpoint), "--model", TINY, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "timm-dgconv convert: no space left on device\n"
    assert names(tmp_path) == []


def test_convert_notices_other_outputs(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "_reload", lambda folder: randomized("test_g_resnext", seed=1, num_classes=11))
    assert main(["convert", str(checkpoint), "--model", TINY, "--out", str(tmp_path / "out")]) == 2
    assert "the reloaded model's outputs differ by" in capsys.readouterr().err
    assert names(tmp_path) == []


@pytest.mark.skipif(not has_scripts(), reason="TIMM_SCRIPTS_DIR is not set to a checkout of timm >= 1.0.26")
def test_validate_takes_the_folders(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    compact = tmp_path / "compact"
    assert main(["convert", str(checkpoint), "--model", TINY, "--out", str(compact), "--compact"]) == 0
    random = torch.Generator().manual_seed(0)
    for number in range(22):  # 11 classes
        path = tmp_path / "images" / f"{number % 11:02}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(256, (64, 64, 3), generator=random).byte().numpy()).save(path)
    losses = set()
    for model in (
        ["--model", "test_g_resnext", "--num-classes", "11", "--checkpoint", checkpoint],
        ["--model", f"local-dir:{folder}", "--pretrained"],
        ["--model", f"local-dir:{compact}", "--pretrained"],
    ):
        script = Path(str(SCRIPTS), "validate.py").resolve()
        command = [
            sys.executable,
            script,
            "--data-dir",
            tmp_path / "images",
            "--device",
            "cpu",
            "--workers",
            "1",
            *model,
        ]
        result = subprocess.run([*command, "--batch-size", "22"], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        losses |= set(re.findall(r"Loss: .*?\( *([\d.]+)\)", result.stderr))
    assert len(losses) == 1


# hub_configs


def test_hub_configs_are_complete() -> None:
    ours = [name for arch in ("g_resnext50", "g_resnext101") for name in timm.models.get_arch_pretrained_cfgs(arch)]
    own = [name for name in ours if not name.split(".")[1].startswith("resnext_")]
    assert names(HUB_CONFIGS) == sorted([*own, hub.BASELINE]) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_hub_config(name: str, tmp_path: Path) -> None:
    """As `describe` writes it (and so `convert`), as timm's save_config_for_hf, and as default_cfgs."""
    hub.describe(name, tmp_path)
    assert names(HUB_CONFIGS / name) == names(tmp_path) == ["README.md", "config.json"]
    rewrite = f"write it again: timm_dgconv.hub.describe({name!r}, Path('hub_configs/{name}'))"
    assert (tmp_path / "README.md").read_bytes() == (HUB_CONFIGS / name / "README.md").read_bytes(), rewrite
    config = json.loads((HUB_CONFIGS / name / "config.json").read_text())
    written = json.loads((tmp_path / "config.json").read_text())
    # What timm writes of a model that it made; timm < 1.0.31 does not record model_args and global_pool.
    arch = name.split(".")[0]
    cfg = timm.get_pretrained_cfg("g_resnext50.dgconv_in1k" if name == hub.BASELINE else name).to_dict()
    cfg["architecture"] = arch
    with torch.device("meta"):
        model = timm.create_model(arch, pretrained_cfg=cfg, num_classes=1000)
    save_config_for_hf(model, tmp_path / "timm.json")
    by_timm = json.loads((tmp_path / "timm.json").read_text())
    paper = {
        "paper_ids": "arXiv:1611.05431",
        "paper_name": "Aggregated Residual Transformations for Deep Neural Networks",
    }
    by_timm["pretrained_cfg"] |= paper if name == hub.BASELINE else {}
    if RECORDS_ARGS:  # a second time, which transformers cannot load
        assert by_timm["model_args"].pop("num_classes") == by_timm["num_classes"]
    assert written == by_timm, rewrite
    assert (written if RECORDS_ARGS else {**config, **written}) == config, rewrite

    assert config["architecture"] == arch
    stored = {key: tuple(v) if isinstance(v, list) else v for key, v in config["pretrained_cfg"].items()}
    assert "hf_hub_id" not in stored
    if name != hub.BASELINE:
        default = timm.get_pretrained_cfg(name).to_dict(remove_source=True)
        assert {key: default[key] for key in stored} == stored


@pytest.mark.parametrize("name", NAMES)
def test_model_card(name: str) -> None:
    card = ModelCard.load(HUB_CONFIGS / name / "README.md")
    assert card.data.license == "mit"
    assert card.data.library_name == "timm"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.datasets == ["imagenet-1k"]
    assert {"image-classification", "timm"} <= set(card.data.tags)
    model = timm.create_model(name.split(".")[0]) if "101" not in name else None
    if model is not None:
        params = sum(parameter.numel() for parameter in model.parameters())
        assert f"Params (M): {params / 1e6:.1f}\n" in card.text
    for text in (
        "GMACs: ",
        "Activations (M): 14.4" if model is not None else "31.2",
        "78.592",
        "78.198",
        "@InProceedings",
    ):
        assert text in card.text
    for heading in (
        "Model Details",
        "Model Usage",
        "Image Classification",
        "Feature Map Extraction",
        "Image Embeddings",
    ):
        assert f"# {heading}\n" in card.text
    assert ("pip install timm-dgconv" in card.text) == ("timm-dgconv" in card.data.tags) == (name != hub.BASELINE)


# The Hub


@pytest.fixture
def server() -> Iterator[HubServer]:
    """A Hub; at the end it must not have failed by itself."""
    with HubServer() as hub_server:
        yield hub_server
    assert hub_server.errors == []


COMMANDS = """
import contextlib, io, json, sys
from timm_dgconv.cli import main
results = []
for args in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(args)
    results.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""
CREATE = """
import json, sys, timm, torch
images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
results = []
for name in json.loads(sys.argv[1]):
    with torch.inference_mode():
        results.append(timm.create_model(name, pretrained=True).eval()(images).tolist())
print(json.dumps(results))
"""


def start(env: dict[str, str], code: str, argument: object) -> "subprocess.Popen[str]":
    """A new process: the Hub's client reads its environment when it is imported."""
    env = {**env, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}  # of an old timm in a new torch
    command = [sys.executable, "-c", code, json.dumps(argument)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: "subprocess.Popen[str]") -> Any:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def run(env: dict[str, str], code: str, argument: object) -> Any:
    return finish(start(env, code, argument))


def test_publish_and_load(tiny: nn.Module, checkpoint: Path, server: HubServer, tmp_path: Path) -> None:
    publish = ["publish", str(checkpoint), "--model", TINY, "--repo", "owner/tiny"]
    env = server.env(tmp_path / "publisher", server.token)
    (dry, published) = run(env, COMMANDS, [[*publish, "--dry-run"], publish])
    assert dry[0] == published[0] == 0, (dry, published)
    files = server.files("owner/tiny")
    assert sorted(files) == [".gitattributes", "README.md", "config.json", "model.safetensors"]
    for name, data in files.items():
        line = rf"{re.escape(name)} +{len(data):,} bytes  sha256 {hashlib.sha256(data).hexdigest()}\n"
        assert name == ".gitattributes" or re.search(line, published[1])
        assert name == ".gitattributes" or re.search(line, dry[1]), "the same file every time"
    assert f"{server.url}/owner/tiny" in published[1]
    assert "nothing was sent" in dry[1]
    assert server.count("GET", "/cdn/*") == 1, "downloaded again to compare"

    # A new process with an empty cache.
    expected = outputs(tiny)
    (found,) = run(server.env(tmp_path / "user"), CREATE, ["hf-hub:owner/tiny"])
    assert torch.equal(torch.tensor(found), expected)

    # The same offline, and the code of the model card.
    usage = re.findall(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)
    assert len(usage) == 3
    code = f"{CREATE}\nout = []\n"
    for block in usage:
        block, count = re.subn(
            r"Image.open\(\n +urlopen\(.*?\)\n\)", "Image.new('RGB', (300, 200))", block, flags=re.DOTALL
        )
        code += block.replace(f"OWNER/{TINY}", "owner/tiny") + "\nout.append([list(o.shape) for o in output])\n"
        assert count == 1
    code += "\nprint(json.dumps([results, out]))"
    (found,), shapes = run(server.env(tmp_path / "user", offline=True), code, ["hf-hub:owner/tiny"])
    assert torch.equal(torch.tensor(found), expected)
    info = tiny.feature_info
    assert shapes[0] == [[11]]
    assert shapes[1] == [[1, i["num_chs"], 160 // i["reduction"], 160 // i["reduction"]] for i in info]
    assert [f"torch.Size([{', '.join(map(str, shape))}])" in usage[1] for shape in shapes[1]] == [True] * len(info)
    assert shapes[2] == [[tiny.num_features]]


def test_publish_options(folder: Path, server: HubServer, tmp_path: Path) -> None:
    """A folder, private, to a branch, again; a folder with something else in it; and nothing sent by --dry-run."""
    (tmp_path / "more").mkdir()
    for path in folder.iterdir():
        (tmp_path / "more" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "more" / "secret.txt").write_text("not for the Hub")
    server.add_repo("owner/public", {"config.json": b"{}"})
    publish = ["publish", str(tmp_path / "more"), "--repo"]
    env = server.env(tmp_path / "home", server.token)
    (dry,) = run(env, COMMANDS, [[*publish, "owner/new", "--dry-run"]])
    assert dry[0] == 0
    assert server.log == []
    private, branch, again, public = run(
        env,
        COMMANDS,
        [
            [*publish, "owner/new", "--private"],
            [*publish, "owner/branch", "--revision", "v2"],
            [*publish, "owner/new", "--model", TINY],
            [*publish, "owner/public", "--private"],
        ],
    )
    assert private[0] == branch[0] == again[0] == 0, (private, branch, again)
    assert "owner/new" in server.private
    assert sorted(server.files("owner/new")) == [".gitattributes", "README.md", "config.json", "model.safetensors"]
    assert len(server.commits("owner/new")) == 2, "the same content is no new commit"
    assert sorted(server.files("owner/branch")) == [".gitattributes"]
    assert server.files("owner/branch", "v2")["config.json"] == (folder / "config.json").read_bytes()
    assert "'hf-hub:owner/branch@v2'" in branch[1]
    assert public[0] == 2
    assert "owner/public exists and is public, nothing was uploaded" in public[2]
    assert server.files("owner/public") == {"config.json": b"{}"}


def test_publish_notices_another_digest(folder: Path, server: HubServer, tmp_path: Path) -> None:
    server.corrupted |= {("owner/tiny", "model.safetensors")}
    env = server.env(tmp_path / "home", server.token)
    ((status, _, error),) = run(env, COMMANDS, [["publish", str(folder), "--repo", "owner/tiny"]])
    assert status == 2
    assert error.startswith("timm-dgconv publish: the Hub returns another model.safetensors than was uploaded")
    assert sha256(folder / "model.safetensors") in error


def test_damaged_download_is_no_model(folder: Path, server: HubServer, tmp_path: Path) -> None:
    """Of the right length, which is all that the Hub's client looks at; and an error again from the cache."""
    server.add_repo("owner/tiny", {path.name: path.read_bytes() for path in folder.iterdir()})
    server.corrupted.add(("owner/tiny", "model.safetensors"))
    for offline in (False, True):
        process = start(server.env(tmp_path / "home", offline=offline), CREATE, ["hf-hub:owner/tiny"])
        error = process.communicate(timeout=300)[1].splitlines()[-1]
        assert process.returncode == 1
        digest = sha256(folder / "model.safetensors")
        assert re.fullmatch(rf"RuntimeError: model.safetensors of owner/tiny is damaged: .*{digest}; delete .*", error)
    server.corrupted.clear()
    Path(re.findall("delete (.*) and load", error)[0]).unlink()
    run(server.env(tmp_path / "home"), CREATE, ["hf-hub:owner/tiny"])


def test_hub_errors(folder: Path, server: HubServer, tmp_path: Path) -> None:
    """One line that a user understands, with the way out."""
    server.read_only.add("timm")
    server.add_repo("owner/empty", {"config.json": b"{}"})
    server.add_repo("owner/private", {"model.safetensors": b""}, private=True)

    def convert(hub_id: str) -> list[str]:
        return ["convert", hub_id, "--model", TINY, "--out", str(tmp_path / "out")]

    publish = ["publish", str(folder), "--repo"]
    gone = {**server.env(tmp_path / "4", server.token), "HF_ENDPOINT": "http://127.0.0.1:9"}
    cases: list[tuple[dict[str, str], list[str], str]] = [
        (
            server.env(tmp_path / "1"),
            [*publish, "owner/new"],
            "no token for the Hub: run `hf auth login`, or set HF_TOKEN",
        ),
        (server.env(tmp_path / "1"), convert("owner/none"), "no file and no repository owner/none, or it is private"),
        (
            server.env(tmp_path / "1"),
            convert("owner/private"),
            "or it is private: check the name, or run `hf auth login`",
        ),
        (server.env(tmp_path / "2", "hf_wrong"), [*publish, "owner/new"], "the Hub does not know the token"),
        (server.env(tmp_path / "3", server.token), [*publish, "timm/new"], "the token may not write to timm/new"),
        (server.env(tmp_path / "3", server.token), [*publish, "new"], "--repo must be OWNER/NAME, got 'new'"),
        (server.env(tmp_path / "3", server.token), [*publish, "a/b/c"], "'a/b/c'"),
        (server.env(tmp_path / "3", server.token), convert("owner/empty"), "owner/empty has no model.safetensors"),
        (server.env(tmp_path / "3", server.token), convert("owner/empty@no"), "owner/empty@no has no such revision"),
        (gone, [*publish, "owner/new"], "cannot reach http://127.0.0.1:9"),
        (server.env(tmp_path / "5", "hf_x", offline=True), [*publish, "owner/new"], "HF_HUB_OFFLINE is set"),
    ]
    environments = [env for n, (env, _, _) in enumerate(cases) if env not in [other for other, _, _ in cases[:n]]]
    processes = [start(env, COMMANDS, [args for other, args, _ in cases if other == env]) for env in environments]
    results = [result for process in processes for result in finish(process)]
    for (_, args, said), (status, out, error) in zip(cases, results, strict=True):
        assert status == 2, (args, out)
        assert said in error
        assert len(error.splitlines()) == 1, error
    assert not [name for name in names(tmp_path) if "out" in name]
    assert server.count("POST", "*/commit/*") == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config.json": None}, "has no config.json; name a folder that timm-dgconv convert wrote"),
        ({"model.safetensors": None}, "has no model.safetensors"),
        ({"config.json": b"{}"}, "timm cannot load"),
        ({"model.safetensors": b"1234"}, "timm cannot load"),
    ],
)
def test_publish_refuses(
    change: dict[str, bytes | None], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in folder.iterdir():
        data = change.get(path.name, path.read_bytes())
        if data is not None:
            (tmp_path / path.name).write_bytes(data)
    assert main(["publish", str(tmp_path), "--repo", "owner/name", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_publish_needs_to_know_what_it_is(folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", str(checkpoint), "--repo", "owner/name", "--dry-run"]) == 2
    assert "say what it is with --model ARCH.TAG" in capsys.readouterr().err
    assert main(["publish", str(folder), "--repo", "owner/name", "--dry-run", "--model", hub.BASELINE]) == 2
    assert f"is {TINY}, not {hub.BASELINE}" in capsys.readouterr().err


def test_pretrained_resnext_resumes_its_download(server: HubServer, tmp_path: Path) -> None:
    """`pretrained=True` gets timm's ResNeXt; a download that was cut off goes on where it was."""
    resnext = randomized("resnext50_32x4d")
    repo, cut = "timm/resnext50_32x4d.a1h_in1k", 35_000_000
    server.add_repo(repo, {"model.safetensors": safetensors.torch.save(resnext.state_dict())})
    server.cuts += [(cut, "*/model.safetensors")]
    code = """
import contextlib, timm
with contextlib.suppress(Exception):  # unless the client goes on by itself
    timm.create_model("g_resnext50", pretrained=True)
"""
    expected = outputs(resnext)
    for found in run(server.env(tmp_path / "home"), code + CREATE, ["g_resnext50", "resnext50_32x4d.a1h_in1k"]):
        assert_close(torch.tensor(found), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    ranges = [request.range for request in server.requests("GET", "/cdn/*")]
    assert len(ranges) == 2
    assert ranges[0] is None
    assert 0 < int(ranges[1].removeprefix("bytes=").removesuffix("-")) <= cut


def test_eight_processes_load_at_once(tiny: nn.Module, folder: Path, server: HubServer, tmp_path: Path) -> None:
    server.add_repo("owner/tiny", {path.name: path.read_bytes() for path in folder.iterdir()})
    code = """
import json, multiprocessing, timm, torch

def create(number):
    barrier.wait()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return timm.create_model("hf-hub:owner/tiny", pretrained=True).eval()(images).tolist()

context = multiprocessing.get_context("fork")
barrier = context.Barrier(8)
with context.Pool(8) as pool:
    print(json.dumps(pool.map(create, range(8), chunksize=1)))
"""
    found = run(server.env(tmp_path / "home"), code, None)
    assert torch.equal(torch.tensor(found), outputs(tiny).expand(8, -1, -1))
    assert server.count("GET", "/cdn/*") == 1


def test_convert_from_the_hub(tiny: nn.Module, server: HubServer, tmp_path: Path) -> None:
    first = server.add_repo("owner/tiny", {"model.safetensors": safetensors.torch.save(tiny.state_dict())})
    server.add_repo("owner/tiny", {"model.safetensors": b"something else"})
    args = ["convert", f"owner/tiny@{first}", "--model", TINY, "--out", str(tmp_path / "out")]
    ((status, _, error),) = run(server.env(tmp_path / "home"), COMMANDS, [args])
    assert status == 0, error
    assert torch.equal(outputs(hub._reload(tmp_path / "out")), outputs(tiny))
