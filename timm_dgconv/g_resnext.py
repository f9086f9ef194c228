"""G-ResNeXt: ResNeXt whose 3x3 convolutions learn their number of groups.

Papers:
* `Differentiable Learning-to-Group Channels via Groupable Convolutional Neural Networks` -
  https://arxiv.org/abs/1908.05867

Original release: https://github.com/d-li14/dgconv.pytorch (MIT)
"""

import copy
import dataclasses
import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    list_models,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from timm_dgconv import regularizer
from timm_dgconv.dgconv import DGConv2d
from timm_dgconv.digest import check_download
from timm_dgconv.fold import fold_norm, fold_norms, neighbours, to_group_convolution
from timm_dgconv.loading import LoadsWhole

__all__ = ["GResNeXt", "GroupableBottleneck"]

_logger = logging.getLogger(__name__)

TRAINING_ARGS = ("complexity_weight", "complexity_target", "freeze_groups")
"""Arguments of a model that say how it is trained, not what it is."""


class GroupableBottleneck(Bottleneck):
    """timm's ResNeXt bottleneck with a DGConv2d as its 3x3 convolution."""

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        sort: bool = False,
        groups: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the block.

        Args:
            inplanes: Number of input channels.
            planes: Base width; the block has `planes * 4` output channels.
            stride: Stride of the 3x3 convolution.
            downsample: Module on the shortcut.
            sort: Contiguous groups, see DGConv2d.
            groups: A fixed number of groups instead of learned ones (the compact form, see `timm_dgconv.compact`).
            device: Device of the parameters.
            dtype: Dtype of the parameters.
            **kwargs: Further arguments of timm's Bottleneck; `cardinality` counts for the width only.
        """
        super().__init__(inplanes, planes, stride, downsample, device=device, dtype=dtype, **kwargs)
        self.cardinality: int = kwargs.get("cardinality", 1)
        fixed: Any = self.get_submodule("conv2")
        if groups is not None and (groups < 1 or fixed.in_channels % groups or fixed.out_channels % groups):
            raise ValueError(
                f"groups={groups} does not divide the {fixed.in_channels} -> {fixed.out_channels} channels of the block"
            )
        conv = partial(DGConv2d, sort=sort) if groups is None else partial(nn.Conv2d, groups=groups)
        self.conv2 = conv(
            fixed.in_channels,
            fixed.out_channels,
            fixed.kernel_size,
            stride=fixed.stride,
            padding=fixed.padding,
            dilation=fixed.dilation,
            bias=False,
            device=device,
            dtype=dtype,
        )

    def fuse(self) -> "GroupableBottleneck":
        """The same block for inference, as `timm.utils.reparameterize_model` asks for it.

        Convolutions, activations and what cannot be folded: the DGConv2d becomes a plain group convolution
        (`timm_dgconv.compact`), batch norms go into the convolutions before them. They are taken to be in evaluation
        mode. Norms of another kind, and batch norms without running statistics, stay.

        Returns:
            A new block.
        """
        block: Any = copy.deepcopy(self)
        if isinstance(block.conv2, DGConv2d):
            # With a norm in groups of its own, a permutation that it cannot take leaves the layer as it is.
            with suppress(ValueError):
                to_group_convolution(block)
        fold_norms(block, (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")))
        if block.downsample is not None:
            fold_norms(block.downsample, neighbours(block.downsample))
        return block


def _fixed_blocks(groups: Sequence[int], num_blocks: int) -> Callable[..., GroupableBottleneck]:
    """What timm's ResNet takes as a block class; the n-th block that it builds has groups[n] groups."""
    if not isinstance(groups, list | tuple) or len(groups) != num_blocks:
        raise ValueError(f"groups={groups!r} must be one number for each of the {num_blocks} blocks")
    numbers = iter(groups)

    def block(*args: Any, **kwargs: Any) -> GroupableBottleneck:
        kwargs["groups"] = next(numbers)
        return GroupableBottleneck(*args, **kwargs)

    block.expansion = GroupableBottleneck.expansion  # type: ignore[attr-defined]
    return block


class GResNeXt(LoadsWhole, ResNet):
    """A timm ResNet of GroupableBottleneck blocks."""

    def __init__(
        self,
        layers: tuple[int, ...],
        cardinality: int = 32,
        base_width: int = 4,
        groups: Sequence[int] | None = None,
        complexity_weight: float = 0.0,
        complexity_target: float | None = None,
        freeze_groups: bool = False,
        **kwargs: Any,
    ) -> None:
        """Build the network.

        Args:
            layers: Number of blocks in each stage.
            cardinality: Number of groups of the ResNeXt with the same widths; here it only sets the widths.
            base_width: Width of such a group in the first stage.
            groups: One number of groups for each block builds plain group convolutions with those instead of learning
                them: the compact form, see `timm_dgconv.compact`.
            complexity_weight: Every step of an optimizer adds this times the gradient of `timm_dgconv.complexity` to
                that of the gates.
            complexity_target: Share of a dense network's connections, above 0 and at most 1; with it, the weight acts
                only while the network has more, on the open gates nearest to zero, as many as must close to get there.
                No step opens gates that would take it above, nor closes gates that would take it more than 5 % below,
                where anything nearer can be reached.
            freeze_groups: Gates that do not learn, see `timm_dgconv.freeze_groups`.
            **kwargs: Further arguments of timm's ResNet.

        Raises:
            TypeError: For an argument that timm's ResNet does not take, or a weight or target that is no number.
            ValueError: For `groups` of the wrong length, or that do not divide the channels; for a weight or target
                out of its range, or with gates that do not learn.
        """
        known = [name for name in inspect.signature(ResNet).parameters if name != "block"]
        unknown = {name: value for name, value in kwargs.items() if name not in known}
        if unknown:
            raise TypeError(
                f"G-ResNeXt takes no {', '.join(f'{name}={value!r}' for name, value in unknown.items())}; it takes "
                f"groups, complexity_weight, complexity_target, freeze_groups, {', '.join(known)}, and the arguments "
                "of a block in block_args"
            )
        if complexity_target is not None and not complexity_weight:
            raise ValueError(
                f"complexity_target={complexity_target} needs a complexity_weight that takes the network there; "
                "try 1e-7"
            )
        if complexity_weight and (freeze_groups or groups is not None):
            fixed = "freeze_groups=True" if groups is None else "groups=..."
            raise ValueError(
                f"complexity_weight={complexity_weight} has no gates to act on with {fixed}; leave one out"
            )
        block = GroupableBottleneck if groups is None else _fixed_blocks(groups, sum(layers))
        super().__init__(block, layers, cardinality=cardinality, base_width=base_width, **kwargs)
        self._let_stem_fuse()
        if complexity_weight:
            regularizer.steer(self, complexity_weight, complexity_target)
        if freeze_groups and groups is None:
            regularizer.freeze_groups(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep how a model is trained out of what timm >= 1.0.31 stores with its weights."""
        if name == "_model_args":
            value = {key: argument for key, argument in value.items() if key not in TRAINING_ARGS}
        super().__setattr__(name, value)

    def _let_stem_fuse(self) -> None:
        """Give the norms of the stem a `fuse`: reparameterize_model looks for one in every module but the model."""
        deep = isinstance(self.conv1, nn.Sequential)
        pairs = [(self.conv1[-1] if deep else self.conv1, self.bn1)]
        for sequence in (self.conv1, self.maxpool):
            pairs += [(getattr(sequence, a), getattr(sequence, b)) for a, b in neighbours(sequence)]
        for conv, norm in pairs:
            norm.fuse = partial(fold_norm, conv, norm)


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


def _resnext_cfgs(variant: str, resnext: str, default_tag: str) -> dict[str, Any]:
    """Every pretrained tag of one of timm's ResNeXts, as `variant.resnext_<tag>`; the default tag first."""
    names = sorted(list_models(f"{resnext}.*", pretrained=True), key=lambda name: name != f"{resnext}.{default_tag}")
    return {
        f"{variant}.resnext_{name.split('.', 1)[1]}": dataclasses.replace(
            get_pretrained_cfg(name), architecture=None, tag=None
        )
        for name in names
    }


# The first tag with weights is the default: dgconv_in1k once it has an hf_hub_id, which `timm-dgconv publish` prints.
default_cfgs = generate_default_cfgs(
    {
        "g_resnext50.dgconv_in1k": _cfg(),
        **_resnext_cfgs("g_resnext50", "resnext50_32x4d", default_tag="a1h_in1k"),
        "g_resnext101.dgconv_in1k": _cfg(),
        **_resnext_cfgs("g_resnext101", "resnext101_32x8d", default_tag="tv2_in1k"),
        "test_g_resnext.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5), crop_pct=0.95),
    }
)


def _create_g_resnext(variant: str, pretrained: bool = False, **kwargs: Any) -> GResNeXt:
    if pretrained:
        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        elsewhere = cfg.source or cfg.file or cfg.state_dict  # weights that the user names
        if cfg.tag == "dgconv_in1k" and not (elsewhere or cfg.has_weights):
            raise RuntimeError(_HOW_TO_GET_WEIGHTS[variant])
        if cfg.tag and cfg.tag.startswith("resnext_") and not elsewhere:
            _logger.warning(
                f"{variant}.{cfg.tag} is a converted ResNeXt: the same function, 32 groups in each block. Its groups "
                "are not learned yet."
            )
    model = build_model_with_cfg(GResNeXt, variant, pretrained, **kwargs)
    if pretrained and cfg.hf_hub_id and not (cfg.file or cfg.state_dict):
        check_download(cfg.hf_hub_id, cfg.hf_hub_filename, kwargs.get("cache_dir"))
    return model


_HOW_TO_GET_WEIGHTS = {
    "g_resnext50": "The weights g_resnext50.dgconv_in1k are not on the Hub yet. Download the original's file from "
    "https://drive.google.com/open?id=1elM-FVacE-Pkin_hCiW24oKCogHEaYRn and load it as it is, "
    "create_model('g_resnext50.dgconv_in1k', pretrained=True, pretrained_cfg_overlay=dict(file=PATH)), or convert it, "
    "timm-dgconv convert PATH --model g_resnext50.dgconv_in1k --out DIR, and use 'local-dir:DIR'. Weights that "
    "somebody has published load with create_model('hf-hub:OWNER/NAME', pretrained=True).",
    "g_resnext101": "The original release has no weights for g_resnext101. g_resnext101.resnext_tv2_in1k and the other "
    "resnext_ tags are converted from timm's ResNeXt; weights that somebody has published load with "
    "create_model('hf-hub:OWNER/NAME', pretrained=True), a checkpoint of your own with "
    "pretrained_cfg_overlay=dict(file=PATH).",
}


@register_model
def g_resnext50(pretrained: bool = False, **kwargs: Any) -> GResNeXt:
    """G-ResNeXt-50, with the widths of a ResNeXt-50 32x4d."""
    model_args = dict(layers=(3, 4, 6, 3), cardinality=32, base_width=4)
    return _create_g_resnext("g_resnext50", pretrained, **dict(model_args, **kwargs))


@register_model
def g_resnext101(pretrained: bool = False, **kwargs: Any) -> GResNeXt:
    """G-ResNeXt-101, with the widths of a ResNeXt-101 32x8d."""
    model_args = dict(layers=(3, 4, 23, 3), cardinality=32, base_width=8)
    return _create_g_resnext("g_resnext101", pretrained, **dict(model_args, **kwargs))


@register_model
def test_g_resnext(pretrained: bool = False, **kwargs: Any) -> GResNeXt:
    """A tiny G-ResNeXt for tests; its 48 and 96 channels share four and five powers of two."""
    model_args = dict(layers=(1, 1, 1, 1), cardinality=4, base_width=16, channels=(16, 32, 48, 96))
    return _create_g_resnext("test_g_resnext", pretrained, **dict(model_args, **kwargs))
