"""timm-dgconv convert: checkpoints become folders that timm loads, with the outputs of the checkpoint."""

import argparse
import copy
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from conftest import Capture, Patch, assert_refused, layers, outputs, trained
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

from timm_dgconv import DGConv2d, compact, group_report, layer_groups
from timm_dgconv.cli import main
from timm_dgconv.hub import convert
from timm_dgconv.hub.model import BASELINE

HUB_CONFIGS = Path(__file__).parents[2] / "hub_configs"
TINY = "test_g_resnext.mine"
TIMM = tuple(int(number) for number in re.findall(r"\d+", timm.__version__)[:3])
LOADS_FOLDERS = TIMM >= (1, 0, 26)  # earlier versions read the safetensors file in a folder as a pickle
RECORDS_ARGS = TIMM >= (1, 0, 31)  # in config.json

compact_or_not = pytest.mark.parametrize("compact", [False, True], ids=["plain", "compact"])


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


def run_convert(source: Any, out: Path, compact: bool = False, model: str = TINY, options: Sequence[str] = ()) -> None:
    options = [*options, "--compact"] if compact else options
    assert main(["convert", str(source), "--model", model, "--out", str(out), *options]) == 0


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


@compact_or_not
@pytest.mark.parametrize(
    "form",
    ["original.pth.tar", "original_2019.pth.tar", "train.pth.tar", "sorted_0_2.pth.tar", "bare.pt", "safetensors"],
)
def test_every_form_of_checkpoint_keeps_its_outputs(form: str, compact: bool, tmp_path: Path, capsys: Capture) -> None:
    model = tiny(**{"sort": False} if "original" in form or form == "bare.pt" else {})
    source, out = tmp_path / "source" / f"checkpoint.{form.partition('.')[2] or form}", tmp_path / "out"
    source.parent.mkdir()
    if form == "safetensors":
        safetensors.torch.save_file(model.state_dict(), source)
    elif form == "train.pth.tar":
        torch.save(train_checkpoint(another()) | {"state_dict_ema": model.state_dict()}, source)
    elif form == "sorted_0_2.pth.tar":  # version 0.2 had one name for both readings of gates
        state_dict = {name.replace("sorted_gate", "gate"): value for name, value in model.state_dict().items()}
        torch.save(train_checkpoint(model, sort=True) | {"state_dict": state_dict}, source)
    elif form == "bare.pt":
        torch.save(copy.deepcopy(model).to(memory_format=torch.channels_last).state_dict(), source)
    else:
        torch.save(original(model), source, _use_new_zipfile_serialization="2019" not in form)
    run_convert(source, out, compact)
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
    assert compact or first.sort or config["model_args"]["sort"] is False
    with safetensors.safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.fixture(scope="module")
def converted(checkpoint: str) -> bytes:
    """The weights that convert writes."""
    folder = Path(checkpoint).with_name("converted")
    run_convert(checkpoint, folder)
    return (folder / "model.safetensors").read_bytes()


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value for name, value in tiny().state_dict().items()}


def views() -> dict[str, torch.Tensor]:
    """Tensors that share the memory of one buffer, as an optimizer with flat parameters makes them."""
    state_dict = tiny().state_dict()
    floats = [name for name, value in state_dict.items() if value.is_floating_point()]
    parts = torch.cat([state_dict[name].flatten() for name in floats]).split([state_dict[n].numel() for n in floats])
    return state_dict | {name: part.view_as(state_dict[name]) for name, part in zip(floats, parts, strict=True)}


WRAPPED: dict[str, Callable[[], dict[str, Any]]] = {
    "transformers": lambda: prefixed("timm_model."),
    "compiled in DistributedDataParallel": lambda: prefixed("module._orig_mod."),
    "a backbone": lambda: {"state_dict": prefixed("backbone.net."), "epoch": 1, "args": {}},
    "lightning": lambda: {
        "state_dict": prefixed("model.") | {"criterion.weight": torch.ones(11)},
        "hyper_parameters": {"lr": 0.1},
    },
    "a compiled stage": lambda: {n.replace("layer1.", "layer1._orig_mod."): v for n, v in prefixed("").items()},
    "an average": lambda: {"model": prefixed("total."), "model_ema": AveragedModel(tiny()).state_dict()},
    "another entry": lambda: {"model_state_dict": prefixed(""), "optimizer_state_dict": {"state": {}}, "loss": 0.1},
    "views": views,
}


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "safetensors", *WRAPPED])
def test_the_same_weights_in_another_file_become_the_same_file(kind: str, converted: bytes, tmp_path: Path) -> None:
    source = tmp_path / "source.ckpt"
    if kind == "pytorch_model.bin":
        timm.models.save_for_hf(tiny(), source)
        assert torch.equal(outputs(timm.create_model(f"local-dir:{source}", pretrained=True)), outputs(tiny()))
    elif kind == "safetensors":  # with the name of another format
        safetensors.torch.save_file(tiny().state_dict(), source)
    else:
        torch.save(WRAPPED[kind](), source)
    run_convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == converted


@compact_or_not
def test_a_network_without_a_classifier(compact: bool, tmp_path: Path) -> None:
    backbone, out = trained(num_classes=0).eval(), tmp_path / "out"
    torch.save({"state_dict": {f"encoder.{n}": v for n, v in backbone.state_dict().items()}}, tmp_path / "ssl.pth")
    run_convert(tmp_path / "ssl.pth", out, compact)
    assert main(["inspect", str(tmp_path / "ssl.pth"), "--model", "test_g_resnext"]) == 0
    assert main(["publish", str(out), "--repo", "owner/name", "--dry-run"]) == 0
    assert_close(outputs(load(out)), outputs(backbone), rtol=0, atol=1e-5 if compact else 0)
    card = (out / "README.md").read_text()
    assert "pipeline_tag: image-feature-extraction" in card
    assert "top5" not in card


def test_labels_and_the_license_of_a_folder_are_kept(tmp_path: Path) -> None:
    labels = {"label_names": list("abcdefghijk"), "label_descriptions": {"a": "ant"}}
    timm.models.save_for_hf(tiny(), tmp_path / "source", model_config=dict(labels))
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text()) | {"model_args": None}  # as transformers writes it
    config["pretrained_cfg"]["license"] = "apache-2.0"
    path.write_text(json.dumps(config))
    for source, out in ("source", "plain"), ("plain", "compact"):
        run_convert(tmp_path / source, tmp_path / out, out == "compact")
        written = json.loads((tmp_path / out / "config.json").read_text())
        assert {name: written[name] for name in labels} == labels
        assert load(tmp_path / out).pretrained_cfg["label_names"] == labels["label_names"]
        assert "license: apache-2.0" in (tmp_path / out / "README.md").read_text()


def test_averaged_weights_can_be_left_out(tmp_path: Path) -> None:
    """And test_every_form_of_checkpoint_keeps_its_outputs takes them."""
    average, other, out = tiny(), another(), tmp_path / "out"
    torch.save({"model": other.state_dict(), "model_ema": average.state_dict()}, tmp_path / "both.pth")
    run_convert(tmp_path / "both.pth", out, options=["--no-ema"])
    assert torch.equal(outputs(load(out)), outputs(other))


@pytest.mark.parametrize("target", [0.9, "resnext"])
@pytest.mark.parametrize("unit", ["connections", "macs"])
def test_an_average_above_the_target_of_its_training_is_named(unit: str, target: Any, tmp_path: Path) -> None:
    args = dict(complexity_target=target, complexity_unit=unit, img_size=32)
    model = timm.create_model("test_g_resnext", init_groups=1)
    dense = copy.deepcopy(model.state_dict())
    for conv in layers(model):
        conv.reset_gate(1 << conv.num_bits)
    checkpoint = train_checkpoint(model, **args) | {"state_dict_ema": dense}
    torch.save(checkpoint, tmp_path / "last.pth.tar")
    convert.convert(str(tmp_path / "last.pth.tar"), TINY, tmp_path / "trained", use_ema=False)
    with pytest.warns(UserWarning, match=rf"costs 1.000 of the dense network's {unit}, .*complexity_target=0\.\d+;"):
        convert.convert(str(tmp_path / "last.pth.tar"), TINY, tmp_path / "average")
    torch.save({**checkpoint, "state_dict_ema": compact(model).state_dict()}, tmp_path / "fixed.pth.tar")
    convert.convert(
        str(tmp_path / "fixed.pth.tar"), TINY, tmp_path / "fixed", model_kwargs=dict(groups=layer_groups(model))
    )


STEM = dict(stem_type="deep", stem_width=8, avg_down=True)
NETWORKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # arguments of the model, and `args.model_kwargs`
    "in_chans=1": (dict(in_chans=1), dict(complexity_target=1.0)),
    "in_chans=4": (dict(in_chans=4, **STEM), STEM),
    "stem": (STEM, dict(STEM, complexity_weight=0.1)),
    "gp": (dict(global_pool="avgmax"), dict(global_pool="avgmax")),
    "sort": (dict(sort=False), dict(sort=False, freeze_groups=True)),
}


@compact_or_not
@pytest.mark.parametrize("network", NETWORKS)
def test_arguments_of_the_network_are_kept(network: str, compact: bool, tmp_path: Path, capsys: Capture) -> None:
    kwargs, stored = NETWORKS[network]
    model = trained(num_classes=7, **kwargs).eval()
    source, out = tmp_path / "last.pth.tar", tmp_path / "out"
    torch.save(train_checkpoint(model, **stored), source)
    run_convert(source, out, compact)
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


def test_model_kwargs_override_the_checkpoint(tmp_path: Path) -> None:
    model = trained(**STEM).eval()
    source, out = tmp_path / "last.pth.tar", tmp_path / "out"
    torch.save(train_checkpoint(model, **dict(STEM, stem_width=16)), source)
    options = ["--model-kwargs", *(f"{name}={value}" for name, value in STEM.items())]
    run_convert(source, out, options=options)
    assert main(["inspect", str(source), "--model", "test_g_resnext", *options]) == 0
    assert torch.equal(outputs(load(out)), outputs(model))


WRONG_KWARGS = [
    (["nonsense=1"], "test_g_resnext cannot be built with {'nonsense': 1}: "),
    (["stem_type=deep", "stem_width=x"], "cannot be built with {'stem_type': 'deep', 'stem_width': 'x'}"),
    (["sort=false"], "sort='false' is not a bool; use True or False"),
    (["architecture=resnet18"], "cannot be built with {'architecture': 'resnet18'}"),
    (["init_groups=7"], "init_groups=7 does not change the network of a checkpoint; leave it out"),
    (["num_classes=x", "scriptable=3"], "num_classes=x, scriptable=3 does not change the network"),
    (["stem_type=deep"], "is a checkpoint of another network than test_g_resnext: "),
]


@pytest.mark.parametrize(("kwargs", "said"), WRONG_KWARGS)
def test_wrong_model_kwargs_are_named_by_inspect(kwargs: list[str], said: str, checkpoint: str) -> None:
    command = ["inspect", checkpoint, "--model", TINY, "--model-kwargs", *kwargs]
    assert_refused(command, "timm-dgconv inspect: ", said)


DATA = dict(mean=[0.3], std=[0.2], crop_pct=1.0, interpolation="bilinear")


def test_data_settings_of_the_training_are_kept(tmp_path: Path) -> None:
    """And timm's input size for tests of this network is not."""
    model = trained("g_resnet18", num_classes=7, in_chans=1).eval()
    checkpoint = train_checkpoint(model)
    vars(checkpoint["args"]).update(DATA, in_chans=1, img_size=48, input_size=None)
    torch.save(checkpoint, tmp_path / "last.pth.tar")
    for source, out in ("last.pth.tar", "plain"), ("plain", "compact"):
        run_convert(tmp_path / source, tmp_path / out, out == "compact", "g_resnet18.resnet_a1_in1k")
        config = json.loads((tmp_path / out / "config.json").read_text())["pretrained_cfg"]
        assert config["input_size"] == [1, 48, 48]
        assert {name: config[name] for name in DATA} == DATA
        assert "test_input_size" not in config
        card = (tmp_path / out / "README.md").read_text()
        assert "Image size: 48 x 48" in card
        assert card.count('.convert("L")') == 3
    assert_close(outputs(load(tmp_path / "compact")), outputs(model), rtol=0, atol=1e-5)


def test_the_converted_baseline_is_a_resnext_of_timm(tmp_path: Path) -> None:
    baseline = trained("resnext50_32x4d", zero_init_last=False).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in baseline.state_dict().items()}}, tmp_path / "b.pth.tar")
    out, expected = tmp_path / "out", outputs(baseline)
    run_convert(tmp_path / "b.pth.tar", out, model=BASELINE)
    for name in ("README.md", "config.json") if RECORDS_ARGS else ("README.md",):
        assert (out / name).read_bytes() == (HUB_CONFIGS / BASELINE / name).read_bytes()
    assert type(load(out)).__module__ == "timm.models.resnet"
    assert torch.equal(outputs(load(out)), expected)
    run_convert(out / "model.safetensors", tmp_path / "compact", True, "g_resnext50.resnext_mine")
    compact = safetensors.torch.load_file(tmp_path / "compact" / "model.safetensors")
    assert all(torch.equal(compact[name], value) for name, value in baseline.state_dict().items())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model", "resnet50.a1_in1k"], "unknown model 'resnet50.a1_in1k'; use g_resnet18.TAG"),
        (["--model", "g_resnext50.a/b"], "unknown model 'g_resnext50.a/b'"),
        (["--model", "g_resnext50"], "model 'g_resnext50' has no tag, the name of its weights; use g_resnext50.TAG"),
        (["--out", "HERE"], "exists; use a new folder for --out"),
        (["--out", "HERE/none/out"], "is not a folder; create it"),
        (["--model", BASELINE, "--compact"], "without --compact"),
        *((["--model-kwargs", *kwargs], said) for kwargs, said in WRONG_KWARGS),
    ],
)
def test_wrong_options_are_named_in_one_line(args: list[str], said: str, checkpoint: str, tmp_path: Path) -> None:
    options = ["--model", TINY, "--out", str(tmp_path / "out"), *(arg.replace("HERE", str(tmp_path)) for arg in args)]
    assert_refused(["convert", checkpoint, *options], "timm-dgconv convert: ", said)
    assert names(tmp_path) == []


def fail(folder: Path) -> None:
    raise OSError("no space left on device")


@pytest.mark.parametrize(
    ("name", "function", "said"),
    [
        ("reload", lambda folder: another(), "the outputs of the reloaded model differ by"),
        ("list_files", fail, "timm-dgconv convert: no space left on device\n"),
    ],
)
def test_a_failed_conversion_leaves_nothing(
    name: str, function: Any, said: str, checkpoint: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(convert, name, function)
    assert_refused(["convert", checkpoint, "--model", TINY, "--out", str(tmp_path / "out")], said)
    assert names(tmp_path) == []
