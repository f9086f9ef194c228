"""What was learned: counts against independent ones, every kind of checkpoint, plots."""

import argparse
import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from hub_server import HubServer
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import timm_dgconv
from timm_dgconv import DGConv2d, group_report, plots
from timm_dgconv.cli import main
from timm_dgconv.report import Cost, GroupHistory

TINY = "test_g_resnext"
SIGNATURES = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


def randomize(model: nn.Module, seed: int = 0, p: float = 0.5) -> None:
    """Gates that are open with probability p, on the CPU; the weights may be on the meta device."""
    generator = torch.Generator().manual_seed(seed)
    for conv in (module for module in model.modules() if isinstance(module, DGConv2d)):
        gate = torch.where(torch.rand(conv.gate.shape, generator=generator) < p, 0.01, -0.01)
        conv.gate = nn.Parameter(gate.to(conv.weight.dtype))


def without_weights(name: str, seed: int = 0, p: float = 0.5, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
    randomize(model, seed, p)
    return model


def counted(model: nn.Module, size: tuple[int, int, int]) -> Cost:
    """By torch's own counter."""
    model = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(torch.empty(1, *size, device="meta"))
    return Cost(sum(p.numel() for p in model.parameters()), flops.get_total_flops() // 2)


@pytest.mark.parametrize(
    ("name", "size", "kwargs"),
    [
        (TINY, None, {}),
        (TINY, (3, 96, 64), {"num_classes": 7}),
        (TINY, (3, 75, 81), {"output_stride": 8, "num_classes": 0}),
        (TINY, (1, 64, 64), {"in_chans": 1, "stem_type": "deep", "stem_width": 8, "avg_down": True}),
        (TINY, None, {"block_args": {"sort": True, "attn_layer": "se"}}),
        ("g_resnext50", None, {}),
        ("g_resnext50", (3, 288, 288), {"output_stride": 16}),
    ],
    ids=str,
)
def test_counts_are_those_of_torch(name: str, size: tuple[int, int, int] | None, kwargs: dict[str, Any]) -> None:
    for seed in range(3 if name == TINY else 1):
        model = without_weights(name, seed, **kwargs)
        report = group_report(model, size)
        assert size is None or report.input_size == size
        compact = timm_dgconv.compact(model)
        assert report.learned == counted(compact, report.input_size)
        assert [layer.groups for layer in report.layers] == timm_dgconv.block_groups(model)
        assert report.complexity == timm_dgconv.complexity(model).item()

        dense = without_weights(name, p=1, **kwargs)
        assert report.dense == counted(timm_dgconv.compact(dense), report.input_size)
        assert report.share == pytest.approx(report.complexity / timm_dgconv.complexity(dense).item())
        assert group_report(dense, size).learned == report.dense

        fixed = timm.create_model(name, groups=[c.resnext_groups for c in report.layers], device="meta", **kwargs)
        assert report.resnext == counted(fixed, report.input_size)

        again = group_report(compact, size)
        assert (again.learned, again.dense, again.resnext) == (report.learned, report.dense, report.resnext)
        assert [(c.groups, c.learned, c.bits) for c in again.layers] == [
            (c.groups, c.learned, None) for c in report.layers
        ]
        for layer, shape in zip(report.layers, again.layers, strict=True):
            conv = model.get_submodule(layer.name)
            assert isinstance(conv, DGConv2d)
            assert layer.resolution == shape.resolution
            assert torch.equal(layer.connectivity(), conv.connectivity().detach())
            assert shape.connectivity().sum() == layer.connectivity().sum()


def test_dense_and_resnext_are_those_of_timm() -> None:
    report = group_report(without_weights("g_resnext50"))
    size = report.input_size
    assert report.dense == counted(timm.create_model("wide_resnet50_2", device="meta"), size)
    assert report.resnext == counted(timm.create_model("resnext50_32x4d", device="meta"), size)
    assert {layer.resnext_groups for layer in report.layers} == {32}

    report = group_report(without_weights(TINY))
    args: Any = dict(layers=(1, 1, 1, 1), channels=(16, 32, 48, 96), device="meta")
    assert report.resnext == counted(ResNet(Bottleneck, cardinality=4, base_width=16, **args), report.input_size)
    assert report.resnext_share == 1 / 4


def test_table() -> None:
    model = without_weights(TINY, num_classes=10)
    with torch.no_grad():
        for conv in (module for module in model.modules() if isinstance(module, DGConv2d)):
            conv.gate.copy_(torch.tensor([-1.0, 1, -1, 1, 1][: len(conv.gate)]))
    report = group_report(model)
    assert str(report).splitlines()[:5] == [
        "test_g_resnext, input 3 x 160 x 160",
        "",
        "layer           channels  resolution  groups  channels  open bits  parameters                   MACs, M",
        "                                               a group                learned   dense  ResNeXt  "
        "learned  dense  ResNeXt",
        "layer1.0.conv2        16     40 x 40       4         4       0101         576   2,304      576  "
        "   0.92   3.69     0.92",
    ]
    assert f"{report.learned.params:,}" in str(report)
    assert "ResNeXt, 4 groups" in str(report)
    assert str(report).splitlines()[-1].split()[-3:] == [f"{100 * report.share:.2f}", "100.00", "25.00"]
    written = json.loads(json.dumps(report.as_dict()))
    assert written["layers"][0] == {
        "name": "layer1.0.conv2",
        "in_channels": 16,
        "out_channels": 16,
        "resolution": [40, 40],
        "groups": 4,
        "channels_per_group": 4,
        "bits": "0101",
        "learned": {"params": 576, "macs": 921600},
        "dense": {"params": 2304, "macs": 3686400},
        "resnext": {"params": 576, "macs": 921600},
        "resnext_groups": 4,
    }
    assert (written["complexity"], written["share"]) == (report.complexity, report.share)


def test_sorted_gates_act_on_other_bits_than_they_are_stored_for() -> None:
    conv = DGConv2d(8, 8, 1, sort=True)
    with torch.no_grad():
        conv.gate.copy_(torch.tensor([1.0, -1.0, 1.0]))
    (layer,) = group_report(nn.Sequential(conv), (8, 1, 1)).layers
    assert layer.bits == "011"
    assert torch.equal(layer.connectivity(), conv.connectivity().detach())


class Wrapper(nn.Module):
    """As DistributedDataParallel holds a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def test_wrappers() -> None:
    model = without_weights(TINY)
    expected = group_report(model)
    assert group_report(Wrapper(model)) == expected
    assert group_report(torch.compile(Wrapper(model))) == expected  # type: ignore[arg-type]
    sequence = group_report(nn.Sequential(model, nn.Identity()))
    assert (sequence.learned, sequence.model) == (expected.learned, expected.model)
    assert [layer.name for layer in sequence.layers] == [f"0.{layer.name}" for layer in expected.layers]


@pytest.mark.parametrize("kwargs", [{}, {"feature_cls": "hook"}, {"feature_cls": "getter", "out_indices": (1, 3)}])
def test_features_only(kwargs: dict[str, Any]) -> None:
    model = timm.create_model(TINY, features_only=True, **kwargs)
    report = group_report(model)
    assert report.learned == counted(timm_dgconv.compact(model), report.input_size)
    assert all(layer.resnext is not None and layer.resolution is not None for layer in report.layers)


def test_layers_of_ones_own() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = DGConv2d(6, 12, 3, stride=2, padding=1)
            self.again = DGConv2d(12, 12, (1, 3), padding="same", bias=False)
            self.head = nn.Linear(12, 5)
            self.unused = DGConv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.again(self.again(self.first(x)))
            return self.head(x.mean((2, 3)))

    net = Net()
    with torch.no_grad():
        net.first.gate.fill_(-1)
        net.again.gate.copy_(torch.tensor([1.0, -1.0]))
    report = group_report(net, (6, 9, 8))
    first, again, unused = report.layers
    assert (first.in_channels, first.out_channels, first.resolution, first.groups) == (6, 12, (5, 4), 2)
    assert first.learned == Cost(6 * 12 * 9 // 2 + 12, 5 * 4 * 6 * 12 * 9 // 2)
    assert again.learned == Cost(12 * 12 * 3 // 2, 2 * 5 * 4 * 12 * 12 * 3 // 2), "it runs twice"
    assert again.dense == Cost(12 * 12 * 3, 2 * 5 * 4 * 12 * 12 * 3)
    assert (unused.resolution, unused.learned.macs) == (None, 0)
    head = Cost(12 * 5 + 5, 12 * 5)
    assert report.learned == first.learned + again.learned + unused.learned + head
    assert report.resnext is report.resnext_share is None
    assert "-" in str(report)
    assert report.model == "Net"


def test_the_model_stays_as_it_is() -> None:
    model = timm.create_model(TINY, drop_path_rate=0.5, drop_rate=0.5).train()
    calls = []
    model.layer1.register_forward_hook(lambda *args: calls.append(args))
    model.layer1.register_forward_pre_hook(lambda *args: calls.append(args))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    state = torch.get_rng_state()
    group_report(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert calls == []
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    after = model.state_dict()
    assert all(torch.equal(after[name], value) and not after[name].is_meta for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_half_precision() -> None:
    model = timm.create_model(TINY)
    assert group_report(copy.deepcopy(model).half()) == group_report(model)


@pytest.mark.parametrize(
    ("model", "size", "error", "named"),
    [
        (nn.Conv2d(4, 4, 1), None, ValueError, ["Conv2d has no DGConv2d", "timm.create_model"]),
        (nn.Sequential(DGConv2d(4, 4, 1)), None, ValueError, ["Sequential has no pretrained_cfg", "input_size="]),
        (nn.Sequential(DGConv2d(4, 4, 1)), (3, 8, 8), ValueError, ["does not run on an image of 3 x 8 x 8", "size"]),
        (nn.Sequential(DGConv2d(4, 4, 1)), (4, 8), ValueError, ["(4, 8)", "(channels, height, width)"]),
        (nn.Sequential(DGConv2d(4, 4, 1)), (4, 0, 8), ValueError, ["(4, 0, 8)", "positive"]),
        (nn.Sequential(DGConv2d(4, 4, 1)), 224, TypeError, ["input_size=224", "three integers"]),
        (nn.Sequential(DGConv2d(4, 4, 1, device="meta")), (4, 8, 8), ValueError, ["gates of 0", "load weights"]),
    ],
)
def test_refuses(model: nn.Module, size: Any, error: type[Exception], named: list[str]) -> None:
    with pytest.raises(error) as caught:
        group_report(model, size)
    assert all(word in str(caught.value) for word in named), caught.value


# The command, on checkpoints.


@pytest.fixture(scope="module")
def model() -> nn.Module:
    model = timm.create_model(TINY, num_classes=10)
    randomize(model)
    return model


@pytest.fixture(scope="module")
def run(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Checkpoints of a run as timm's train.py writes them, epochs 0, 4, 8; the averaged weights have one group."""
    folder = tmp_path_factory.mktemp("run")
    paths = []
    for epoch in (0, 4, 8):
        now, averaged = copy.deepcopy(model), copy.deepcopy(model)
        randomize(now, seed=epoch)
        randomize(averaged, p=1)
        checkpoint = {"epoch": epoch, "arch": TINY, "state_dict": now.state_dict(), "args": argparse.Namespace(lr=1)}
        if epoch == 8:
            checkpoint["state_dict_ema"] = averaged.state_dict()
        paths.append(str(folder / f"checkpoint-{epoch}.pth.tar"))
        torch.save(checkpoint, paths[-1])
    return paths


def inspected(capsys: pytest.CaptureFixture[str], *args: str) -> list[dict[str, Any]]:
    assert main(["inspect", *args, "--model", TINY, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("form", ["state_dict.pt", "legacy.pth", "safetensors", "original", "folder", "compact"])
def test_inspect_reads_what_convert_takes(
    model: nn.Module, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / form
    expected = group_report(model).as_dict()
    if form in ("safetensors", "folder", "compact"):
        source = tmp_path / "weights.safetensors"
        safetensors.torch.save_file(model.state_dict(), source)
        if form != "safetensors":
            args = ["--out", str(tmp_path / form), *(["--compact"] if form == "compact" else [])]
            assert main(["convert", str(source), "--model", f"{TINY}.mine", *args]) == 0
            source = tmp_path / form
        if form == "compact":
            expected = group_report(timm_dgconv.compact(model)).as_dict()
    elif form == "original":
        state_dict: dict[str, Tensor] = {}
        for name, value in model.state_dict().items():
            state_dict["module." + name.replace("conv2.weight", "conv2.conv.weight")] = value
            if name.endswith("gate"):
                state_dict["module." + name.replace("gate", "D")] = torch.eye(2)
                state_dict["module." + name.replace("gate", "I")] = torch.ones(2, 2)
        torch.save({"state_dict": state_dict, "best_acc1": torch.tensor(1.0)}, source)
    else:
        torch.save(model.state_dict(), source, _use_new_zipfile_serialization=form != "legacy.pth")
    capsys.readouterr()
    state = torch.get_rng_state()
    (found,) = inspected(capsys, str(source))
    assert found == json.loads(json.dumps({"source": str(source), "epoch": None, **expected}))
    assert torch.equal(torch.get_rng_state(), state)


def test_inspect_a_plain_resnext(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plain.pt"
    torch.save(timm.create_model(TINY, groups=[4, 4, 4, 4]).state_dict(), path)
    (found,) = inspected(capsys, str(path), "--img-size", "64")
    assert [(layer["groups"], layer["bits"]) for layer in found["layers"]] == [(4, None)] * 4
    assert found["learned"] == found["resnext"]
    assert found["input_size"] == [3, 64, 64]


def test_inspect_a_model_of_the_hub(model: nn.Module, tmp_path: Path) -> None:
    weights = safetensors.torch.save(model.state_dict())
    with HubServer() as server:
        server.add_repo("owner/tiny", {"model.safetensors": weights}, branch="other")
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "from timm_dgconv.cli import main; main()",
                "inspect",
                "owner/tiny@other",
                "--model",
                f"{TINY}.mine",
            ],
            env={**os.environ, **server.env(tmp_path)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert server.errors == []
    assert done.stdout == f"{group_report(model)}\n", done.stderr


def test_inspect_a_run(run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = inspected(capsys, *reversed(run), "--no-ema")
    assert [report["epoch"] for report in reports] == [0, 4, 8]
    assert [report["source"] for report in reports] == run
    assert main(["inspect", *run, "--no-ema", "--model", f"{TINY}.dgconv_in1k"]) == 0
    title, _, head, *rows, shares = capsys.readouterr().out.splitlines()
    assert title == "test_g_resnext, groups by epoch"
    assert head.split() == ["layer", "channels", "0", "4", "8"]
    for n, row in enumerate(rows):
        groups = [str(report["layers"][n]["groups"]) for report in reports]
        assert row.split() == [reports[0]["layers"][n]["name"], str(reports[0]["layers"][n]["in_channels"]), *groups]
    assert shares.split() == ["connections,", "%", "of", "dense", *(f"{100 * r['share']:.2f}" for r in reports)]

    averaged = inspected(capsys, run[-1])[0]
    assert (averaged["share"], averaged["epoch"]) == (1, 8)


def test_checkpoints_without_an_epoch_go_by_their_names(
    model: nn.Module, run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        torch.save(model.state_dict(), tmp_path / name / "last.pt")
    (tmp_path / "c.pt").write_bytes((tmp_path / "a" / "last.pt").read_bytes())
    head = "layer channels"
    for sources, labels in [(["a/last.pt", "c.pt"], "last.pt c.pt"), (["a/last.pt", "b/last.pt"], None)]:
        paths = [str(tmp_path / source) for source in sources]
        assert main(["inspect", *paths, "--model", TINY]) == 0
        title, _, found, *_ = capsys.readouterr().out.splitlines()
        assert title == "test_g_resnext, groups by checkpoint"
        assert " ".join(found.split()) == f"{head} {labels or ' '.join(paths)}"
    assert main(["inspect", run[1], str(tmp_path / "c.pt"), "--model", TINY]) == 0
    assert " ".join(capsys.readouterr().out.splitlines()[2].split()) == f"{head} epoch 4 c.pt"


@pytest.mark.parametrize("suffix", list(SIGNATURES))
@pytest.mark.parametrize("count", [1, 3])
def test_plots(run: list[str], count: int, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"groups{suffix}"
    assert main(["inspect", *run[:count], "--model", TINY, "--plot", str(path), "--layers", "layer3.0.conv2"]) == 0
    assert path.read_bytes().startswith(SIGNATURES[suffix])
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert "layer4.0.conv2" in capsys.readouterr().out, "the table has all layers"


def test_plots_of_many(tmp_path: Path) -> None:
    """Many layers, many checkpoints, wide layers, other shapes; names that have no room."""
    wide = group_report(without_weights("g_resnext101"))
    plots.draw(wide, tmp_path / "wide.png", ["layer4.0.conv2", *(f"layer3.{n}.conv2" for n in range(4))])
    count = 60
    history = GroupHistory((wide,) * count, tuple(f"checkpoint-{n}.pth.tar" for n in range(count)), (None,) * count)
    plots.draw(history, tmp_path / "many.svg")
    own = nn.Sequential(DGConv2d(6, 12, 1), nn.Sequential(DGConv2d(12, 300, 1)))
    plots.draw(group_report(own, (6, 4, 4)), tmp_path / "own.pdf")
    assert len(list(tmp_path.iterdir())) == 3


def test_missing_matplotlib(
    run: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["inspect", "absent.pt", "--model", TINY, "--plot", "groups.png"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "timm-dgconv inspect: plots need matplotlib: pip install 'timm-dgconv[plot]'"
    ]


class Code:
    """What a checkpoint must not do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["RUN", "--model", "g_resnext5"], "unknown model 'g_resnext5'; expected g_resnext50, g_resnext101"),
        (["RUN", "--model", "resnext50_32x4d.dgconv_in1k"], "unknown model 'resnext50_32x4d.dgconv_in1k'"),
        (["RUN", "--model", TINY, "--img-size", "0"], "image size must be at least 1, got 0"),
        (["RUN", "--model", "g_resnext50"], "is a checkpoint of another network than g_resnext50: size mismatch"),
        (["RUN", "HEAD", "--model", TINY], "is of another network than"),
        (["absent.pt", "--model", TINY], "there is no file absent.pt"),
        ([".", "--model", TINY], ". has no model.safetensors; name a checkpoint, or a folder that timm-dgconv convert"),
        (["CODE", "--model", TINY], "refused, not executed"),
        (["THREE", "--model", TINY], "3 groups"),
        (["RUN", "--model", TINY, "--layers", "layer1.0.conv2"], "--layers chooses what a plot shows: add --plot FILE"),
        (["RUN", "--model", TINY, "--plot", "x.png", "--layers", "layer9"], "no layer 'layer9' that learns groups; it"),
        (["absent.pt", "--model", TINY, "--plot", "x.jpeg"], "x.jpeg must end in .pdf, .png or .svg"),
        (["absent.pt", "--model", TINY, "--plot", "no/x.png"], "no is no folder; create it"),
    ],
)
def test_inspect_refuses(
    args: list[str],
    named: str,
    model: nn.Module,
    run: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if "HEAD" in args:
        torch.save(timm.create_model(TINY, num_classes=11).state_dict(), "HEAD")
    if "CODE" in args:
        Path("CODE").write_bytes(pickle.dumps({"epoch": 1, "state_dict": Code(tmp_path / "done")}))
    if "THREE" in args:
        state_dict = model.state_dict()
        del state_dict["layer3.0.conv2.gate"]
        state_dict["layer3.0.conv2.weight"] = torch.zeros(48, 16, 3, 3)
        torch.save(state_dict, "THREE")
    before = sorted(tmp_path.iterdir())
    assert main(["inspect", *(run[0] if arg == "RUN" else arg for arg in args)]) == 2
    out, error = capsys.readouterr()
    assert named in error
    assert len(error.splitlines()) == 1
    assert out == ""
    assert sorted(tmp_path.iterdir()) == before
