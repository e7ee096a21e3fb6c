"""What can be seen wrong in a graph's QuantizeLinear and DequantizeLinear nodes without running it.

A number that is wrong but possible cannot be seen here: an activation's scale that is doubled in
both nodes of its pair (which costs one bit), a weight's scale that is doubled beside the same 8-bit
weights. Only a comparison of answers finds those. The reverse holds too: on a square weight, ONNX
Runtime's fused integer product ignores the axis of the scales, so that its answers are right where
another runtime's would be wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
#: a column with this scale may be of any size below it
_LEAST_SCALE = 2.0**-24


def quantization_faults(model: onnx.ModelProto) -> list[str]:
    """Each violation of the form that ``quantized_graph`` writes, as a sentence naming the node.

    Of every pair: one constant scale, finite, above 0, exact in float16 and bfloat16; zero points 0,
    of the scale's shape, int8 or float8e4m3fn. Of activations: a scalar scale, the same in both
    nodes. Of weights: 2-D, a scale a column along the last axis, int8 in -127..127 (E4M3 in
    +-448), the largest of each column above half of that, because the scale is the column's own.
    Dequantized values go to MatMul alone, weights to its right, and to both of its sides or neither.
    Scales may be of any floating-point type. Weights must be in the model, not external.
    """
    graph = _Graph(model)
    faults: list[str] = []
    for node in model.graph.node:
        if node.op_type == _QUANTIZE:
            found = [*_scale_faults(graph, node), *_activation_faults(graph, node)]
        elif node.op_type == _DEQUANTIZE:
            found = [*_scale_faults(graph, node), *_dequantize_faults(graph, node)]
        elif node.op_type == "MatMul":
            found = list(_product_faults(graph, node))
        else:
            continue
        faults += [f"{node.name or node.output[0]}: {fault}" for fault in found]
    # a node that reads a tensor twice breaks a rule twice
    return list(dict.fromkeys(faults))


class _Graph:
    """Constants, makers and readers of a graph's tensors."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._producers = {output: node for node in model.graph.node for output in node.output}
        self._readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        for node in model.graph.node:
            for index, name in enumerate(node.input):
                self._readers.setdefault(name, []).append((node, index))
        self.outputs = {value.name for value in model.graph.output}

    def constant(self, node: onnx.NodeProto, index: int) -> np.ndarray | None:
        """The values of an input that is an initializer."""
        from onnx import numpy_helper

        name = node.input[index] if index < len(node.input) else ""
        return numpy_helper.to_array(self._tensors[name]) if name in self._tensors else None

    def kind(self, node: onnx.NodeProto, index: int) -> int:
        """TensorProto data type of an input that is an initializer, else 0."""
        name = node.input[index] if index < len(node.input) else ""
        return self._tensors[name].data_type if name in self._tensors else 0

    def producer(self, node: onnx.NodeProto, index: int) -> onnx.NodeProto | None:
        """The node that makes an input, behind a change of type."""
        found = self._producers.get(node.input[index])
        while found is not None and found.op_type == "Cast":
            found = self._producers.get(found.input[0])
        return found

    def readers(self, tensor: str) -> Iterator[tuple[onnx.NodeProto, int]]:
        """(node, input index), behind a change of type."""
        for node, index in self._readers.get(tensor, ()):
            if node.op_type == "Cast":
                yield from self.readers(node.output[0])
            else:
                yield node, index


def _scale_faults(graph: _Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Of the scale and zero point of either node."""
    from onnx import TensorProto

    stored, zero_point = graph.constant(node, 1), graph.constant(node, 2)
    if stored is None or zero_point is None:
        yield "its scale or zero point is no constant, expected both as initializers"
        return
    scale = stored.astype(np.float32)
    good = np.isfinite(scale) & (scale > 0)
    if not good.all():
        yield f"scale {_first(scale, ~good)}, expected finite and above 0"
    elif not (exact := _exact_in_halves(scale)).all():
        yield f"scale {_first(scale, ~exact)} is not exact in float16 and bfloat16"
    if graph.kind(node, 2) not in (TensorProto.INT8, TensorProto.FLOAT8E4M3FN):
        kind = TensorProto.DataType.Name(graph.kind(node, 2))
        yield f"quantized as {kind}, expected INT8 or FLOAT8E4M3FN"
    if zero_point.shape != scale.shape:
        yield (
            f"zero point of shape {list(zero_point.shape)}, expected its scale's "
            f"{list(scale.shape)}"
        )
    values = zero_point.astype(np.float32)
    if (values != 0).any():
        yield f"zero point {_first(values, values != 0)}, expected 0"


def _activation_faults(graph: _Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Of a QuantizeLinear."""
    scale = graph.constant(node, 1)
    if scale is not None and scale.shape:
        yield f"activation scale of shape {list(scale.shape)}, expected a scalar"
    others = [other for other, _ in graph.readers(node.output[0]) if other.op_type != _DEQUANTIZE]
    if others:
        yield f"{others[0].name} reads its 8-bit values, expected DequantizeLinear alone"
    if node.output[0] in graph.outputs:
        yield "its 8-bit values are an output of the graph"


def _dequantize_faults(graph: _Graph, node: onnx.NodeProto) -> Iterator[str]:
    quantize = graph.producer(node, 0)
    if quantize is not None and quantize.op_type == _QUANTIZE:
        yield from _pair_faults(graph, quantize, node)
        index = None
    elif graph.constant(node, 0) is not None:
        yield from _weight_faults(graph, node)
        index = 1
    else:
        yield f"dequantizes {node.input[0]}, expected a QuantizeLinear's output or a constant"
        return
    for reader, place in graph.readers(node.output[0]):
        if reader.op_type != "MatMul":
            yield f"{reader.op_type} {reader.name} reads it, expected MatMul alone"
        elif index not in (None, place):
            yield f"a weight is on the left of {reader.name}, expected on its right"
    if node.output[0] in graph.outputs:
        yield "its values are an output of the graph, expected MatMul alone to read them"


def _pair_faults(
    graph: _Graph, quantize: onnx.NodeProto, dequantize: onnx.NodeProto
) -> Iterator[str]:
    for index, name in ((1, "scale"), (2, "zero point")):
        one, other = graph.constant(quantize, index), graph.constant(dequantize, index)
        if one is None or other is None:
            continue  # named already
        if graph.kind(quantize, index) != graph.kind(dequantize, index) or not np.array_equal(
            one.astype(np.float32), other.astype(np.float32)
        ):
            yield f"{name} {_short(other)}, expected {quantize.name}'s {_short(one)}"


def _weight_faults(graph: _Graph, node: onnx.NodeProto) -> Iterator[str]:
    from onnx import TensorProto

    stored, scale = graph.constant(node, 0), graph.constant(node, 1)
    assert stored is not None
    if stored.ndim != 2:
        yield f"weight of shape {list(stored.shape)}, expected 2 axes"
        return
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    if axis % 2 != 1:
        yield f"scales along axis {axis}, expected one a column: axis 1"
    if scale is None:
        return
    columns = stored.shape[1]
    if scale.shape != (columns,):
        yield f"weight scale of shape {list(scale.shape)}, expected [{columns}], one a column"
        return
    if graph.kind(node, 0) != graph.kind(node, 2):
        yield "zero point of another type than the weight"
    largest = 127.0 if graph.kind(node, 0) == TensorProto.INT8 else 448.0
    reach = np.abs(stored.astype(np.float32)).max(axis=0, initial=0)
    # written so that a NaN is a fault
    over = ~(reach <= largest)
    if over.any():
        yield f"column {_index(over)} reaches {_first(reach, over)}, expected at most {largest:g}"
    unused = (reach > 0) & (reach <= largest / 2) & (scale.astype(np.float32) > _LEAST_SCALE)
    if unused.any():
        yield (
            f"column {_index(unused)} reaches {_first(reach, unused)} of {largest:g}, expected over "
            "half: its scale is not the column's"
        )


def _product_faults(graph: _Graph, node: onnx.NodeProto) -> Iterator[str]:
    sides = [graph.producer(node, index) for index in (0, 1)]
    quantized = [side is not None and side.op_type == _DEQUANTIZE for side in sides]
    if any(quantized) and not all(quantized):
        yield f"only its {'left' if quantized[0] else 'right'} side is in 8 bits, expected both"


def _exact_in_halves(values: np.ndarray) -> np.ndarray:
    """Which float32 numbers float16 and bfloat16 hold exactly."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16).astype(np.float32) == values
    # bfloat16 is the upper half of a float32
    return half & ((np.ascontiguousarray(values).reshape(values.shape).view(np.uint32) << 16) == 0)


def _index(mask: np.ndarray) -> int:
    return int(np.flatnonzero(mask)[0])


def _first(values: np.ndarray, mask: np.ndarray) -> str:
    return f"{float(values[mask].reshape(-1)[0]):.9g}"


def _short(values: np.ndarray) -> str:
    flat = values.astype(np.float32).reshape(-1)
    return f"{flat[0]:.9g}" if flat.size == 1 else f"of {flat.size} numbers"
