"""Registers the models when timm is imported, without an import of this package.

PyTorch calls `install` at the end of ``import torch`` (entry point group ``torch.backends``). It turns an exception
into a failed ``import torch``. So this module imports the standard library only, and `install` only adds a finder to
``sys.meta_path``. The finder waits for ``timm.models``, either the installed package or the one in a clone of timm's
repository.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

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


class _Finder(MetaPathFinder):
    """Find ``timm.models`` as Python does, and register the models after its import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == _WAITS_FOR else None
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                if module.__name__ == _WAITS_FOR:  # the loader of a zip archive loads other modules, too
                    _register()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
