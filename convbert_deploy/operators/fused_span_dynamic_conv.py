"""FusedSpanDynamicConv in ONNX: the kernel generator and SpanDynamicConv as one operator, and the
rewrite that puts it into a graph. Kernels: plugins/fused_span_dynamic_conv.

An exported graph does not have it: ``build-engine`` fuses where our kernels run.
"""

from __future__ import annotations

import collections
import dataclasses

import onnx
from onnx import helper

from convbert_deploy.operators import span_dynamic_conv
from convbert_deploy.operators.domain import (
    DOMAIN,
    PLUGIN_ATTRIBUTES,
    Shapes,
    has_mask,
    integers,
    make_function,
)
from convbert_deploy.operators.functions import FunctionBody

OP_TYPE = "FusedSpanDynamicConv"
ATTRIBUTES = ("num_heads", "kernel_size", "query_offset", "value_offset")


def function_of(node: onnx.NodeProto, shapes: Shapes, opset: int) -> onnx.FunctionProto:
    """The function for a node like ``node``; the channels are those of its weight."""
    sizes = integers(node)
    channels = shapes[node.input[2]][0]
    masked = has_mask(node, required=4)
    body = FunctionBody()
    axis = body.constant("channel_axis", [-1])
    for name in ("query", "value"):
        first = sizes[f"{name}_offset"]
        start = body.constant(f"{name}_start", [first])
        stop = body.constant(f"{name}_stop", [first + channels])
        body.node("Slice", ["projections", start, stop, axis], [name])
    product = body.node("Mul", ["key_conv", "query"], ["product"])
    generated = body.node("MatMul", [product, "weight"], ["generated"])
    logits = body.node("Add", [generated, "bias"], ["kernel_logits"])
    value = body.zero_at_pads("value", "mask", "real_value") if masked else "value"
    total = span_dynamic_conv.append_convolution(
        body, value, logits, sizes["num_heads"], sizes["kernel_size"]
    )
    if masked:
        body.zero_at_pads(total, "mask", "output")
    else:
        body.node("Identity", [total], ["output"])
    inputs = ["key_conv", "projections", "weight", "bias"] + (["mask"] if masked else [])
    return make_function(OP_TYPE, inputs, body.nodes, opset, ATTRIBUTES)


@dataclasses.dataclass(frozen=True)
class _Generator:
    """The nodes before a SpanDynamicConv: Split -> Mul(key_conv, query) -> MatMul -> Add."""

    split: onnx.NodeProto
    absorbed: tuple[onnx.NodeProto, ...]
    key_conv: str
    query: str
    weight: str
    bias: str


def fuse(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every SpanDynamicConv that can takes in its kernel generator.

    It can where logits = (key_conv * query) @ weight + bias has no other reader, the query and the
    value are parts of one Split, and weight and bias are initializers of the same type. Elsewhere
    (a generator kept in float32, say) the node stays. Model-local functions are left as they are.
    """
    fused = onnx.ModelProto()
    fused.CopyFrom(model)
    graph = fused.graph
    producers = {output: node for node in graph.node for output in node.output}
    readers = collections.Counter(name for node in graph.node for name in node.input)
    readers.update(value.name for value in graph.output)
    weights = {tensor.name: tensor for tensor in graph.initializer}
    gone: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if (node.domain, node.op_type) == (DOMAIN, span_dynamic_conv.OP_TYPE):
            generator = _generator(node, producers, readers, weights)
            if generator is not None:
                gone.update(other.output[0] for other in generator.absorbed)
                node = _fused_node(node, generator, producers, weights)
        nodes.append(node)
    kept = [_copy(other) for other in nodes if other.output[0] not in gone]
    del graph.node[:]
    graph.node.extend(kept)
    return fused


def _generator(
    node: onnx.NodeProto,
    producers: dict[str, onnx.NodeProto],
    readers: collections.Counter[str],
    weights: dict[str, onnx.TensorProto],
) -> _Generator | None:
    value, logits = node.input[0], node.input[1]
    add = producers.get(logits)
    matmul = _one_of(add, "Add", "MatMul", producers)
    product = _one_of(matmul, "MatMul", "Mul", producers)
    split = producers.get(value)
    if add is None or matmul is None or product is None or split is None:
        return None
    absorbed = (product, matmul, add)
    if split.op_type != "Split" or any(readers[n.output[0]] != 1 for n in absorbed):
        return None
    query = [name for name in product.input if name in split.output]
    weight, bias = matmul.input[1], [name for name in add.input if name in weights]
    if len(query) != 1 or weight not in weights or len(bias) != 1:
        return None
    if weights[weight].data_type != weights[bias[0]].data_type:
        return None
    key_conv = next(name for name in product.input if name != query[0])
    return _Generator(split, absorbed, key_conv, query[0], weight, bias[0])


def _one_of(
    node: onnx.NodeProto | None,
    op_type: str,
    input_type: str,
    producers: dict[str, onnx.NodeProto],
) -> onnx.NodeProto | None:
    """The producer of type ``input_type`` among the inputs of ``node``, itself an ``op_type``."""
    if node is None or node.op_type != op_type:
        return None
    found = [producers[name] for name in node.input if name in producers]
    return next((other for other in found if other.op_type == input_type), None)


def _fused_node(
    node: onnx.NodeProto,
    generator: _Generator,
    producers: dict[str, onnx.NodeProto],
    weights: dict[str, onnx.TensorProto],
) -> onnx.NodeProto:
    # the generator's weight is square in channels: its first axis is the width of one part
    width = weights[generator.weight].dims[0]
    parts = list(generator.split.output)
    inputs = [generator.key_conv, generator.split.input[0], generator.weight, generator.bias]
    mask = [node.input[2]] if has_mask(node, required=2) else []
    sizes = integers(node)
    return helper.make_node(
        OP_TYPE,
        inputs + mask,
        list(node.output),
        name=node.name.replace(span_dynamic_conv.OP_TYPE, OP_TYPE),
        domain=DOMAIN,
        num_heads=sizes["num_heads"],
        kernel_size=sizes["kernel_size"],
        query_offset=parts.index(generator.query) * width,
        value_offset=parts.index(node.input[0]) * width,
        **PLUGIN_ATTRIBUTES,
    )


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    # a node still belongs to the list that is about to be cleared
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy
