"""The linear layers of an exported ConvBERT that integers may compute, and the form they need."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

#: Kept at the graph's own precision: 384 x 54 weights a layer save nothing, and their output steers
#: the convolution through a softmax.
_HIGH = ("kernel_generator",)
_ENCODER = "encoder.layer."


@dataclasses.dataclass(frozen=True)
class Linear:
    """One matrix product with a constant weight of shape (rows, columns).

    name: module path, such as ``encoder.layer.0.output.dense``. node: its MatMul. activation:
    tensor on its left, of shape (..., rows). weight: initializer on its right.
    """

    name: str
    node: str
    activation: str
    weight: str
    rows: int
    columns: int

    @property
    def layer(self) -> int:
        return int(self.name.removeprefix(_ENCODER).split(".", 1)[0])

    @property
    def multiplications(self) -> int:
        """A token."""
        return self.rows * self.columns


def linears(model: onnx.ModelProto) -> tuple[Linear, ...]:
    """The encoder's linear layers in graph order: the merged q/k/v/convolution-value projection, the
    pointwise half of the separable convolution, the attention's output, both of the feed-forward
    block (each group of a grouped one, after ``split_groups``).

    Embeddings, the kernel generator and the heads are not among them: small, and sensitive.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type != "MatMul" or node.input[1] not in weights:
            continue
        name = node.name.rpartition("/")[0]
        shape = weights[node.input[1]].dims
        if not name.startswith(_ENCODER) or name.endswith(_HIGH) or len(shape) != 2:
            continue
        found.append(Linear(name, node.name, node.input[0], node.input[1], *shape))
    return tuple(found)


def split_groups(model: onnx.ModelProto) -> int:
    """Rewrite each grouped linear, in place, as one MatMul a group between a Split and a Concat.

    A batched product with a weight of shape (groups, in, out) has no per-channel integer form that
    every runtime takes, and one activation scale would have to serve all groups. Returns how many
    were rewritten; the values are the same.
    """
    from onnx import helper

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    replaced: dict[str, list[onnx.NodeProto]] = {}
    dropped: set[str] = set()
    for product in list(graph.node):
        weight = weights.get(product.input[1]) if product.op_type == "MatMul" else None
        if weight is None or len(weight.dims) != 3:
            continue
        chain = _grouped_chain(product, producers, readers)
        source, result = chain[1].input[0], chain[-1].output[0]
        module = product.name.rpartition("/")[0]
        replaced[chain[-1].name] = _per_group(graph, helper, module, source, result, weight)
        dropped.update(node.name for node in chain)
        graph.initializer.remove(weight)
    nodes = []
    for node in graph.node:
        nodes.extend(replaced.get(node.name, []))
        if node.name not in dropped:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unread_initializers(graph)
    return len(replaced)


def _grouped_chain(
    product: onnx.NodeProto,
    producers: dict[str, onnx.NodeProto],
    readers: dict[str, list[onnx.NodeProto]],
) -> list[onnx.NodeProto]:
    """Transpose, Reshape, MatMul, Transpose, Reshape, as ``TraceableGroupedLinear`` is traced.

    Raises:
        GraphError: something else surrounds the product.
    """
    from ..errors import GraphError

    before = producers.get(product.input[0])
    first = producers.get(before.input[0]) if before is not None else None
    (after,) = readers.get(product.output[0], [None])[:1]
    (last,) = readers.get(after.output[0], [None])[:1] if after is not None else (None,)
    chain = [before, first, product, after, last]
    kinds = [node.op_type if node is not None else None for node in chain]
    if kinds != ["Transpose", "Reshape", "MatMul", "Transpose", "Reshape"]:
        raise GraphError(
            f"{product.name} multiplies by a 3-D weight between {kinds}, expected the reshapes and "
            "transposes of a grouped linear",
            hint="export the checkpoint again with this version",
        )
    return [node for node in chain if node is not None]


def _per_group(
    graph: onnx.GraphProto,
    helper: Any,
    module: str,
    source: str,
    result: str,
    weight: onnx.TensorProto,
) -> list[onnx.NodeProto]:
    from onnx import numpy_helper

    groups = weight.dims[0]
    values = numpy_helper.to_array(weight)
    parts = [f"{module}/Split:{index}" for index in range(groups)]
    products = [f"{module}.group{index}/MatMul:0" for index in range(groups)]
    nodes = [
        helper.make_node(
            "Split", [source], parts, name=f"{module}/Split", axis=-1, num_outputs=groups
        )
    ]
    for index, (part, product) in enumerate(zip(parts, products, strict=True)):
        name = f"{module}.group{index}.weight"
        graph.initializer.append(numpy_helper.from_array(values[index].copy(), name))
        nodes.append(
            helper.make_node(
                "MatMul", [part, name], [product], name=f"{module}.group{index}/MatMul"
            )
        )
    nodes.append(helper.make_node("Concat", products, [result], name=f"{module}/Concat", axis=-1))
    return nodes


def _drop_unread_initializers(graph: onnx.GraphProto) -> None:
    read = {name for node in graph.node for name in node.input}
    read.update(value.name for value in graph.output)
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)


def share(selected: tuple[Linear, ...], every: tuple[Linear, ...]) -> float:
    """The part of the linear arithmetic of ``every`` that ``selected`` does, in 0..1."""
    whole = math.fsum(linear.multiplications for linear in every)
    return math.fsum(linear.multiplications for linear in selected) / whole if whole else 0.0
