"""Registers the models when timm is imported, without an import of this package.

PyTorch calls `install` at the end of ``import torch`` (entry point group ``torch.backends``). It turns an exception
into a failed ``import torch``. So this module imports the standard library only, and `install` only adds a finder to
``sys.meta_path``. The finder waits for ``timm.models``, either the installed package or the one in a clone of timm's
repository.
"""

import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_WAITS_FOR = "timm.models"


def install() -> None:
    """Register the models now if timm is imported, otherwise after ``timm.models`` is imported. Never raises."""
    if _WAITS_FOR in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    """Import the models, which registers them. A failure there must not break timm or torch."""
    try:
        import_module("timm_dgconv.models")
    except Exception as error:
        warnings.warn(
            f"timm-dgconv could not register its models, timm works without them: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )


class _Finder(importlib.abc.MetaPathFinder):
    """Find ``timm.models`` with the other finders, and register the models after its import."""

    def __init__(self) -> None:
        self.searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _WAITS_FOR or self.searching:
            return None
        self.searching = True  # another finder may call all finders, including this one
        try:
            for finder in sys.meta_path:
                find_spec = getattr(finder, "find_spec", None)  # Python ignores finders without it
                spec = find_spec(fullname, path, target) if find_spec is not None else None
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader = _Loader(spec.loader)
                    return spec
            return None
        finally:
            self.searching = False


class _Loader(importlib.abc.Loader):
    """Run the module with its own loader, restore that loader on the module, and register the models."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register()
