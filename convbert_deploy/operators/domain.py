"""What all our operators' nodes share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx

DOMAIN = "convbert"
DOMAIN_VERSION = 1
#: TensorRT looks a plugin up by these; an explicit (even empty) namespace makes the plugin win over
#: the model-local function.
PLUGIN_ATTRIBUTES = {"plugin_version": "1", "plugin_namespace": ""}

#: shapes of a graph's initializers, by name
Shapes = Mapping[str, Sequence[int]]


def onnxscript_operator(op_type: str, inputs: tuple[str, ...], attributes: tuple[str, ...]) -> Any:
    """The operator for a translation function. The last of ``inputs`` is the optional mask."""
    from onnxscript import values

    schema_type = onnx.defs.OpSchema
    parameter, attribute = schema_type.FormalParameter, schema_type.Attribute
    kinds = schema_type.AttrType
    *typed, mask = inputs
    optional = schema_type.FormalParameterOption.Optional
    schema = schema_type(
        op_type,
        DOMAIN,
        DOMAIN_VERSION,
        inputs=[parameter(name, "T") for name in typed]
        + [parameter(mask, "tensor(int64)", param_option=optional)],
        outputs=[parameter("output", "T")],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "element type")
        ],
        attributes=[attribute(name, kinds.INT) for name in attributes]
        + [attribute(name, kinds.STRING, required=False) for name in PLUGIN_ATTRIBUTES],
    )
    return values.Op(values.Opset(DOMAIN, DOMAIN_VERSION), op_type, schema)


def integers(node: onnx.NodeProto) -> dict[str, int]:
    """A node's integer attributes by name."""
    return {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}


def has_mask(node: onnx.NodeProto, required: int) -> bool:
    """Whether the optional input after ``required`` ones is there."""
    return len(node.input) > required and bool(node.input[required])


def make_function(
    op_type: str,
    inputs: list[str],
    nodes: list[onnx.NodeProto],
    opset: int,
    attributes: tuple[str, ...],
) -> onnx.FunctionProto:
    """A function with output ``output``. The attributes are declared for the runtimes that map the
    node to a kernel; the body has them built in."""
    return onnx.helper.make_function(
        DOMAIN,
        op_type,
        inputs,
        ["output"],
        nodes,
        [onnx.helper.make_opsetid("", opset)],
        attributes=[*attributes, *PLUGIN_ATTRIBUTES],
    )
