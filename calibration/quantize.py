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
from .attention import ProductInput
from .folding import fold
from .formats import activation_scale, quantized_weight, weight_scales
from .linears import Linear
from .smoothing import ActivationPlan
from .workspace import WeightEdits, Workspace

if TYPE_CHECKING:
    import onnx


def quantized_graph(
    workspace: Workspace,
    plans: Sequence[ActivationPlan],
    precision: Precision,
    products: Sequence[ProductInput] = (),
) -> onnx.ModelProto:
    """The workspace's graph with the linears of ``plans`` in 8 bits, and the inputs ``products`` of
    attention's products; the rest is untouched.

    A plan's divisor goes into the weights that make the activation where nothing else reads it,
    otherwise into a Mul in front of the QuantizeLinear.

    Raises:
        GraphError: a plan or product names a node or tensor that the graph lacks, or another one
            than the node reads; two plans name one node; a divisor of another length than the
            activation's rows; a scale that float16 cannot hold.
    """
    if not precision.quantized:
        raise GraphError(f"cannot quantize to {precision}, expected int8 or fp8")
    model = workspace.model()
    change = _Change(workspace, model, precision)
    change.keep_ranges(products)
    # first all divisions of weights: a weight may be divided for one plan and stored for another
    smoothed = [change.smoothed(plan) for plan in plans]
    for plan, source in zip(plans, smoothed, strict=True):
        change.quantize(plan, source)
    for product in products:
        change.quantize_input(product)
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
        self._fixed: frozenset[str] = frozenset()

    def keep_ranges(self, products: Sequence[ProductInput]) -> None:
        """No smoothing may divide what ``products`` read, or their ranges would be wrong."""
        self._fixed = frozenset(self._named(p.node).input[p.index] for p in products)

    def smoothed(self, plan: ActivationPlan) -> str:
        """Name of the tensor to quantize: the activation, divided."""
        for linear in plan.linears:
            self._check(plan, linear)
        if plan.divisor is None or fold(self._weights, self._model, plan, self._fixed):
            return plan.activation
        label = plan.linears[0].name
        factor = self._constant(f"{label}.smoothing", (1 / plan.divisor).astype(np.float32))
        multiply = self._node("Mul", [plan.activation, factor], f"{label}/Smooth")
        self._behind.setdefault(plan.activation, []).append(multiply)
        return multiply.output[0]

    def quantize(self, plan: ActivationPlan, source: str) -> None:
        """Put ``source`` and the weights that meet it into 8 bits."""
        dequantized = self._pair(plan.activation, source, plan.amax, plan.linears[0].name)
        for linear in plan.linears:
            node = self._named(linear.node)
            self._check(plan, linear)
            node.input[0] = dequantized
            node.input[1] = self._weight(plan, linear.name, linear.weight)

    def quantize_input(self, product: ProductInput) -> None:
        """Put one input of a product of two activations into 8 bits."""
        node = self._named(product.node)
        source = node.input[product.index]
        label = f"{product.node}.{'left' if product.index == 0 else 'right'}"
        node.input[product.index] = self._pair(source, source, product.amax, label)

    def _pair(self, behind: str, source: str, amax: float, label: str) -> str:
        """QuantizeLinear and DequantizeLinear of ``source``, placed with what follows ``behind``."""
        constants = [
            self._constant(f"{label}.input_scale", activation_scale(amax, self._precision)),
            self._zero_point(f"{label}.input_zero_point", ()),
        ]
        quantize = self._node("QuantizeLinear", [source, *constants], f"{label}/QuantizeLinear")
        dequantize = self._node(
            "DequantizeLinear", [quantize.output[0], *constants], f"{label}/DequantizeLinear"
        )
        self._behind.setdefault(behind, []).extend([quantize, dequantize])
        return dequantize.output[0]

    def _named(self, name: str) -> onnx.NodeProto:
        if name not in self._nodes:
            raise GraphError(f"the graph has no node {name} to quantize")
        return self._nodes[name]

    def _check(self, plan: ActivationPlan, linear: Linear) -> None:
        found = list(self._named(linear.node).input)
        expected = [plan.activation, linear.weight]
        if found != expected:
            raise GraphError(
                f"node {linear.node} reads {found}, expected {expected}: the plan is of another "
                "graph, or quantizes the node twice"
            )
        if plan.divisor is not None and plan.divisor.shape != (linear.rows,):
            raise GraphError(
                f"the smoothing of {plan.activation} has shape {list(plan.divisor.shape)}, expected "
                f"[{linear.rows}]"
            )

    def _weight(self, plan: ActivationPlan, name: str, weight: str) -> str:
        """Store the weight in 8 bits behind a DequantizeLinear; the new name of its values."""
        values = np.asarray(self._weights.value(weight), np.float32)
        if plan.divisor is not None:
            values = values * plan.divisor[:, None]
        scales = weight_scales(values, self._precision)
        inputs = [
            # named by the linear: equal weights of two layers are one initializer
            self._constant(
                f"{name}.weight.{self._precision}",
                quantized_weight(values, scales, self._precision),
            ),
            self._constant(f"{name}.weight.scale", scales),
            self._zero_point(f"{name}.weight.zero_point", scales.shape),
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
