"""An fp32 graph as a strongly typed fp16 or bf16 graph.

Every float tensor inside takes the new type; inputs and outputs keep theirs. Casts stand only where
an integer input becomes a number, before a float32 output, and around nodes kept in fp32.
LayerNormalization keeps ``stash_type`` 1, that is float32 statistics: ConvBERT's epsilon of 1e-12
is zero in fp16, and a row of equal numbers would divide by zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..errors import GraphError
from ..precision import Precision

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

_ELEMENT_TYPE = {Precision.FP16: TensorProto.FLOAT16, Precision.BF16: TensorProto.BFLOAT16}
#: What exporters multiply the mask with: transformers' float32 minimum, BERT's and Tensor2Tensor's
#: own. The first is infinite in both half types, the second in fp16; 0 * inf is NaN.
_KNOWN_MASK_CONSTANTS = (float(np.finfo(np.float32).min), -1e9)
#: Zero after the softmax, and its sum with any plausible score stays inside fp16's 65504. Equal to
#: ``traceable.MASK_CONSTANT``, which cannot be imported here without torch.
_HALF_MASK_CONSTANT = -30000.0
#: Conv takes bfloat16 from opset 22 on; between 20 and 22 the operators of an encoder only gained
#: types, so the number alone changes.
_BF16_OPSET = 22


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
        GraphError: a value out of the type's range (other than a known mask constant), a name in
            ``keep_fp32`` that the graph lacks, a graph already typed, or one with control flow.
    """
    typed = onnx.ModelProto()
    typed.CopyFrom(model)
    if precision is Precision.FP32:
        return typed
    _require_convertible(typed)
    _Typing(typed, precision, frozenset(keep_fp32)).apply()
    if precision is Precision.BF16:
        for scope in (typed, *typed.functions):
            for opset in scope.opset_import:
                if opset.domain in ("", "ai.onnx"):
                    opset.version = max(opset.version, _BF16_OPSET)
    return typed


def _require_convertible(model: onnx.ModelProto) -> None:
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
            if _float_constant(node) is not None or _casts_to_float(node):
                raise GraphError(
                    f"function {function.domain}.{function.name} fixes its type to float32 in a "
                    f"{node.op_type}, expected a body generic in type"
                )
        del function.value_info[:]


class _Typing:
    """The conversion of one model, in place."""

    def __init__(self, model: onnx.ModelProto, precision: Precision, keep: frozenset[str]) -> None:
        self._model, self._graph, self._precision = model, model.graph, precision
        self._type = _ELEMENT_TYPE[precision]
        self._float_names = _float_tensors(model)
        self._weights = {tensor.name: tensor for tensor in self._graph.initializer}
        self._kept = self._kept_nodes(keep)
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

    def _kept_nodes(self, keep: frozenset[str]) -> set[int]:
        nodes = self._graph.node
        unknown = keep - {node.name for node in nodes} - set(self._weights)
        if unknown:
            raise GraphError(
                f"keep_fp32 names {', '.join(sorted(unknown))}: no such node or initializer"
            )
        return {i for i, n in enumerate(nodes) if n.name in keep or not keep.isdisjoint(n.input)}

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
        constant = _float_constant(node)
        if constant is not None:
            converted = self._converted(constant, node.name or node.output[0])
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("value", converted))

    def _converted(self, tensor: TensorProto, label: str) -> TensorProto:
        values = numpy_helper.to_array(tensor)
        if values.size == 1 and values.item() in _KNOWN_MASK_CONSTANTS:
            values = np.full_like(values, _HALF_MASK_CONSTANT)
        with np.errstate(over="ignore"):
            converted = values.astype(_numpy_type(self._precision))
        back = converted.astype(np.float32)
        if not np.isfinite(back).all():
            worst = values.flat[int(np.argmax(~np.isfinite(back)))]
            raise GraphError(
                f"tensor {label} holds {worst:g}, which {self._precision} cannot represent",
                hint="keep it in fp32, or build with --bf16 or --fp32",
            )
        if values.size == 1 and values.item() != 0 and back.item() == 0:
            raise GraphError(
                f"constant {label} is {values.item():g}, which is 0 in {self._precision}",
                hint="keep it in fp32, or build with --bf16 or --fp32",
            )
        return numpy_helper.from_array(converted, tensor.name)


def _numpy_type(precision: Precision) -> DTypeLike:
    if precision is Precision.FP16:
        return np.float16
    import ml_dtypes

    return ml_dtypes.bfloat16


def _casts_to_float(node: onnx.NodeProto) -> bool:
    return node.op_type == "Cast" and any(
        attribute.name == "to" and attribute.i == TensorProto.FLOAT for attribute in node.attribute
    )


def _float_constant(node: onnx.NodeProto) -> TensorProto | None:
    """The float32 tensor a Constant or ConstantOfShape holds, however it is spelt."""
    if node.op_type == "ConstantOfShape" and not node.attribute:
        return numpy_helper.from_array(np.zeros(1, np.float32))
    if node.op_type not in ("Constant", "ConstantOfShape"):
        return None
    (attribute,) = node.attribute
    if attribute.name == "value":
        return attribute.t if attribute.t.data_type == TensorProto.FLOAT else None
    if attribute.name == "value_float":
        return numpy_helper.from_array(np.float32(attribute.f))
    if attribute.name == "value_floats":
        return numpy_helper.from_array(np.asarray(attribute.floats, np.float32))
    return None


def _float_tensors(model: onnx.ModelProto) -> frozenset[str]:
    """Names of all float32 values of the graph.

    Raises:
        GraphError: the type of a value cannot be inferred.
    """
    weightless = onnx.ModelProto()
    weightless.CopyFrom(_without_weights(model))
    try:
        inferred = onnx.shape_inference.infer_shapes(weightless).graph
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
    return frozenset(name for name, kind in types.items() if kind == TensorProto.FLOAT)


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, its float weights as inputs: protobuf cannot hand 2 GiB to the checker."""
    graph = onnx.GraphProto(name="types")
    graph.node.extend(model.graph.node)
    graph.output.extend(model.graph.output)
    graph.value_info.extend(model.graph.value_info)
    graph.input.extend(model.graph.input)
    declared = {value.name for value in graph.input}
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
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
