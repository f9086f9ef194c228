"""Let the convolutions of any network learn their groups: the one way in which a DGConv2d enters a network."""

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from timm_dgconv import _compat
from timm_dgconv.layers.checkpoints import from_conv
from timm_dgconv.layers.dgconv import DGConv2d, check_flags
from timm_dgconv.layers.gate_reader import OneReading, read_once_per_call
from timm_dgconv.ops import algebra

Where = Callable[[str, nn.Conv2d], bool]

_MERGES = ("fuse", "reparameterize", "switch_to_deploy")
"""Methods that `timm.utils.reparameterize_model` calls. They read the weights of convolutions.

A module whose methods know gates has the attribute `knows_gates`.
"""


def groupable(model: nn.Module, where: Where | None = None, sort: bool = True, nested: bool = True) -> nn.Module:
    """Turn the convolutions of a network into DGConv2d layers that compute the same, in place.

    A dense convolution starts with one group, and a group convolution with its groups. The gates are
    `timm_dgconv.layers.checkpoints.PRETRAINED_GATE` from zero. Each module stays the same object, with its hooks,
    names, dtype, device, memory format, training mode and `requires_grad`. Only the weight of a group convolution is
    new: a DGConv2d stores the connections between the groups, too. So create the optimizer afterwards.

    Args:
        model: A network, or a convolution.
        where: Function of the name and the torch.nn.Conv2d that returns whether to convert it. The default converts
            kernels larger than 1x1 whose channel counts have at least two powers of two in common. It leaves out
            depthwise convolutions, since the dense weight of a DGConv2d costs more than it can gain there, and
            convolutions whose parent merges weights. If you choose these, call `timm_dgconv.compact` before the parent
            merges. See `skipped_convs`.
        sort: See `timm_dgconv.DGConv2d`.
        nested: See `timm_dgconv.DGConv2d`.

    Returns:
        The model.

    Raises:
        TypeError: If the model is not a torch.nn.Module, if `where` is not a function, or if `sort` or `nested` is not
            a bool.
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
    if where is not None and not callable(where):
        raise TypeError(f"where={where!r} is not a function of the name and the torch.nn.Conv2d; use a lambda")
    check_flags(sort=sort, nested=nested)
    skipped = skipped_convs(model, where)
    chosen = {name: conv for name, conv in _plain_convs(model).items() if name not in skipped}
    if where is not None:
        for name, obstacle in _obstacles(model, chosen).items():
            raise ValueError(f"`where` chooses {name or 'the model'}, which cannot learn its groups: {obstacle}")
    if not chosen:
        if any(isinstance(module, DGConv2d) for module in model.modules()):
            raise ValueError(f"{type(model).__name__} has DGConv2d layers already, and no other convolution to convert")
        reasons = ", ".join(f"{reason} ({count})" for reason, count in Counter(skipped.values()).most_common(3))
        raise ValueError(f"{type(model).__name__} has no convolution to convert: {reasons or 'it has none'}")
    parameters: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for conv in chosen.values():
        _convert(conv, parameters, sort, nested)
    if not isinstance(model, OneReading):
        read_once_per_call(model)
    args = getattr(model, _compat.MODEL_ARGS, {})
    if "groups" in args:  # of the compact form that it was
        args = {name: value for name, value in args.items() if name != "groups"}
        setattr(model, _compat.MODEL_ARGS, args if sort else {**args, "sort": False})
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
    convs = _plain_convs(model)
    if where is not None:
        return {name: "`where` does not choose it" for name, conv in convs.items() if not where(name, conv)}
    reasons = {name: reason for name, conv in convs.items() if (reason := _reluctance(conv))}
    reasons |= {name: reason for name, reason in _merged(model).items() if name not in reasons}
    return reasons | _obstacles(model, {name: conv for name, conv in convs.items() if name not in reasons})


def _plain_convs(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and not isinstance(module, DGConv2d)
    }


def _obstacles(model: nn.Module, chosen: dict[str, nn.Conv2d]) -> dict[str, str]:
    """Return why some of the chosen convolutions cannot be a DGConv2d, by name."""
    obstacles = {name: obstacle for name, conv in chosen.items() if (obstacle := _obstacle(conv))}
    owners: Any = defaultdict(list)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter].append(module)
    shapes: Any = {conv: (conv.in_channels, conv.out_channels, conv.groups) for conv in chosen.values()}
    for name, conv in chosen.items():
        if name not in obstacles and {shapes.get(owner) for owner in owners[conv.weight]} != {shapes[conv]}:
            obstacles[name] = "it shares its weight with a module that cannot become the same layer"
    return obstacles


def _obstacle(conv: nn.Conv2d) -> str:
    """Return why a convolution alone cannot be a DGConv2d, or an empty string."""
    if type(conv) is not nn.Conv2d:
        return f"the forward pass of a {type(conv).__name__} may differ from the forward pass of a torch.nn.Conv2d"
    if _compat.FORWARDS & vars(conv).keys():
        return "it has a forward pass of its own"
    if "weight" not in dict(conv.named_parameters(recurse=False)):
        return "another module or a hook computes its weight"
    try:
        bits = algebra.num_bits(conv.in_channels, conv.out_channels)
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
    if not _obstacle(conv) and algebra.num_bits(conv.in_channels, conv.out_channels) < 2:
        return f"{conv.in_channels} -> {conv.out_channels} channels have only one gate"
    return ""


def _merged(model: nn.Module) -> dict[str, str]:
    """Return the convolutions whose weight a parent merges with others, by name."""
    merging = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if not isinstance(module, nn.Conv2d)
        and any(hasattr(module, method) for method in _MERGES)
        and not getattr(module, "knows_gates", False)
    }
    names = list(_plain_convs(model)) if merging else []
    return {
        name: f"a {parent} merges its weight with others"
        for prefix, parent in merging.items()
        for name in names
        if not prefix or name.startswith(f"{prefix}.")
    }


def _convert(
    conv: nn.Conv2d, parameters: dict[int, tuple[nn.Parameter, nn.Parameter]], sort: bool, nested: bool
) -> None:
    """Turn a convolution into a DGConv2d, in place.

    Args:
        conv: The convolution.
        parameters: Id of a weight -> weight and gates of the layer that it has become; updated in place. Convolutions
            that share a weight share both.
        sort: See `groupable`.
        nested: See `groupable`.
    """
    weight = conv.weight
    if id(weight) not in parameters:
        layer = DGConv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            bias=False,
            device=weight.device,
            dtype=weight.dtype,
        )
        if weight.is_contiguous(memory_format=torch.channels_last):
            layer.to(memory_format=torch.channels_last)
        dense, gates = from_conv(layer, weight)
        new: Any = weight if conv.groups == 1 else nn.Parameter(dense, weight.requires_grad)
        parameters[id(weight)] = (new, nn.Parameter(gates, weight.requires_grad))
    conv.weight, gate = parameters[id(weight)]
    conv.groups = 1
    conv.__class__ = DGConv2d  # as in torch.nn.utils.parametrize: hooks and references to the object stay valid
    conv.add_gates(gate, sort, nested)  # type: ignore[operator]
