"""Checkpoints of every kind load, wherever timm loads a checkpoint."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.models
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.layers import BlurPool2d
from timm.models.resnet import Bottleneck, ResNet
from torch import nn
from torch.testing import assert_close

import timm_dgconv
from timm_dgconv import DGConv2d, grouping

TINY = {"layers": (1, 1, 1, 1), "cardinality": 4, "base_width": 16, "channels": (16, 32, 48, 96)}  # test_g_resnext


def unsettle(model: nn.Module) -> nn.Module:
    """Batch norms that are not trivial, and no block that is its shortcut."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def learned(seed: int = 0, **kwargs: Any) -> nn.Module:
    """A tiny G-ResNeXt with gates here and there."""
    torch.manual_seed(seed)
    return unsettle(timm.create_model("test_g_resnext", num_classes=10, **kwargs))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64)


class TestOriginal:
    """The original release's files, through every route that leads into timm."""

    @pytest.mark.parametrize("route", ["checkpoint_path", "overlay", "load_checkpoint", "resume_checkpoint"])
    def test_loads(self, original: tuple[Path, torch.Tensor, torch.Tensor], route: str) -> None:
        file, x, logits = original
        if route == "checkpoint_path":  # and train.py --initial-checkpoint
            model = timm.create_model("g_resnext50", checkpoint_path=str(file))
        elif route == "overlay":
            overlay = {"file": str(file)}
            model = timm.create_model("g_resnext50.dgconv_in1k", pretrained=True, pretrained_cfg_overlay=overlay)
        else:  # validate.py --checkpoint, train.py --resume
            model = timm.create_model("g_resnext50")
            getattr(timm.models, route)(model, str(file))
        with torch.inference_mode():
            assert_close(model.eval()(x), logits, rtol=1e-4, atol=1e-4 * logits.abs().max().item())

    def test_pretrained_path(self, original: tuple[Path, torch.Tensor, torch.Tensor]) -> None:
        """train.py --pretrained-path says num_classes=-1, with which timm leaves the classifier fresh."""
        file, x, logits = original
        overlay = {"file": str(file), "num_classes": -1}
        model = timm.create_model("g_resnext50", True, num_classes=1000, pretrained_cfg_overlay=overlay)
        fc = torch.load(file, weights_only=True)["state_dict"]
        model.fc.load_state_dict({name: fc[f"module.fc.{name}"] for name in ("weight", "bias")})
        with torch.inference_mode():
            assert_close(model.eval()(x), logits, rtol=1e-4, atol=1e-4 * logits.abs().max().item())

    def test_dgconv_in1k_from_a_file(
        self, original: tuple[Path, torch.Tensor, torch.Tensor], caplog: pytest.LogCaptureFixture
    ) -> None:
        file, x, _ = original
        model = timm.create_model(
            "g_resnext50.dgconv_in1k", pretrained=True, features_only=True, pretrained_cfg_overlay={"file": str(file)}
        )
        assert "converted ResNeXt" not in caplog.text
        assert len(model(x)) == 5

    def test_layer_keeps_nothing_else(self) -> None:
        conv = DGConv2d(16, 16, 3)
        gate, weight = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.randn(16, 16, 3, 3)
        state_dict = {
            "conv.weight": weight,
            "conv.bias": torch.randn(16),
            "gate": gate,
            "D": torch.eye(2),
            "I": torch.ones(2, 2),
        }
        conv.load_state_dict(state_dict)
        assert torch.equal(conv.weight, weight)
        assert torch.equal(conv.gate, gate)
        assert set(state_dict) == {"conv.weight", "conv.bias", "gate", "D", "I"}, "the caller's dict is the caller's"


class TestResNeXt:
    @pytest.mark.parametrize(
        ("name", "resnext"), [("g_resnext50", "resnext50_32x4d"), ("g_resnext101", "resnext101_32x8d")]
    )
    def test_is_the_same_function(self, name: str, resnext: str, tmp_path: Path, x: torch.Tensor) -> None:
        torch.manual_seed(0)
        fixed = unsettle(timm.create_model(resnext))
        save_file(fixed.state_dict(), tmp_path / "resnext.safetensors")
        model = timm.create_model(name, checkpoint_path=tmp_path / "resnext.safetensors").eval()
        assert timm_dgconv.block_groups(model) == [32] * len(timm_dgconv.block_groups(model))
        with torch.inference_mode():
            expected = fixed(x)
        del fixed
        logits = model(x)
        assert_close(logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        gates = [conv.gate for conv in model.modules() if isinstance(conv, DGConv2d)]
        for gate, grad in zip(gates, torch.autograd.grad(logits.square().sum(), gates), strict=True):
            assert (grad[gate < 0] != 0).all()

    @given(st.sampled_from([(16, 16), (48, 96), (24, 8)]), st.integers(0, 3), st.booleans(), st.integers(0, 2**31))
    def test_layer(self, channels: tuple[int, int], closed: int, sort: bool, seed: int) -> None:
        torch.manual_seed(seed)
        fixed = nn.Conv2d(*channels, 3, groups=2**closed)
        conv = DGConv2d(*channels, 3, sort=sort)
        fresh = conv.weight.detach().clone()
        conv.load_state_dict(fixed.state_dict())
        assert conv.num_groups == 2**closed
        outside = conv.connectivity() == 0
        assert torch.equal(conv.weight[outside], fresh[outside])
        assert (conv.gate.abs() == timm_dgconv.dgconv.LOADED_GATE).all()
        x = torch.randn(1, channels[0], 5, 5)
        assert_close(conv(x), fixed(x), rtol=1e-4, atol=1e-5)

    def test_into_a_model_on_the_meta_device(self, x: torch.Tensor) -> None:
        fixed = unsettle(ResNet(Bottleneck, num_classes=10, **TINY))
        model = timm.create_model("test_g_resnext", num_classes=10, device="meta").eval()
        model.load_state_dict(fixed.state_dict(), assign=True)
        assert_close(model(x), fixed(x))

    def test_other_classes_and_channels(self, tmp_path: Path) -> None:
        fixed = unsettle(ResNet(Bottleneck, **TINY))
        torch.save(fixed.state_dict(), tmp_path / "resnext.pth")
        overlay = {"file": str(tmp_path / "resnext.pth")}
        model = timm.create_model(
            "test_g_resnext", True, num_classes=3, in_chans=1, pretrained_cfg_overlay=overlay
        ).eval()
        assert model(torch.randn(1, 1, 64, 64)).shape == (1, 3)
        assert timm_dgconv.block_groups(model) == [4, 4, 4, 4]

    @pytest.mark.parametrize(
        ("weight", "why"),
        [
            (torch.zeros(48, 16, 3, 3), r"3 groups.*48 -> 48 channels.*power of two up to 16"),
            (torch.zeros(48, 1, 3, 3), r"48 groups.*power of two up to 16"),
            (torch.zeros(48, 9, 3, 3), r"5\.33333 groups"),
            (torch.zeros(32, 12, 3, 3), r"shape \(32, 12, 3, 3\).*expected.*\(48, 48 / groups, 3, 3\)"),
            (torch.zeros(48, 12, 1, 1), r"shape \(48, 12, 1, 1\)"),
            (torch.zeros(48), r"shape \(48,\)"),
            (torch.zeros(48, 0, 3, 3), r"shape \(48, 0, 3, 3\)"),
        ],
        ids=["three", "depthwise of 48", "five and a third", "width", "kernel", "vector", "empty"],
    )
    def test_refuses(self, weight: torch.Tensor, why: str) -> None:
        model = learned()
        state_dict = ResNet(Bottleneck, num_classes=10, **TINY).state_dict()
        state_dict["layer3.0.conv2.weight"] = weight
        with pytest.raises(RuntimeError, match=rf"layer3\.0\.conv2: .*{why}"):
            model.load_state_dict(state_dict)


class TestTags:
    @pytest.mark.parametrize(
        ("name", "resnext", "default"),
        [("g_resnext50", "resnext50_32x4d", "a1h_in1k"), ("g_resnext101", "resnext101_32x8d", "tv2_in1k")],
    )
    def test_every_tag_of_timm(self, name: str, resnext: str, default: str) -> None:
        sources = timm.list_pretrained(f"{resnext}.*")
        tags = {f"{name}.resnext_{source.split('.', 1)[1]}": source for source in sources}
        assert set(timm.list_pretrained(f"{name}*")) == set(tags)
        for tag, source in tags.items():
            ours, theirs = (timm.get_pretrained_cfg(n).to_dict() for n in (tag, source))
            assert {key for key in theirs if ours[key] != theirs[key]} == {"architecture", "tag"}
            assert ours["hf_hub_id"] == f"timm/{source}"
        assert timm.get_pretrained_cfg(name).tag == f"resnext_{default}"

    def test_becomes_the_default_once_published(self) -> None:
        from timm.models import generate_default_cfgs

        from timm_dgconv.g_resnext import default_cfgs

        published = {
            f"g_resnext50.{tag}": {**cfg.to_dict(), "hf_hub_id": "somebody/g_resnext50.dgconv_in1k"}
            if tag == "dgconv_in1k"
            else cfg
            for tag, cfg in sorted(default_cfgs["g_resnext50"].cfgs.items())
        }
        assert generate_default_cfgs(published)["g_resnext50"].tags[0] == "dgconv_in1k"

    @pytest.mark.parametrize(
        ("name", "ways"),
        [
            (
                "g_resnext50",
                ["drive.google.com", "timm-dgconv convert", "pretrained_cfg_overlay=dict(file=PATH)", "hf-hub:"],
            ),
            ("g_resnext101", ["no weights", "resnext_tv2_in1k", "pretrained_cfg_overlay=dict(file=PATH)", "hf-hub:"]),
        ],
    )
    def test_unpublished(self, name: str, ways: list[str]) -> None:
        with pytest.raises(RuntimeError) as error:
            timm.create_model(f"{name}.dgconv_in1k", pretrained=True)
        assert all(way in str(error.value) for way in ways)

    def test_says_that_nothing_is_learned_yet(self, caplog: pytest.LogCaptureFixture) -> None:
        weights = ResNet(Bottleneck, (3, 4, 6, 3), cardinality=32, base_width=4).state_dict()
        cfg = timm.get_pretrained_cfg("g_resnext50").to_dict()
        with pytest.raises(Exception, match=r"."), caplog.at_level(logging.WARNING):  # there is no Hub here
            timm.create_model(
                "g_resnext50", pretrained=True, pretrained_cfg={**cfg, "hf_hub_id": None, "url": "file:///no"}
            )
        assert re.search(r"g_resnext50\.resnext_a1h_in1k is a converted ResNeXt.*not learned yet", caplog.text)
        caplog.clear()
        timm.create_model("g_resnext50", pretrained=True, pretrained_cfg_overlay={"state_dict": weights})
        assert "converted" not in caplog.text


class TestCompact:
    @pytest.mark.parametrize(
        "kwargs",
        [
            {},
            {"block_args": {"sort": True}},
            {"block_args": {"attn_layer": "se"}},
            {"aa_layer": BlurPool2d, "drop_block_rate": 0.1, "act_layer": "prelu"},
            {"norm_layer": "groupnorm1"},
            {"norm_layer": "layernorm2d"},
            {"block_reduce_first": 2},
            {"output_stride": 8},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("seed", [0, 1])
    def test_is_the_same_function(self, kwargs: dict[str, Any], seed: int, x: torch.Tensor) -> None:
        model = learned(seed, **kwargs)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        form = timm_dgconv.compact(model)
        assert not any(isinstance(module, DGConv2d) for module in form.modules())
        assert_close(form(x), model(x), rtol=1e-4, atol=1e-5)
        assert sum(p.numel() for p in form.parameters()) < sum(p.numel() for p in model.parameters())
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), "the model itself stays as it was"
        again = timm_dgconv.compact(form)
        assert torch.equal(again(x), form(x))

    def test_round_trip_and_training(self, x: torch.Tensor) -> None:
        model = learned()
        form = timm_dgconv.compact(model)
        groups = timm_dgconv.block_groups(model)
        assert timm_dgconv.block_groups(form) == groups
        assert len(set(groups)) > 1
        built = timm.create_model("test_g_resnext", num_classes=10, groups=groups).eval()
        built.load_state_dict(form.state_dict())
        assert torch.equal(built(x), form(x))
        built.train()(x).sum().backward()
        assert all(p.grad is not None for p in built.parameters())

    def test_goes_back_into_a_model_with_gates(self, x: torch.Tensor) -> None:
        form = timm_dgconv.compact(learned())
        model = timm.create_model("test_g_resnext", num_classes=10).eval()
        model.load_state_dict(form.state_dict())
        assert_close(model(x), form(x), rtol=1e-4, atol=1e-5)

    def test_features_only(self, x: torch.Tensor) -> None:
        model = learned(features_only=True)
        for ours, theirs in zip(timm_dgconv.compact(model)(x), model(x), strict=True):
            assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("name", "resnext"), [("g_resnext50", "resnext50_32x4d"), ("g_resnext101", "resnext101_32x8d")]
    )
    def test_sizes_of_the_resnext(self, name: str, resnext: str) -> None:
        fixed = timm.create_model(resnext, device="meta")
        form = timm.create_model(
            name, groups=[32] * sum(1 for m in fixed.modules() if isinstance(m, Bottleneck)), device="meta"
        )
        assert {k: v.shape for k, v in form.state_dict().items()} == {k: v.shape for k, v in fixed.state_dict().items()}

    def test_same_order_for_sorted_gates(self) -> None:
        gate = torch.tensor([1.0, -1.0, 1.0])
        assert grouping.channel_order(gate, 24, sort=True).tolist() == list(range(24))
        assert grouping.channel_order(gate, 24).tolist() != list(range(24))

    @pytest.mark.parametrize(
        ("groups", "why"),
        [
            ([4, 4, 4], "4 blocks"),
            ([4, 4, 5, 4], "groups=5.*48 -> 48"),
            ("4444", "4 blocks"),
            (4, "groups=4 must be one number for each of the 4 blocks"),
            ([0] * 4, "groups=0"),
        ],
    )
    def test_refuses_groups(self, groups: Any, why: str) -> None:
        with pytest.raises(ValueError, match=why):
            timm.create_model("test_g_resnext", groups=groups)

    def test_refuses_models(self) -> None:
        with pytest.raises(ValueError, match="ResNet has no GroupableBottleneck"):
            timm_dgconv.compact(timm.create_model("test_resnet"))
        with pytest.raises(ValueError, match=r"1 is in none"):
            timm_dgconv.compact(nn.Sequential(learned(), DGConv2d(2, 2, 1)))
        with pytest.raises(ValueError, match="norm_layer without groups"):
            timm_dgconv.compact(learned(norm_layer=lambda c, **kwargs: nn.GroupNorm(4, c, **kwargs)))
