"""The operator: DGConv as group convolutions, forwards and backwards, with the exact straight-through gradients.

Let D be the set of open bits. Two channels are connected exactly if their codes differ in bits of D only. So a DGConv
is a group convolution up to a permutation of its channels. It is also a group convolution for every superset D' of D
(a span), with a weight that is masked to D inside the groups. The masked dense convolution is the case in which D' has
all bits.

Let S be a subset of D, and let R[x] be the sum of <W_ij, dL/dW'_ij> over all pairs with i XOR j = x. The gradient of
gate k is the sum of R[{k} + S] over all S without k. If D' has bit k, the weight gradient of the group convolution
contains these pairs. Otherwise they join each group to its partner, the group whose code differs in bit k. Then the
group convolution also computes the weight gradient between the input of each group and the output of its partners. No
dense convolution is computed, and the gradients are exact.
"""

import functools
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from timm_dgconv import _compat
from timm_dgconv.layers import gate_cache, grouping
from timm_dgconv.layers.layout import (
    gate_gradients,
    gather_blocks,
    get_layout,
    in_format,
    is_channels_last,
    place,
    select_channels,
    weight_gradient,
)
from timm_dgconv.layers.spans import Problem, Spans, choose_spans, may_tune, tune

Size = Sequence[int]

MASKED_DENSE = os.environ.get("TIMM_DGCONV_MASKED_DENSE", "0") != "0"
"""Whether all layers compute a dense convolution with a masked weight instead, as the original release does.

The result is the same up to rounding, at several times the cost. The environment variable TIMM_DGCONV_MASKED_DENSE=1
sets it, and so does an assignment at any time.
"""

CHUNK = 1 << 21
"""Size in bytes of the output gradients with partners that a CPU computes with at once.

Larger temporaries cost fresh pages in every step (benchmarks/results/speed.md).
"""


def is_supported(input: Tensor, weight: Tensor, gate: Tensor) -> bool:
    """Return whether the operator applies: plain CPU or CUDA tensors, no tracing, export, functorch, graph capture."""
    if MASKED_DENSE or not gate_cache.is_plain(input, weight, gate):
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
    stride: Size,
    padding: Size,
    dilation: Size,
    sort: bool = False,
    spans: Size | None = None,
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
        spans: The three spans to compute with. If None, `choose_spans` chooses them.
        closed: Which gates are closed. If None, the operator reads the gates.

    Returns:
        Output of shape (N, C_out, H_out, W_out).

    Raises:
        RuntimeError: If a gate is nan, or if input and weight differ in dtype.
    """
    device_type = input.device.type
    input_dtype, weight_dtype = input.dtype, weight.dtype
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        input_dtype, weight_dtype = (dtype if _is_autocast(t) else t.dtype for t in (input, weight))
        input = input.to(input_dtype)
    if input_dtype != weight_dtype:
        raise RuntimeError(
            f"input has dtype {input.dtype} and weight has dtype {weight.dtype}; cast the input or the model"
        )
    args = (input, weight, bias, gate, stride, padding, dilation, sort, spans)
    return _DGConv2d.apply(closed, *args) if _is_eager() else torch.ops.timm_dgconv.dgconv2d(*args)


def _is_autocast(tensor: Tensor) -> bool:
    """Return whether autocast casts a tensor."""
    return tensor.is_floating_point() and tensor.dtype != torch.float64


def _is_eager() -> bool:
    """Return whether nothing looks for the operator: neither torch.compile nor a TorchDispatchMode."""
    return not torch.compiler.is_compiling() and not _compat.dispatch_modes_are_active()


class _Plan(NamedTuple):
    closed: tuple[bool, ...]
    """Which bits are closed."""
    gates: tuple[int, ...]
    """The bit on which each gate acts."""
    spans: Spans
    channels_last: bool
    """The memory format of output and input gradient."""
    problem: Problem | None
    """What the tuner needs to know, if it may measure."""

    def span(self, convolution: str, run: Callable[[int], Any]) -> int:
        """Return the span of one of the convolutions, which `run` computes."""
        static: int = getattr(self.spans, convolution)
        if self.problem is None:
            return static
        return tune(self.problem._replace(convolution=convolution), self.closed, static, run)


def _plan(
    input: Tensor,
    weight: Tensor,
    gate: Tensor,
    options: tuple[Size, Size, Size, bool, Size | None],
    closed: Sequence[bool] | None,
    learns: bool = False,
) -> _Plan:
    *geometry, sort, spans = options
    bits = tuple(closed) if closed is not None else gate_cache.closed_on_host(gate)
    gates = tuple(range(len(bits)))
    if sort:
        order = sorted(gates, key=lambda k: not bits[k])
        bits, gates = tuple(bits[k] for k in order), tuple(order.index(k) for k in gates)
    channels_last, device = is_channels_last(input, weight), input.device
    if spans is not None:
        return _Plan(bits, gates, Spans(*spans), channels_last, None)
    chosen = choose_spans(bits, weight.shape[1], device.type, input.dtype)
    problem = None
    if any(bits) and may_tune(device.type):
        size, num_closed = tuple(map(tuple, geometry)), sum(bits)
        permuted = not all(bits[:num_closed])
        shapes = (tuple(input.shape), tuple(weight.shape))
        problem = Problem("", device, input.dtype, channels_last, *shapes, size, num_closed, permuted, learns)
    return _Plan(bits, gates, chosen, channels_last, problem)


def _forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    stride: Size,
    padding: Size,
    dilation: Size,
    sort: bool,
    spans: Size | None,
    closed: Sequence[bool] | None = None,
) -> Tensor:
    plan = _plan(input, weight, gate, (stride, padding, dilation, sort, spans), closed)
    where, dense = place(input), _dense(weight)

    def output(span: int) -> Tensor:
        layout = get_layout(plan.closed, span)
        x = select_channels(input, layout, where)
        blocks = gather_blocks(dense, layout, where).flatten(0, 2).to(x.dtype)
        y = torch.conv2d(x, blocks, None, stride, padding, dilation, layout.groups)
        return select_channels(in_format(y, plan.channels_last), layout, where, inverse=True)

    with _without_autocast(input):
        y = output(plan.span("output", output))
    return y if bias is None else y.add_(bias.to(y.dtype)[:, None, None])


def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    gate: Tensor,
    stride: Size,
    padding: Size,
    dilation: Size,
    sort: bool,
    spans: Size | None,
    output_mask: Sequence[bool],
    closed: Sequence[bool] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    needs_input, needs_weight, needs_gate = output_mask
    plan = _plan(input, weight, gate, (stride, padding, dilation, sort, spans), closed, learns=needs_gate)
    where, dense = place(input), _dense(weight)
    grad, x = in_format(grad_output, plan.channels_last), in_format(input, plan.channels_last)

    def convolution_backward(grad: Tensor, x: Tensor, blocks: Tensor, groups: int, mask: list[bool]) -> list[Tensor]:
        args = (None, stride, padding, dilation, False, [0], groups, mask)
        return torch.ops.aten.convolution_backward(grad, x, blocks, *args)

    def input_gradient(span: int) -> Tensor:
        layout = get_layout(plan.closed, span)
        blocks = gather_blocks(dense, layout, where).flatten(0, 2).to(grad.dtype)
        permuted = select_channels(grad, layout, where)
        grad_input = convolution_backward(permuted, x, blocks, layout.groups, [True, False, False])[0]
        return select_channels(in_format(grad_input, plan.channels_last), layout, where, inverse=True)

    def weight_and_gate_gradients(span: int) -> tuple[Tensor | None, Tensor | None]:
        layout = get_layout(plan.closed, span)
        slots = 1 + len(layout.far) if needs_gate else 1
        # Only the shape and the memory format of this weight matter.
        shape = (slots * weight.shape[0], weight.shape[1] // layout.groups, *weight.shape[2:])
        memory_format = torch.channels_last if is_channels_last(dense) else torch.contiguous_format
        like = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)

        # A gradient is a sum over many values, for which half precision is too coarse.
        sum_dtype = torch.promote_types(torch.promote_types(weight.dtype, grad.dtype), torch.float32)

        def gradient(grad: Tensor, x: Tensor) -> Tensor:
            inputs = (select_channels(grad, layout, where, partners=needs_gate), select_channels(x, layout, where))
            return convolution_backward(*inputs, like, layout.groups, [False, True, False])[1]

        size = slots * grad.nbytes // max(CHUNK, 4 * like.nbytes)  # each chunk writes a result, too
        chunks = min(len(x), size) if slots > 1 and x.device.type == "cpu" else 0
        if chunks < 2:
            grad_blocks = gradient(grad, x)
        else:
            pieces = zip(grad.tensor_split(chunks), x.tensor_split(chunks), strict=True)
            grad_blocks = functools.reduce(Tensor.add_, (gradient(*piece).to(sum_dtype) for piece in pieces))
        grad_blocks = grad_blocks.unflatten(0, (layout.groups, slots, -1))
        grad_weight = grad_gate = None
        if needs_gate:
            blocks = gather_blocks(dense, layout, where, partners=True).to(sum_dtype)
            products = blocks.mul_(grad_blocks) if layout.far else blocks * grad_blocks  # without groups: the weight
            grad_gate = gate_gradients(products, layout, plan.gates, where).to(gate.dtype)
        if needs_weight:
            grad_weight = weight_gradient(grad_blocks[:, 0], dense, layout, where)
            grad_weight = grad_weight if dense is weight else torch.empty_like(weight).copy_(grad_weight)
        return grad_weight, grad_gate

    grad_input = grad_weight = grad_gate = None
    with _without_autocast(input):
        if needs_input:
            grad_input = input_gradient(plan.span("input_grad", input_gradient))
        if needs_weight or needs_gate:
            span = plan.span("weight_grad", weight_and_gate_gradients)
            grad_weight, grad_gate = weight_and_gate_gradients(span)
    grads = (grad_input, grad_weight, grad_gate)
    return tuple(weight.new_empty(0) if g is None else g for g in grads)  # type: ignore[return-value]


def _dense(weight: Tensor) -> Tensor:
    """Return a weight in one of the two memory formats."""
    return weight if weight.is_contiguous(memory_format=torch.channels_last) else weight.contiguous()


def _without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    device_type = tensor.device.type
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, gate, *ctx.options = inputs
    ctx.closed = None
    ctx.save_for_backward(input, weight, bias, gate)


def _gradients(ctx: Any, grad_output: Tensor, needs: Sequence[bool]) -> tuple[Any, ...]:
    input, weight, bias, gate = ctx.saved_tensors
    needs_input, needs_weight, needs_bias, needs_gate, *others = needs
    if gate.device.type in gate_cache.READ_DIRECTLY:
        gate_cache.refuse_nan(gate)
    if torch.is_grad_enabled():  # create_graph=True
        return (*_differentiable_gradients(ctx, grad_output, needs), *[None] * len(others))
    args: Any = (grad_output, input, weight, gate, *ctx.options, [needs_input, needs_weight, needs_gate])
    operator = torch.ops.timm_dgconv.dgconv2d_backward
    grads = _backward(*args, ctx.closed) if _is_eager() else operator(*args)  # type: ignore[call-arg]
    return (
        grads[0] if needs_input else None,
        grads[1] if needs_weight else None,
        grad_output.sum((0, 2, 3), dtype=bias.dtype) if needs_bias else None,
        grads[2] if needs_gate else None,
        *[None] * len(others),
    )


def _differentiable_gradients(ctx: Any, grad_output: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    """Return the gradients of the masked dense form, which torch can differentiate again."""
    tensors = ctx.saved_tensors
    *geometry, sort, _ = ctx.options
    needs = needs[:4]
    # Views are new nodes of the graph, so torch.autograd.grad stops at them.
    tensors = [t if t is None or not needed else t.view_as(t) for t, needed in zip(tensors, needs, strict=True)]
    input, weight, bias, gate = tensors
    u = grouping.connectivity(gate, weight.shape[0], weight.shape[1], sort).to(weight.dtype)
    masked = (weight * u[:, :, None, None]).to(input.dtype)
    with _without_autocast(input):
        output = torch.conv2d(input, masked, None if bias is None else bias.to(input.dtype), *geometry)
        wanted = [tensor for tensor, needed in zip(tensors, needs, strict=True) if needed]
        grads = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=True))
    return [next(grads) if needed else None for needed in needs]


class _DGConv2d(torch.autograd.Function):
    """The operator in eager mode. It skips torch's dispatcher, which needs a third of the host's time."""

    @staticmethod
    def forward(ctx: Any, closed: Sequence[bool] | None, *inputs: Any) -> Tensor:
        output = _forward(*inputs, closed)  # type: ignore[call-arg]
        _setup_context(ctx, inputs, output)
        ctx.closed = closed
        return output.data  # not a view, since autograd refuses to change the views of a Function in place

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        return (None, *_gradients(ctx, grad_output, ctx.needs_input_grad[1:]))


# The operator for torch.compile. Its backward pass is an operator, too: torch.compile must not trace it, since it
# depends on which gates are closed.

_UNSAFE_IN_CUDA_GRAPHS: Any = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
_TAGS: Any = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order, *_UNSAFE_IN_CUDA_GRAPHS)
_OPTIONS = "int[2] stride, int[2] padding, int[2] dilation, bool sort, int[]? spans"

torch.library.define(
    "timm_dgconv::dgconv2d",
    f"(Tensor input, Tensor weight, Tensor? bias, Tensor gate, {_OPTIONS}) -> Tensor",
    tags=_TAGS,
)
torch.library.define(
    "timm_dgconv::dgconv2d_backward",
    f"(Tensor grad_output, Tensor input, Tensor weight, Tensor gate, {_OPTIONS}, bool[3] output_mask)"
    " -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.impl("timm_dgconv::dgconv2d", ("cpu", "cuda"), _forward)
torch.library.impl("timm_dgconv::dgconv2d_backward", ("cpu", "cuda"), _backward)


@torch.library.register_fake("timm_dgconv::dgconv2d")
def _fake_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    stride: Size,
    padding: Size,
    dilation: Size,
    *_: Any,
) -> Tensor:
    y = torch.conv2d(input, weight.to(input.dtype), None, stride, padding, dilation)
    return torch.empty_like(y, memory_format=_memory_format(input, weight))


@torch.library.register_fake("timm_dgconv::dgconv2d_backward")
def _fake_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, gate: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, (needs_input, needs_weight, needs_gate) = options
    return (
        torch.empty_like(input, memory_format=_memory_format(input, weight)) if needs_input else weight.new_empty(0),
        torch.empty_like(weight) if needs_weight else weight.new_empty(0),
        torch.empty_like(gate) if needs_gate else weight.new_empty(0),
    )


def _memory_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(input, weight) else torch.contiguous_format


def _operator_gradients(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    return _gradients(ctx, grad_output, ctx.needs_input_grad)


torch.library.register_autograd("timm_dgconv::dgconv2d", _operator_gradients, setup_context=_setup_context)
