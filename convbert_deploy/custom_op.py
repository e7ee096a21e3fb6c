"""SpanDynamicConv as a torch operator and as an ONNX operator.

In torch it is ``convbert::span_dynamic_conv``, computed by the reference, so a traced model still
runs eagerly. In ONNX it is one node of domain ``convbert`` plus a model-local function of the same
name: a runtime without our libraries inlines the function, one with them maps the node to a kernel.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

if TYPE_CHECKING:
    import torch

DOMAIN = "convbert"
DOMAIN_VERSION = 1
OP_TYPE = "SpanDynamicConv"
#: TensorRT looks its plugin up by these; an explicit (even empty) namespace makes the plugin win
#: over the model-local function.
PLUGIN_ATTRIBUTES = {"plugin_version": "1", "plugin_namespace": ""}
ATTRIBUTES = ("num_heads", "kernel_size", *PLUGIN_ATTRIBUTES)


@functools.cache
def torch_operator() -> Any:
    """Register (once) and return ``torch.ops.convbert.span_dynamic_conv``.

    Signature: (value (batch, seq, heads*head_dim), kernel_logits (batch, seq, heads*K),
    num_heads, kernel_size) -> (batch, seq, heads*head_dim).
    """
    import torch

    from convbert_deploy.reference import span_dynamic_conv

    def compute(
        value: torch.Tensor, kernel_logits: torch.Tensor, num_heads: int, kernel_size: int
    ) -> torch.Tensor:
        return span_dynamic_conv(value, kernel_logits, num_heads=num_heads, kernel_size=kernel_size)

    # torch reads the schema off real annotations, which this module keeps as strings
    compute.__annotations__ = {
        "value": torch.Tensor,
        "kernel_logits": torch.Tensor,
        "num_heads": int,
        "kernel_size": int,
        "return": torch.Tensor,
    }
    operator = torch.library.custom_op("convbert::span_dynamic_conv", compute, mutates_args=())
    operator.register_fake(
        lambda value, kernel_logits, num_heads, kernel_size: value.new_empty(value.shape)
    )
    return torch.ops.convbert.span_dynamic_conv.default


def translation_table() -> dict[Any, Any]:
    """For ``torch.onnx.export(custom_translation_table=...)``."""
    from onnxscript import values

    schema_type = onnx.defs.OpSchema
    parameter, attribute = schema_type.FormalParameter, schema_type.Attribute
    kinds = schema_type.AttrType
    schema = schema_type(
        OP_TYPE,
        DOMAIN,
        DOMAIN_VERSION,
        inputs=[parameter("value", "T"), parameter("kernel_logits", "T")],
        outputs=[parameter("output", "T")],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "value type")
        ],
        attributes=[attribute(name, kinds.INT) for name in ("num_heads", "kernel_size")]
        + [attribute(name, kinds.STRING, required=False) for name in PLUGIN_ATTRIBUTES],
    )
    operator = values.Op(values.Opset(DOMAIN, DOMAIN_VERSION), OP_TYPE, schema)

    def translate(value: Any, kernel_logits: Any, num_heads: int, kernel_size: int) -> Any:
        return operator(
            value,
            kernel_logits,
            num_heads=num_heads,
            kernel_size=kernel_size,
            **PLUGIN_ATTRIBUTES,
        )

    return {torch_operator(): translate}


def function_proto(num_heads: int, kernel_size: int, opset: int) -> onnx.FunctionProto:
    """The operator in standard ONNX: softmax, pad, then kernel_size shifted slices.

    Sliced, because unfolding costs stock runtimes ten times as much. An ONNX function cannot loop
    over an attribute, so the body is specialised to the model's one (num_heads, kernel_size); the
    attributes are declared all the same, for the runtimes that map the node to a kernel. It is
    generic in type, batch, sequence and head_dim.
    """
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, values: list[int]) -> str:
        tensor = numpy_helper.from_array(np.asarray(values, np.int64), name)
        nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def node(op_type: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        nodes.append(helper.make_node(op_type, inputs, outputs, **attributes))
        return outputs[0]

    half = (kernel_size - 1) // 2
    taps = range(kernel_size)
    split_heads = constant("split_heads", [0, 0, num_heads, -1])
    logits = node("Reshape", ["kernel_logits", split_heads], ["logits"])
    weights = node("Softmax", [logits], ["weights"], axis=-1)
    node("Split", [weights], [f"weight_{k}" for k in taps], axis=-1, num_outputs=kernel_size)
    padded = node(
        "Pad", ["value", constant("pads", [0, half, 0, 0, half, 0])], ["padded"], mode="constant"
    )
    by_head = node("Reshape", [padded, split_heads], ["by_head"])
    axis = constant("seq_axis", [1])
    total = ""
    for k in taps:
        # the last slice runs to the end of the padded sequence; the others stop K-1-k short of it
        stop = constant(f"stop_{k}", [k + 1 - kernel_size if k + 1 < kernel_size else 2**31 - 1])
        window = node("Slice", [by_head, constant(f"start_{k}", [k]), stop, axis], [f"window_{k}"])
        term = node("Mul", [window, f"weight_{k}"], [f"term_{k}"])
        total = node("Add", [total, term], [f"sum_{k}"]) if total else term
    node("Reshape", [total, constant("join_heads", [0, 0, -1])], ["output"])
    return helper.make_function(
        DOMAIN,
        OP_TYPE,
        ["value", "kernel_logits"],
        ["output"],
        nodes,
        [helper.make_opsetid("", opset)],
        attributes=list(ATTRIBUTES),
    )


def nodes_of(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Every SpanDynamicConv node of a graph: one per encoder layer."""
    return [n for n in model.graph.node if n.domain == DOMAIN and n.op_type == OP_TYPE]
