"""Our operators as torch and as ONNX know them; their kernels are in plugins/, one folder each.

In torch each is ``convbert::name``, computed by ``reference``, so a traced model still runs eagerly.
In ONNX it is a node of domain ``convbert`` plus a model-local function of the same name: a runtime
without our libraries inlines the function, one with them maps the node to a kernel. Those of CPU
engines alone (``encoder_layer``) have neither a torch form nor a function.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import onnx

from convbert_deploy.errors import GraphError
from convbert_deploy.operators import (
    depthwise_conv1d,
    fused_span_dynamic_conv,
    span_dynamic_conv,
)
from convbert_deploy.operators.domain import DOMAIN, DOMAIN_VERSION, Shapes

__all__ = ["DOMAIN", "DOMAIN_VERSION", "functions_of", "nodes_of", "translation_table"]

_MODULES: dict[str, ModuleType] = {
    module.OP_TYPE: module
    for module in (span_dynamic_conv, depthwise_conv1d, fused_span_dynamic_conv)
}


def nodes_of(model: onnx.ModelProto, op_type: str | None = None) -> list[onnx.NodeProto]:
    """Nodes that our libraries run: all, or those of one operator."""
    return [n for n in model.graph.node if n.domain == DOMAIN and op_type in (None, n.op_type)]


def function_of(node: onnx.NodeProto, shapes: Shapes, opset: int) -> onnx.FunctionProto:
    """The function that stands for ``node`` in a runtime without our library.

    Args:
        shapes: of the initializers among its inputs.
        opset: version of the standard operators in the body.

    Raises:
        GraphError: an operator of CPU engines alone, which has no function.
    """
    if node.op_type not in _MODULES:
        raise GraphError(
            f"{node.name or node.op_type} runs in our library only: {node.op_type} has no function",
            hint="build the engine from the exported graph",
        )
    return _MODULES[node.op_type].function_of(node, shapes, opset)


def functions_of(model: onnx.ModelProto, opset: int) -> list[onnx.FunctionProto]:
    """One function for each of our operators in ``model``.

    Raises:
        GraphError: nodes of one operator that differ in attributes, weight shape or mask, which one
            function cannot stand for.
    """
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    functions: dict[str, onnx.FunctionProto] = {}
    for node in nodes_of(model):
        function = function_of(node, shapes, opset)
        if functions.setdefault(node.op_type, function) != function:
            raise GraphError(
                f"the {node.op_type} nodes of the graph are not of one kind: {node.name} differs"
            )
    return list(functions.values())


def translation_table() -> dict[Any, Any]:
    """For ``torch.onnx.export(custom_translation_table=...)``."""
    table: dict[Any, Any] = {}
    traced: Iterable[ModuleType] = (span_dynamic_conv, depthwise_conv1d)
    for module in traced:
        table |= module.translation()
    return table
