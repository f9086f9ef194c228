"""hub_configs/ and model cards."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from timm.models._hub import save_config_for_hf

from timm_dgconv import group_report
from timm_dgconv.hub.card import model_card
from timm_dgconv.hub.convert import describe
from timm_dgconv.hub.model import BASELINE

HUB_CONFIGS = Path(__file__).parents[2] / "hub_configs"
NAMES = ["g_resnext50.dgconv_in1k", "g_resnext101.dgconv_in1k", BASELINE]
RECORDS_ARGS = hasattr(timm.models, "get_model_args")  # in config.json, timm >= 1.0.31


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_the_files_of_a_hub_config_are_as_describe_and_timm_write_them(name: str, tmp_path: Path) -> None:
    describe(name, tmp_path)
    assert names(tmp_path) == ["README.md", "config.json"]
    assert names(HUB_CONFIGS / name) == ["README.md", *([] if name == BASELINE else ["args.yaml"]), "config.json"]
    rewrite = f"write it again: timm_dgconv.hub.convert.describe({name!r}, Path('hub_configs/{name}'))"
    assert (tmp_path / "README.md").read_bytes() == (HUB_CONFIGS / name / "README.md").read_bytes(), rewrite
    config = json.loads((HUB_CONFIGS / name / "config.json").read_text())
    written = json.loads((tmp_path / "config.json").read_text())
    arch = name.split(".")[0]
    cfg = timm.get_pretrained_cfg("g_resnext50.dgconv_in1k" if name == BASELINE else name).to_dict()
    cfg["architecture"] = arch
    with torch.device("meta"):
        form = {"sort": False} if name == "g_resnext50.dgconv_in1k" else {}  # the gates of the original release
        model = timm.create_model(arch, pretrained_cfg=cfg, num_classes=1000, **form)
    save_config_for_hf(model, tmp_path / "timm.json")
    by_timm = json.loads((tmp_path / "timm.json").read_text())
    paper = {
        "paper_ids": "arXiv:1611.05431",
        "paper_name": "Aggregated Residual Transformations for Deep Neural Networks",
    }
    by_timm["pretrained_cfg"] |= paper if name == BASELINE else {}
    if RECORDS_ARGS:  # transformers cannot load a second num_classes
        assert by_timm["model_args"].pop("num_classes") == by_timm["num_classes"]
    elif form:
        by_timm["model_args"] = form
    assert written == by_timm, rewrite
    # timm < 1.0.31 does not record model_args and global_pool.
    if not RECORDS_ARGS:
        written.pop("model_args", None)
    assert (written if RECORDS_ARGS else {**config, **written}) == config, rewrite

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
