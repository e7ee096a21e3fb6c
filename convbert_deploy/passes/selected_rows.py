"""What only one row of each sequence is read of is computed for that row alone."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from convbert_deploy.errors import GraphError
from convbert_deploy.passes.pass_report import PassReport
from convbert_deploy.passes.ranks import ranks_of

if TYPE_CHECKING:
    import onnx

_ELEMENTWISE = {"Add", "Cast", "Div", "Erf", "Gelu", "Identity", "Mul", "Relu", "Sub", "Tanh"}
_QUANTIZING = {"QuantizeLinear", "DequantizeLinear"}
_SEQ_AXIS = 1
_RANK = 3
#: among the readers of a tensor: the graph's own outputs
_GRAPH = -1


@dataclasses.dataclass(frozen=True)
class _Graph:
    """A graph's nodes with what the pass asks about them."""

    nodes: tuple[onnx.NodeProto, ...]
    producers: Mapping[str, onnx.NodeProto]
    readers: Mapping[str, tuple[int, ...]]  # positions of nodes, or _GRAPH
    constants: Mapping[str, onnx.TensorProto]
    ranks: Mapping[str, int]

    @classmethod
    def of(cls, model: onnx.ModelProto) -> _Graph:
        readers: dict[str, list[int]] = collections.defaultdict(list)
        for position, node in enumerate(model.graph.node):
            for name in node.input:
                readers[name].append(position)
        for value in model.graph.output:
            readers[value.name].append(_GRAPH)
        return cls(
            nodes=tuple(model.graph.node),
            producers={output: node for node in model.graph.node for output in node.output},
            readers={name: tuple(positions) for name, positions in readers.items()},
            constants={tensor.name: tensor for tensor in model.graph.initializer},
            ranks=ranks_of(model),
        )


class SelectedRows:
    """Moves a ``Gather`` of the first or last row up through everything that treats rows alike.

    A sequence classifier reads one row of the last layer: that layer's attention output, LayerNorms
    and feed-forward block are then computed for one row of each sequence instead of all, 78 % of the
    layer's products in base. The numbers do not change: no operator it passes mixes rows.

    Requires: nodes in topological order. Ensures: every tensor that only such Gathers read comes
    from an operator that mixes rows, or has other readers too.
    """

    name = "SelectedRows"

    def requires(self, model: onnx.ModelProto) -> None:
        known = {value.name for value in model.graph.input}
        known.update(tensor.name for tensor in model.graph.initializer)
        for node in model.graph.node:
            missing = [name for name in node.input if name and name not in known]
            if missing:
                raise GraphError(
                    f"{self.name}: {node.name} reads {missing[0]} before it is computed, expected "
                    "nodes in topological order",
                    hint="export the checkpoint again",
                )
            known.update(node.output)

    def call(self, model: onnx.ModelProto) -> PassReport:
        found = _selections(_Graph.of(model))
        reasons = []
        for name in found:
            graph = _Graph.of(model)
            node = graph.producers.get(name)
            if node is None:  # it moved together with another of the same row
                continue
            rows = _row_only(graph, node)
            if rows:
                _move(model, graph, node, rows)
            else:
                reasons.append(_reason(graph, node))
        return PassReport(self.name, len(found), len(found) - len(reasons), tuple(reasons))

    def ensures(self, model: onnx.ModelProto, report: PassReport) -> None:
        graph = _Graph.of(model)
        for name in _selections(graph):
            if _row_only(graph, graph.producers[name]):
                raise GraphError(f"{self.name}: {name} could still move up after {report}")


def _selections(graph: _Graph) -> list[str]:
    """Outputs of the Gathers of the first or last row of a computed (batch, seq, channels)."""
    return [
        node.output[0]
        for node in graph.nodes
        if node.op_type == "Gather"
        and _integer(node, "axis", 0) == _SEQ_AXIS
        and node.input[0] in graph.producers
        and graph.ranks.get(node.input[0]) == _RANK
        and _index(graph, node) in (0, -1)
    ]


def _index(graph: _Graph, node: onnx.NodeProto) -> int | None:
    import onnx

    tensor = graph.constants.get(node.input[1])
    if tensor is None:
        return None
    values = onnx.numpy_helper.to_array(tensor).reshape(-1)
    return int(values[0]) if values.size == 1 else None


def _row_only(graph: _Graph, gather: onnx.NodeProto) -> frozenset[int]:
    """Positions of the nodes of which that Gather, and others of the same row, are all the use."""
    reading = {
        position
        for position, node in enumerate(graph.nodes)
        if node.op_type == "Gather"
        and _integer(node, "axis", 0) == _SEQ_AXIS
        and node.input[1] == gather.input[1]
    }
    only: set[int] = set()
    for position in range(len(graph.nodes) - 1, -1, -1):
        node = graph.nodes[position]
        readers = {reader for name in node.output for reader in graph.readers.get(name, ())}
        if readers and readers <= reading | only and _row_wise(graph, node):
            only.add(position)
    return frozenset(only)


def _row_wise(graph: _Graph, node: onnx.NodeProto) -> bool:
    """Whether row s of the output depends on row s of the (batch, seq, channels) inputs alone, with
    seq still the second axis."""
    if node.domain or len(node.output) != 1:
        return False
    data = _data(graph, node)
    if not data or any(graph.ranks.get(name) != _RANK for name in data):
        return False
    constants = [len(graph.constants[n].dims) for n in node.input if n in graph.constants]
    if node.op_type in _ELEMENTWISE:
        return all(rank <= 1 for rank in constants)
    if node.op_type in _QUANTIZING:
        return all(rank == 0 for rank in constants)
    if node.op_type == "LayerNormalization":
        return _integer(node, "axis", -1) == -1
    if node.op_type == "Concat":
        return _integer(node, "axis", 0) == -1 and not constants
    if node.op_type == "MatMul":
        return data == [node.input[0]] and constants in ([], [2])
    return False


def _data(graph: _Graph, node: onnx.NodeProto) -> list[str]:
    """The inputs that are computed, not stored: a weight behind Q/DQ counts as stored."""
    inputs = [name for name in node.input if name and name not in graph.constants]
    if node.op_type == "MatMul" and len(inputs) == 2 and graph.ranks.get(inputs[1]) == 2:
        return inputs[:1]
    return inputs


def _move(
    model: onnx.ModelProto, graph: _Graph, gather: onnx.NodeProto, only: frozenset[int]
) -> None:
    """Gather what enters the nodes ``only`` instead of what leaves them."""
    import onnx

    inside = {name for position in only for name in graph.nodes[position].output}
    outer: dict[str, str] = {}  # a tensor from outside: its row
    names = _names_after(model, graph, inside)
    nodes: list[onnx.NodeProto] = []
    for position, node in enumerate(graph.nodes):
        if node.op_type == "Gather" and node.input[0] in inside:
            continue
        for name in _data(graph, node) if position in only else ():
            if name in inside or name in outer:
                continue
            outer[name] = f"{name}/row"
            picked = onnx.helper.make_node(
                "Gather",
                [name, gather.input[1]],
                [outer[name]],
                name=f"{gather.name}/{len(outer)}",
                axis=_SEQ_AXIS,
            )
            nodes.append(picked)
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        rows = outer if position in only else {}
        for i, name in enumerate(node.input):
            copy.input[i] = rows.get(name) or names.get(name, name)
        for i, name in enumerate(node.output):
            copy.output[i] = names.get(name, name)
        nodes.append(copy)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    still_true = [value for value in model.graph.value_info if value.name not in inside]
    del model.graph.value_info[:]
    model.graph.value_info.extend(still_true)


def _names_after(model: onnx.ModelProto, graph: _Graph, inside: set[str]) -> dict[str, str]:
    """New names once the Gathers of ``inside`` are gone: their outputs are called what they read,
    except that the graph's outputs keep their names."""
    published = {value.name for value in model.graph.output}
    gone = [n for n in graph.nodes if n.op_type == "Gather" and n.input[0] in inside]
    names = {n.input[0]: n.output[0] for n in gone if n.output[0] in published}
    return names | {n.output[0]: names.get(n.input[0], n.input[0]) for n in gone}


def _reason(graph: _Graph, gather: onnx.NodeProto) -> str:
    producer = graph.producers[gather.input[0]]
    others = len(graph.readers[gather.input[0]]) - 1
    why = f"{others} other readers" if others else "an operator that mixes rows"
    return f"{gather.name}: stays behind {producer.op_type} {producer.name} ({why})"


def _integer(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)
