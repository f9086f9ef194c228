"""DGConv through group convolutions, forwards and backwards, with the exact straight-through gradients.

Let D be the set of open bits. Channels are connected exactly if their numbers differ in bits of D only, so a DGConv is
a group convolution up to an order of its channels. It is one for every larger set of bits D' as well, with zeros for
the pairs that D does not connect: the masked dense convolution is the one where D' is all bits.

With S a subset of D and R[x] = sum of <W_ij, dL/dW'_ij> over the pairs with i XOR j = x, the gradient of gate k is the
sum of R[{k} + S] over S with k not in S. If k is in D', these pairs lie inside the groups, and the weight gradient of
the group convolution has them. If it is not, they join each group with the one whose number differs in bit k: one more
group convolution's weight gradient. Nothing dense is left, and nothing is approximated.

So there are two spans D' to choose, one for output and input gradient, where a wider one costs arithmetic and may fill
the hardware better, and one for the weight gradient, where it also saves a convolution for each closed gate inside.

Which bits are open must be known on the host. A CPU tensor is read, which costs microseconds. Elsewhere a gate is read
once for each of its versions, and all that have changed since are read together: one transfer a training step.
"""

import functools
import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.weak import WeakTensorKeyDictionary

from timm_dgconv import grouping

Spans = tuple[int, int]
"""D' for output and input gradient, and D' for the weight gradient.

Masks of the bits of a channel number, bit 0 the least significant; open bits count as set. The result does not depend
on them, the speed does.
"""


def choose_spans(closed: Sequence[bool], in_channels: int, device_type: str) -> Spans:
    """The policy: the spans that are fastest for a layer with learnable gates.

    Args:
        closed: Which bits are closed, the most significant first.
        in_channels: Number of input channels.
        device_type: Type of the device, as in torch.device.

    Returns:
        The two spans. On a CPU (benchmarks/results/speed.md) the output needs no more than the open bits. The weight
        gradient is fastest with one closed bit inside, and in narrow groups with as many as make 16 channels: so wide
        it costs little more, and each saves a convolution.
    """
    width = in_channels >> sum(closed)  # input channels a group
    if device_type == "cpu":
        return 0, _lowest(closed, max(1, (15 // width).bit_length()))
    # Not measured: tensor cores want wide groups, and weight gradients of narrow ones are slow in cuDNN.
    return 0, _lowest(closed, (63 // width).bit_length())


def _lowest(closed: Sequence[bool], count: int) -> int:
    """Mask of the least significant closed bits, `count` of them if there are so many."""
    return sum([1 << shift for shift, bit in enumerate(reversed(closed)) if bit][:count])


def is_supported(input: Tensor, weight: Tensor, gate: Tensor) -> bool:
    """Whether the operator takes these: plain tensors on a device where a host transfer is what it seems."""
    if not all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in (input, weight, gate)):
        return False  # subclasses (fx, DTensor, fake tensors), whose values may not be there
    if input.device.type not in ("cpu", "cuda"):
        return False
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    if torch.compiler.is_compiling():
        # torch.export must not depend on this package; CUDA graphs must not keep an open set.
        exporting = getattr(torch.compiler, "is_exporting", lambda: True)()
        return not exporting and (input.device.type == "cpu" or _UNSAFE_IN_CUDA_GRAPHS != ())
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False  # torch.func and forward-mode gradients need a form that torch differentiates itself
    return not _is_capturing(input)


def refuse_nan(gate: Tensor) -> None:
    """Raise for nan gates where their values are at hand; in a graph that outlives them, nan goes on to the output.

    Raises:
        RuntimeError: If a gate is nan.
    """
    if not isinstance(gate, Tensor) or torch.compiler.is_compiling():
        return
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(gate):
        gate = functorch.get_unwrapped(gate)
    if type(gate) in (Tensor, torch.nn.Parameter) and gate.device.type in ("cpu", "cuda") and not _is_capturing(gate):
        with torch._C._DisableFuncTorch():
            _closed(values_on_host(gate if gate.ndim == 1 else gate.detach().flatten()))


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def dgconv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    sort: bool = False,
    spans: Spans | None = None,
) -> Tensor:
    """Dynamic grouping convolution as a group convolution.

    Args:
        input: Input of shape (N, C_in, H, W).
        weight: Dense weight of shape (C_out, C_in, kernel height, kernel width).
        bias: Bias of shape (C_out,) or None.
        gate: Gates of shape (K,).
        stride: Vertical and horizontal stride.
        padding: Vertical and horizontal zero padding.
        dilation: Vertical and horizontal dilation.
        sort: As in `timm_dgconv.grouping.connectivity`.
        spans: The sets of bits D' to compute with; None leaves them to `choose_spans`.

    Returns:
        Output of shape (N, C_out, H_out, W_out).

    Raises:
        RuntimeError: If a gate is nan, or input and weight are not of one dtype.
    """
    device_type = input.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        input_dtype, weight_dtype = (dtype if _is_cast(t) else t.dtype for t in (input, weight))
        input = input.to(input_dtype)
    else:
        input_dtype, weight_dtype = input.dtype, weight.dtype
    if input_dtype != weight_dtype:
        raise RuntimeError(
            f"input is {input.dtype} and weight {weight.dtype}; they must be of one dtype: cast the input, or the model"
        )
    return torch.ops.timm_dgconv.dgconv2d(input, weight, bias, gate, stride, padding, dilation, sort, spans)


def _is_cast(tensor: Tensor) -> bool:
    """Whether autocast casts it."""
    return tensor.is_floating_point() and tensor.dtype != torch.float64


# What is open, on the host.

_known: Any = WeakTensorKeyDictionary()  # gate -> (version, address, closed), where reading needs a transfer
_known_lock = threading.Lock()
_READ_DIRECTLY = {"cpu"}


def closed_on_host(gate: Tensor) -> tuple[bool, ...]:
    """Which gates are closed."""
    return _closed(values_on_host(gate))


def values_on_host(gate: Tensor) -> list[float]:
    """The gates; a transfer only for gates on other devices that have changed, and then one for all of them.

    Raises:
        RuntimeError: If they have no values, on the meta device.
    """
    if gate.is_meta:
        raise RuntimeError("gates of a DGConv2d are on the meta device and have no values; load weights first")
    whole = getattr(gate, "full_tensor", None)  # of a DTensor: all processes that share it must ask
    if whole is not None:
        return whole().tolist()
    if gate.device.type in _READ_DIRECTLY or gate.is_inference():
        return gate.tolist()
    with _known_lock:
        if gate not in _known or _known[gate][:2] != _state(gate):
            _known.setdefault(gate, (None, None, ()))
            stale = [
                g for g, known in _known.items() if g is not None and g.device == gate.device and known[:2] != _state(g)
            ]
            states = [_state(g) for g in stale]
            values = torch.cat([g.detach().float() for g in stale]).tolist()
            for g, state in zip(stale, states, strict=True):
                _known[g] = (*state, values[: g.numel()])
                values = values[g.numel() :]
        return _known[gate][2]


def _state(gate: Tensor) -> tuple[int, int]:
    return gate._version, gate.data_ptr()


def _closed(values: Sequence[float]) -> tuple[bool, ...]:
    if any(math.isnan(value) for value in values):
        raise RuntimeError(
            f"gates of a DGConv2d are nan: {list(values)}; the training has diverged, so go back to a checkpoint "
            "before it and use a smaller learning rate or gradient clipping"
        )
    return tuple(math.copysign(1, value) < 0 for value in values)


# The order of channels: closed bits, which number the groups, before open ones; views of the pairs that D connects.


class _Layout:
    """Where the channels and weights of the groups are; its methods make views or one copy, with no index tensors."""

    def __init__(self, closed: Sequence[bool], spans: Spans) -> None:
        bits = range(len(closed))
        in_span = [[bool(span >> shift & 1) for shift in reversed(bits)] for span in spans]
        self.bits = list(bits)
        self.open = [k for k in bits if not closed[k]]
        # Closed bits outside both spans, in that of the weight gradient only, in that of the output.
        self.far = [k for k in bits if closed[k] and not in_span[0][k] and not in_span[1][k]]
        self.mid = [k for k in bits if closed[k] and not in_span[0][k] and in_span[1][k]]
        self.near = [k for k in bits if closed[k] and in_span[0][k]]
        self.closed = [*self.far, *self.mid, *self.near]
        self.order = [*self.closed, *self.open]

    def permute(self, x: Tensor, channels_last: bool, back: bool = False) -> Tensor:
        """Bring the channels of a group together, or back to where they were, in this memory format."""
        order = self.order
        if order != self.bits:
            if back:
                order = [order.index(k) for k in self.bits]
            dim = 3 if channels_last else 1
            x = x.movedim(1, 3) if channels_last else x
            bits = x.unflatten(dim, (*(2 for _ in order), -1))
            before, after = range(dim), range(dim + len(order), bits.ndim)
            x = bits.permute(*before, *(dim + k for k in order), *after).reshape(x.shape)
            x = x.movedim(3, 1) if channels_last else x
        return _in_format(x, channels_last)

    def pairs(self, weight: Tensor, groups: Sequence[int] | None = None, flip: int | None = None) -> list[Tensor]:
        """Views of the elements for the channel pairs inside groups, or between those that differ in one bit.

        Args:
            weight: Dense, (C_out, C_in, kernel height, kernel width), or blocks, (groups, C_out / groups,
                C_in / groups, kernel height, kernel width), the channels in the order of this layout.
            groups: The bits that number the groups; the closed ones by default: the pairs that the gates connect.
            flip: One of these bits, for the pairs that differ in it.

        Returns:
            A view (*(2 for each of `groups`), *(2 for each other bit), q_out, *(2 for each other bit), q_in, kernel
            height, kernel width). With `flip` two, without that bit: where the input channel has 0 there, and 1.
        """
        dense = weight.ndim == 4
        shape, steps = ((1, *weight.shape), (0, *weight.stride())) if dense else (tuple(weight.shape), weight.stride())
        numbers = tuple(self.closed if groups is None else groups)
        size, stride, offsets = self._pairs(shape, steps, dense, numbers, flip)
        return [weight.as_strided(size, stride, weight.storage_offset() + offset) for offset in offsets]

    @functools.lru_cache(maxsize=8192)  # noqa: B019 (layouts are cached, too)
    def _pairs(
        self, shape: tuple[int, ...], strides: tuple[int, ...], dense: bool, groups: tuple[int, ...], flip: int | None
    ) -> tuple[list[int], list[int], list[int]]:
        bits = self.bits if dense else self.order
        num_blocks = shape[0].bit_length() - 1
        outer, inside = bits[:num_blocks], bits[num_blocks:]
        q_out, q_in = (channels >> len(inside) for channels in shape[1:3])
        block_step, out_step, in_step, *kernel_steps = strides
        out_steps = {k: out_step * q_out << shift for shift, k in enumerate(reversed(inside))}
        in_steps = {k: in_step * q_in << shift for shift, k in enumerate(reversed(inside))}
        steps = {k: block_step << shift for shift, k in enumerate(reversed(outer))}
        steps |= {k: out_steps[k] + in_steps[k] for k in inside}

        others = [k for k in self.order if k not in groups]
        size = [2 for k in groups if k != flip]
        stride = [steps[k] for k in groups if k != flip]
        for channel_steps, q, step in ((out_steps, q_out, out_step), (in_steps, q_in, in_step)):
            size += [*(2 for _ in others), q]
            stride += [*(channel_steps[k] for k in others), step]
        if flip is None:
            offsets = [0]
        elif flip in outer:  # blocks that join two groups have the number of the input's
            offsets = [0, steps[flip]]
        else:
            offsets = [out_steps[flip], in_steps[flip]]
        return [*size, *shape[3:]], [*stride, *kernel_steps], offsets

    def inside_gradients(self, products: Tensor) -> dict[int, Tensor]:
        """Gradients of the gates inside the span of the weight gradient.

        Args:
            products: <W_ij, dL/dW'_ij> for the pairs in its groups, (groups, C_out / groups, C_in / groups, kernel
                height, kernel width).
        """
        inside = [*self.mid, *self.near, *self.open]
        if not inside:
            return {}
        n = 1 << len(inside)
        by_code = products.sum(0).unflatten(1, (n, -1)).unflatten(0, (n, -1)).flatten(3).sum((1, 3))
        codes = torch.arange(n, device=products.device)
        r = by_code.gather(1, codes.unsqueeze(1) ^ codes).sum(0)  # r[x] = sum of by_code[a, a ^ x]
        # A gate's gradient is the sum of r[x] over the x with its bit and no other closed one.
        bits = 1 << torch.arange(len(inside) - 1, -1, -1, device=products.device).unsqueeze(1)
        closed = n - (1 << len(self.open))
        counts = (codes & bits != 0) & (codes & ~bits & closed == 0)
        return dict(zip(inside, counts.to(r.dtype) @ r, strict=True))

    def blocks(self, weight: Tensor, group_bits: int, channels_last: bool, connected: bool = True) -> Tensor:
        """The weight of a group convolution whose groups the first closed bits number; zeros where D does not connect.

        Args:
            weight: Dense, (C_out, C_in, kernel height, kernel width).
            group_bits: How many bits.
            channels_last: Memory format of the convolution.
            connected: Without it, all pairs in the groups.

        Returns:
            (groups, C_out / groups, C_in / groups, kernel height, kernel width).
        """
        blocks = _empty_blocks(weight, (1 << group_bits,), channels_last)
        groups = None if connected else self.closed[:group_bits]
        if connected and group_bits < len(self.closed):
            blocks.zero_()
        self.pairs(blocks, groups)[0].copy_(self.pairs(weight, groups)[0])
        return blocks


def _empty_blocks(weight: Tensor, shape: tuple[int, ...], channels_last: bool) -> Tensor:
    """Room for weights of a group convolution, (groups, ..., C_out / groups, C_in / groups, ...)."""
    out_channels, in_channels, height, width = weight.shape
    shape, in_channels = (*shape, out_channels // shape[0]), in_channels // shape[0]
    if channels_last:
        return weight.new_empty(*shape, height, width, in_channels).movedim(-1, -3)
    return weight.new_empty(*shape, in_channels, height, width)


_layout = functools.lru_cache(maxsize=1024)(_Layout)


class _Plan(NamedTuple):
    layout: _Layout
    gates: list[int]
    """The gate that acts on each bit."""
    channels_last: bool
    """The memory format of output and input gradient."""


def _plan(input: Tensor, weight: Tensor, gate: Tensor, sort: bool, spans: Sequence[int] | None, learns: bool) -> _Plan:
    closed = closed_on_host(gate)
    gates = sorted(range(len(closed)), key=lambda k: not closed[k]) if sort else list(range(len(closed)))
    closed = tuple(closed[k] for k in gates)
    if spans is None:
        spans = choose_spans(closed, weight.shape[1], input.device.type) if learns else (0, 0)
    return _Plan(_layout(closed, (spans[0], spans[1])), gates, _is_channels_last(input, weight))


def _in_format(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _is_channels_last(*tensors: Tensor) -> bool:
    """As convolutions of torch choose the memory format of their output."""
    return any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in tensors)


# The operator. Its backward pass is one, too, so that torch.compile sees neither's inside.

_UNSAFE_IN_CUDA_GRAPHS: Any = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
_TAGS: Any = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order, *_UNSAFE_IN_CUDA_GRAPHS)
_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, bool sort, int[]? spans"

torch.library.define(
    "timm_dgconv::dgconv2d",
    f"(Tensor input, Tensor weight, Tensor? bias, Tensor gate, {_GEOMETRY}) -> Tensor",
    tags=_TAGS,
)
torch.library.define(
    "timm_dgconv::dgconv2d_backward",
    f"(Tensor grad_output, Tensor input, Tensor weight, Tensor gate, {_GEOMETRY}, bool[3] output_mask)"
    " -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


@torch.library.impl("timm_dgconv::dgconv2d", ("cpu", "cuda"))
def _forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    sort: bool,
    spans: list[int] | None,
) -> Tensor:
    layout, _, channels_last = _plan(input, weight, gate, sort, spans, learns=False)
    group_bits = len(layout.far) + len(layout.mid)
    x, blocks = layout.permute(input, channels_last), layout.blocks(weight, group_bits, channels_last)
    with torch.autocast(input.device.type, enabled=False):
        y = torch.conv2d(x, blocks.flatten(0, 1).to(x.dtype), None, stride, padding, dilation, 1 << group_bits)
    y = layout.permute(y, channels_last, back=True)
    return y if bias is None else y.add_(bias.to(y.dtype)[:, None, None])


@torch.library.impl("timm_dgconv::dgconv2d_backward", ("cpu", "cuda"))
def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    gate: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    sort: bool,
    spans: list[int] | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    needs_input, needs_weight, needs_gate = output_mask
    layout, gates, output_channels_last = _plan(input, weight, gate, sort, spans, learns=needs_gate)
    # oneDNN's weight gradient of very narrow groups is several times faster in channels_last.
    narrow = input.is_cpu and weight.shape[1] >> len(layout.closed) <= 4
    channels_last = output_channels_last or narrow
    grad_input, grad_weight, grad_gate = (weight.new_empty(0) for _ in range(3))
    grad, x = layout.permute(grad_output, channels_last), layout.permute(input, channels_last)

    def convolution_backward(grad: Tensor, blocks: Tensor, of_input: bool) -> Tensor:
        weight = blocks.flatten(0, -4)
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, [0], len(blocks), [of_input, not of_input, False]
        )[0 if of_input else 1]

    def weight_gradient(grad: Tensor, blocks: Tensor) -> Tensor:
        """In the shape of these blocks. Their values do not count, but in another dtype or format they are copied."""
        if blocks.dtype != grad.dtype:
            blocks = grad.new_empty(()).expand(blocks.shape)
        return convolution_backward(grad, blocks, of_input=False).unflatten(0, blocks.shape[:-3])

    if needs_input:
        blocks = layout.blocks(weight, len(layout.far) + len(layout.mid), channels_last).to(grad.dtype)
        grad_input = convolution_backward(grad, blocks, of_input=True)
        grad_input = _in_format(layout.permute(grad_input, channels_last, back=True), output_channels_last)
    if not (needs_weight or needs_gate):
        return grad_input, grad_weight, grad_gate

    inside = layout.blocks(weight, len(layout.far), channels_last, connected=False)
    grad_blocks = weight_gradient(grad, inside)
    (connected,) = layout.pairs(grad_blocks)
    if needs_weight:
        grad_weight = _zeros_like(weight)
        layout.pairs(grad_weight)[0].copy_(connected)
    if needs_gate:
        # Half precision is too coarse for the sums over channel pairs.
        accurate = torch.promote_types(torch.promote_types(weight.dtype, grad.dtype), torch.float32)
        grads = layout.inside_gradients(inside.to(accurate).mul_(grad_blocks))
        groups = 1 << len(layout.closed)
        at_once = max(1, _JOINED_BYTES // max(1, grad.nbytes)) if grad.is_cpu else 1
        for start in range(0, len(layout.far), at_once):
            gates_now = layout.far[start : start + at_once]
            joined_grad = _flips(grad, len(layout.closed), range(start, start + len(gates_now)), channels_last)
            joined = _empty_blocks(weight, (groups, len(gates_now)), channels_last)
            for n, k in enumerate(gates_now):
                for there, here in zip(layout.pairs(weight, flip=k), layout.pairs(joined[:, n], flip=k), strict=True):
                    here.copy_(there)
            products = joined.to(accurate).mul_(weight_gradient(joined_grad, joined))
            grads |= zip(gates_now, products.sum((0, 2, 3, 4, 5)), strict=True)
        grad_gate = torch.stack([grads[gates.index(k)] for k in range(len(gates))]).to(gate.dtype)
    return grad_input, grad_weight, grad_gate


def _flips(x: Tensor, group_bits: int, bits: range, channels_last: bool) -> Tensor:
    """For each group, the channels of the groups whose numbers differ in one of these bits (0 is the first)."""
    groups = torch.arange(1 << group_bits, device=x.device).unsqueeze(1)
    masks = 1 << group_bits - 1 - torch.arange(bits.start, bits.stop, device=x.device)
    dim = 3 if channels_last else 1
    x = x.movedim(1, 3) if channels_last else x
    x = x.unflatten(dim, (1 << group_bits, -1)).index_select(dim, (groups ^ masks).flatten()).flatten(dim, dim + 1)
    return x.movedim(3, 1) if channels_last else x


_JOINED_BYTES = 1 << 25


_spare: Any = WeakTensorKeyDictionary()  # weight -> memory of a gradient that nobody holds any more


def _zeros_like(weight: Tensor) -> Tensor:
    """Zeros for the gradient of a dense weight.

    On a CPU, fresh memory for it costs more than the convolution, and the allocator gives large tensors back to the
    system at once. So the memory of a weight's last gradient is kept for the next one when it is free.
    """
    reach = 1 + sum((size - 1) * step for size, step in zip(weight.shape, weight.stride(), strict=True))
    if weight.device.type != "cpu" or reach != weight.numel():
        return torch.zeros_like(weight)
    memory = _spare.pop(weight, None)
    if memory is None or memory.nbytes != weight.nbytes:  # model.double() keeps the parameter
        memory = np.empty(weight.nbytes, np.uint8)
    memory.fill(0)  # faster than torch's, since it goes past the caches
    borrowed = memory[:]  # the tensor keeps this object alive
    weakref.finalize(borrowed, _give_back, weakref.ref(weight), memory).atexit = False
    return torch.from_numpy(borrowed).view(weight.dtype).as_strided(weight.shape, weight.stride())


def _give_back(weight: weakref.ref[Tensor], memory: Any) -> None:
    owner = weight()
    if owner is not None:
        _spare[owner] = memory


@torch.library.register_fake("timm_dgconv::dgconv2d")
def _fake_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    sort: bool,
    spans: list[int] | None,
) -> Tensor:
    y = torch.conv2d(input, weight.to(input.dtype), None, stride, padding, dilation)
    channels_last = _is_channels_last(input, weight)
    return torch.empty_like(y, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@torch.library.register_fake("timm_dgconv::dgconv2d_backward")
def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    gate: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    sort: bool,
    spans: list[int] | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    channels_last = _is_channels_last(input, weight)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    needs_input, needs_weight, needs_gate = output_mask
    return (
        torch.empty_like(input, memory_format=memory_format) if needs_input else weight.new_empty(0),
        torch.empty_like(weight) if needs_weight else weight.new_empty(0),
        torch.empty_like(gate) if needs_gate else weight.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, gate, *ctx.rest = inputs
    ctx.save_for_backward(input, weight, bias, gate)


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    input, weight, bias, gate = ctx.saved_tensors
    needs_input, needs_weight, needs_bias, needs_gate, *others = ctx.needs_input_grad
    if torch.is_grad_enabled():  # create_graph: the masked dense form can be differentiated again
        refuse_nan(gate)
        return (*_differentiable_gradients(ctx, grad_output), *[None] * len(others))
    grads = torch.ops.timm_dgconv.dgconv2d_backward(
        grad_output, input, weight, gate, *ctx.rest, [needs_input, needs_weight, needs_gate]
    )
    return (
        grads[0] if needs_input else None,
        grads[1] if needs_weight else None,
        grad_output.sum((0, 2, 3)).to(bias.dtype) if needs_bias else None,
        grads[2] if needs_gate else None,
        *[None] * len(others),
    )


def _differentiable_gradients(ctx: Any, grad_output: Tensor) -> list[Tensor | None]:
    tensors = ctx.saved_tensors
    *geometry, sort, _ = ctx.rest
    needs = ctx.needs_input_grad[:4]
    # New nodes with the same histories, so that gradients with respect to them go no further.
    tensors = [t if t is None or not needed else t.view_as(t) for t, needed in zip(tensors, needs, strict=True)]
    input, weight, bias, gate = tensors
    u = grouping.connectivity(gate, weight.shape[0], weight.shape[1], sort).to(weight.dtype)
    masked = (weight * u[:, :, None, None]).to(input.dtype)
    output = torch.conv2d(input, masked, None if bias is None else bias.to(input.dtype), *geometry)
    wanted = [tensor for tensor, needed in zip(tensors, needs, strict=True) if needed]
    grads = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=True))
    return [next(grads) if needed else None for needed in needs]


torch.library.register_autograd("timm_dgconv::dgconv2d", _gradients, setup_context=_setup_context)
