"""Constants that mask attention, made finite in every number format.

Exporters mask padded keys by adding a huge negative number to their scores: float32's minimum
(transformers), -1e9 (BERT's successors, Tensor2Tensor) or -inf (torch's own attention). In fp16 all
three are -inf, and ``(1 - mask) * -inf`` is NaN wherever the mask is 1; a QuantizeLinear further on
turns that NaN into a finite, wrong number, so nothing at the outputs tells. -30000 does the same
work: exp(-30000) is 0 in every format, and its sum with any plausible score stays inside fp16.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterable, Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..errors import GraphError

#: Equal to ``traceable.MASK_CONSTANT``, which cannot be imported here without torch.
MASK_CONSTANT = -30000.0
#: The smallest magnitude that masks: the original BERT's (1 - mask) * -10000.
_SMALLEST_MASK = 1e4

_FLOAT_TYPES = frozenset(
    {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16}
)
#: Operators that hand on their data inputs (these positions; None: all) value by value, so that
#: what reached them is still a mask, or scores with a mask.
_PASSING: dict[str, frozenset[int] | None] = {
    **dict.fromkeys(
        (
            *("Cast", "CastLike", "Identity", "Neg", "Div", "Trilu"),
            *("Reshape", "Squeeze", "Unsqueeze", "Expand", "Tile", "Transpose", "Flatten"),
            *("Slice", "Split", "Gather", "GatherND", "GatherElements"),
        ),
        frozenset({0}),
    ),
    "Pad": frozenset({0, 2}),
    "ScatterND": frozenset({0, 2}),
    "ScatterElements": frozenset({0, 2}),
    "Mul": None,
    "Concat": None,
}
#: Operators that join a mask to the scores: by sum, or in their place.
_JOINING: dict[str, frozenset[int] | None] = {
    **dict.fromkeys(("Add", "Sub", "Sum", "Max", "Min", "Clip"), None),
    "Where": frozenset({1, 2}),
}

#: (tensor, whether it has been joined to something that may be the scores)
_State = tuple[str, bool]
_ROOT: _State = ("", False)
#: (index of a node, position among its inputs)
_Use = tuple[int, int]


def repair_mask_constants(model: onnx.ModelProto) -> tuple[str, ...]:
    """Clamp every constant that masks attention to +-30000, in place.

    A constant masks attention where it flows, through sums, products and changes of shape, into an
    Add, Sub or Where before a Softmax, or into the mask of an ``Attention`` node. Where it is also
    read for something else, the mask gets a copy of its own. Rows of which every key is masked
    become uniform instead of NaN; all other rows keep their probabilities.

    Args:
        model: a graph of any float type with its weights inside; initializers that refer to
            external data are not looked into.

    Returns:
        The names of the repaired initializers and of the nodes that hold repaired constants.

    Raises:
        GraphError: a constant holds an infinity or NaN and masks no attention that could be found;
            the model is then unchanged.
    """
    flow = _Flow(model.graph)
    _refuse_functions(model)
    repairs = []
    for constant in _large_constants(model.graph, -MASK_CONSTANT):
        uses = flow.uses(constant.output)
        masking = [use for use in uses if flow.masks(use)]
        # an unused constant does no harm
        others = len(uses) > len(masking) or constant.output in flow.outputs
        if others:
            _require_finite(constant)
        if masking:
            if np.isnan(constant.values).any():
                raise GraphError(f"the mask constant {constant.name} holds nan, expected numbers")
            repairs.append((constant, masking if others else None))
    copies = [
        (constant.output, _clamp(model.graph, constant, masking)) for constant, masking in repairs
    ]
    for output, copy in copies:
        if copy is not None:
            place = next(i for i, node in enumerate(model.graph.node) if output in node.output)
            model.graph.node.insert(place + 1, copy)
    return tuple(constant.name for constant, _ in repairs)


def mask_tensors(model: onnx.ModelProto) -> frozenset[str]:
    """Names of the mask constants (1e4 and larger) and of the tensors from there to their Softmax.

    That is the mask in all its shapes and the scores it has been added to. Their magnitude is the
    mask's, and ``repair_mask_constants`` bounds it.
    """
    flow = _Flow(model.graph)
    found: set[str] = set()
    for constant in _large_constants(model.graph, _SMALLEST_MASK):
        masking = [use for use in flow.uses(constant.output) if flow.masks(use)]
        if masking:
            found |= flow.path(masking) | {constant.output}
    return frozenset(found)


def float_constant(
    node: onnx.NodeProto, kinds: Collection[int] = (TensorProto.FLOAT,)
) -> TensorProto | None:
    """The tensor a Constant or ConstantOfShape holds, however it is spelt, if of one of ``kinds``.

    A number given as an attribute of its own is float32.
    """
    if node.op_type == "ConstantOfShape" and not node.attribute:
        tensor = numpy_helper.from_array(np.zeros(1, np.float32))
    elif node.op_type not in ("Constant", "ConstantOfShape"):
        return None
    else:
        (attribute,) = node.attribute
        if attribute.name == "value":
            tensor = attribute.t
        elif attribute.name == "value_float":
            tensor = numpy_helper.from_array(np.float32(attribute.f))
        elif attribute.name == "value_floats":
            tensor = numpy_helper.from_array(np.asarray(attribute.floats, np.float32))
        else:
            return None
    return tensor if tensor.data_type in kinds else None


@dataclasses.dataclass(frozen=True)
class _Constant:
    """``name`` is what a message calls it, ``output`` the tensor its readers see."""

    name: str
    output: str
    values: np.ndarray
    holder: TensorProto | onnx.NodeProto


class _Flow:
    """Who reads what, and which of it ends in an attention's softmax."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._nodes = graph.node
        self.outputs = frozenset(value.name for value in graph.output)
        self._uses: dict[str, list[_Use]] = collections.defaultdict(list)
        for index, node in enumerate(graph.node):
            for position, name in enumerate(node.input):
                self._uses[name].append((index, position))

    def uses(self, tensor: str) -> list[_Use]:
        return self._uses.get(tensor, [])

    def masks(self, use: _Use) -> bool:
        """Whether what is read there ends in the softmax of an attention."""
        return bool(self._leading_on([use]))

    def path(self, start: Iterable[_Use]) -> set[str]:
        """The tensors between ``start`` and a softmax."""
        return {name for name, _ in self._leading_on(start)} - {_ROOT[0]}

    def _leading_on(self, start: Iterable[_Use]) -> set[_State]:
        """The root and the states between it and a softmax; empty where none is reached."""
        before: dict[_State, set[_State]] = collections.defaultdict(set)
        waiting = [(_ROOT, use) for use in start]
        found: set[_State] = set()
        while waiting:
            state, use = waiting.pop()
            if self._masks_attention(use, joined=state[1]):
                found.add(state)
            for following in self._after(use, joined=state[1]):
                if following not in before:
                    waiting += [(following, next_use) for next_use in self.uses(following[0])]
                before[following].add(state)
        backwards = list(found)
        while backwards:
            led_to = before.get(backwards.pop(), set()) - found
            found |= led_to
            backwards += led_to
        return found

    def _masks_attention(self, use: _Use, *, joined: bool) -> bool:
        node, position = self._nodes[use[0]], use[1]
        if node.domain not in ("", "ai.onnx"):
            return False
        return (node.op_type == "Softmax" and joined) or (
            node.op_type == "Attention" and position == 3
        )

    def _after(self, use: _Use, *, joined: bool) -> Iterator[_State]:
        node, position = self._nodes[use[0]], use[1]
        if node.domain not in ("", "ai.onnx"):
            return
        joining = node.op_type in _JOINING
        positions = (_JOINING if joining else _PASSING).get(node.op_type, frozenset())
        if positions is None or position in positions:
            for name in node.output:
                if name:
                    yield name, joined or joining


def _large_constants(graph: onnx.GraphProto, limit: float) -> Iterator[_Constant]:
    """Constants that reach beyond ``limit`` or hold NaN."""
    for tensor in graph.initializer:
        if tensor.data_type in _FLOAT_TYPES and not tensor.external_data:
            values = numpy_helper.to_array(tensor)
            if _beyond(values, limit):
                yield _Constant(tensor.name, tensor.name, values, tensor)
    for node in graph.node:
        held = float_constant(node, _FLOAT_TYPES)
        if held is not None:
            values = numpy_helper.to_array(held)
            if _beyond(values, limit):
                yield _Constant(node.name or node.output[0], node.output[0], values, node)


def _beyond(values: np.ndarray, limit: float) -> bool:
    """Whether any |value| is over ``limit`` or NaN; no copy is made of the values."""
    return values.size > 0 and not (float(values.min()) >= -limit and float(values.max()) <= limit)


def _require_finite(constant: _Constant) -> None:
    finite = np.isfinite(constant.values.astype(np.float64))
    if not finite.all():
        worst = float(constant.values[~finite].flat[0])
        raise GraphError(
            f"constant {constant.name} holds {worst:g} and masks no attention that could be found: "
            "expected finite numbers",
            hint="export the model with a finite constant, such as -30000, in its place",
        )


def _refuse_functions(model: onnx.ModelProto) -> None:
    """What flows through a model-local function is not followed."""
    for function in model.functions:
        for node in function.node:
            held = float_constant(node, _FLOAT_TYPES)
            if held is not None:
                name = f"{node.output[0]} of function {function.name}"
                _require_finite(_Constant(name, name, numpy_helper.to_array(held), node))


def _clamp(
    graph: onnx.GraphProto, constant: _Constant, uses: list[_Use] | None
) -> onnx.NodeProto | None:
    """Clamp a constant for all its readers or, where ``uses`` is given, a copy of it for those.

    Returns:
        The copy, if a node: putting it into the graph would move the nodes that ``uses`` counts.
    """
    bound = np.asarray(-MASK_CONSTANT, constant.values.dtype)
    clamped = np.maximum(np.minimum(constant.values, bound), -bound)
    holder = constant.holder
    if uses is not None:
        holder = _copy_for(graph, constant, uses)
    if isinstance(holder, TensorProto):
        holder.CopyFrom(numpy_helper.from_array(clamped, holder.name))
        return None
    del holder.attribute[:]
    holder.attribute.append(helper.make_attribute("value", numpy_helper.from_array(clamped)))
    return holder if uses is not None else None


def _copy_for(
    graph: onnx.GraphProto, constant: _Constant, uses: list[_Use]
) -> TensorProto | onnx.NodeProto:
    name = f"{constant.output}.mask"
    for index, position in uses:
        graph.node[index].input[position] = name
    if isinstance(constant.holder, TensorProto):
        tensor = graph.initializer.add()
        tensor.name = name
        return tensor
    node = onnx.NodeProto()
    node.CopyFrom(constant.holder)
    node.name = node.output[0] = name
    return node
