"""The linear layers of an exported ConvBERT that integers may compute, and the form they need."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import GraphError

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

    Raises:
        GraphError: a product with a 3-D weight that is no grouped linear as ``export`` writes it.
    """
    from onnx import helper

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    readers: dict[str, list[onnx.NodeProto | None]] = {
        # read by whoever runs the graph
        value.name: [None]
        for value in graph.output
    }
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
        source, result = chain[0].input[0], chain[-1].output[0]
        module = product.name.rpartition("/")[0]
        replaced[chain[-1].name] = _per_group(graph, helper, module, source, result, weight)
        dropped.update(node.name for node in chain)
    nodes = []
    for node in graph.node:
        nodes.extend(replaced.get(node.name, []))
        if node.name not in dropped:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unread_initializers(graph)
    return len(replaced)


#: as ``TraceableGroupedLinear`` is traced; (batch, seq, groups, in) -> (batch, groups, seq, in)
_CHAIN = ("Reshape", "Transpose", "MatMul", "Transpose", "Reshape")
_BY_GROUP = [0, 2, 1, 3]


def _grouped_chain(
    product: onnx.NodeProto,
    producers: Mapping[str, onnx.NodeProto],
    readers: Mapping[str, Sequence[onnx.NodeProto | None]],
) -> list[onnx.NodeProto]:
    """The nodes of a grouped linear from its input to its output, ``_CHAIN``, each read by the next
    alone.

    Raises:
        GraphError: something else surrounds the product.
    """

    def before(node: onnx.NodeProto | None) -> onnx.NodeProto | None:
        alone = node is not None and len(readers[node.input[0]]) == 1
        return producers.get(node.input[0]) if alone else None

    def after(node: onnx.NodeProto | None) -> onnx.NodeProto | None:
        found = readers.get(node.output[0], ()) if node is not None else ()
        return found[0] if len(found) == 1 else None

    turn, back = before(product), after(product)
    chain = [before(turn), turn, product, back, after(back)]
    kinds = tuple(node.op_type if node is not None else None for node in chain)
    turns = [
        _permutation(node) for node in chain if node is not None and node.op_type == "Transpose"
    ]
    if kinds != _CHAIN or turns != [_BY_GROUP, _BY_GROUP]:
        raise GraphError(
            f"{product.name} multiplies by a 3-D weight between {kinds} with permutations {turns}, "
            f"expected a grouped linear: {_CHAIN} with {_BY_GROUP}",
            hint="export the checkpoint again with this version",
        )
    return [node for node in chain if node is not None]


def _permutation(transpose: onnx.NodeProto) -> list[int]:
    return next((list(a.ints) for a in transpose.attribute if a.name == "perm"), [])


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
