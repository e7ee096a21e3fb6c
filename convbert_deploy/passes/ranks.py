"""How many axes a graph's tensors have, as far as a pass over the nodes can tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from convbert_deploy.operators.domain import DOMAIN

if TYPE_CHECKING:
    import onnx

#: of the rank of their first input
_SAME = {
    *("Cast", "Concat", "DequantizeLinear", "Erf", "Gelu", "Identity", "LayerNormalization"),
    *("QuantizeLinear", "Relu", "Slice", "Softmax", "Split", "Tanh", "Transpose"),
}
#: of the largest rank among their inputs
_BROADCAST = {"Add", "Div", "Mul", "Pow", "Sub", "Where"}

Numbers = Mapping[str, int]


def ranks_of(model: onnx.ModelProto) -> dict[str, int]:
    """Rank by tensor name; a tensor whose rank is not plain to see is absent."""
    graph = model.graph
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    for value in graph.input:
        if value.type.tensor_type.HasField("shape"):
            ranks[value.name] = len(value.type.tensor_type.shape.dim)
    # of one axis: how many numbers
    lengths = {tensor.name: tensor.dims[0] for tensor in graph.initializer if len(tensor.dims) == 1}
    for node in graph.node:
        rank = _rank(node, ranks, lengths)
        if rank is not None:
            ranks.update({output: rank for output in node.output if output})
        length = _length(node, ranks, lengths)
        if length is not None:
            lengths[node.output[0]] = length
    return ranks


def _rank(node: onnx.NodeProto, ranks: Numbers, lengths: Numbers) -> int | None:
    inputs = [name for name in node.input if name]
    if not inputs or inputs[0] not in ranks:
        return None
    first = ranks[inputs[0]]
    if node.domain == DOMAIN or node.op_type in _SAME:
        return first
    if any(name not in ranks for name in inputs):
        return None
    known = [ranks[name] for name in inputs]
    if node.op_type in _BROADCAST or (node.op_type == "MatMul" and min(known) > 1):
        return max(known)
    if node.op_type == "Gather":
        return known[0] + known[1] - 1
    if node.op_type == "Shape":
        return 1
    if node.op_type == "Reshape":
        return lengths.get(inputs[1])
    if node.op_type == "Unsqueeze" and inputs[1] in lengths:
        return first + lengths[inputs[1]]
    return None


def _length(node: onnx.NodeProto, ranks: Numbers, lengths: Numbers) -> int | None:
    """Numbers in the output of a Shape, or of a Concat of such."""
    if node.op_type == "Concat" and all(name in lengths for name in node.input):
        return sum(lengths[name] for name in node.input)
    if node.op_type != "Shape" or node.input[0] not in ranks:
        return None
    rank = ranks[node.input[0]]
    bounds = {attribute.name: attribute.i for attribute in node.attribute}
    return len(range(rank)[bounds.get("start", 0) : bounds.get("end", rank)])
