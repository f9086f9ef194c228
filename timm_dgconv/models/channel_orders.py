"""Move the channel orders of group convolutions into the weights around them.

A GroupConv2d may read and write its channels in another order. Between two convolutions stand operations that treat all
channels alike. There the channels can have any order if all convolutions that write and read them agree: the weights of
a dense convolution take it, and so does the order of another GroupConv2d. torch.fx finds these places.
"""

import copy
import inspect
import operator
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import timm.layers
import torch
from timm.models import FeatureInfo
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules import activation, batchnorm, dropout, instancenorm, pooling

from timm_dgconv import _compat
from timm_dgconv.layers.group_conv import GroupConv2d

_TIMM_EQUIVARIANT = (
    *("AvgPool2dSame", "BatchNormAct2d", "BlurPool2d", "DropBlock2d", "DropPath"),
    *("EvoNorm2dB0", "EvoNorm2dB1", "EvoNorm2dB2", "FilterResponseNormAct2d", "FilterResponseNormTlu2d"),
    *("FrozenBatchNormAct2d", "GroupNorm1", "GroupNorm1Act", "LayerNorm2d", "LayerNorm2dFp32", "LayerNormAct2d"),
    *("LayerNormAct2dFp32", "RmsNorm2d", "RmsNorm2dFp32", "RmsNormAct2d", "RmsNormAct2dFp32", "SimpleNorm2d"),
    *("SimpleNorm2dFp32", "SyncBatchNormAct"),
)
_CHANNEL_MIXING = ("GLU", "LogSoftmax", "MultiheadAttention", "Softmax", "Softmax2d", "Softmin")

EQUIVARIANT: set[type[nn.Module]] = {
    nn.Identity,
    *(getattr(timm.layers, name) for name in _TIMM_EQUIVARIANT if hasattr(timm.layers, name)),
    *(
        getattr(module, name)
        for module in (activation, batchnorm, dropout, instancenorm, pooling)
        for name in module.__all__
        if name not in _CHANNEL_MIXING and not name.endswith("3d")
    ),
    *(
        value
        for name in dir(timm.layers)
        if isinstance(value := getattr(timm.layers, name), type)
        and value.__module__.startswith("timm.layers.activations")
    ),
}
"""Types of modules for which a permutation of the input channels permutes the output channels in the same way.

Parameters and buffers whose first dimension is the number of channels are permuted along. Add a type of your own here.
"""

_ELEMENTWISE: set[Any] = {
    *(operator.add, operator.iadd, operator.mul, operator.imul, torch.add, torch.mul),
    *(F.relu, torch.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.hardsigmoid, torch.sigmoid, torch.tanh, F.dropout),
    *(F.max_pool2d, F.avg_pool2d, F.interpolate),
    *("add", "add_", "mul", "mul_", "relu", "relu_", "sigmoid", "contiguous", "clone"),
}
"""Functions, and names of methods, that treat all channels alike."""


def is_equivariant(module: nn.Module) -> bool:
    """Return whether a module treats all channels alike."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups == 1 and type(module) in {*EQUIVARIANT, nn.GroupNorm, timm.layers.GroupNorm}
    is_depthwise = _is_plain_conv(module) and module.groups == module.in_channels == module.out_channels
    return is_depthwise or type(module) in EQUIVARIANT


def absorb_orders(model: nn.Module) -> None:
    """Move the orders of all GroupConv2d layers of a model into other weights, where the model computes the same.

    The output of a module in timm's `feature_info` and what a module with hooks sees stay as they are.

    Args:
        model: The model; changed in place.
    """
    opaque = set()
    for module in model.modules():
        infos = getattr(module, "feature_info", None)
        if isinstance(infos, list | FeatureInfo):
            names = {info.get("module") for info in infos if isinstance(info, dict)}
            opaque |= {child for name, child in module.named_modules() if name in names}
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    tied = (m for m in model.modules() if any(owners[id(p)] > 1 for p in m.parameters(recurse=False)))
    _absorb_in(model, opaque | set(tied))


def _absorb_in(root: nn.Module, opaque: set[nn.Module]) -> None:
    """Absorb orders in one module, and then in each module that is opaque in its graph."""
    modules: dict[Any, nn.Module] = dict(root.named_modules())
    graphs = _trace(root, opaque)
    calls = [Counter(node.target for node in graph.nodes if node.op == "call_module") for graph in graphs]
    usable = {
        name: module
        for name, module in modules.items()
        if all(count[name] == 1 or not _has_state(module) for count in calls)
        and module not in opaque
        and not _has_hooks(module)
    }
    for name, module in usable.items() if graphs else ():
        if isinstance(module, GroupConv2d):
            for side in ("in_order", "out_order"):
                if getattr(module, side) is not None:
                    region, *others = (_find_region(graph, name, side, usable) for graph in graphs)
                    if region is not None and others == [region]:
                        region.reorder(usable)
    inner = [modules[name] for name in calls[0]] if graphs else list(root.children())
    for module in inner:
        if any(isinstance(child, GroupConv2d) for child in module.modules() if child is not module):
            _absorb_in(module, opaque - {module})


def _trace(root: nn.Module, opaque: set[nn.Module]) -> list[fx.Graph]:
    """Return the graphs of a module in evaluation and in training mode, or an empty list if it cannot be traced.

    Auxiliary heads and the like read values in one mode only.
    """
    try:
        return [_Tracer().record(root, opaque, training) for training in (False, True)]
    except Exception:  # any exception of the user's modules
        return []


class _Tracer(fx.Tracer):
    """Records the calls of modules that it knows, of opaque modules, and of modules that it cannot trace.

    `fx.Tracer.trace` changes torch.nn.Module for all threads. This class changes the modules of a copy instead.
    """

    def record(self, root: nn.Module, opaque: set[nn.Module], training: bool) -> fx.Graph:
        """Return the graph of a forward pass with the default arguments."""
        # The copy shares the tensors. It also keeps what the modules of users store in a forward pass.
        twin = copy.deepcopy(root, {id(tensor): tensor for tensor in (*root.parameters(), *root.buffers())})
        self.root, self.graph, self.tensor_attrs = twin.train(training), fx.Graph(), {}
        for (name, module), original in zip(twin.named_modules(), root.modules(), strict=True):
            is_leaf = original in opaque or _has_hooks(original) or self.is_leaf_module(module, name)
            for hooks in _compat.HOOKS:
                getattr(module, hooks).clear()
            if module is not twin:
                module.forward = self._recorded(name, None if is_leaf else module.forward)
        parameters = inspect.signature(root.forward).parameters.values()
        inputs = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        output = twin.forward(*(self.create_proxy("placeholder", p.name, (), {}) for p in inputs))
        self.create_node("output", "output", (self.create_arg(output),), {})
        # Modules that could be traced in part have left nodes.
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        return self.graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether the graph has a call of this module instead of its operations."""
        is_known = is_equivariant(m) or isinstance(m, nn.Conv2d)
        return is_known or super().is_leaf_module(m, module_qualified_name)

    def _recorded(self, name: str, forward: Callable[..., Any] | None) -> Callable[..., Any]:
        """Return a forward pass that records the call of a module, if it cannot be traced or has no `forward`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if forward is not None:
                with suppress(Exception):  # any exception of the user's modules
                    return forward(*args, **kwargs)
            return self.create_proxy("call_module", name, args, kwargs)

        return call


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(), *module.buffers()))


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in _compat.HOOKS)


def _is_plain_conv(module: Any) -> bool:
    return type(module) is nn.Conv2d and module.padding_mode == "zeros" and "weight" in module._parameters


@dataclass
class _Region:
    """Values whose channels have one common order, by the names of the modules that write, read and pass them on."""

    writers: set[str] = field(default_factory=set)
    readers: set[str] = field(default_factory=set)
    carriers: set[str] = field(default_factory=set)

    @torch.no_grad()
    def reorder(self, modules: dict[Any, nn.Module]) -> None:
        """Give the values the order with which the fewest GroupConv2d layers need an order of their own."""
        writers: list[Any] = [modules[name] for name in sorted(self.writers)]
        readers: list[Any] = [modules[name] for name in sorted(self.readers)]
        orders = [getattr(c, "out_order", None) for c in writers] + [getattr(c, "in_order", None) for c in readers]
        identity = next(order for order in orders if order is not None).sort().values
        after = [identity if c.out_order is None else c.out_order for c in writers if isinstance(c, GroupConv2d)]
        before = [identity if c.in_order is None else c.in_order for c in readers if isinstance(c, GroupConv2d)]

        def num_orders(order: Tensor) -> int:
            return sum(not torch.equal(o[order], identity) for o in after) + sum(
                not torch.equal(o, order) for o in before
            )

        order = min([identity, *(o.argsort() for o in after), *before], key=num_orders)
        if torch.equal(order, identity):
            return
        for conv in writers:
            if isinstance(conv, GroupConv2d):
                out_order = order if conv.out_order is None else conv.out_order[order]
                conv.set_orders(conv.in_order, out_order)
            else:
                _permute(conv, order)
        for conv in readers:
            if isinstance(conv, GroupConv2d):
                in_order = order.argsort() if conv.in_order is None else order.argsort()[conv.in_order]
                conv.set_orders(in_order, conv.out_order)
            else:
                conv.weight.copy_(conv.weight[:, order])
        for name in self.carriers:
            _permute(modules[name], order)


def _permute(module: nn.Module, order: Tensor) -> None:
    """Permute the parameters and buffers that this module has per channel."""
    for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        if tensor.ndim and tensor.shape[0] == order.shape[0]:
            tensor.copy_(tensor[order])


def _find_region(graph: fx.Graph, name: str, side: str, modules: dict[Any, nn.Module]) -> _Region | None:
    """Return the region at the input or output of a GroupConv2d, or None if other operations limit it."""
    start = next((node for node in graph.nodes if node.op == "call_module" and node.target == name), None)
    if start is None or not _takes_order(start, modules[name]):
        return None
    todo: list[Any] = [start if side == "out_order" else start.args[0]]
    seen: set[fx.Node] = set()
    region = _Region()
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        module = modules.get(value.target) if value.op == "call_module" else None
        if _takes_order(value, module):
            region.writers.add(str(value.target))
        elif _passes_on(value, module):
            todo += value.all_input_nodes
            region.carriers |= {str(value.target)} if module is not None else set()
        else:
            return None
        for user in value.users:
            module = modules.get(user.target) if user.op == "call_module" else None
            if _takes_order(user, module):
                region.readers.add(str(user.target))
            elif _passes_on(user, module):
                todo.append(user)
            elif not _reads_shape(user):
                return None
    counts: set[Any] = {modules[name].out_channels for name in region.writers}
    counts |= {modules[name].in_channels for name in region.readers}
    return region if len(counts) == 1 else None


def _takes_order(node: fx.Node, module: Any) -> bool:
    """Return whether a node is a convolution that can write and read its channels in any order."""
    if len(node.args) != 1 or node.kwargs:
        return False
    return isinstance(module, GroupConv2d) or (_is_plain_conv(module) and module.groups == 1)


def _passes_on(node: fx.Node, module: nn.Module | None) -> bool:
    """Return whether the output of a node has its channels in the order of its inputs."""
    if node.op == "call_module":
        return module is not None and is_equivariant(module) and len(node.args) == 1 and not node.kwargs
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target == "mean":  # over the pixels, as in squeeze-and-excitation
        return node.args[1:] in (((2, 3),), ([2, 3],)) and node.kwargs == {"keepdim": True}
    return node.target in _ELEMENTWISE and not (set(node.kwargs) & {"alpha", "out"})


def _reads_shape(node: fx.Node) -> bool:
    is_shape = node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "dtype", "device")
    return is_shape or (node.op == "call_method" and node.target in ("size", "dim"))
