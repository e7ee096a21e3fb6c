"""An fp32 graph, quantized or not, as a strongly typed fp16 or bf16 graph.

Every float tensor inside takes the new type; inputs and outputs keep theirs. Casts stand only where
an integer input becomes a number, before a float32 output, and around nodes kept in fp32.
Quantized tensors and their zero points stay as they are; scales take the type of what is quantized,
and a QuantizeLinear and its DequantizeLinear always have the same one.
LayerNormalization keeps ``stash_type`` 1, that is float32 statistics: ConvBERT's epsilon of 1e-12
is zero in fp16, and a row of equal numbers would divide by zero.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..errors import GraphError
from ..precision import Precision
from .masks import float_constant, repair_mask_constants
from .ranges import QUANTIZERS, float_tensors, kept_nodes

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

#: ONNX element type of each half precision
ELEMENT_TYPE = {Precision.FP16: TensorProto.FLOAT16, Precision.BF16: TensorProto.BFLOAT16}
#: DequantizeLinear's largest output over its scale. A type that is not listed is not checked.
_LARGEST_QUANTIZED = {
    TensorProto.INT8: 127.0,
    TensorProto.UINT8: 255.0,
    TensorProto.FLOAT8E4M3FN: 448.0,
}
_MAX_SCALE_CHANGE = 1e-3
_FP32_HINT = "keep it in fp32, or build with --bf16 or --fp32"
_ONNX = ("", "ai.onnx")
#: Newer opsets gave these attributes whose absence means what it always did.
_GAINED_OPTIONS = {*QUANTIZERS, "Cast", "CastLike"}


def typed_graph(
    model: onnx.ModelProto, precision: Precision, *, keep_fp32: Iterable[str] = ()
) -> onnx.ModelProto:
    """A copy of ``model`` whose float32 tensors are ``precision``.

    Args:
        model: an fp32 graph; model-local functions in it must be generic in type.
        precision: FP16 or BF16; FP32 returns a plain copy.
        keep_fp32: names of nodes that stay in float32, or of initializers, which stand for every
            node that reads them.

    Raises:
        GraphError: a value out of the type's range (other than a mask constant), a scale that the
            type cannot represent to 1e-3, a name in ``keep_fp32`` that the graph lacks, a graph
            already typed, one with control flow, or one of an opset too old for the type.
    """
    typed = onnx.ModelProto()
    typed.CopyFrom(model)
    if precision is Precision.FP32:
        return typed
    require_convertible(typed)
    repair_mask_constants(typed)
    _Typing(typed, precision, keep_fp32).apply()
    require_opset(typed, _needed_opset(typed, precision))
    return typed


def _needed_opset(model: onnx.ModelProto, precision: Precision) -> int:
    """Conv takes bfloat16 from opset 22 on, scales are half from 19 on. Every runtime reads FP8 from
    21 on; ONNX Runtime and TensorRT-RTX do from 19 on."""
    if precision is Precision.BF16:
        return 22
    if any(tensor.data_type == TensorProto.FLOAT8E4M3FN for tensor in model.graph.initializer):
        return 21
    return 19 if any(node.op_type in QUANTIZERS for node in model.graph.node) else 1


def require_convertible(model: onnx.ModelProto) -> None:
    """Raises GraphError: typed already, control flow, or a function that fixes its own type."""
    graph = model.graph
    if not any(tensor.data_type == TensorProto.FLOAT for tensor in graph.initializer):
        raise GraphError(
            "the graph has no float32 weights: it is typed already",
            hint="give the fp32 graph that convbert-deploy export wrote",
        )
    for node in graph.node:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise GraphError(f"node {node.name} ({node.op_type}) has a sub-graph, expected none")
    for function in model.functions:
        for node in function.node:
            if float_constant(node) is not None or _casts_to_float(node):
                raise GraphError(
                    f"function {function.domain}.{function.name} fixes its type to float32 in a "
                    f"{node.op_type}, expected a body generic in type"
                )
        del function.value_info[:]


class _Typing:
    """The conversion of one model, in place."""

    def __init__(self, model: onnx.ModelProto, precision: Precision, keep: Iterable[str]) -> None:
        self._model, self._graph, self._precision = model, model.graph, precision
        self._type = ELEMENT_TYPE[precision]
        self._float_names = float_tensors(model)
        self._kept = kept_nodes(model, keep)
        self._scales = scale_uses(model)
        self._nodes: list[onnx.NodeProto] = []
        #: element type each float tensor has under its own name
        self._native: dict[str, int] = {}
        self._cast_names: dict[tuple[str, int], str] = {}

    def apply(self) -> None:
        self._type_weights()
        for value in self._graph.input:
            if value.name in self._float_names:
                self._native[value.name] = TensorProto.FLOAT
        outputs = {value.name for value in self._graph.output} & self._float_names
        inner = {name: f"{name}.{self._precision}" for name in outputs}
        for index, node in enumerate(list(self._graph.node)):
            self._type_node(node, kept=index in self._kept, renamed=inner)
        for value in self._graph.output:
            if value.name in outputs:
                cast = helper.make_node(
                    "Cast",
                    [inner[value.name]],
                    [value.name],
                    name=f"{value.name}.cast",
                    to=TensorProto.FLOAT,
                )
                self._nodes.append(cast)
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)
        del self._graph.value_info[:]

    def _type_weights(self) -> None:
        """Weights take the type of the nodes that read them; both, where both do."""
        kept, typed = set(), set()
        for index, node in enumerate(self._graph.node):
            (kept if index in self._kept else typed).update(node.input)
        tensors = list(self._graph.initializer)
        del self._graph.initializer[:]
        for tensor in tensors:
            if tensor.data_type != TensorProto.FLOAT:
                self._graph.initializer.append(tensor)
                continue
            if tensor.name in kept:
                self._native[tensor.name] = TensorProto.FLOAT
                self._graph.initializer.append(tensor)
            if tensor.name in typed or tensor.name not in kept:
                converted = self._converted(tensor, tensor.name)
                if tensor.name in kept:
                    converted.name = f"{tensor.name}.{self._precision}"
                    self._cast_names[tensor.name, self._type] = converted.name
                else:
                    self._native[tensor.name] = self._type
                self._graph.initializer.append(converted)

    def _type_node(self, node: onnx.NodeProto, kept: bool, renamed: dict[str, str]) -> None:
        wanted = TensorProto.FLOAT if kept else self._type
        # A Cast reads any type: one in front of it would only round twice.
        if node.op_type != "Cast":
            for index, name in enumerate(node.input):
                node.input[index] = self._as(renamed.get(name, name), wanted)
        else:
            node.input[0] = renamed.get(node.input[0], node.input[0])
        if not kept:
            self._type_attributes(node)
        for index, name in enumerate(node.output):
            if name in self._float_names:
                node.output[index] = renamed.get(name, name)
                self._native[node.output[index]] = wanted
        self._nodes.append(node)

    def _as(self, name: str, wanted: int) -> str:
        """``name`` in type ``wanted``, through a Cast placed once."""
        if self._native.get(name, wanted) == wanted:
            return name
        if (name, wanted) not in self._cast_names:
            cast = f"{name}.to_{'fp32' if wanted == TensorProto.FLOAT else self._precision}"
            self._nodes.append(helper.make_node("Cast", [name], [cast], name=cast, to=wanted))
            self._cast_names[name, wanted] = cast
        return self._cast_names[name, wanted]

    def _type_attributes(self, node: onnx.NodeProto) -> None:
        if _casts_to_float(node):
            for attribute in node.attribute:
                if attribute.name == "to":
                    attribute.i = self._type
        constant = float_constant(node)
        if constant is not None:
            converted = self._converted(constant, node.output[0])
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("value", converted))

    def _converted(self, tensor: TensorProto, name: str) -> TensorProto:
        if tensor.external_data:
            raise GraphError(f"the values of {name} are external data, expected them in the model")
        values = numpy_helper.to_array(tensor)
        converted = half_values(values, self._precision, name)
        if name in self._scales:
            _require_scale(values, converted, self._scales[name], name, self._precision)
        return numpy_helper.from_array(converted, tensor.name)


def half_values(values: np.ndarray, precision: Precision, label: str) -> np.ndarray:
    """float32 ``values`` rounded to the nearest in the half type.

    Raises:
        GraphError: one is out of range, or the only one vanishes; ``label`` names the tensor.
    """
    with np.errstate(over="ignore"):
        converted = values.astype(_numpy_type(precision))
    back = converted.astype(np.float32)
    if not np.isfinite(back).all():
        worst = values.flat[int(np.argmax(~np.isfinite(back)))]
        raise GraphError(
            f"tensor {label} holds {worst:g}, which {precision} cannot represent", hint=_FP32_HINT
        )
    if values.size == 1 and values.item() != 0 and back.item() == 0:
        raise GraphError(
            f"constant {label} is {values.item():g}, which is 0 in {precision}", hint=_FP32_HINT
        )
    return converted


def scale_uses(model: onnx.ModelProto) -> dict[str, list[tuple[str, float]]]:
    """By scale tensor: each node reading it, as (op type, largest quantized value; 0 unknown)."""
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    uses: dict[str, list[tuple[str, float]]] = collections.defaultdict(list)
    for node in model.graph.node:
        if node.op_type in QUANTIZERS:
            zero_point = node.input[2] if len(node.input) > 2 else ""
            kind = kinds.get(zero_point, kinds.get(node.input[0], TensorProto.UNDEFINED))
            uses[node.input[1]].append((node.op_type, _LARGEST_QUANTIZED.get(kind, 0.0)))
    return dict(uses)


def _require_scale(
    scale: np.ndarray,
    converted: np.ndarray,
    uses: Iterable[tuple[str, float]],
    label: str,
    precision: Precision,
) -> None:
    """A rounded scale moves every value by the same factor, so its error does not average out."""
    back = converted.astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        change = np.abs(back / scale - 1)
        good = (scale > 0) & (change <= _MAX_SCALE_CHANGE)
        for op_type, largest in uses:
            # QuantizeLinear may multiply by the reciprocal in the half type
            used = 1 / back if op_type == "QuantizeLinear" else back * largest
            good &= np.isfinite(used.astype(converted.dtype).astype(np.float32))
    if not good.all():
        worst = float(scale[~good].flat[0])
        raise GraphError(
            f"scale {label} holds {worst:g}, which becomes {float(back[~good].flat[0]):g} in "
            f"{precision}: expected a change below {_MAX_SCALE_CHANGE:g}, and its reciprocal and "
            "all it scales within the type's range",
            hint=_FP32_HINT,
        )


def require_opset(model: onnx.ModelProto, minimum: int) -> None:
    """Raise the declared opset to ``minimum``, in place, where no operator in use changes by it.

    Raises:
        GraphError: an operator of the graph means something else in the newer opset.
    """
    for scope in (model, *model.functions):
        nodes = scope.graph.node if isinstance(scope, onnx.ModelProto) else scope.node
        used = {node.op_type for node in nodes if node.domain in _ONNX} - _GAINED_OPTIONS
        for opset in scope.opset_import:
            if opset.domain not in _ONNX or opset.version >= minimum:
                continue
            for op_type in sorted(used):
                if _interface(op_type, opset.version) != _interface(op_type, minimum):
                    raise GraphError(
                        f"the graph is of opset {opset.version} and needs {minimum}, where "
                        f"{op_type} is another operator",
                        hint="convbert-deploy export",
                    )
            opset.version = minimum


def _interface(op_type: str, opset: int) -> tuple[object, ...]:
    """What a node of the operator may say, element types aside."""
    schema = onnx.defs.get_schema(op_type, opset)
    attributes = {
        name: (attribute.type, attribute.required, attribute.default_value.SerializeToString())
        for name, attribute in schema.attributes.items()
    }
    return [(value.name, value.option) for value in schema.inputs], attributes


def _numpy_type(precision: Precision) -> DTypeLike:
    if precision is Precision.FP16:
        return np.float16
    import ml_dtypes

    return ml_dtypes.bfloat16


def _casts_to_float(node: onnx.NodeProto) -> bool:
    return node.op_type == "Cast" and any(
        attribute.name == "to" and attribute.i == TensorProto.FLOAT for attribute in node.attribute
    )
