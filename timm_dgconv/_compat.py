"""The private names of torch and timm that this package needs, each with its reason.

The tests exercise all of them on torch 2.5.0 and 2.14.1 and on timm 1.0.21 and 1.0.31, the oldest and the newest
supported versions. timm's names are imported inside functions, since importing timm imports this package.
"""

import json
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim import Optimizer

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""The attributes of a module that hold its hooks. torch has no public way to list them."""

FORWARDS = {"forward", "_conv_forward"}
"""The methods of a torch.nn.Conv2d that compute. Users replace them on an instance."""

COMPILED = "_orig_mod"
"""The attribute of a compiled module that holds the module."""

MODEL_ARGS = "_model_args"
"""The attribute of a model in which timm >= 1.0.31 records its arguments, to write them to config.json."""


def transforms_are_active() -> bool:
    """Return whether a torch.func transform or forward-mode differentiation is active. torch has no public query."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def dispatch_modes_are_active() -> bool:
    """Return whether a TorchDispatchMode is active, for example FakeTensorMode. torch has no public query."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_traced_by_proxies() -> bool:
    """Return whether make_fx records what is computed. Compiled code is not asked, since torch.compile uses it, too."""
    if torch.compiler.is_compiling() or not dispatch_modes_are_active():
        return False
    from torch.fx.experimental.proxy_tensor import get_proxy_mode  # takes long to import

    return get_proxy_mode() is not None


def fake_mode() -> Any:
    """Return a mode in which tensors have a shape, a dtype and a device, and no data."""
    from torch._subclasses import FakeTensorMode  # takes long to import

    return FakeTensorMode(allow_non_fake_inputs=True)


def is_batched(tensor: Tensor) -> bool:
    """Return whether torch.vmap or torch.autograd.grad(is_grads_batched=True) hides a dimension of a tensor."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def unwrap_functorch(tensor: Tensor) -> Tensor:
    """Return the tensor inside the wrappers of torch.func transforms, which hide whether its values can be read."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def functorch_disabled() -> Any:
    """Return a context in which torch.func transforms do not see operations, so that values can be read."""
    return torch._C._DisableFuncTorch()


def version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place. The autograd notes describe it; the attribute is private."""
    return tensor._version


def foreach_add_(tensors: list[Tensor], others: list[Tensor]) -> None:
    """Add tensors in place, pair by pair, in one launch per device and dtype, as torch's optimizers do."""
    torch._foreach_add_(tensors, others)


def flat_parameter_modules(parameter: Tensor) -> set[nn.Module]:
    """Return the modules whose parameters FullyShardedDataParallel has flattened into this one; usually none."""
    return {info.module for info in getattr(parameter, "_param_infos", ())}


def hook_wrappers() -> None:
    """Let the steps of timm's Lookahead and torch's PostLocalSGDOptimizer call the hooks of optimizers.

    They do not call Optimizer.__init__, which installs the hooks. They average parameters after the step of their base
    optimizer, so the hooks of that step are not enough.
    """
    from timm.optim import Lookahead

    wrappers: list[Any] = [Lookahead]
    if torch.distributed.is_available():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of functional optimizers, in torch 2.5
            from torch.distributed.optim import PostLocalSGDOptimizer
        wrappers.append(PostLocalSGDOptimizer)
        PostLocalSGDOptimizer._optimizer_step_pre_hooks = OrderedDict()
        PostLocalSGDOptimizer._optimizer_step_post_hooks = OrderedDict()
    for wrapper in wrappers:
        if not getattr(wrapper.step, "hooked", False):
            wrapper.step = Optimizer.profile_hook_step(wrapper.step)
            wrapper.step.hooked = True


def save_config_for_hf(model: nn.Module, path: Path, model_args: dict[str, Any] | None = None) -> None:
    """Write config.json as timm does for the Hub. timm.models.save_for_hf would write the weights, too."""
    from timm.models._hub import save_config_for_hf

    save_config_for_hf(model, path, model_args=model_args)


def load_model_config_from_path(folder: Path) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Read config.json as timm does, which takes no null. transformers writes ``"model_args": null``."""
    from timm.models._hub import _parse_model_cfg

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return _parse_model_cfg({name: value for name, value in config.items() if value is not None}, {})


def generate_readme(content: dict[str, Any], name: str, task: str) -> str:
    """Return a model card in the form of timm's model cards."""
    from timm.models._hub import generate_readme

    return generate_readme(content, name, task)
