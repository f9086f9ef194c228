"""Let the convolutions of any network learn their groups."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from timm_dgconv.layers import grouping
from timm_dgconv.layers.dgconv import DGConv2d
from timm_dgconv.layers.gate_cache import share_reader
from timm_dgconv.layers.group_conv import GroupConv2d

Where = Callable[[str, nn.Conv2d], bool]

_MERGES = ("fuse", "reparameterize", "switch_to_deploy")
"""Methods that `timm.utils.reparameterize_model` calls. They read the weights of convolutions, and know no gates."""


def groupable(model: nn.Module, where: Where | None = None) -> nn.Module:
    """Turn the convolutions of a network into DGConv2d layers that compute the same, in place.

    A dense convolution starts with one group, and a group convolution with its groups. The gates are
    `timm_dgconv.layers.dgconv.PRETRAINED_GATE` from zero. Each module stays the same object, with its hooks, names,
    dtype, device, memory format, training mode and `requires_grad`. Only the weight of a group convolution is new: a
    DGConv2d stores the connections between the groups, too. So create the optimizer afterwards.

    Args:
        model: A network, or a convolution.
        where: Function of the name and the torch.nn.Conv2d that returns whether to convert it. The default converts
            kernels larger than 1x1 whose channel counts have at least two powers of two in common. It leaves out
            depthwise convolutions, since the dense weight of a DGConv2d costs more than it can gain there. See
            `skipped_convs`.

    Returns:
        The model.

    Raises:
        TypeError: If the model is not a torch.nn.Module.
        ValueError: If there is no convolution to convert, or if `where` chooses a convolution that cannot learn its
            groups. The model is unchanged then.

    Examples:
        >>> import timm, timm_dgconv, torch
        >>> model = timm.create_model("test_resnet").eval()
        >>> images = torch.randn(1, 3, 64, 64)
        >>> logits = model(images)
        >>> model = timm_dgconv.groupable(model)
        >>> torch.allclose(model(images), logits, atol=1e-5)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"groupable takes a torch.nn.Module, not a {type(model).__name__}")
    convs = _plain_convs(model)
    obstacles = _obstacles(model)
    skipped = skipped_convs(model, where)
    for name, obstacle in obstacles.items():
        if where is not None and obstacle and name not in skipped:
            raise ValueError(f"`where` chooses {name or 'the model'}, which cannot learn its groups: {obstacle}")
    chosen = [conv for name, conv in convs.items() if name not in skipped]
    if not chosen:
        if any(isinstance(module, DGConv2d) for module in model.modules()):
            raise ValueError(f"{type(model).__name__} has DGConv2d layers already, and no other convolution to convert")
        if any(isinstance(module, GroupConv2d) for module in model.modules()):
            raise ValueError(f"{type(model).__name__} is compact; use groupable before timm_dgconv.compact")
        reasons = ", ".join(f"{reason} ({count})" for reason, count in Counter(skipped.values()).most_common(3))
        raise ValueError(f"{type(model).__name__} has no convolution to convert: {reasons or 'it has none'}")
    for conv in chosen:
        _convert(conv)
    share_reader(module for module in model.modules() if isinstance(module, DGConv2d))
    return model


def skipped_convs(model: nn.Module, where: Where | None = None) -> dict[str, str]:
    """Return the convolutions that `groupable` leaves as they are, with the reason.

    Args:
        model: A network, before or after `groupable`.
        where: As in `groupable`.

    Returns:
        Name of each convolution -> reason.

    Examples:
        >>> import timm
        >>> skipped_convs(timm.create_model("resnet18"))["layer2.0.downsample.0"]
        'its kernel is 1x1'
    """
    obstacles = _obstacles(model)
    reasons = {}
    for name, conv in _plain_convs(model).items():
        if where is not None:
            reason = "" if where(name, conv) else "`where` does not choose it"
        else:
            reason = _reluctance(conv) or obstacles[name]
            if not reason and grouping.num_bits(conv.in_channels, conv.out_channels) < 2:
                reason = f"{conv.in_channels} -> {conv.out_channels} channels have only one gate"
        if reason:
            reasons[name] = reason
    return reasons


def _plain_convs(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and not isinstance(module, DGConv2d)
    }


def _obstacles(model: nn.Module) -> dict[str, str]:
    """Return why each convolution cannot be a DGConv2d, or an empty string."""
    merging = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if not isinstance(module, nn.Conv2d) and any(hasattr(module, method) for method in _MERGES)
    }
    obstacles = {}
    for name, conv in _plain_convs(model).items():
        parents = [".".join(name.split(".")[:depth]) for depth in range(name.count(".") + 1)]
        merged = next((merging[parent] for parent in parents if parent in merging), None)
        obstacles[name] = f"a {merged} merges its weight with others" if merged else _obstacle(conv)
    return obstacles


def _obstacle(conv: nn.Conv2d) -> str:
    """Return why a convolution alone cannot be a DGConv2d, or an empty string."""
    if isinstance(conv, GroupConv2d):
        return "it is compact, without weights between its groups; use groupable before timm_dgconv.compact"
    if type(conv) is not nn.Conv2d:
        return f"the forward pass of a {type(conv).__name__} may differ from the forward pass of a torch.nn.Conv2d"
    if "weight" not in dict(conv.named_parameters(recurse=False)):
        return "another module or a hook computes its weight"
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r} is not supported"
    try:
        bits = grouping.num_bits(conv.in_channels, conv.out_channels)
    except ValueError as error:
        return str(error)
    if conv.groups not in [1 << closed for closed in range(bits + 1)]:
        return f"its {conv.groups} groups are not a power of two up to {1 << bits}"
    return ""


def _reluctance(conv: nn.Conv2d) -> str:
    """Return why the default leaves out a convolution that may be able to learn its groups, or an empty string."""
    if max(conv.kernel_size) == 1:
        return "its kernel is 1x1"
    if conv.groups == conv.in_channels:
        return "it is depthwise, and the dense weight of a DGConv2d costs more than it can gain"
    return ""


def _convert(conv: nn.Conv2d) -> None:
    """Turn a convolution into a DGConv2d, in place.

    The object changes its class, as in torch.nn.utils.parametrize. So hooks and references to it stay valid.
    """
    layer = DGConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        bias=conv.bias is not None,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    layer.load_state_dict(conv.state_dict(), strict=False)
    layer.requires_grad_(conv.weight.requires_grad)
    if conv.groups > 1:
        is_channels_last = conv.weight.is_contiguous(memory_format=torch.channels_last)
        memory_format = torch.channels_last if is_channels_last else torch.contiguous_format
        conv.weight = nn.Parameter(
            layer.weight.detach().contiguous(memory_format=memory_format), layer.weight.requires_grad
        )
    conv.__class__ = DGConv2d
    conv.groups, conv.sort, conv.gate = 1, layer.sort, layer.gate  # type: ignore[assignment]
