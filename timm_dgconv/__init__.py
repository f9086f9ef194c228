"""G-ResNeXt for timm: convolutions that learn their number of groups.

Importing this package registers the models with timm, now or as soon as timm is imported. The public names are imported
on first use, since PyTorch imports this package at the end of ``import torch`` (see `timm_dgconv._autoload`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from timm_dgconv._autoload import install

if TYPE_CHECKING:
    from timm_dgconv.layers.dgconv import DGConv2d as DGConv2d
    from timm_dgconv.models.compact import compact as compact
    from timm_dgconv.models.convert import groupable as groupable
    from timm_dgconv.models.convert import skipped_convs as skipped_convs
    from timm_dgconv.models.group_net import layer_groups as layer_groups
    from timm_dgconv.optim.complexity import complexity as complexity
    from timm_dgconv.optim.complexity import constrained_loss as constrained_loss
    from timm_dgconv.optim.complexity import freeze_groups as freeze_groups
    from timm_dgconv.optim.cost import cost_table as cost_table
    from timm_dgconv.optim.steering import hold_target as hold_target
    from timm_dgconv.optim.steering import steer as steer
    from timm_dgconv.report import group_report as group_report

__version__ = "0.2.0"

_MODULES = {
    "DGConv2d": "layers.dgconv",
    "layer_groups": "models.group_net",
    "compact": "models.compact",
    "complexity": "optim.complexity",
    "constrained_loss": "optim.complexity",
    "cost_table": "optim.cost",
    "freeze_groups": "optim.complexity",
    "group_report": "report",
    "groupable": "models.convert",
    "hold_target": "optim.steering",
    "skipped_convs": "models.convert",
    "steer": "optim.steering",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


install()
