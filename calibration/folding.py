"""A smoothing divisor moved into the weights that make the activation, so that it costs nothing.

Two activations of a ConvBERT layer allow it. The depthwise convolution multiplies each channel by
weights of its own. The attention's output projection reads the heads' context beside the dynamic
convolution, and both are weighted sums over tokens of values, channel by channel: dividing the
columns of the projections that make those values divides the result. LayerNorm's outputs also feed
the residual sum, and GELU is not linear: those need an explicit multiplication.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from ..operators import DOMAIN
from .smoothing import ActivationPlan
from .workspace import WeightEdits

if TYPE_CHECKING:
    import onnx


def fold(
    weights: WeightEdits,
    model: onnx.ModelProto,
    plan: ActivationPlan,
    fixed: Collection[str] = (),
) -> bool:
    """Divide the weights behind ``plan.activation``; False, and nothing done, where it is read
    elsewhere too or made in another way than the two above.

    fixed: tensors that must keep their values, because their ranges are in use.
    """
    assert plan.divisor is not None
    graph = _Reading(model, fixed)
    if not graph.read_once(plan.activation):
        return False
    producer = graph.producer(plan.activation)
    if producer is None:
        return False
    if producer.domain == DOMAIN and producer.op_type == "DepthwiseConv1D":
        weight = producer.input[1]
        if not graph.own_weights(weight):
            return False
        weights.divide(weight, plan.divisor)
        return True
    if producer.op_type == "Concat" and len(producer.input) == 2:
        return _fold_values(weights, graph, producer, plan.divisor)
    return False


class _Reading:
    """Who makes and who reads a tensor. ``fixed`` ones count as read elsewhere too."""

    def __init__(self, model: onnx.ModelProto, fixed: Collection[str]) -> None:
        self._producers = {output: node for node in model.graph.node for output in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._fixed = {value.name for value in model.graph.output} | set(fixed)
        self._weights = {tensor.name for tensor in model.graph.initializer}

    def producer(self, tensor: str) -> onnx.NodeProto | None:
        return self._producers.get(tensor)

    def read_once(self, tensor: str) -> bool:
        return len(self._readers.get(tensor, [])) == 1 and tensor not in self._fixed

    def own_weights(self, *names: str) -> bool:
        """Whether all are initializers with one reader: equal weights of layers may be stored once."""
        return all(name in self._weights and self.read_once(name) for name in names)

    def behind(self, tensor: str, *kinds: str) -> onnx.NodeProto | None:
        """The node that ends a chain of ``kinds``, walked from ``tensor`` towards the inputs along
        first inputs, if each tensor on the way is read once."""
        node = None
        for kind in kinds:
            node = self.producer(tensor)
            if node is None or node.op_type != kind or not self.read_once(tensor):
                return None
            tensor = node.input[0]
        return node


def _fold_values(
    weights: WeightEdits, graph: _Reading, concat: onnx.NodeProto, divisor: np.ndarray
) -> bool:
    """From Concat(context of the attention heads, dynamic convolution) back to the merged
    projection, whose columns are q, k, v and the convolution's value."""
    attention, convolution = concat.input
    product = graph.behind(attention, "Reshape", "Transpose", "MatMul")
    span = graph.behind(convolution, "SpanDynamicConv")
    values = graph.behind(product.input[1], "Transpose", "Reshape") if product else None
    if values is None or span is None:
        return False
    read = [values.input[0], span.input[0]]
    split = graph.producer(read[0])
    if split is None or list(split.output[2:]) != read or not all(map(graph.read_once, read)):
        return False
    add = graph.behind(split.input[0], "Add")
    matmul = graph.behind(add.input[0], "MatMul") if add else None
    if add is None or matmul is None:
        return False
    bias, weight = add.input[1], matmul.input[1]
    if not graph.own_weights(bias, weight):
        return False
    queries_and_keys = weights.value(bias).shape[0] - len(divisor)
    whole = np.concatenate([np.ones(queries_and_keys, np.float32), divisor])
    weights.divide(weight, whole)
    weights.divide(bias, whole)
    return True
