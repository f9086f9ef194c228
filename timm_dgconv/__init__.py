"""G-ResNeXt for timm: convolutions that learn their number of groups.

Importing this package registers the models with timm, now or as soon as timm is imported. The public names are
imported when they are first used, since PyTorch imports this package at the end of ``import torch`` (see
`timm_dgconv.autoload`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from timm_dgconv.autoload import install

if TYPE_CHECKING:
    from timm_dgconv.deploy import block_groups as block_groups
    from timm_dgconv.deploy import compact as compact
    from timm_dgconv.dgconv import DGConv2d as DGConv2d
    from timm_dgconv.regularizer import complexity as complexity
    from timm_dgconv.regularizer import freeze_groups as freeze_groups
    from timm_dgconv.report import group_report as group_report

__version__ = "0.1.0"

_HOME = {
    "DGConv2d": "dgconv",
    "block_groups": "deploy",
    "compact": "deploy",
    "complexity": "regularizer",
    "freeze_groups": "regularizer",
    "group_report": "report",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


install()
