"""The model card, in the form of timm's model cards."""

import math
from collections.abc import Mapping
from typing import Any

import timm
from timm.models import get_arch_pretrained_cfgs
from torch import nn

from timm_dgconv import _compat
from timm_dgconv.hub.model import BASELINE, RESNEXT_PAPER
from timm_dgconv.layers.dgconv import DGConv2d
from timm_dgconv.models.base_models import BASE_MODELS, FAMILIES, family
from timm_dgconv.models.group_net import layer_groups
from timm_dgconv.report import GroupReport
from timm_dgconv.tracing import trace


def fixed_groups(model: nn.Module) -> list[int]:
    """Return the groups of the layers of a compact model, and an empty list for other models."""
    return [] if any(isinstance(module, DGConv2d) for module in model.modules()) else layer_groups(model)


def _stats(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, str]:
    """Return counts for one image with their units."""
    traced = trace(model, input_size)
    params = sum(parameter.numel() for parameter in model.parameters())
    activations = sum(output.numel() for found in traced.outputs.values() for output in found)
    numbers = {"Params (M)": params / 1e6, "GMACs": traced.macs / 1e9, "Activations (M)": activations / 1e6}
    return {name: f"{number:.1f}" for name, number in numbers.items()}


def model_card(
    model: Any,
    report: GroupReport | None = None,
    figure: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Return the text of the model card.

    Args:
        model: A model with a pretrained_cfg that has an architecture and a tag. It may be on the meta device.
        report: The groups of its layers, if they are known.
        figure: Name of the file with a figure of the groups.
        model_kwargs: Arguments of the model that change the network.
    """
    cfg = model.pretrained_cfg
    architecture, tag, size = cfg["architecture"], cfg["tag"], cfg["input_size"]
    name, groups = f"{architecture}.{tag}", fixed_groups(model)
    details: dict[str, Any] = {
        "Model Type": "Image classification / feature backbone",
        "Model Stats": {**_stats(model, size), "Image size": f"{size[1]} x {size[2]}"},
    }
    base = BASE_MODELS.get(architecture)
    # timm >= 1.0.31 always stores the pooling.
    if base is not None and set(model_kwargs or ()) <= {"groups", "sort", "global_pool"}:
        baseline = timm.create_model(base, num_classes=model.num_classes, in_chans=size[0], device="meta")
        counted = "" if groups else _COUNTED_DENSE
        params, macs, activations = _stats(baseline, size).values()
        stats = f"{params} M parameters, {macs} GMACs, {activations} M activations"
        details["Compared with"] = f"{counted}timm's `{base}` has {stats}"
    papers = [RESNEXT_PAPER] if name == BASELINE else [_PAPER, RESNEXT_PAPER]
    details["Papers"] = [f"{title}: {id.replace('arXiv:', 'https://arxiv.org/abs/')}" for title, id in papers]
    if tag.endswith("in1k"):
        details["Dataset"] = "ImageNet-1k"
    if cfg.get("origin_url"):
        details["Original"] = cfg["origin_url"]
    if name in _CHECKPOINTS:
        details["Original checkpoint"] = _CHECKPOINTS[name]
    task = "image-classification" if model.num_classes else "image-feature-extraction"
    content = {
        "tags": [task, "timm", *([] if name == BASELINE else ["timm-dgconv"])],
        "license": cfg.get("license") or "unknown",
        "description": _description(name, groups, getattr(model, "pointwise", False))
        + ("" if report is None else _groups(report, figure)),
        "details": details,
        "usage": _usage(model, name),
        "citation": _CITATION,
    }
    if name == BASELINE or tag == "dgconv_in1k":
        content["comparison"] = _COMPARISON
    return _compat.generate_readme(content, name, task)


def _description(name: str, groups: list[int], pointwise: bool) -> str:
    architecture, _, tag = name.partition(".")
    if name == BASELINE:
        return (
            "A ResNeXt-50 32x4d image classification model, the baseline of the original release of G-ResNeXt, trained "
            "on ImageNet-1k by its authors.\n\ntimm loads it without timm-dgconv. The model `g_resnext50` of "
            "timm-dgconv loads the same weights, computes the same, and can learn its groups further."
        )
    network = FAMILIES[family(architecture)]
    text = (
        f"A G-{network} image classification model: a {network} whose {'' if pointwise else '3x3 '}convolutions learn "
        "how many groups they have (DGConv, dynamic grouping convolution)."
    )
    if name in _TRAINED_BY:
        text += _TRAINED_BY[name]
    elif tag.startswith(f"{family(architecture)}_") and name in get_arch_pretrained_cfgs(architecture):
        source = f"{BASE_MODELS[architecture]}.{tag.split('_', 1)[1]}"
        text += f" Converted from timm's `{source}`: it computes the same. Its groups are not learned yet."
    if groups:
        text += (
            "\n\nThis is the compact form, which computes the same with group convolutions. The numbers of groups per "
            f"layer are {', '.join(map(str, groups))}."
        )
    return text


def _groups(report: GroupReport, figure: str | None) -> str:
    """Return a table of the groups and of what they save."""
    wholes = [
        f"{cost.params / 1e6:.1f} M parameters and {cost.macs / 1e9:.2f} GMACs with {groups}"
        for cost, groups in [
            (report.learned, "these groups"),
            (report.dense, "one group in each of these layers"),
            (report.resnext, "the groups of a ResNeXt"),
        ]
        if cost is not None
    ]
    lines = [
        f"The layers keep {100 * report.density:.1f} % of the connections of dense layers. The whole network has "
        f"{', '.join(wholes[:-1])}, and {wholes[-1]}.",
        "",
        "| layer | channels | groups | parameters | with one group | MACs, M | with one group |",
        "|---|---|---|---|---|---|---|",
    ]
    for layer in report.layers:
        channels = f"{layer.in_channels} -> {layer.out_channels}"
        params = f"{layer.learned.params:,} | {layer.dense.params:,}"
        macs = f"{layer.learned.macs / 1e6:.2f} | {layer.dense.macs / 1e6:.2f}"
        lines.append(f"| {layer.name} | {channels} | {layer.groups} | {params} | {macs} |")
    if figure is not None:
        lines += ["", f"![groups]({figure})"]
    return "\n\n" + "\n".join(lines)


def _usage(model: Any, name: str) -> str:
    """Return the examples of timm's model cards."""
    channels, height, width = model.pretrained_cfg["input_size"]
    shapes = [
        f"{info['num_chs']}, {math.ceil(height / info['reduction'])}, {math.ceil(width / info['reduction'])}"
        for info in model.feature_info
    ]
    feature_maps = "\n".join(f"    #  torch.Size([1, {shape}])" for shape in shapes)
    examples = [
        ("Image Classification", "", _CLASSES),
        ("Feature Map Extraction", "\n    features_only=True,", _FEATURE_MAPS.format(feature_maps)),
        ("Image Embeddings", "\n    num_classes=0,  # remove classifier nn.Linear", _EMBEDDINGS.format(shapes[-1])),
    ]
    examples = examples if model.num_classes else examples[1:]
    grey = '.convert("L")' if channels == 1 else ""
    install = "" if name == BASELINE else "```bash\npip install timm-dgconv  # timm then knows the model\n```\n\n"
    return install + "\n".join(_EXAMPLE.format(heading, grey, name, *code) for heading, *code in examples)


_TRAINED_BY = {
    "g_resnext50.dgconv_in1k": " Trained on ImageNet-1k by the authors of the original release.",
    "g_resnext101.dgconv_in1k": " The original release describes this model and has no weights for it. The publisher "
    "of this repository trained these weights.",
}
_CHECKPOINTS = {
    "g_resnext50.dgconv_in1k": "https://drive.google.com/open?id=1elM-FVacE-Pkin_hCiW24oKCogHEaYRn",
    BASELINE: "https://drive.google.com/open?id=1zVQm-aoJV6GRi-mCds7B8HVcsI8Jbjim",
}
_PAPER = ("Differentiable Learning-to-Group Channels via Groupable Convolutional Neural Networks", "arXiv:1908.05867")
_COUNTED_DENSE = "a DGConv is counted dense, as it is stored; it is computed as a group convolution; "
_COMPARISON = """Accuracy on ImageNet-1k in percent, from the README of the
[original release](https://github.com/d-li14/dgconv.pytorch) (cosine schedule, 120 epochs). These are its authors'
figures and were not measured again. There are none for a G-ResNeXt-101.

|model                               |top-1 |top-5 |
|------------------------------------|------|------|
|G-ResNeXt-50 (`g_resnext50`)        |78.592|94.106|
|ResNeXt-50 32x4d (`resnext50_32x4d`)|78.198|93.916|
"""
_CITATION = """@InProceedings{Zhang_2019_ICCV,
  author = {Zhang, Zhaoyang and Li, Jingyu and Shao, Wenqi and Peng, Zhanglin and Zhang, Ruimao and Wang, Xiaogang and Luo, Ping},
  title = {Differentiable Learning-to-Group Channels via Groupable Convolutional Neural Networks},
  booktitle = {The IEEE International Conference on Computer Vision (ICCV)},
  month = {Oct},
  year = {2019}
}"""  # noqa: E501
_EXAMPLE = """### {}
```python
from urllib.request import urlopen

import timm
import torch
from PIL import Image

img = Image.open(
    urlopen("https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/beignets-task-guide.png")
){}

model = timm.create_model(
    "hf-hub:OWNER/{}",  # OWNER: the account of this repository
    pretrained=True,{}
)
model = model.eval()

# get model specific transforms (normalization, resize)
data_config = timm.data.resolve_model_data_config(model)
transforms = timm.data.create_transform(**data_config, is_training=False)

output = model(transforms(img).unsqueeze(0))  # {}
```
"""
_CLASSES = """unsqueeze single image into batch of 1

top5_probabilities, top5_class_indices = torch.topk(output.softmax(dim=1) * 100, k=5)"""
_FEATURE_MAPS = """unsqueeze single image into batch of 1

for o in output:
    # print shape of each feature map in output
    # e.g.:
{}
    print(o.shape)"""
_EMBEDDINGS = """output is (batch_size, num_features) shaped tensor

# or equivalently (without needing to set num_classes=0)

output = model.forward_features(transforms(img).unsqueeze(0))
# output is unpooled, a (1, {}) shaped tensor

output = model.forward_head(output, pre_logits=True)
# output is a (1, num_features) shaped tensor"""
