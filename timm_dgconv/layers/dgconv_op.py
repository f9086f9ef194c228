"""The operator: DGConv as group convolutions, forwards and backwards, with the exact straight-through gradients.

Let D be the set of open bits. Two channels are connected exactly if their codes differ in bits of D only. So a DGConv
is a group convolution up to a permutation of its channels. It is also a group convolution for every superset D' of D,
with a weight that is masked to D inside the groups. The masked dense convolution is the case in which D' has all bits.

Let S be a subset of D, and let R[x] be the sum of <W_ij, dL/dW'_ij> over all pairs with i XOR j = x. The gradient of
gate k is the sum of R[{k} + S] over all S without k. If D' has bit k, the weight gradient of the group convolution
contains these pairs. Otherwise each group is paired with the group that differs in bit k, and one extra weight gradient
of a group convolution contains the pairs. No dense convolution is computed, and the gradients are exact.

There are two spans D' to choose: one for the output and the input gradient, one for the weight gradient. A wider span
costs arithmetic and may use the hardware better. In the weight gradient it also saves one convolution per closed gate.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from timm_dgconv import _compat
from timm_dgconv.layers import gate_cache, grouping
from timm_dgconv.layers.grad_memory import zeros_like
from timm_dgconv.layers.layout import Layout, empty_blocks, flip_groups, get_layout, in_format, is_channels_last
from timm_dgconv.layers.spans import Spans, choose_spans


def is_supported(input: Tensor, weight: Tensor, gate: Tensor) -> bool:
    """Return whether the operator applies: plain CPU or CUDA tensors, no tracing, export, functorch, graph capture."""
    if not gate_cache.is_plain(input, weight, gate):
        return False
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    if torch.compiler.is_compiling():
        # An exported program must run without this package. A CUDA graph must not record one set of open bits.
        exporting = getattr(torch.compiler, "is_exporting", lambda: True)()
        return not exporting and (input.device.type == "cpu" or bool(_UNSAFE_IN_CUDA_GRAPHS))
    if _compat.transforms_are_active():
        return False  # a transform needs a form that torch differentiates itself
    return not gate_cache.is_capturing(input)


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
    closed: Sequence[bool] | None = None,
) -> Tensor:
    """Compute a dynamic grouping convolution as a group convolution.

    Args:
        input: Input of shape (N, C_in, H, W).
        weight: Dense weight of shape (C_out, C_in, kernel height, kernel width).
        bias: Bias of shape (C_out,) or None.
        gate: Gates of shape (K,).
        stride: Vertical and horizontal stride.
        padding: Vertical and horizontal zero padding.
        dilation: Vertical and horizontal dilation.
        sort: See `timm_dgconv.layers.grouping.connectivity`.
        spans: The spans to compute with. If None, `choose_spans` chooses them.
        closed: Which gates are closed. If None, the operator reads the gates.

    Returns:
        Output of shape (N, C_out, H_out, W_out).

    Raises:
        RuntimeError: If a gate is nan, or if input and weight differ in dtype.
    """
    device_type = input.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        input_dtype, weight_dtype = (dtype if _is_autocast(t) else t.dtype for t in (input, weight))
        input = input.to(input_dtype)
    else:
        input_dtype, weight_dtype = input.dtype, weight.dtype
    if input_dtype != weight_dtype:
        raise RuntimeError(
            f"input has dtype {input.dtype} and weight has dtype {weight.dtype}; cast the input or the model"
        )
    return torch.ops.timm_dgconv.dgconv2d(input, weight, bias, gate, stride, padding, dilation, sort, spans, closed)


def _is_autocast(tensor: Tensor) -> bool:
    """Return whether autocast casts a tensor."""
    return tensor.is_floating_point() and tensor.dtype != torch.float64


class _Plan(NamedTuple):
    layout: Layout
    gates: list[int]
    """The index of the gate that acts on each bit."""
    channels_last: bool
    """The memory format of output and input gradient."""


def _plan(
    input: Tensor,
    weight: Tensor,
    gate: Tensor,
    sort: bool,
    spans: Sequence[int] | None,
    closed: Sequence[bool] | None,
    learns: bool,
) -> _Plan:
    by_gate = tuple(closed) if closed is not None else gate_cache.closed_on_host(gate)
    gates = sorted(range(len(by_gate)), key=lambda k: not by_gate[k]) if sort else list(range(len(by_gate)))
    closed = tuple(by_gate[k] for k in gates)
    if spans is None:
        spans = choose_spans(closed, weight.shape[1], input.device.type) if learns else (0, 0)
    return _Plan(get_layout(closed, (spans[0], spans[1])), gates, is_channels_last(input, weight))


# The backward pass is an operator, too: torch.compile must not trace it, since it depends on which gates are closed.

_UNSAFE_IN_CUDA_GRAPHS: Any = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
_TAGS: Any = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order, *_UNSAFE_IN_CUDA_GRAPHS)
_OPTIONS = "int[2] stride, int[2] padding, int[2] dilation, bool sort, int[]? spans"

torch.library.define(
    "timm_dgconv::dgconv2d",
    f"(Tensor input, Tensor weight, Tensor? bias, Tensor gate, {_OPTIONS}, bool[]? closed=None) -> Tensor",
    tags=_TAGS,
)
torch.library.define(
    "timm_dgconv::dgconv2d_backward",
    f"(Tensor grad_output, Tensor input, Tensor weight, Tensor gate, {_OPTIONS}, bool[3] output_mask, "
    "bool[]? closed=None)"
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
    closed: list[bool] | None = None,
) -> Tensor:
    layout, _, channels_last = _plan(input, weight, gate, sort, spans, closed, learns=False)
    num_group_bits = len(layout.far) + len(layout.mid)
    x, blocks = layout.permute(input, channels_last), layout.blocks(weight, num_group_bits, channels_last)
    with torch.autocast(input.device.type, enabled=False):
        y = torch.conv2d(x, blocks.flatten(0, 1).to(x.dtype), None, stride, padding, dilation, 1 << num_group_bits)
    y = layout.permute(y, channels_last, inverse=True)
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
    closed: list[bool] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    needs_input, needs_weight, needs_gate = output_mask
    layout, gates, output_channels_last = _plan(input, weight, gate, sort, spans, closed, learns=needs_gate)
    # oneDNN's weight gradient of very narrow groups is several times faster in channels_last.
    narrow = input.is_cpu and weight.shape[1] >> len(layout.closed) <= 4
    channels_last = output_channels_last or narrow
    grad_input, grad_weight, grad_gate = (weight.new_empty(0) for _ in range(3))
    grad, x = layout.permute(grad_output, channels_last), layout.permute(input, channels_last)

    def convolution_backward(grad: Tensor, blocks: Tensor, of_input: bool) -> Tensor:
        weight, mask = blocks.flatten(0, -4), [of_input, not of_input, False]
        grads = torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, [0], len(blocks), mask
        )
        return grads[0 if of_input else 1]

    def weight_gradient(grad: Tensor, blocks: Tensor) -> Tensor:
        """Return the weight gradient in the shape of `blocks`. It does not depend on their values."""
        if blocks.dtype != grad.dtype:
            blocks = grad.new_empty(()).expand(blocks.shape)
        return convolution_backward(grad, blocks, of_input=False).unflatten(0, blocks.shape[:-3])

    with torch.autocast(input.device.type, enabled=False):
        if needs_input:
            blocks = layout.blocks(weight, len(layout.far) + len(layout.mid), channels_last).to(grad.dtype)
            grad_input = layout.permute(convolution_backward(grad, blocks, of_input=True), channels_last, inverse=True)
            grad_input = in_format(grad_input, output_channels_last)
        if not (needs_weight or needs_gate):
            return grad_input, grad_weight, grad_gate

        blocks = layout.blocks(weight, len(layout.far), channels_last, masked=False)
        grad_blocks = weight_gradient(grad, blocks)
        if needs_weight:
            grad_weight = zeros_like(weight)
            layout.pairs(grad_weight)[0].copy_(layout.pairs(grad_blocks)[0])
        if needs_gate:
            # A gate's gradient is a sum over many channel pairs, for which half precision is too coarse.
            sum_dtype = torch.promote_types(torch.promote_types(weight.dtype, grad.dtype), torch.float32)
            grads = layout.gate_gradients(blocks.to(sum_dtype).mul_(grad_blocks))
            groups = 1 << len(layout.closed)
            step = max(1, _MAX_FLIPPED_BYTES // max(1, grad.nbytes)) if grad.is_cpu else 1  # gates per convolution
            for start in range(0, len(layout.far), step):
                far = layout.far[start : start + step]
                flipped = flip_groups(grad, len(layout.closed), range(start, start + len(far)), channels_last)
                blocks = empty_blocks(weight, (groups, len(far)), channels_last)
                for n, k in enumerate(far):
                    sources, targets = layout.pairs(weight, flip=k), layout.pairs(blocks[:, n], flip=k)
                    for source, target in zip(sources, targets, strict=True):
                        target.copy_(source)
                products = blocks.to(sum_dtype).mul_(weight_gradient(flipped, blocks))
                grads |= zip(far, products.sum((0, 2, 3, 4, 5)), strict=True)
            grad_gate = torch.stack([grads[gates.index(k)] for k in range(len(gates))]).to(gate.dtype)
    return grad_input, grad_weight, grad_gate


_MAX_FLIPPED_BYTES = 1 << 25
"""Size of the output gradients of all far gates that share one convolution on a CPU."""


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
    closed: list[bool] | None = None,
) -> Tensor:
    y = torch.conv2d(input, weight.to(input.dtype), None, stride, padding, dilation)
    channels_last = is_channels_last(input, weight)
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
    closed: list[bool] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    channels_last = is_channels_last(input, weight)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    needs_input, needs_weight, needs_gate = output_mask
    return (
        torch.empty_like(input, memory_format=memory_format) if needs_input else weight.new_empty(0),
        torch.empty_like(weight) if needs_weight else weight.new_empty(0),
        torch.empty_like(gate) if needs_gate else weight.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, gate, *ctx.options, ctx.closed = inputs
    ctx.save_for_backward(input, weight, bias, gate)


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    input, weight, bias, gate = ctx.saved_tensors
    needs_input, needs_weight, needs_bias, needs_gate, *others = ctx.needs_input_grad
    if gate.device.type in gate_cache.READ_DIRECTLY:
        gate_cache.refuse_nan(gate)
    if torch.is_grad_enabled():  # create_graph=True
        return (*_differentiable_gradients(ctx, grad_output), *[None] * len(others))
    grads = torch.ops.timm_dgconv.dgconv2d_backward(
        grad_output, input, weight, gate, *ctx.options, [needs_input, needs_weight, needs_gate], ctx.closed
    )
    return (
        grads[0] if needs_input else None,
        grads[1] if needs_weight else None,
        grad_output.sum((0, 2, 3)).to(bias.dtype) if needs_bias else None,
        grads[2] if needs_gate else None,
        *[None] * len(others),
    )


def _differentiable_gradients(ctx: Any, grad_output: Tensor) -> list[Tensor | None]:
    """Return the gradients of the masked dense form, which torch can differentiate again."""
    tensors = ctx.saved_tensors
    *geometry, sort, _ = ctx.options
    needs = ctx.needs_input_grad[:4]
    # Views are new nodes of the graph, so torch.autograd.grad stops at them.
    tensors = [t if t is None or not needed else t.view_as(t) for t, needed in zip(tensors, needs, strict=True)]
    input, weight, bias, gate = tensors
    u = grouping.connectivity(gate, weight.shape[0], weight.shape[1], sort).to(weight.dtype)
    masked = (weight * u[:, :, None, None]).to(input.dtype)
    with torch.autocast(input.device.type, enabled=False):
        output = torch.conv2d(input, masked, None if bias is None else bias.to(input.dtype), *geometry)
        wanted = [tensor for tensor, needed in zip(tensors, needs, strict=True) if needed]
        grads = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=True))
    return [next(grads) if needed else None for needed in needs]


torch.library.register_autograd("timm_dgconv::dgconv2d", _gradients, setup_context=_setup_context)
