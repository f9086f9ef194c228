"""The operator with its gradients, in eager mode and as an operator of torch.library. It chooses which form runs.

Forward and backward use one reading of the gates. Its values are numbers in eager mode, and a tensor on the CPU in a
compiled graph.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from timm_dgconv import _compat
from timm_dgconv.ops import grouped
from timm_dgconv.ops.algebra import Bits, read_bits
from timm_dgconv.ops.grouped import Geometry, Size, is_channels_last
from timm_dgconv.ops.naive import masked_conv2d

KEPT = 8
"""From this number of groups on, the backward pass uses the weights that the forward pass has gathered.

With fewer groups these are a large part of the dense weight. Then the backward pass gathers them again.
"""


def is_grouped(input: Tensor, weight: Tensor, gate: Tensor) -> bool:
    """Return whether `dgconv2d` applies: plain CPU or CUDA tensors, no tracing, export, functorch, graph capture."""
    if not is_plain(input, weight, gate) or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    if _compat.transforms_are_active() or _compat.is_traced_by_proxies():
        return False  # torch differentiates or records the operations of the masked dense form
    if torch.compiler.is_compiling():
        # An exported program must run without this package. A CUDA graph must not record one set of open bits.
        exporting = getattr(torch.compiler, "is_exporting", lambda: True)()
        return not exporting and (input.device.type == "cpu" or bool(_UNSAFE_IN_CUDA_GRAPHS))
    return not is_capturing(input)


def is_plain(*tensors: Tensor) -> bool:
    """Return whether all tensors are on the CPU or CUDA and of no subclass (fx proxy, DTensor, fake tensor)."""
    for tensor in tensors:  # a generator takes twice as long, and each layer asks in each pass
        if type(tensor) not in (Tensor, nn.Parameter) or not (tensor.is_cpu or tensor.is_cuda):
            return False
    return True


def is_capturing(tensor: Tensor) -> bool:
    """Return whether a CUDA graph is being captured, in which nothing can be read on the host."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def dgconv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    values: Sequence[float] | Tensor,
    stride: Size,
    padding: Size,
    dilation: Size,
    sort: bool,
    nested: bool,
) -> Tensor:
    """Compute a dynamic grouping convolution as group convolutions. `is_grouped` says when it applies.

    Args:
        input: Input of shape (N, C_in, H, W).
        weight: Dense weight of shape (C_out, C_in, kernel height, kernel width).
        bias: Bias of shape (C_out,) or None.
        gate: Gates of shape (K,). They receive gradients.
        values: Their values, K numbers or a tensor on the CPU.
        stride: Vertical and horizontal stride.
        padding: Vertical and horizontal zero padding.
        dilation: Vertical and horizontal dilation.
        sort: See `timm_dgconv.ops.algebra.read_bits`.
        nested: See `timm_dgconv.ops.algebra.read_bits`.

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
    options = (stride, padding, dilation, sort, nested)
    if torch.compiler.is_compiling():
        return torch.ops.timm_dgconv.dgconv2d(input, weight, bias, gate, _on_host(values), *options)
    if torch.is_grad_enabled():
        return _DGConv2d.apply(input, weight, bias, gate, values, options)
    return _output(input, weight, bias, gate, values, *options)


def _is_autocast(tensor: Tensor) -> bool:
    """Return whether autocast casts a tensor."""
    return tensor.is_floating_point() and tensor.dtype != torch.float64


def _without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    device_type = tensor.device.type
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _output(
    input: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, values: Tensor | Sequence[float], *options: Any
) -> Tensor:
    return _forward(input, weight, bias, _bits(values, *options[3:]), options[:3], needs_gate=False)[0]


def _forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, bits: Bits, geometry: Geometry, needs_gate: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the output, and group weight and wide weight for the backward pass, if they are small."""
    weight = _dense(weight)
    plan = grouped.plan_layer(weight, input.dtype, bits, needs_gate)
    wide_weight = grouped.wide_weight(weight, plan)
    kernel = grouped.group_weight(weight, wide_weight, plan, input.dtype)
    if plan.is_sorted:
        y = grouped.output(input, kernel, bias, plan, geometry)
    else:
        x = grouped.exchange_bits(grouped.in_format(input, is_channels_last(input, weight)), bits.closed)
        bias = None if bias is None else grouped.exchange_bits(bias, bits.closed, 0)
        y = grouped.exchange_bits(grouped.output(x, kernel, bias, plan, geometry), bits.closed, inverse=True)
    return y, kernel if plan.groups >= KEPT else None, wide_weight if plan.wide_groups >= KEPT else None


def _gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    gate: Tensor,
    values: Tensor | Sequence[float],
    *options: Any,
) -> tuple[Tensor, ...]:
    """Return the gradients of input, weight and gates, or empty tensors for those that are not needed."""
    *_, sort, nested, needs = options
    bits = _bits(values, sort, nested)
    grads = _grouped_gradients(grad_output, input, weight, gate, bits, options[:3], needs, needs[2], None, None)
    return tuple(weight.new_empty(0) if grad is None else grad for grad in grads)


def _grouped_gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    gate: Tensor,
    bits: Bits,
    geometry: Geometry,
    needs: Sequence[bool],
    learns: bool,
    kernel: Tensor | None,
    wide_weight: Tensor | None,
) -> list[Tensor | None]:
    """Return the gradients of input, weight and gates that are needed.

    What the forward pass has kept may be in another memory format now, for example after a hook for saved tensors. So
    nothing here relies on the format that it had.

    Args:
        grad_output: Gradient of the output.
        input: Input.
        weight: Dense weight.
        gate: Gates.
        bits: The bits of the layer.
        geometry: Stride, padding and dilation.
        needs: Which of the three gradients are needed.
        learns: Whether the forward pass has planned gradients for the gates.
        kernel: Group weight of the forward pass, if it was kept.
        wide_weight: Wide weight of the forward pass, if it was kept.
    """
    needs_input, needs_weight, needs_gate = needs
    w, channels_last = _dense(weight), is_channels_last(input, weight)
    plan = grouped.plan_layer(w, grad_output.dtype, bits, learns)
    if wide_weight is None:
        wide_weight = grouped.wide_weight(w, plan)
    if kernel is None:
        kernel = grouped.group_weight(w, wide_weight, plan, grad_output.dtype)
    kernel = grouped.in_format(kernel, plan.channels_last)
    grad, x = grouped.in_format(grad_output, channels_last), grouped.in_format(input, channels_last)
    if not plan.is_sorted:
        grad, x = (grouped.exchange_bits(tensor, bits.closed) for tensor in (grad, x))
    grad_weight = grad_gate = None
    with _without_autocast(input):
        wanted = (needs_input, needs_weight or needs_gate)
        grad_input, grad_wide = grouped.convolution_gradients(grad, x, kernel, plan, geometry, *wanted)
        if grad_input is not None and not plan.is_sorted:
            grad_input = grouped.exchange_bits(grad_input, bits.closed, inverse=True)
        if grad_wide is not None and needs_weight:
            grad_weight = grouped.dense_gradient(grad_wide, w, plan)
            if grad_weight.stride() != weight.stride():
                grad_weight = torch.empty_like(weight).copy_(grad_weight)
        if grad_wide is not None and needs_gate:
            if wide_weight is not None:
                wide_weight = grouped.in_format(wide_weight, plan.channels_last)
            grad_gate = grouped.gate_gradient(grad, x, w, wide_weight, grad_wide, bits, plan, geometry).to(gate.dtype)
    return [grad_input, grad_weight, grad_gate]


def _dense(weight: Tensor) -> Tensor:
    """Return a weight in one of the two memory formats, without a copy if it is in one."""
    return weight if weight.is_contiguous(memory_format=torch.channels_last) else weight.contiguous()


def _bits(values: Tensor | Sequence[float], sort: bool, nested: bool) -> Bits:
    return read_bits(values.tolist() if isinstance(values, Tensor) else values, sort, nested)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, values = inputs[:5]
    ctx.options = inputs[5:]
    ctx.save_for_backward(*tensors, values)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    *tensors, values = ctx.saved_tensors
    grads = _op_gradients(grad_output, tensors, values, ctx.options, ctx.needs_input_grad[:4])
    return *grads, None, *[None] * len(ctx.options)


def _op_gradients(
    grad_output: Tensor, tensors: Sequence[Any], values: Tensor, options: Any, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of `tensors` by the operator of torch.library, or those of the masked dense form."""
    # create_graph=True, or torch.autograd.grad(is_grads_batched=True)
    if torch.is_grad_enabled() or _compat.is_batched(grad_output):
        return _masked_gradients(grad_output, tensors, values, options, needs)
    input, weight, bias, gate = tensors
    args = (values, *options, (needs[0], needs[1], needs[3]))
    grads = torch.ops.timm_dgconv.dgconv2d_backward(grad_output, input, weight, gate, *args)
    return _with_bias(grads, grad_output, bias, needs)


def _with_bias(
    grads: Sequence[Tensor | None], grad_output: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Insert the gradient of the bias between those of weight and gates."""
    grad_bias = grad_output.sum((0, 2, 3), dtype=bias.dtype) if bias is not None and needs[2] else None
    found = (grads[0], grads[1], grad_bias, grads[2])
    return [grad if needed else None for grad, needed in zip(found, needs, strict=True)]


def _masked_gradients(
    grad_output: Tensor, tensors: Sequence[Any], values: Tensor, options: Any, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of the masked dense form, which torch can differentiate again and batch."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), _without_autocast(tensors[0]):
        # Views are new nodes of the graph, so torch.autograd.grad stops at them.
        tensors = [t if t is None or not needed else t.view_as(t) for t, needed in zip(tensors, needs, strict=True)]
        input, weight, bias, gate = tensors
        bias = None if bias is None else bias.to(input.dtype)
        read = values.to(gate.device)
        output = masked_conv2d(input, weight, bias, gate, *options, read, input.dtype)  # type: ignore[call-arg]
        wanted = [tensor for tensor, needed in zip(tensors, needs, strict=True) if needed]
        grads = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=create_graph))
    return [next(grads) if needed else None for needed in needs]


def _on_host(values: Tensor | Sequence[float]) -> Tensor:
    return values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float64, device="cpu")


class _DGConv2d(torch.autograd.Function):
    """The operator in eager mode. It skips torch's dispatcher, which needs a third of the host's time."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        input, weight, bias, gate, ctx.values, ctx.options = inputs
        ctx.bits, ctx.learns = _bits(ctx.values, *ctx.options[3:]), ctx.needs_input_grad[3]
        y, *kept = _forward(input, weight, bias, ctx.bits, ctx.options[:3], ctx.learns)
        ctx.save_for_backward(input, weight, bias, gate, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        *tensors, kernel, wide_weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        # torch.utils.flop_counter counts a dense convolution for the weight gradient of a group convolution.
        if torch.is_grad_enabled() or _compat.is_batched(grad_output) or _compat.dispatch_modes_are_active():
            return *_op_gradients(grad_output, tensors, _on_host(ctx.values), ctx.options, needs), None, None
        input, weight, bias, gate = tensors
        args = (ctx.bits, ctx.options[:3], (needs[0], needs[1], needs[3]), ctx.learns, kernel, wide_weight)
        grads = _grouped_gradients(grad_output, input, weight, gate, *args)
        return *_with_bias(grads, grad_output, bias, needs), None, None


# The operator for torch.compile. Its backward pass is an operator, too: torch.compile must not trace it, since it
# depends on which gates are closed.

_UNSAFE_IN_CUDA_GRAPHS: Any = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
_TAGS: Any = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order, *_UNSAFE_IN_CUDA_GRAPHS)
_TENSORS = "Tensor input, Tensor weight"
_OPTIONS = "Tensor values, int[2] stride, int[2] padding, int[2] dilation, bool sort, bool nested"
for _name, _schema in {
    "read_gates": "(Tensor[] gates) -> Tensor[]",
    "dgconv2d": f"({_TENSORS}, Tensor? bias, Tensor gate, {_OPTIONS}) -> Tensor",
    "dgconv2d_backward": f"(Tensor grad_output, {_TENSORS}, Tensor gate, {_OPTIONS}, bool[3] output_mask)"
    " -> (Tensor, Tensor, Tensor)",
}.items():
    torch.library.define(f"timm_dgconv::{_name}", _schema, tags=_TAGS)


def read_gates(gates: Sequence[Tensor]) -> list[Tensor]:
    """Return the values of gates as float64 tensors on the CPU, in one transfer. All gates are on one device."""
    flat = torch.cat([gate.detach().double() for gate in gates]).to("cpu", copy=True)
    return [values.clone() for values in flat.split([gate.numel() for gate in gates])]


READ_HOOKS: list[Callable[[Sequence[Tensor], Sequence[Tensor]], None]] = []
"""Functions that get the gates and the values that a compiled graph has read. The host runs no code of a layer then."""


def _read_and_report(gates: Sequence[Tensor]) -> list[Tensor]:
    values = read_gates(gates)
    for hook in READ_HOOKS:
        hook(gates, values)
    return values


torch.library.impl("timm_dgconv::read_gates", ("cpu", "cuda"), _read_and_report)
torch.library.impl("timm_dgconv::dgconv2d", ("cpu", "cuda"), _output)
torch.library.impl("timm_dgconv::dgconv2d_backward", ("cpu", "cuda"), _gradients)
torch.library.register_autograd("timm_dgconv::dgconv2d", _backward, setup_context=_setup_context)


@torch.library.register_fake("timm_dgconv::read_gates")
def _fake_read_gates(gates: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty(gate.shape, dtype=torch.float64, device="cpu") for gate in gates]


@torch.library.register_fake("timm_dgconv::dgconv2d")
def _fake_output(input: Tensor, weight: Tensor, bias: Tensor | None, gate: Any, values: Any, *options: Any) -> Tensor:
    y = torch.conv2d(input, weight.to(input.dtype), None, *options[:3])
    return torch.empty_like(y, memory_format=_memory_format(input, weight))


@torch.library.register_fake("timm_dgconv::dgconv2d_backward")
def _fake_gradients(
    grad_output: Tensor, input: Tensor, weight: Tensor, gate: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    needs_input, needs_weight, needs_gate = options[-1]
    grads = (
        torch.empty_like(input, memory_format=_memory_format(input, weight)) if needs_input else None,
        torch.empty_like(weight) if needs_weight else None,
        torch.empty_like(gate) if needs_gate else None,
    )
    return tuple(weight.new_empty(0) if grad is None else grad for grad in grads)


def _memory_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(input, weight) else torch.contiguous_format


@register_flop_formula(torch.ops.timm_dgconv.dgconv2d, get_raw=True)
def _flops(input: Tensor, weight: Tensor, bias: Any, gate: Any, values: Tensor, *options: Any, **kwargs: Any) -> int:
    """Count the group convolution that the layer computes, two operations per multiply-add."""
    return 2 * kwargs["out_val"].numel() * weight[0].numel() // _bits(values, *options[-2:]).groups


@register_flop_formula(torch.ops.timm_dgconv.dgconv2d_backward, get_raw=True)
def _backward_flops(grad_output: Tensor, input: Tensor, weight: Tensor, gate: Any, *args: Any, **_: Any) -> int:
    """Count a group convolution for the input, and those for the weight and the gates with their groups."""
    sort, nested, (needs_input, needs_weight, needs_gate) = args[-3:]
    plan = grouped.plan_layer(weight, grad_output.dtype, _bits(args[0], sort, nested), needs_gate)
    groups = [plan.groups] * needs_input
    if needs_weight or needs_gate:
        groups += [plan.wide_groups, *[plan.groups] * len(plan.outside)]
    return sum(2 * grad_output.numel() * weight[0].numel() // number for number in groups)
