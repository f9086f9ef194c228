"""Report the groups in checkpoints."""

from collections.abc import Mapping, Sequence
from typing import Any

import timm

from timm_dgconv.hub.model import Checkpoint, resolve
from timm_dgconv.models.base_models import ARCHITECTURES
from timm_dgconv.report import GroupHistory, group_report


def inspect(
    sources: Sequence[str],
    model_name: str,
    use_ema: bool = True,
    image_size: int | None = None,
    layers: Sequence[str] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    costs: str | None = None,
) -> GroupHistory:
    """Report the groups in the checkpoints of one run. No code in them is executed.

    The arguments are those of ``timm-dgconv inspect``. Checkpoints that all have an epoch are sorted by it.

    Raises:
        ValueError: If a model or layer is unknown, a source is not a checkpoint of the model, the checkpoints are of
            different networks, or `costs` is not a table of the model.
        RuntimeError: If the Hub does not return a source.
    """
    architecture = model_name.partition(".")[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown model {model_name!r}; use {', '.join(ARCHITECTURES)}, with or without a tag")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image size must be at least 1, got {image_size}")
    default_tag = timm.get_pretrained_cfg(architecture).tag
    _, cfg = resolve(model_name if "." in model_name else f"{architecture}.{default_tag}")
    entries = []
    for source in sources:
        checkpoint = Checkpoint(source, architecture, cfg, use_ema, model_kwargs)
        model = checkpoint.load_groups()
        in_chans, height, width = timm.data.resolve_model_data_config(model)["input_size"]
        report = group_report(model, (in_chans, image_size or height, image_size or width), costs)
        report.select(layers)
        entries.append((report, source, checkpoint.epoch))
    if all(epoch is not None for *_, epoch in entries):  # a shell sorts checkpoint-10 before checkpoint-2
        entries.sort(key=lambda entry: entry[2] or 0)
    return GroupHistory(*zip(*entries, strict=True))
