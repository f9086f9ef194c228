"""G-DenseNet: DenseNet whose 3x3 convolutions learn their number of groups."""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.densenet import DenseNet

from timm_dgconv.models.base_models import base_cfgs, check_pretrained
from timm_dgconv.models.group_net import GroupFeatureListNet, GroupNet, add_missing_gates

__all__ = ["GDenseNet"]


class GDenseNet(GroupNet, DenseNet):
    """A timm DenseNet whose 3x3 convolutions are DGConv2d layers. The arguments are those of `GroupNet`."""

    group_convs = r".*\.denselayer\d+\.conv\d"


default_cfgs = generate_default_cfgs(base_cfgs("g_densenet121"))


@register_model
def g_densenet121(pretrained: bool = False, **kwargs: Any) -> GDenseNet:
    """G-DenseNet-121."""
    if pretrained:
        check_pretrained("g_densenet121", kwargs)
    model_args = dict(growth_rate=32, block_config=(6, 12, 24, 16))
    return build_model_with_cfg(
        GDenseNet,
        "g_densenet121",
        pretrained,
        pretrained_filter_fn=add_missing_gates,
        feature_cfg=dict(feature_cls=GroupFeatureListNet, flatten_sequential=True),
        **dict(model_args, **kwargs),
    )
