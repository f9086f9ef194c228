"""G-ResNet and G-ResNeXt: ResNet and ResNeXt whose 3x3 convolutions learn their number of groups.

Papers:
* `Differentiable Learning-to-Group Channels via Groupable Convolutional Neural Networks` -
  https://arxiv.org/abs/1908.05867

Original release: https://github.com/d-li14/dgconv.pytorch (MIT)
"""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from timm_dgconv.models.base_models import base_cfgs, check_pretrained
from timm_dgconv.models.fold import FoldsNorms
from timm_dgconv.models.group_net import GroupFeatureListNet, GroupNet, add_missing_gates

__all__ = ["GBasicBlock", "GBottleneck", "GResNet"]


class GBasicBlock(FoldsNorms, BasicBlock):
    """timm's basic block, whose 3x3 convolutions the network converts."""


class GBottleneck(FoldsNorms, Bottleneck):
    """timm's bottleneck, whose 3x3 convolution the network converts."""


class GResNet(GroupNet, ResNet):
    """A timm ResNet whose 3x3 convolutions are DGConv2d layers."""

    group_convs = r"layer\d\.\d+\.(conv\d|downsample\.\d)"

    def __init__(
        self,
        block: type[GBasicBlock] | type[GBottleneck],
        layers: tuple[int, ...],
        cardinality: int = 1,
        base_width: int = 64,
        zero_init_last: bool = True,
        **kwargs: Any,
    ) -> None:
        """Build the network.

        Args:
            block: Class of the blocks.
            layers: Number of blocks per stage.
            cardinality: Number of groups of the ResNeXt with the same widths. It only determines the widths.
            base_width: Width of such a group in the first stage.
            zero_init_last: Initialise the weights of the last norm of each block with zeros.
            **kwargs: Further arguments of `GroupNet` and of timm's ResNet. The `complexity_target` "resnext" is the
                share of a ResNeXt with this cardinality.

        Raises:
            TypeError: If timm's ResNet does not take an argument, or if an argument is not a number.
            ValueError: As `GroupNet`.
        """
        self.cardinality = cardinality
        kwargs.update(cardinality=cardinality, base_width=base_width)
        super().__init__(block, layers, zero_init_last=zero_init_last, **kwargs)
        ResNet.init_weights(self, zero_init_last)  # the weights between the groups of a ResNeXt, too


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "mit",
        "paper_ids": "arXiv:1908.05867",
        "paper_name": "Differentiable Learning-to-Group Channels via Groupable Convolutional Neural Networks",
        "origin_url": "https://github.com/d-li14/dgconv.pytorch",
        **kwargs,
    }


# The first tag with weights is the default. That is dgconv_in1k as soon as it has an hf_hub_id.
default_cfgs = generate_default_cfgs(
    {
        "g_resnext50.dgconv_in1k": _cfg(),
        "g_resnext101.dgconv_in1k": _cfg(),
        **base_cfgs("g_resnet18"),
        **base_cfgs("g_resnet34"),
        **base_cfgs("g_resnet50"),
        **base_cfgs("g_resnet101"),
        **base_cfgs("g_resnet152"),
        **base_cfgs("g_wide_resnet50_2"),
        **base_cfgs("g_resnext50"),
        **base_cfgs("g_resnext101", default_tag="tv2_in1k"),
        **base_cfgs("g_resnext101_32x4d"),
        **base_cfgs("g_resnext101_64x4d"),
        "test_g_resnet.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5), crop_pct=0.95),
        "test_g_resnext.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5), crop_pct=0.95),
    }
)


def _create_g_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> GResNet:
    if pretrained:
        check_pretrained(variant, kwargs, _HOW_TO_GET_WEIGHTS.get(variant))
    return build_model_with_cfg(
        GResNet,
        variant,
        pretrained,
        pretrained_filter_fn=add_missing_gates,
        feature_cfg=dict(feature_cls=GroupFeatureListNet),
        **kwargs,
    )


_HOW_TO_GET_WEIGHTS = {
    "g_resnext50": "The weights g_resnext50.dgconv_in1k are not on the Hub yet. Download the file of the original "
    "release from https://drive.google.com/open?id=1elM-FVacE-Pkin_hCiW24oKCogHEaYRn and load it: "
    "create_model('g_resnext50.dgconv_in1k', pretrained=True, pretrained_cfg_overlay=dict(file=PATH)). Or convert it: "
    "timm-dgconv convert PATH --model g_resnext50.dgconv_in1k --out DIR, and use the model name 'local-dir:DIR'. "
    "Published weights load with create_model('hf-hub:OWNER/NAME', pretrained=True).",
    "g_resnext101": "The original release has no weights for g_resnext101. g_resnext101.resnext_tv2_in1k and the other "
    "resnext_ tags are converted from timm's ResNeXt. Published weights load with "
    "create_model('hf-hub:OWNER/NAME', pretrained=True), your own checkpoint with "
    "pretrained_cfg_overlay=dict(file=PATH).",
}


@register_model
def g_resnet18(pretrained: bool = False, **kwargs: Any) -> GResNet:
    """G-ResNet-18."""
    model_args = dict(block=GBasicBlock, layers=(2, 2, 2, 2))
    return _create_g_resnet("g_resnet18", pretrained, **dict(model_args, **kwargs))


@register_model
def g_resnet34(pretrained: bool = False, **kwargs: Any) -> GResNet:
    """G-ResNet-34."""
    model_args = dict(block=GBasicBlock, layers=(3, 4, 6, 3))
    return _create_g_resnet("g_resnet34", pretrained, **dict(model_args, **kwargs))


@register_model
def g_resnet50(pretrained: bool = False, **kwargs: Any) -> GResNet:
    """G-ResNet-50."""
    model_args = dict(block=GBottleneck, layers=(3, 4, 6, 3))
    return _create_g_resnet("g_resnet50", pretrained, **dict(model_args, **kwargs))


@register_model
def g_resnet101(pretrained: bool = False, **kwargs: Any) -> GResNet:
    """G-ResNet-101."""
    model_args = dict(block=GBottleneck, layers=(3, 4, 23, 3))
    return _create_g_resnet("g_resnet101", pretrained, **dict(model_args, **kwargs))


@register_model
def g_resnet152(pretrained: bool = False, **kwargs: Any) -> GResNet:
    """G-ResNet-152."""
    model_args = dict(block=GBottleneck, layers=(3, 8, 36, 3))
    return _create_g_resnet("g_resnet152", pretrained, **dict(model_args, **kwargs))


@register_model
def g_wide_resnet50_2(pretrained: bool = False, **kwargs: Any) -> GResNet:
    """G-ResNet-50 with the widths of a Wide ResNet-50-2."""
    model_args = dict(block=GBottleneck, layers=(3, 4, 6, 3), base_width=128)
    return _create_g_resnet("g_wide_resnet50_2", pretrained, **dict(model_args, **kwargs))


@register_model
def g_resnext50(pretrained: bool = False, **kwargs: Any) -> GResNet:
    """G-ResNeXt-50, with the widths of a ResNeXt-50 32x4d."""
    model_args = dict(block=GBottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4)
    return _create_g_resnet("g_resnext50", pretrained, **dict(model_args, **kwargs))


@register_model
def g_resnext101(pretrained: bool = False, **kwargs: Any) -> GResNet:
    """G-ResNeXt-101, with the widths of a ResNeXt-101 32x8d."""
    model_args = dict(block=GBottleneck, layers=(3, 4, 23, 3), cardinality=32, base_width=8)
    return _create_g_resnet("g_resnext101", pretrained, **dict(model_args, **kwargs))


@register_model
def g_resnext101_32x4d(pretrained: bool = False, **kwargs: Any) -> GResNet:
    """G-ResNeXt-101, with the widths of a ResNeXt-101 32x4d."""
    model_args = dict(block=GBottleneck, layers=(3, 4, 23, 3), cardinality=32, base_width=4)
    return _create_g_resnet("g_resnext101_32x4d", pretrained, **dict(model_args, **kwargs))


@register_model
def g_resnext101_64x4d(pretrained: bool = False, **kwargs: Any) -> GResNet:
    """G-ResNeXt-101, with the widths of a ResNeXt-101 64x4d."""
    model_args = dict(block=GBottleneck, layers=(3, 4, 23, 3), cardinality=64, base_width=4)
    return _create_g_resnet("g_resnext101_64x4d", pretrained, **dict(model_args, **kwargs))


@register_model
def test_g_resnet(pretrained: bool = False, **kwargs: Any) -> GResNet:
    """A tiny G-ResNet of basic blocks for tests."""
    model_args = dict(block=GBasicBlock, layers=(1, 1, 1, 1), channels=(16, 32, 48, 48))
    return _create_g_resnet("test_g_resnet", pretrained, **dict(model_args, **kwargs))


@register_model
def test_g_resnext(pretrained: bool = False, **kwargs: Any) -> GResNet:
    """A tiny G-ResNeXt for tests. Its 48 and 96 channels are not powers of two."""
    model_args = dict(block=GBottleneck, layers=(1, 1, 1, 1), cardinality=4, base_width=16, channels=(16, 32, 48, 96))
    return _create_g_resnet("test_g_resnext", pretrained, **dict(model_args, **kwargs))
