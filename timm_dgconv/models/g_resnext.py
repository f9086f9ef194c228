"""G-ResNeXt: ResNeXt whose 3x3 convolutions learn their number of groups.

Papers:
* `Differentiable Learning-to-Group Channels via Groupable Convolutional Neural Networks` -
  https://arxiv.org/abs/1908.05867

Original release: https://github.com/d-li14/dgconv.pytorch (MIT)
"""

import copy
import dataclasses
import logging
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    FeatureListNet,
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    list_models,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from timm_dgconv import _compat
from timm_dgconv.layers.dgconv import DGConv2d
from timm_dgconv.layers.gate_cache import share_reader
from timm_dgconv.models.compact import TRAINING_ARGS, find_obstacle, fold_norm, fold_sequence, to_group_conv
from timm_dgconv.optim import complexity, steering

__all__ = ["GResNeXt", "GroupableBottleneck"]

_logger = logging.getLogger(__name__)


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
            planes: Base width. The block has `planes * 4` output channels.
            stride: Stride of the 3x3 convolution.
            downsample: Module on the shortcut.
            sort: Contiguous groups, see DGConv2d.
            groups: A fixed number of groups instead of learned groups (the compact form, see `timm_dgconv.compact`).
            device: Device of the parameters.
            dtype: Dtype of the parameters.
            **kwargs: Further arguments of timm's Bottleneck. `cardinality` only determines the width.

        Raises:
            ValueError: If `groups` does not divide the channel counts.
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
        """Return the block for inference, as `timm.utils.reparameterize_model` requests it.

        The DGConv2d becomes a plain group convolution, see `timm_dgconv.compact`. It stays if a module of the block may
        mix channels. Batch norms with running statistics are folded into the convolutions before them.

        Returns:
            A new block. It computes what this block computes in evaluation mode.
        """
        block: Any = copy.deepcopy(self)
        if isinstance(block.conv2, DGConv2d) and find_obstacle(block) is None:
            to_group_conv(block)
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")):
            setattr(block, norm, fold_norm(getattr(block, conv), getattr(block, norm)))
        fold_sequence(block.downsample)
        return block


def _fixed_blocks(groups: Sequence[int], num_blocks: int) -> Callable[..., GroupableBottleneck]:
    """Return a block class for timm's ResNet. The n-th block that it builds has groups[n] groups."""
    if not isinstance(groups, list | tuple) or len(groups) != num_blocks:
        raise ValueError(f"groups={groups!r} must be one number for each of the {num_blocks} blocks")
    remaining = iter(groups)

    def block(*args: Any, **kwargs: Any) -> GroupableBottleneck:
        kwargs["groups"] = next(remaining)
        return GroupableBottleneck(*args, **kwargs)

    block.expansion = GroupableBottleneck.expansion  # type: ignore[attr-defined]
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


class GResNeXt(ResNet):
    """A timm ResNet of GroupableBottleneck blocks."""

    def __init__(
        self,
        layers: tuple[int, ...],
        cardinality: int = 32,
        base_width: int = 4,
        groups: Sequence[int] | None = None,
        complexity_weight: float | None = None,
        complexity_target: float | str | None = None,
        gate_bound: float | None = None,
        gate_steps: int | None = None,
        init_groups: int | Sequence[int] | None = None,
        freeze_groups: bool = False,
        **kwargs: Any,
    ) -> None:
        """Build the network.

        Args:
            layers: Number of blocks per stage.
            cardinality: Number of groups of the ResNeXt with the same widths. It only determines the widths.
            base_width: Width of such a group in the first stage.
            groups: One fixed number of groups per block, instead of learned groups. This builds plain group
                convolutions (the compact form, see `timm_dgconv.compact`).
            complexity_weight: Every optimizer step adds the gradient of ``complexity_weight * log(complexity)`` to the
                gradient of the gates. See `timm_dgconv.optim.steering.steer`, also for the next three.
            complexity_target: Largest density, the share of a dense network's connections, above 0 and at most 1, or
                "resnext" for the density of a ResNeXt with this cardinality. It needs no weight.
            gate_bound: Largest distance of a gate from zero.
            gate_steps: Number of optimizer steps after which the gates stand still.
            init_groups: Number of groups with which training starts, in all blocks or one per block: powers of two. The
                default are gates near zero with random signs, as in the original release.
            freeze_groups: Build gates that do not learn, see `timm_dgconv.freeze_groups`.
            **kwargs: Further arguments of timm's ResNet.

        Raises:
            TypeError: If timm's ResNet does not take an argument, or if an argument is not a number.
            ValueError: If `groups` or `init_groups` has the wrong length or does not fit the channel counts, or if an
                argument is out of range or needs gates that learn.
        """
        if complexity_target == "resnext":
            complexity_target = 1 / cardinality
        steers = dict(weight=complexity_weight, target=complexity_target, bound=gate_bound, steps=gate_steps)
        is_steered = bool(complexity_weight) or {complexity_target, gate_bound, gate_steps} != {None}
        if is_steered and (freeze_groups or groups is not None):
            given = ", ".join(f"{name}={value}" for name, value in steers.items() if value is not None)
            fixed = "freeze_groups=True" if groups is None else "groups=..."
            raise ValueError(f"steering with {given} needs gates that learn, and {fixed} has none; leave one out")
        if init_groups is not None and groups is not None:
            raise ValueError(f"init_groups={init_groups} needs gates, and groups=... has none; leave one out")
        block = GroupableBottleneck if groups is None else _fixed_blocks(groups, sum(layers))
        super().__init__(block, layers, cardinality=cardinality, base_width=base_width, **kwargs)
        _set_stem_fuse(self)
        convs = [module for module in self.modules() if isinstance(module, DGConv2d)]
        share_reader(convs)
        if init_groups is not None:
            per_block = [init_groups] * len(convs) if isinstance(init_groups, int) else list(init_groups)
            if len(per_block) != len(convs):
                raise ValueError(f"init_groups has {len(per_block)} numbers; use one, or one per block ({len(convs)})")
            for conv, number in zip(convs, per_block, strict=True):
                conv.reset_gate(number)
        if is_steered:
            steering.steer(self, **steers)  # type: ignore[arg-type]
        if freeze_groups and groups is None:
            complexity.freeze_groups(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Leave out `TRAINING_ARGS` when timm records the arguments of the model."""
        if name == _compat.MODEL_ARGS:
            value = {key: argument for key, argument in value.items() if key not in TRAINING_ARGS}
        super().__setattr__(name, value)


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
    """Return every pretrained tag of one of timm's ResNeXts, as `variant.resnext_<tag>`. The default tag is first."""
    names = sorted(list_models(f"{resnext}.*", pretrained=True), key=lambda name: name != f"{resnext}.{default_tag}")
    return {
        f"{variant}.resnext_{name.split('.', 1)[1]}": dataclasses.replace(
            get_pretrained_cfg(name), architecture=None, tag=None
        )
        for name in names
    }


# The first tag with weights is the default. That is dgconv_in1k as soon as it has an hf_hub_id.
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
        overlay = kwargs.get("pretrained_cfg_overlay")
        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
        elsewhere = cfg.source or cfg.file or cfg.state_dict or "hf_hub_id" in (overlay or {})  # the user's weights
        if cfg.tag == "dgconv_in1k" and not (elsewhere or cfg.has_weights):
            raise RuntimeError(_HOW_TO_GET_WEIGHTS[variant])
        if cfg.tag and cfg.tag.startswith("resnext_") and not elsewhere:
            _logger.warning(
                f"{variant}.{cfg.tag} is a converted ResNeXt: it computes the same with 32 groups in each block. Its "
                "groups are not learned yet."
            )
    model = build_model_with_cfg(GResNeXt, variant, pretrained, **kwargs)
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
    """A tiny G-ResNeXt for tests. Its 48 and 96 channels are not powers of two."""
    model_args = dict(layers=(1, 1, 1, 1), cardinality=4, base_width=16, channels=(16, 32, 48, 96))
    return _create_g_resnext("test_g_resnext", pretrained, **dict(model_args, **kwargs))
