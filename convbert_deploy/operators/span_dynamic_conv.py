"""SpanDynamicConv in torch and in ONNX. Kernels: plugins/span_dynamic_conv."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import onnx

from convbert_deploy.operators.domain import (
    PLUGIN_ATTRIBUTES,
    Shapes,
    has_mask,
    integers,
    make_function,
    onnxscript_operator,
)
from convbert_deploy.operators.functions import FunctionBody

if TYPE_CHECKING:
    import torch

OP_TYPE = "SpanDynamicConv"
ATTRIBUTES = ("num_heads", "kernel_size")


@functools.cache
def torch_operator() -> Any:
    """Register (once) and return ``torch.ops.convbert.span_dynamic_conv``.

    Signature: (value (batch, seq, heads*head_dim), kernel_logits (batch, seq, heads*K), mask int64
    (batch, seq) or None, num_heads, kernel_size) -> (batch, seq, heads*head_dim).
    """
    import torch

    from convbert_deploy.reference import span_dynamic_conv

    def compute(
        value: torch.Tensor,
        kernel_logits: torch.Tensor,
        mask: torch.Tensor | None,
        num_heads: int,
        kernel_size: int,
    ) -> torch.Tensor:
        return span_dynamic_conv(
            value, kernel_logits, num_heads=num_heads, kernel_size=kernel_size, mask=mask
        )

    operator = torch.library.custom_op(
        "convbert::span_dynamic_conv",
        compute,
        mutates_args=(),
        # torch cannot read it off annotations that are strings
        schema="(Tensor value, Tensor kernel_logits, Tensor? mask, int num_heads, int kernel_size)"
        " -> Tensor",
    )
    operator.register_fake(
        lambda value, kernel_logits, mask, num_heads, kernel_size: value.new_empty(value.shape)
    )
    return torch.ops.convbert.span_dynamic_conv.default


def translation() -> dict[Any, Any]:
    """Entry of ``torch.onnx.export``'s translation table."""
    operator = onnxscript_operator(OP_TYPE, ("value", "kernel_logits", "mask"), ATTRIBUTES)

    def translate(
        value: Any, kernel_logits: Any, mask: Any, num_heads: int, kernel_size: int
    ) -> Any:
        inputs = (value, kernel_logits) if mask is None else (value, kernel_logits, mask)
        return operator(*inputs, num_heads=num_heads, kernel_size=kernel_size, **PLUGIN_ATTRIBUTES)

    return {torch_operator(): translate}


def function_of(node: onnx.NodeProto, shapes: Shapes, opset: int) -> onnx.FunctionProto:
    """The function for a node like ``node``; it reads no weight."""
    del shapes
    sizes = integers(node)
    return function_proto(
        sizes["num_heads"], sizes["kernel_size"], opset, masked=has_mask(node, required=2)
    )


def function_proto(
    num_heads: int, kernel_size: int, opset: int, *, masked: bool = False
) -> onnx.FunctionProto:
    """The operator in standard ONNX: softmax, pad, then kernel_size shifted slices.

    Sliced, because unfolding costs stock runtimes ten times as much. An ONNX function cannot loop
    over an attribute, so the body is specialised to the model's one (num_heads, kernel_size); it is
    generic in type, batch, sequence and head_dim.
    """
    body = FunctionBody()
    value = body.zero_at_pads("value", "mask", "real_value") if masked else "value"
    total = append_convolution(body, value, "kernel_logits", num_heads, kernel_size)
    if masked:
        body.zero_at_pads(total, "mask", "output")
    else:
        body.node("Identity", [total], ["output"])
    inputs = ["value", "kernel_logits"] + (["mask"] if masked else [])
    return make_function(OP_TYPE, inputs, body.nodes, opset, ATTRIBUTES)


def append_convolution(
    body: FunctionBody, value: str, kernel_logits: str, num_heads: int, kernel_size: int
) -> str:
    """Nodes of the unmasked convolution; the name of its (batch, seq, channels) result."""
    half = (kernel_size - 1) // 2
    taps = range(kernel_size)
    split_heads = body.constant("split_heads", [0, 0, num_heads, -1])
    logits = body.node("Reshape", [kernel_logits, split_heads], ["logits"])
    weights = body.node("Softmax", [logits], ["weights"], axis=-1)
    body.node("Split", [weights], [f"weight_{k}" for k in taps], axis=-1, num_outputs=kernel_size)
    padded = body.node(
        "Pad", [value, body.constant("pads", [0, half, 0, 0, half, 0])], ["padded"], mode="constant"
    )
    by_head = body.node("Reshape", [padded, split_heads], ["by_head"])
    axis = body.constant("seq_axis", [1])
    total = ""
    for k in taps:
        # the last slice runs to the end of the padded sequence; the others stop K-1-k short of it
        stop = body.constant(
            f"stop_{k}", [k + 1 - kernel_size if k + 1 < kernel_size else 2**31 - 1]
        )
        start = body.constant(f"start_{k}", [k])
        window = body.node("Slice", [by_head, start, stop, axis], [f"window_{k}"])
        term = body.node("Mul", [window, f"weight_{k}"], [f"term_{k}"])
        total = body.node("Add", [total, term], [f"sum_{k}"]) if total else term
    return body.node("Reshape", [total, body.constant("join_heads", [0, 0, -1])], ["convolved"])
