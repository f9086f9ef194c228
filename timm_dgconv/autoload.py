"""Registers the models when timm is imported, without anybody importing this package.

PyTorch calls `install` at the end of ``import torch`` (entry point group ``torch.backends``) and turns an exception
into a failed ``import torch``. So this module imports nothing but the standard library, and `install` only puts a
finder on ``sys.meta_path`` that waits for ``timm.models``, be it the installed one or the one in a clone of timm's
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
    """Register the models now if timm is there, else when ``timm.models`` has been imported. Never raises."""
    if _WAITS_FOR in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    """Import the model file, which registers the models; a failure there must not take timm or torch with it."""
    try:
        import_module("timm_dgconv.g_resnext")
    except Exception as error:
        warnings.warn(
            f"timm-dgconv could not register its models, timm works without them: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )


class _Finder(importlib.abc.MetaPathFinder):
    """Finds ``timm.models`` as the other finders do, and has the models registered behind its import."""

    def __init__(self) -> None:
        self.asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _WAITS_FOR or self.asking:
            return None
        self.asking = True  # another finder may ask all the others too, and so us
        try:
            for finder in sys.meta_path:
                find_spec = getattr(finder, "find_spec", None)  # Python passes over finders that have none
                spec = find_spec(fullname, path, target) if find_spec is not None else None
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader = _Loader(spec.loader)
                    return spec
            return None
        finally:
            self.asking = False


class _Loader(importlib.abc.Loader):
    """Runs the module with its own loader, takes itself away, then registers the models."""

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
