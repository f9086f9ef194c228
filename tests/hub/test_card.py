"""hub_configs/ and model cards."""

import json
import re
from pathlib import Path

import pytest
import timm

from timm_dgconv import group_report
from timm_dgconv.hub.card import model_card
from timm_dgconv.hub.convert import describe
from timm_dgconv.hub.model import BASELINE

HUB_CONFIGS = Path(__file__).parents[2] / "hub_configs"
NAMES = ["g_resnext50.dgconv_in1k", "g_resnext101.dgconv_in1k", BASELINE]
RECORDS_ARGS = hasattr(timm.models, "get_model_args")  # in config.json, timm >= 1.0.31


@pytest.mark.parametrize("name", NAMES)
def test_the_files_of_a_hub_config_are_as_describe_writes_them(name: str, tmp_path: Path) -> None:
    describe(name, tmp_path)
    committed, rewrite = HUB_CONFIGS / name, f"timm_dgconv.hub.convert.describe({name!r}, Path('hub_configs/{name}'))"
    assert (tmp_path / "README.md").read_bytes() == (committed / "README.md").read_bytes(), rewrite
    config, written = (json.loads((folder / "config.json").read_text()) for folder in (committed, tmp_path))
    if not RECORDS_ARGS:
        written = {**config, **written, "model_args": config["model_args"]}
    assert written == config, rewrite
    assert "num_classes" not in config["model_args"], "transformers cannot load it"
    assert "hf_hub_id" not in config["pretrained_cfg"]


def test_the_card_of_a_compact_model_has_its_groups() -> None:
    groups = [32, 16, *[8] * 14]
    model = timm.create_model("g_resnext50.dgconv_in1k", groups=groups, device="meta")
    card = model_card(model, model_kwargs={"groups": groups, "global_pool": "avg"})
    assert "**Compared with:** timm's `resnext50_32x4d` has 25.0 M parameters" in card
    assert f"The numbers of groups per layer are {', '.join(map(str, groups))}." in card
    assert "dense" not in card


def test_the_card_of_other_widths_compares_with_no_network_of_timm() -> None:
    kwargs = {"channels": (32, 64, 128, 256)}
    model = timm.create_model("g_resnext50.dgconv_in1k", **kwargs)
    card = model_card(model, group_report(model), model_kwargs=kwargs)
    assert "Compared with" not in card
    resnext = timm.create_model("resnext50_32x4d", **kwargs)
    params = sum(parameter.numel() for parameter in resnext.parameters())
    assert re.search(rf"{params / 1e6:.1f} M parameters and [\d.]+ GMACs with the groups of a ResNeXt\.", card)
    assert "whose 3x3 convolutions learn" in card
    pointwise = timm.create_model("test_g_resnext", pointwise=True, device="meta")
    assert "a ResNeXt whose convolutions learn how many groups they have" in model_card(pointwise)
