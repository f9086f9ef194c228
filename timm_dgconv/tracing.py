"""A run of a network without data: its multiply-adds, and the shapes of what its convolutions compute."""

import copy
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from timm_dgconv import _compat


class Trace(NamedTuple):
    """What a network has computed for one image.

    Attributes:
        macs: Number of multiply-adds with the stored weights.
        inputs: The inputs of each convolution and linear layer, by name, without data.
        outputs: Their outputs.
    """

    macs: int
    inputs: dict[str, list[Tensor]]
    outputs: dict[str, list[Tensor]]


def unwrap(model: Any) -> nn.Module:
    """Return the network inside of wrappers such as DistributedDataParallel. A wrapper has no other child."""
    if not isinstance(model, nn.Module):  # timm's first ModelEma
        return unwrap(model.ema)
    children = [*model.children()]
    wrapped = [getattr(model, name, None) for name in ("module", _compat.COMPILED)]
    return unwrap(children[0]) if len(children) == 1 and children[0] in wrapped else model


def setting(model: nn.Module, key: str) -> Any:
    """Return the first value of this key in a pretrained_cfg of the model or of a module inside, or None."""
    cfgs = (getattr(module, "pretrained_cfg", None) or {} for module in model.modules())
    return next((cfg[key] for cfg in cfgs if cfg.get(key)), None)


def image_size(model: nn.Module, given: Sequence[int] | None) -> tuple[int, int, int]:
    """Return channels, height and width of the image for which multiply-adds are counted.

    Args:
        model: The model.
        given: What the user asks for. The default is the input size of the pretrained_cfg.

    Raises:
        TypeError: If `given` is not three integers.
        ValueError: If the model has no known input size, or if a number is below 1.
    """
    default = setting(model, "input_size")
    if given is None and default is None:
        raise ValueError(
            f"{type(model).__name__} has no pretrained_cfg with an input size; use input_size=(channels, height, width)"
        )
    if given is None:
        first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        given = (first.in_channels, *default[1:])  # in_chans of timm.create_model does not change the cfg
    if not isinstance(given, Sequence) or not all(type(number) is int for number in given):
        raise TypeError(f"input_size={given!r} must be three integers, (channels, height, width)")
    if len(given) != 3 or min(given) < 1:
        raise ValueError(f"input_size={given!r} must be three positive integers, (channels, height, width)")
    return given[0], given[1], given[2]


def trace(model: nn.Module, size: tuple[int, int, int]) -> Trace:
    """Run a copy of a model without data on an image of this size: channels, height and width.

    Raises:
        ValueError: If the model does not run on such an image.
    """
    mode = _compat.fake_mode()
    net = _without_data(model, mode)
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    outputs: dict[str, list[Tensor]] = defaultdict(list)
    names = {module: name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}

    def record(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        inputs[names[module]].append(args[0] if args else kwargs["input"])
        outputs[names[module]].append(output)

    for module in names:
        module.register_forward_hook(record, with_kwargs=True)
    like = next(net.parameters())
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), mode, counter:
            net(torch.empty(1, *size, device=like.device, dtype=like.dtype))
    except Exception as error:  # any exception of the user's modules
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{type(model).__name__} does not run on an image of {' x '.join(map(str, size))} without data: {reason}; "
            "use an input_size=(channels, height, width) that it takes, and read no values in its forward pass"
        ) from error
    return Trace(counter.get_total_flops() // 2, inputs, outputs)


def _without_data(model: nn.Module, mode: Any) -> nn.Module:
    """Return a copy of a model with tensors of a mode on one device, in evaluation mode, without the user's hooks."""
    device = next(model.parameters()).device
    attributes = (value for module in model.modules() for value in vars(module).values())
    tensors = [*model.buffers(), *(value for value in attributes if isinstance(value, Tensor))]
    with mode:  # a forward pass that makes new tensors makes them on the CPU
        like = partial(torch.empty_like, device="cpu" if device.type == "meta" else device)
        memo: dict[int, Any] = {id(tensor): like(tensor) for tensor in tensors}
        memo |= {id(p): nn.Parameter(like(p), requires_grad=False) for p in model.parameters()}
    result = copy.deepcopy(model, memo).eval()
    for module in result.modules():
        for hooks in (getattr(module, name) for name in _compat.HOOKS):
            # A function would see this run. timm's FeatureHookNet needs its bound methods, which deepcopy copies.
            for key in [key for key, hook in hooks.items() if isinstance(hook, FunctionType)]:
                del hooks[key]
    return result
