"""State dicts load as a whole or not at all."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _Deferred(TorchFunctionMode):
    """Notes what is to be copied into these tensors in place of copying it."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.ids = {id(tensor) for tensor in tensors}
        self.copies: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.copy_ or id(args[0]) not in self.ids:
            return func(*args, **(kwargs or {}))
        target, source, *_ = args
        if source.layout != torch.strided or source.is_quantized or source.is_meta:  # what cannot be copied says so now
            source = torch.empty_like(target).copy_(source)
        self.copies.append((target, source))
        return target


class LoadsWhole:
    """A module that has the weights it had before when it refuses a state dict, where torch leaves it half loaded.

    Nothing is copied before torch has looked at all of it, and then once. Where a wrapper loads it
    (DistributedDataParallel, torch.compile, FSDP), with hooks that run after the loading, which want to see what was
    loaded, and where torch swaps tensors (`torch.__future__.set_swap_module_params_on_conversion`), it is torch's own.
    """

    def load_state_dict(self: Any, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch.nn.Module.load_state_dict, but nothing changes if it raises."""
        modules: list[nn.Module] = list(self.modules())
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        if swaps or any(module._load_state_dict_post_hooks for module in modules):
            return super().load_state_dict(state_dict, strict, assign)  # type: ignore[misc]
        entries: list[dict[str, Any]] = [entry for m in modules for entry in (m._parameters, m._buffers)]
        before = [dict(entry) for entry in entries]
        deferred = _Deferred([tensor for entry in before for tensor in entry.values() if tensor is not None])
        try:
            with deferred:
                result = super().load_state_dict(state_dict, strict, assign)  # type: ignore[misc]
        except BaseException:
            for entry, values in zip(entries, before, strict=True):
                entry.update(values)  # what was assigned
            raise
        with torch.no_grad():
            for target, source in deferred.copies:
                target.copy_(source)
        return result
