"""Which nodes of a half-precision graph have to stay in float32, by what was measured.

fp16 ends at 65504 and its smallest number is 6e-8. What an operator may reach is no property of its
name: one model's residual stream stays below 100, another's leaves the range.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterable, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..errors import GraphError
from ..precision import Precision
from .masks import float_constant, mask_tensors

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
#: what shapes are computed with: inference needs the values
_SHAPE_TYPES = (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)
FP16_MAX = float(np.finfo(np.float16).max)
#: Half of it still rounds to zero.
_FP16_MIN = float(np.finfo(np.float16).smallest_subnormal)
#: How much larger a tensor's largest |x| was over unseen texts than over those measured, for the
#: worst tensor of two trained checkpoints (300 long reviews against film sentences; 1024 sentences
#: to tag): 1.71 with 512 measured, 2.54 with the worst of 20 draws of 32, 3.83 with 8. The largest
#: |x| itself was 475.
MARGIN = 4.0
#: 65504 has to hold a mask's 30000 beside scores of 65504 / margin.
_SMALLEST_MARGIN = 1.85
#: What a constant that guards against zero is added to ends in one of these.
_DIVIDES = frozenset({"Div", "Reciprocal", "Log"})
#: What may lie between: the value is still as small as the constant, or its root.
_STILL_SMALL = frozenset(
    {"Add", "Max", "Clip", "Sqrt", "Pow", "Identity", "Expand", "Reshape", "Unsqueeze", "Squeeze"}
)


@dataclasses.dataclass(frozen=True)
class KeptNode:
    """Why a node stays in float32: ``tensor``, which it reads or writes, reached |x| = ``largest``
    where ``limit`` is allowed. For a constant that fp16 rounds to zero, ``largest`` is below
    ``limit``, the smallest number that it does not."""

    node: str
    tensor: str
    largest: float
    limit: float

    def __str__(self) -> str:
        relation = "vanishes below" if self.largest < self.limit else "is over"
        return f"{self.node}: {self.tensor} {self.largest:.4g} {relation} {self.limit:.4g}"


def keep_fp32(
    model: onnx.ModelProto,
    largest: Mapping[str, float],
    precision: Precision,
    *,
    margin: float = MARGIN,
) -> tuple[KeptNode, ...]:
    """The nodes of ``model`` that ``typed_graph`` must keep in float32, in graph order.

    In fp16: nodes that read or write a tensor that reached 65504 / ``margin`` on the data; that
    read a weight over 65504; that read a number too small for fp16, and those after them up to the
    division it guards. Masks, and scores with a mask added, are exempt: their size is the mask
    constant's, which ``repair_mask_constants`` bounds. bf16 has float32's range: none.

    Args:
        model: the fp32 graph that was measured, its nodes named. Weights that are references to
            external data are not judged; ``typed_graph`` refuses those out of range.
        largest: the largest |x| measured of each of ``observed_tensors(model)``; further names are
            ignored, NaN is over any limit.
        margin: how much larger a tensor may be on texts that were not measured.

    Raises:
        GraphError: ``largest`` lacks a tensor, a node to keep has no name, or the margin is below
            1.85: 65504 would not hold a mask beside the scores.
    """
    if not margin >= _SMALLEST_MARGIN:
        raise GraphError(f"the margin is {margin:g}, expected {_SMALLEST_MARGIN:.2f} or more")
    if precision is not Precision.FP16:
        return ()
    masks = mask_tensors(model)
    observed = [name for name in observed_tensors(model) if name not in masks]
    missing = [name for name in observed if name not in largest]
    if missing:
        raise GraphError(
            f"no range was measured for {missing[0]}, one of {len(missing)} tensors: expected all "
            "that observed_tensors names"
        )
    over = {
        name: (largest[name], FP16_MAX / margin)
        for name in observed
        if not largest[name] <= FP16_MAX / margin
    }
    weights = _constants(model.graph)
    over |= {
        name: (_reach(array), FP16_MAX)
        for name, array in weights.items()
        if name not in masks and not _reach(array) <= FP16_MAX
    }
    kept = {index: (name, *over[name]) for index, name in _touching(model.graph, over)}
    for index, name in _guarded(model.graph, weights):
        kept.setdefault(index, (name, _reach(weights[name]), _FP16_MIN))
    return tuple(_record(model.graph.node[index], *kept[index]) for index in sorted(kept))


def _record(node: onnx.NodeProto, tensor: str, largest: float, limit: float) -> KeptNode:
    if not node.name:
        raise GraphError(
            f"a {node.op_type} node has to stay in fp32 for its tensor {tensor} and has no name, "
            "by which to keep it"
        )
    return KeptNode(node.name, tensor, largest, limit)


def _touching(graph: onnx.GraphProto, names: Mapping[str, object]) -> Iterable[tuple[int, str]]:
    for index, node in enumerate(graph.node):
        # a Constant is typed as its readers are
        if float_constant(node) is None:
            touched = [name for name in (*node.input, *node.output) if name in names]
            if touched:
                yield index, touched[0]


def _guarded(
    graph: onnx.GraphProto, constants: Mapping[str, np.ndarray]
) -> Iterable[tuple[int, str]]:
    """Nodes that read a constant that fp16 rounds to zero, and what computes with it up to the
    division; with the constant's name."""
    small = {
        name: name
        for name, array in constants.items()
        if array.size == 1 and 0 < abs(array.item()) <= _FP16_MIN / 2
    }
    for index, node in enumerate(graph.node):
        read = [small[name] for name in node.input if name in small]
        if read and float_constant(node) is None:
            yield index, read[0]
            if node.op_type in _STILL_SMALL and node.op_type not in _DIVIDES:
                small |= dict.fromkeys(node.output, read[0])


def _constants(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """The float32 initializers and Constant nodes held in the model, by tensor name."""
    found = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.FLOAT and not tensor.external_data
    }
    for node in graph.node:
        held = float_constant(node)
        if held is not None:
            found[node.output[0]] = numpy_helper.to_array(held)
    return found


def _reach(array: np.ndarray) -> float:
    """max |x| without a copy; NaN where there is one."""
    if not array.size:
        return 0.0
    return float(np.maximum(np.abs(array.min()), np.abs(array.max())))


def observed_tensors(model: onnx.ModelProto) -> tuple[str, ...]:
    """The float32 tensors that depend on the data: inputs and outputs of nodes, in graph order,
    without constants and weights."""
    floats = float_tensors(model)
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value.name for value in model.graph.input if value.name not in weights]
    computed = [
        name for node in model.graph.node if float_constant(node) is None for name in node.output
    ]
    return tuple(name for name in (*inputs, *computed) if name in floats)


def kept_nodes(model: onnx.ModelProto, keep_fp32: Iterable[str]) -> frozenset[int]:
    """Indices of the nodes that stay in float32.

    Those that ``keep_fp32`` names, by their own name or by an initializer they read, directly or
    through a DequantizeLinear; Constants that only such nodes read; and every QuantizeLinear with
    its DequantizeLinears where one of them is named or all that read the result stay.

    Raises:
        GraphError: there is no node or initializer of that name.
    """
    nodes, keep = model.graph.node, frozenset(keep_fp32)
    unknown = keep - {node.name for node in nodes} - {t.name for t in model.graph.initializer}
    if unknown:
        raise GraphError(
            f"keep_fp32 names {', '.join(sorted(unknown))}: no such node or initializer"
        )
    read = keep | {
        node.output[0]
        for node in nodes
        if node.op_type == "DequantizeLinear" and not keep.isdisjoint(node.input)
    }
    kept = {i for i, n in enumerate(nodes) if n.name in keep or not read.isdisjoint(n.input)}
    readers: dict[str, set[int]] = collections.defaultdict(set)
    for index, node in enumerate(nodes):
        for name in node.input:
            readers[name].add(index)
    outputs = {value.name for value in model.graph.output}
    # from the end, so that what reads a pair is decided before it
    for pair in reversed(_sources(model.graph)):
        results = [nodes[i].output[0] for i in pair if nodes[i].op_type != "QuantizeLinear"]
        using = set().union(*(readers[name] for name in results))
        only_kept = bool(using) and using <= kept and outputs.isdisjoint(results)
        if only_kept or not kept.isdisjoint(pair):
            kept |= pair
    return frozenset(kept)


def _sources(graph: onnx.GraphProto) -> list[set[int]]:
    """Indices of nodes that take the type of their readers: each Constant; the QuantizeLinear (if
    any) and the DequantizeLinears of each quantized tensor."""
    producers = {n.output[0]: i for i, n in enumerate(graph.node) if n.op_type == "QuantizeLinear"}
    found: dict[str, set[int]] = {}
    for index, node in enumerate(graph.node):
        if node.op_type == "DequantizeLinear":
            name = node.input[0]
            pair = found.setdefault(name, {producers[name]} if name in producers else set())
            pair.add(index)
        elif float_constant(node) is not None:
            found[node.output[0]] = {index}
    return list(found.values())


def float_tensors(
    model: onnx.ModelProto, kinds: Collection[int] = (TensorProto.FLOAT,)
) -> frozenset[str]:
    """Names of all values of the graph, weights included, whose element type is one of ``kinds``.

    Raises:
        GraphError: the type of a value cannot be inferred.
    """
    try:
        inferred = onnx.shape_inference.infer_shapes(_without_weights(model)).graph
    except onnx.shape_inference.InferenceError as error:
        raise GraphError(f"the graph's types do not fit together: {error}") from error
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*inferred.input, *inferred.output, *inferred.value_info)
    }
    for node in model.graph.node:
        for name in node.output:
            if name and not types.get(name):
                raise GraphError(f"the type of {name}, output of {node.op_type}, is unknown")
    return frozenset(name for name, kind in types.items() if kind in kinds)


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, its weights as inputs: protobuf cannot hand 2 GiB to the checker."""
    graph = onnx.GraphProto(name="types")
    graph.node.extend(model.graph.node)
    graph.output.extend(model.graph.output)
    graph.value_info.extend(model.graph.value_info)
    graph.input.extend(model.graph.input)
    declared = {value.name for value in graph.input}
    for tensor in model.graph.initializer:
        if tensor.data_type in _SHAPE_TYPES:
            graph.initializer.append(tensor)
        elif tensor.name not in declared:
            graph.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    return helper.make_model(
        graph,
        opset_imports=model.opset_import,
        functions=list(model.functions),
        ir_version=model.ir_version,
    )
