"""G-ResNet and G-ResNeXt: ResNet and ResNeXt whose 3x3 convolutions learn their number of groups.

Papers:
* `Differentiable Learning-to-Group Channels via Groupable Convolutional Neural Networks` -
  https://arxiv.org/abs/1908.05867

Original release: https://github.com/d-li14/dgconv.pytorch (MIT)
"""

import copy
import weakref
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import FeatureListNet, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from timm_dgconv.layers.dgconv import DGConv2d
from timm_dgconv.layers.group_conv import GroupConv2d
from timm_dgconv.models.compact import fold_norm, fold_sequence, to_group_convs
from timm_dgconv.models.group_net import GroupNet
from timm_dgconv.models.groupable import groupable
from timm_dgconv.models.sources import check_pretrained, source_cfgs

__all__ = ["GResNet", "GroupableBasicBlock", "GroupableBottleneck"]


class GroupableBasicBlock(BasicBlock):
    """timm's basic block with DGConv2d layers as its 3x3 convolutions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build the block with the arguments of timm's BasicBlock."""
        super().__init__(*args, **kwargs)
        for conv in (self.conv1, self.conv2):
            groupable(conv, where=lambda *_: True)
            conv.reset_gate()

    def fuse(self) -> nn.Module:
        """Return the block for inference, as `GroupableBottleneck.fuse`."""
        return _fuse(self, (("conv1", "bn1"), ("conv2", "bn2")))


class GroupableBottleneck(Bottleneck):
    """timm's bottleneck with a DGConv2d as its 3x3 convolution."""

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        cardinality: int = 1,
        sort: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the block.

        Args:
            inplanes: Number of input channels.
            planes: Base width. The block has `planes * 4` output channels.
            stride: Stride of the 3x3 convolution.
            downsample: Module on the shortcut.
            cardinality: Number of groups in a ResNeXt. It only determines the width.
            sort: Contiguous groups, see DGConv2d.
            device: Device of the parameters.
            dtype: Dtype of the parameters.
            **kwargs: Further arguments of timm's Bottleneck.
        """
        super().__init__(
            inplanes, planes, stride, downsample, cardinality=cardinality, device=device, dtype=dtype, **kwargs
        )
        self.cardinality = cardinality
        fixed: Any = self.get_submodule("conv2")
        self.conv2 = DGConv2d(
            fixed.in_channels,
            fixed.out_channels,
            fixed.kernel_size,
            stride=fixed.stride,
            padding=fixed.padding,
            dilation=fixed.dilation,
            bias=False,
            sort=sort,
            device=device,
            dtype=dtype,
        )

    def fuse(self) -> nn.Module:
        """Return the block for inference, as `timm.utils.reparameterize_model` requests it.

        The DGConv2d becomes a group convolution, see `timm_dgconv.compact`. Batch norms with running statistics are
        folded into the convolutions before them.

        Returns:
            A new block. It computes what this block computes in evaluation mode.
        """
        return _fuse(self, (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")))


def _fuse(source: nn.Module, pairs: Iterable[tuple[str, str]]) -> nn.Module:
    """Return a block of group convolutions with folded norms."""
    block: Any = copy.deepcopy(source)
    to_group_convs(block)
    for conv, norm in pairs:
        setattr(block, norm, fold_norm(getattr(block, conv), getattr(block, norm)))
    for name, module in list(block.named_children()):
        if isinstance(module, GroupConv2d):
            setattr(block, name, module.fuse())
    fold_sequence(block.downsample)
    return block


class _StemFuse:
    """The `fuse` of a norm in the stem. `timm.utils.reparameterize_model` calls `fuse` on modules, not on the model.

    It looks up the module before the norm when it is called, since users replace the stem.
    """

    def __init__(self, model: nn.Module | None, norm: nn.Module) -> None:
        self.model = None if model is None else weakref.ref(model)
        self.norm = weakref.ref(norm)
        self.fused: nn.Module | None = None  # the norm may be registered twice, and is folded once

    def __call__(self) -> nn.Module | None:
        if self.fused is not None:
            return self.fused
        model, norm = None if self.model is None else self.model(), self.norm()
        if model is not None:  # a feature extractor may hold the norm without the model
            for before, module in pairwise(_stem(model)):
                if module is norm:
                    fused = fold_norm(before, norm)
                    self.fused = None if fused is norm else fused
                    return fused
        return norm

    def __reduce__(self) -> Any:  # a copied norm belongs to the copied model
        return _StemFuse, (None if self.model is None else self.model(), self.norm())


def _stem(model: nn.Module) -> list[nn.Module]:
    """Return the modules before the first stage in the order of execution."""

    def leaves(module: nn.Module) -> list[nn.Module]:
        if not isinstance(module, nn.Sequential):
            return [module]
        return [leaf for child in module.children() for leaf in leaves(child)]

    children = dict(model.named_children())
    names = [name for name in ("conv1", "bn1", "act1", "maxpool") if name in children]
    return [leaf for name in names for leaf in leaves(children[name])]


def _set_stem_fuse(model: nn.Module) -> None:
    """Give the batch norms in the stem a `fuse`, see `_StemFuse`."""
    for module in _stem(model):
        if hasattr(module, "running_mean"):
            module.fuse = _StemFuse(model, module)  # type: ignore[assignment]


class GResNet(GroupNet, ResNet):
    """A timm ResNet whose 3x3 convolutions are DGConv2d layers."""

    def __init__(
        self,
        block: type[GroupableBasicBlock] | type[GroupableBottleneck],
        layers: tuple[int, ...],
        cardinality: int = 1,
        base_width: int = 64,
        complexity_target: float | str | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the network.

        Args:
            block: Class of the blocks.
            layers: Number of blocks per stage.
            cardinality: Number of groups of the ResNeXt with the same widths. It only determines the widths.
            base_width: Width of such a group in the first stage.
            complexity_target: See `GroupNet`. "resnext" is the density of a ResNeXt with this cardinality.
            **kwargs: Further arguments of `GroupNet` and of timm's ResNet.

        Raises:
            TypeError: If timm's ResNet does not take an argument, or if an argument is not a number.
            ValueError: As `GroupNet`.
        """
        if complexity_target == "resnext":
            complexity_target = 1 / cardinality
        kwargs.update(cardinality=cardinality, base_width=base_width, complexity_target=complexity_target)
        super().__init__(block, layers, **kwargs)
        _set_stem_fuse(self)


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
        **source_cfgs("g_resnet18"),
        **source_cfgs("g_resnet34"),
        **source_cfgs("g_resnet50"),
        **source_cfgs("g_resnet101"),
        **source_cfgs("g_resnet152"),
        **source_cfgs("g_wide_resnet50_2"),
        **source_cfgs("g_resnext50"),
        **source_cfgs("g_resnext101", default_tag="tv2_in1k"),
        **source_cfgs("g_resnext101_32x4d"),
        **source_cfgs("g_resnext101_64x4d"),
        "test_g_resnet.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5), crop_pct=0.95),
        "test_g_resnext.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5), crop_pct=0.95),
    }
)


def _create_g_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> GResNet:
    if pretrained:
        check_pretrained(variant, kwargs, _HOW_TO_GET_WEIGHTS.get(variant))
    model = build_model_with_cfg(GResNet, variant, pretrained, **kwargs)
    if isinstance(model, FeatureListNet):  # it has the stem now
        _set_stem_fuse(model)
    return model


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
    model_args = dict(block=GroupableBasicBlock, layers=(2, 2, 2, 2))
    return _create_g_resnet("g_resnet18", pretrained, **dict(model_args, **kwargs))


@register_model
def g_resnet34(pretrained: bool = False, **kwargs: Any) -> GResNet:
    """G-ResNet-34."""
    model_args = dict(block=GroupableBasicBlock, layers=(3, 4, 6, 3))
    return _create_g_resnet("g_resnet34", pretrained, **dict(model_args, **kwargs))


@register_model
def g_resnet50(pretrained: bool = False, **kwargs: Any) -> GResNet:
    """G-ResNet-50."""
    model_args = dict(block=GroupableBottleneck, layers=(3, 4, 6, 3))
    return _create_g_resnet("g_resnet50", pretrained, **dict(model_args, **kwargs))


@register_model
def g_resnet101(pretrained: bool = False, **kwargs: Any) -> GResNet:
    """G-ResNet-101."""
    model_args = dict(block=GroupableBottleneck, layers=(3, 4, 23, 3))
    return _create_g_resnet("g_resnet101", pretrained, **dict(model_args, **kwargs))


@register_model
def g_resnet152(pretrained: bool = False, **kwargs: Any) -> GResNet:
    """G-ResNet-152."""
    model_args = dict(block=GroupableBottleneck, layers=(3, 8, 36, 3))
    return _create_g_resnet("g_resnet152", pretrained, **dict(model_args, **kwargs))


@register_model
def g_wide_resnet50_2(pretrained: bool = False, **kwargs: Any) -> GResNet:
    """G-ResNet-50 with the widths of a Wide ResNet-50-2."""
    model_args = dict(block=GroupableBottleneck, layers=(3, 4, 6, 3), base_width=128)
    return _create_g_resnet("g_wide_resnet50_2", pretrained, **dict(model_args, **kwargs))


@register_model
def g_resnext50(pretrained: bool = False, **kwargs: Any) -> GResNet:
    """G-ResNeXt-50, with the widths of a ResNeXt-50 32x4d."""
    model_args = dict(block=GroupableBottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4)
    return _create_g_resnet("g_resnext50", pretrained, **dict(model_args, **kwargs))


@register_model
def g_resnext101(pretrained: bool = False, **kwargs: Any) -> GResNet:
    """G-ResNeXt-101, with the widths of a ResNeXt-101 32x8d."""
    model_args = dict(block=GroupableBottleneck, layers=(3, 4, 23, 3), cardinality=32, base_width=8)
    return _create_g_resnet("g_resnext101", pretrained, **dict(model_args, **kwargs))


@register_model
def g_resnext101_32x4d(pretrained: bool = False, **kwargs: Any) -> GResNet:
    """G-ResNeXt-101, with the widths of a ResNeXt-101 32x4d."""
    model_args = dict(block=GroupableBottleneck, layers=(3, 4, 23, 3), cardinality=32, base_width=4)
    return _create_g_resnet("g_resnext101_32x4d", pretrained, **dict(model_args, **kwargs))


@register_model
def g_resnext101_64x4d(pretrained: bool = False, **kwargs: Any) -> GResNet:
    """G-ResNeXt-101, with the widths of a ResNeXt-101 64x4d."""
    model_args = dict(block=GroupableBottleneck, layers=(3, 4, 23, 3), cardinality=64, base_width=4)
    return _create_g_resnet("g_resnext101_64x4d", pretrained, **dict(model_args, **kwargs))


@register_model
def test_g_resnet(pretrained: bool = False, **kwargs: Any) -> GResNet:
    """A tiny G-ResNet of basic blocks for tests."""
    model_args = dict(block=GroupableBasicBlock, layers=(1, 1, 1, 1), channels=(16, 32, 48, 48))
    return _create_g_resnet("test_g_resnet", pretrained, **dict(model_args, **kwargs))


@register_model
def test_g_resnext(pretrained: bool = False, **kwargs: Any) -> GResNet:
    """A tiny G-ResNeXt for tests. Its 48 and 96 channels are not powers of two."""
    model_args = dict(
        block=GroupableBottleneck, layers=(1, 1, 1, 1), cardinality=4, base_width=16, channels=(16, 32, 48, 96)
    )
    return _create_g_resnet("test_g_resnext", pretrained, **dict(model_args, **kwargs))
