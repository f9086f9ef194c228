"""The networks of timm whose weights the models of this package load: their base models, and their pretrained tags."""

import dataclasses
import logging
from typing import Any

from timm.models import get_pretrained_cfg, list_models, resolve_pretrained_cfg

_logger = logging.getLogger(__name__)

BASE_MODELS = {
    "g_resnet18": "resnet18",
    "g_resnet34": "resnet34",
    "g_resnet50": "resnet50",
    "g_resnet101": "resnet101",
    "g_resnet152": "resnet152",
    "g_wide_resnet50_2": "wide_resnet50_2",
    "g_resnext50": "resnext50_32x4d",
    "g_resnext101": "resnext101_32x8d",
    "g_resnext101_32x4d": "resnext101_32x4d",
    "g_resnext101_64x4d": "resnext101_64x4d",
    "g_densenet121": "densenet121",
}
"""Name of a model -> name of timm's model with the same widths, whose weights it loads."""

ARCHITECTURES = (*BASE_MODELS, "test_g_resnet", "test_g_resnext")
"""Names of all models of this package."""

FAMILIES = {"resnext": "ResNeXt", "resnet": "ResNet", "densenet": "DenseNet"}
"""Name of a family in the names of models -> name of the networks."""


def family(architecture: str) -> str:
    """Return the family of a model, a key of `FAMILIES`."""
    return next(name for name in FAMILIES if name in architecture)


def base_cfgs(variant: str, default_tag: str | None = None) -> dict[str, Any]:
    """Return every pretrained tag of the base model of a model, such as `g_resnet50.resnet_a1_in1k`.

    Args:
        variant: Name of the model.
        default_tag: The tag of the base model that is first, and so is the default. By default it is timm's.
    """
    base = BASE_MODELS[variant]
    default = f"{base}.{default_tag or get_pretrained_cfg(base).tag}"
    names = sorted(list_models(f"{base}.*", pretrained=True), key=lambda name: name != default)
    cfgs = {name: dataclasses.replace(get_pretrained_cfg(name), architecture=None, tag=None) for name in names}
    return {f"{variant}.{family(base)}_{name.split('.', 1)[1]}": cfg for name, cfg in cfgs.items()}


def check_pretrained(variant: str, kwargs: dict[str, Any], missing: str | None = None) -> None:
    """Warn that the weights of a base model have no learned groups.

    Args:
        variant: Name of the model.
        kwargs: Arguments of `timm.create_model`.
        missing: What to say if the weights of the original release are requested, and are not on the Hub.

    Raises:
        RuntimeError: With `missing`.
    """
    overlay = kwargs.get("pretrained_cfg_overlay")
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
    elsewhere = cfg.source or cfg.file or cfg.state_dict or "hf_hub_id" in (overlay or {})  # the user's weights
    if cfg.tag == "dgconv_in1k" and not (elsewhere or cfg.has_weights):
        raise RuntimeError(missing)
    if cfg.tag and variant in BASE_MODELS and cfg.tag.startswith(f"{family(variant)}_") and not elsewhere:
        _logger.warning(
            f"{variant}.{cfg.tag} is a converted {BASE_MODELS[variant]}: it computes the same. Its groups are not "
            "learned yet."
        )
