"""The operator with its gradients, in eager mode and as an operator of torch.library. It chooses which form runs.

Forward and backward use one reading of the gates. Its values are numbers in eager mode, and a tensor on the CPU in a
compiled graph.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from timm_dgconv import _compat
from timm_dgconv.ops import grouped
from timm_dgconv.ops.algebra import Bits, read_bits
from timm_dgconv.ops.grouped import Size, is_channels_last
from timm_dgconv.ops.naive import masked_conv2d

MASKED_DENSE = os.environ.get("TIMM_DGCONV_MASKED_DENSE", "0") != "0"
"""Whether all layers compute a dense convolution with a masked weight instead, as the original release does.

The result is the same up to rounding, at several times the cost. The environment variable TIMM_DGCONV_MASKED_DENSE=1
sets it, and so does an assignment at any time.
"""


def is_grouped(input: Tensor, weight: Tensor, gate: Tensor) -> bool:
    """Return whether `dgconv2d` applies: plain CPU or CUDA tensors, no tracing, export, functorch, graph capture."""
    if MASKED_DENSE or not is_plain(input, weight, gate):
        return False
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    if torch.compiler.is_compiling():
        # An exported program must run without this package. A CUDA graph must not record one set of open bits.
        exporting = getattr(torch.compiler, "is_exporting", lambda: True)()
        return not exporting and (input.device.type == "cpu" or bool(_UNSAFE_IN_CUDA_GRAPHS))
    if _compat.transforms_are_active():
        return False  # a transform needs a form that torch differentiates itself
    return not is_capturing(input)


def is_plain(*tensors: Tensor) -> bool:
    """Return whether all tensors are on the CPU or CUDA and of no subclass (fx proxy, DTensor, fake tensor)."""
    return all(type(t) in (Tensor, nn.Parameter) and t.device.type in ("cpu", "cuda") for t in tensors)


def is_capturing(tensor: Tensor) -> bool:
    """Return whether a CUDA graph is being captured, in which nothing can be read on the host."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def is_eager() -> bool:
    """Return whether nothing looks for operators: neither torch.compile nor a TorchDispatchMode."""
    return not torch.compiler.is_compiling() and not _compat.dispatch_modes_are_active()


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
    args = (input, weight, bias, gate, values, stride, padding, dilation, sort, nested)
    if is_eager():
        return _DGConv2d.apply(*args)
    if not isinstance(values, Tensor):
        values = torch.tensor(values, dtype=torch.float64, device="cpu")
    return torch.ops.timm_dgconv.dgconv2d(*args[:4], values, *args[5:])


def _is_autocast(tensor: Tensor) -> bool:
    """Return whether autocast casts a tensor."""
    return tensor.is_floating_point() and tensor.dtype != torch.float64


def _without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    device_type = tensor.device.type
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    gate: Tensor,
    bits: Bits,
    stride: Size,
    padding: Size,
    dilation: Size,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of input, weight and gates, as far as they are needed."""
    needs_input, needs_weight, needs_gate = needs
    geometry = (stride, padding, dilation)
    grads: list[Tensor | None] = [None, None, None]
    with _without_autocast(input):
        if needs_input:
            grads[0] = grouped.input_gradient(grad_output, input, weight, bits, *geometry)
        if needs_weight or needs_gate:
            grad_weight, grads[2] = grouped.weight_and_gate_gradients(
                grad_output, input, weight, gate if needs_gate else None, bits, *geometry
            )
            grads[1] = grad_weight if needs_weight else None
    return grads


def _masked_gradients(
    grad_output: Tensor, tensors: Sequence[Any], values: Sequence[float] | Tensor, options: Any, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of the masked dense form, which torch can differentiate again and batch."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views are new nodes of the graph, so torch.autograd.grad stops at them.
        tensors = [t if t is None or not needed else t.view_as(t) for t, needed in zip(tensors, needs, strict=True)]
        input, weight, bias, gate = tensors
        values = torch.as_tensor(values, dtype=torch.float64, device="cpu").to(gate.device)
        with _without_autocast(input):
            bias = None if bias is None else bias.to(input.dtype)
            output = masked_conv2d(input, weight, bias, gate, *options, values, input.dtype)  # type: ignore[call-arg]
            wanted = [tensor for tensor, needed in zip(tensors, needs, strict=True) if needed]
            grads = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=create_graph))
    return [next(grads) if needed else None for needed in needs]


class _DGConv2d(torch.autograd.Function):
    """The operator in eager mode. It skips torch's dispatcher, which needs a third of the host's time."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gate: Tensor,
        values: Sequence[float],
        stride: Size,
        padding: Size,
        dilation: Size,
        sort: bool,
        nested: bool,
    ) -> Tensor:
        ctx.save_for_backward(input, weight, bias, gate)
        ctx.values, ctx.bits = values, read_bits(values, sort, nested)
        ctx.geometry, ctx.form = (stride, padding, dilation), (sort, nested)
        with _without_autocast(input):
            return grouped.output(input, weight, bias, ctx.bits, *ctx.geometry)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        nothing = [None] * 6
        # create_graph=True, or torch.autograd.grad(is_grads_batched=True)
        if torch.is_grad_enabled() or _compat.transforms_are_active():
            return (*_masked_gradients(grad_output, tensors, ctx.values, (*ctx.geometry, *ctx.form), needs), *nothing)
        input, weight, bias, gate = tensors
        mask = (needs[0], needs[1], needs[3])
        if is_eager():
            grads: Any = _backward(grad_output, input, weight, gate, ctx.bits, *ctx.geometry, mask)  # type: ignore[call-arg]
        else:
            values = torch.tensor(ctx.values, dtype=torch.float64, device="cpu")
            grads = torch.ops.timm_dgconv.dgconv2d_backward(
                grad_output, input, weight, gate, values, *ctx.geometry, *ctx.form, mask
            )
        return (*_in_order(grads, grad_output, bias, needs), *nothing)


def _in_order(
    grads: Sequence[Tensor | None], grad_output: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of input, weight, bias and gates."""
    grad_input, grad_weight, grad_gate = grads
    grad_bias = None
    if bias is not None and needs[2]:
        grad_bias = grad_output.sum((0, 2, 3), dtype=bias.dtype)
    all_grads = (grad_input, grad_weight, grad_bias, grad_gate)
    return [grad if needed else None for grad, needed in zip(all_grads, needs, strict=True)]


# The operator for torch.compile. Its backward pass is an operator, too: torch.compile must not trace it, since it
# depends on which gates are closed.

_UNSAFE_IN_CUDA_GRAPHS: Any = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
_TAGS: Any = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order, *_UNSAFE_IN_CUDA_GRAPHS)
_OPTIONS = "Tensor values, int[2] stride, int[2] padding, int[2] dilation, bool sort, bool nested"

torch.library.define("timm_dgconv::read_gates", "(Tensor[] gates) -> Tensor[]", tags=_TAGS)
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


@torch.library.impl("timm_dgconv::read_gates", ("cpu", "cuda"))
def read_gates(gates: Sequence[Tensor]) -> list[Tensor]:
    """Return the values of gates as float64 tensors on the CPU, in one transfer. All gates are on one device."""
    flat = torch.cat([gate.detach().double() for gate in gates]).to("cpu", copy=True)
    return [values.clone() for values in flat.split([gate.numel() for gate in gates])]


@torch.library.impl("timm_dgconv::dgconv2d", ("cpu", "cuda"))
def _operator(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    values: Tensor,
    stride: Size,
    padding: Size,
    dilation: Size,
    sort: bool,
    nested: bool,
) -> Tensor:
    bits = read_bits(values.tolist(), sort, nested)
    with _without_autocast(input):
        return grouped.output(input, weight, bias, bits, stride, padding, dilation)


@torch.library.impl("timm_dgconv::dgconv2d_backward", ("cpu", "cuda"))
def _operator_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    gate: Tensor,
    values: Tensor,
    stride: Size,
    padding: Size,
    dilation: Size,
    sort: bool,
    nested: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    bits = read_bits(values.tolist(), sort, nested)
    grads = _backward(grad_output, input, weight, gate, bits, stride, padding, dilation, output_mask)
    return tuple(weight.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("timm_dgconv::read_gates")
def _fake_read_gates(gates: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty(gate.shape, dtype=torch.float64, device="cpu") for gate in gates]


@torch.library.register_fake("timm_dgconv::dgconv2d")
def _fake_operator(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    values: Tensor,
    stride: Size,
    padding: Size,
    dilation: Size,
    *_: Any,
) -> Tensor:
    y = torch.conv2d(input, weight.to(input.dtype), None, stride, padding, dilation)
    return torch.empty_like(y, memory_format=_memory_format(input, weight))


@torch.library.register_fake("timm_dgconv::dgconv2d_backward")
def _fake_operator_backward(
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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, gate, values, *ctx.options = inputs
    ctx.save_for_backward(input, weight, bias, gate, values)


def _operator_gradients(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    *tensors, values = ctx.saved_tensors
    needs = ctx.needs_input_grad[:4]
    nothing = [None] * 6
    if torch.is_grad_enabled():  # create_graph=True
        return (*_masked_gradients(grad_output, tensors, values, ctx.options, needs), *nothing)
    input, weight, bias, gate = tensors
    mask = [needs[0], needs[1], needs[3]]
    grads = torch.ops.timm_dgconv.dgconv2d_backward(grad_output, input, weight, gate, values, *ctx.options, mask)
    return (*_in_order(grads, grad_output, bias, needs), *nothing)


torch.library.register_autograd("timm_dgconv::dgconv2d", _operator_gradients, setup_context=_setup_context)


@register_flop_formula(torch.ops.timm_dgconv.dgconv2d, get_raw=True)
def _flops(
    input: Tensor, weight: Tensor, bias: Any, gate: Any, values: Tensor, *args: Any, out_val: Tensor, **_: Any
) -> int:
    """Count the group convolution that the layer computes, two operations per multiply-add."""
    sort, nested = args[-2:]
    return 2 * out_val.numel() * weight[0].numel() // read_bits(values.tolist(), sort, nested).groups


@register_flop_formula(torch.ops.timm_dgconv.dgconv2d_backward, get_raw=True)
def _backward_flops(
    grad_output: Tensor, input: Tensor, weight: Tensor, gate: Any, values: Tensor, *args: Any, **_: Any
) -> int:
    """Count a group convolution for the input, and one for the weight with the groups that it computes."""
    sort, nested, (needs_input, needs_weight, needs_gate) = args[-3:]
    bits = read_bits(values.tolist(), sort, nested)
    convolutions = [bits.groups] * needs_input
    if needs_weight or needs_gate:
        convolutions += grouped.weight_gradient_groups(weight, grad_output.dtype, bits, needs_gate)
    return sum(2 * grad_output.numel() * weight[0].numel() // groups for groups in convolutions)
