"""Explicit QuantizeLinear/DequantizeLinear around the linear layers, for every runtime at once.

TensorRT 11 quantizes what the graph says and nothing else; ONNX Runtime fuses the same pattern into
its integer products. One QuantizeLinear a tensor (linears that read it share it, so TensorRT merges
their products), per tensor and symmetric; weights stored in 8 bits with one scale a column. The
products' outputs, biases, GELU, softmax, LayerNorm, residual sums, embeddings, attention, dynamic
convolution, kernel generator and heads stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GraphError
from ..precision import Precision
from .folding import fold
from .formats import activation_scale, quantized_weight, weight_scales
from .smoothing import ActivationPlan
from .workspace import WeightEdits, Workspace

if TYPE_CHECKING:
    import onnx


def quantized_graph(
    workspace: Workspace, plans: Sequence[ActivationPlan], precision: Precision
) -> onnx.ModelProto:
    """The workspace's graph with the linears of ``plans`` in 8 bits; the rest is untouched.

    A plan's divisor goes into the weights that make the activation where nothing else reads it,
    otherwise into a Mul in front of the QuantizeLinear.

    Raises:
        GraphError: a plan names a node or tensor that the graph lacks.
    """
    if not precision.quantized:
        raise GraphError(f"cannot quantize to {precision}, expected int8 or fp8")
    model = workspace.model()
    change = _Change(workspace, model, precision)
    # first all divisions of weights: a weight may be divided for one plan and stored for another
    smoothed = [change.smoothed(plan) for plan in plans]
    for plan, source in zip(plans, smoothed, strict=True):
        change.quantize(plan, source)
    change.finish()
    return model


class _Change:
    """One graph on its way from float to 8 bits."""

    def __init__(self, workspace: Workspace, model: onnx.ModelProto, precision: Precision) -> None:
        from onnx import TensorProto

        self._model, self._precision = model, precision
        self._weights = WeightEdits(workspace)
        self._type = TensorProto.INT8 if precision is Precision.INT8 else TensorProto.FLOAT8E4M3FN
        self._nodes = {node.name: node for node in model.graph.node}
        #: nodes to insert behind the producer of a tensor
        self._behind: dict[str, list[onnx.NodeProto]] = {}
        self._replaced: set[str] = set()

    def smoothed(self, plan: ActivationPlan) -> str:
        """Name of the tensor to quantize: the activation, divided."""
        if plan.divisor is None or fold(self._weights, self._model, plan):
            return plan.activation
        label = plan.linears[0].name
        factor = self._constant(f"{label}.smoothing", (1 / plan.divisor).astype(np.float32))
        multiply = self._node("Mul", [plan.activation, factor], f"{label}/Smooth")
        self._behind.setdefault(plan.activation, []).append(multiply)
        return multiply.output[0]

    def quantize(self, plan: ActivationPlan, source: str) -> None:
        """Put ``source`` and the weights that meet it into 8 bits."""
        label = plan.linears[0].name
        missing = [linear.node for linear in plan.linears if linear.node not in self._nodes]
        if missing:
            raise GraphError(f"the graph has no node {', '.join(missing)} to quantize")
        pair = [
            self._constant(f"{label}.input_scale", activation_scale(plan.amax, self._precision)),
            self._zero_point(f"{label}.input_zero_point", ()),
        ]
        quantize = self._node("QuantizeLinear", [source, *pair], f"{label}/QuantizeLinear")
        dequantize = self._node(
            "DequantizeLinear", [quantize.output[0], *pair], f"{label}/DequantizeLinear"
        )
        self._behind.setdefault(plan.activation, []).extend([quantize, dequantize])
        for linear in plan.linears:
            node = self._nodes[linear.node]
            node.input[0] = dequantize.output[0]
            node.input[1] = self._weight(plan, linear.name, linear.weight)

    def _weight(self, plan: ActivationPlan, name: str, weight: str) -> str:
        """Store the weight in 8 bits behind a DequantizeLinear; the new name of its values."""
        values = np.asarray(self._weights.value(weight), np.float32)
        if plan.divisor is not None:
            values = values * plan.divisor[:, None]
        scales = weight_scales(values, self._precision)
        inputs = [
            self._constant(
                f"{weight}.{self._precision}", quantized_weight(values, scales, self._precision)
            ),
            self._constant(f"{weight}.scale", scales),
            self._zero_point(f"{weight}.zero_point", scales.shape),
        ]
        node = self._node("DequantizeLinear", inputs, f"{name}.weight/DequantizeLinear", axis=1)
        self._behind.setdefault("", []).append(node)
        self._replaced.add(weight)
        return node.output[0]

    def _node(self, kind: str, inputs: list[str], name: str, **attributes: int) -> onnx.NodeProto:
        from onnx import helper

        return helper.make_node(kind, inputs, [f"{name}:0"], name=name, **attributes)

    def _constant(self, name: str, values: np.ndarray) -> str:
        from onnx import helper

        kind = helper.np_dtype_to_tensor_dtype(values.dtype)
        self._model.graph.initializer.append(
            helper.make_tensor(name, kind, values.shape, values.tobytes(), raw=True)
        )
        return name

    def _zero_point(self, name: str, shape: tuple[int, ...]) -> str:
        from onnx import helper

        dtype = helper.tensor_dtype_to_np_dtype(self._type)
        return self._constant(name, np.zeros(shape, dtype))

    def finish(self) -> None:
        """Put the new nodes in order and drop the float weights that nothing reads any more."""
        graph = self._model.graph
        nodes = list(self._behind.pop("", []))
        for value in (*graph.input, *graph.initializer):
            nodes.extend(self._behind.pop(value.name, []))
        for node in graph.node:
            nodes.append(node)
            for output in node.output:
                nodes.extend(self._behind.pop(output, []))
        if self._behind:
            raise GraphError(f"the graph computes no tensor {', '.join(self._behind)} to quantize")
        del graph.node[:]
        graph.node.extend(nodes)
        read = {name for node in nodes for name in node.input}
        for tensor in [t for t in graph.initializer if t.name in self._replaced - read]:
            graph.initializer.remove(tensor)
        self._weights.write(self._model)
        # shapes of intermediates go stale with every rewrite
        del graph.value_info[:]
