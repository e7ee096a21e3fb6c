"""A half-precision graph that any CPU can run: float32 arithmetic, every result rounded.

ONNX Runtime's CPU provider has no bfloat16 operators, and runs most float16 ones in float32 between
casts of its own, some of which it drops. Here every tensor that the typed graph would hold in the
half type goes through that type and back, and arithmetic inside an operator is float32, as a GPU's
matrix units and our kernels accumulate. A runtime that fuses operators rounds less often.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..precision import Precision
from .masks import float_constant, repair_mask_constants
from .ranges import float_tensors, kept_nodes
from .typed import ELEMENT_TYPE, half_values, require_convertible

if TYPE_CHECKING:
    from ..backends.base import Batch
    from .workspace import Workspace

#: Endings of the names of what stands between a tensor and its rounded self.
_EXACT_VALUE, _HALF_VALUE = ".exact", ".half"
#: Operators whose results are among their inputs, or differ in sign: rounding again changes nothing.
_EXACT = frozenset(
    (
        *("Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Tile"),
        *("Slice", "Split", "Concat", "Gather", "GatherElements", "GatherND", "Where", "Pad"),
        *("Neg", "Abs", "Relu", "Max", "Min", "ReduceMax", "ReduceMin"),
    )
)


def emulated_graph(
    model: onnx.ModelProto, precision: Precision, *, keep_fp32: Iterable[str] = ()
) -> onnx.ModelProto:
    """A float32 graph with the rounding, and the overflow, of ``typed_graph``'s.

    Args:
        model: an fp32 graph, quantized or not. Weights that are references to external data are
            rounded by nodes of the graph, and not checked.
        precision: FP16 or BF16; FP32 returns a plain copy.
        keep_fp32: as for ``typed_graph``.

    Raises:
        GraphError: as ``typed_graph``, the check of scales excepted.
    """
    emulated = onnx.ModelProto()
    emulated.CopyFrom(model)
    if precision is Precision.FP32:
        return emulated
    require_convertible(emulated)
    repair_mask_constants(emulated)
    _Emulation(emulated, precision, keep_fp32).apply()
    return emulated


class _Emulation:
    """The conversion of one model, in place."""

    def __init__(self, model: onnx.ModelProto, precision: Precision, keep: Iterable[str]) -> None:
        self._graph, self._precision = model.graph, precision
        self._floats = float_tensors(model)
        self._kept = kept_nodes(model, keep)
        self._nodes: list[onnx.NodeProto] = []
        #: the name of the rounded form of each tensor that has one; its own where only that exists
        self._rounded: dict[str, str] = {}

    def apply(self) -> None:
        self._round_weights()
        for index, node in enumerate(list(self._graph.node)):
            if index in self._kept:
                self._nodes.append(node)
            else:
                self._add_typed(node)
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)
        del self._graph.value_info[:]

    def _add_typed(self, node: onnx.NodeProto) -> None:
        # the typed graph's Cast reads any type
        if node.op_type != "Cast":
            for position, name in enumerate(node.input):
                if name in self._floats:
                    node.input[position] = self._rounding(name)
        exact = node.op_type in _EXACT
        constant = float_constant(node)
        if constant is not None:
            values = self._round(constant, node.output[0])
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("value", values))
            exact = True
        self._nodes.append(node)
        for position, name in enumerate(node.output):
            if name in self._floats:
                self._rounded[name] = name
                if not exact:
                    node.output[position] = f"{name}{_EXACT_VALUE}"
                    self._add_casts(node.output[position], name)

    def _round_weights(self) -> None:
        """In place, or beside the original where a kept node reads that."""
        kept, typed = set(), set()
        for index, node in enumerate(self._graph.node):
            (kept if index in self._kept else typed).update(node.input)
        for tensor in list(self._graph.initializer):
            inside = tensor.data_type == TensorProto.FLOAT and not tensor.external_data
            if inside and tensor.name in typed:
                name = tensor.name
                rounded = self._round(tensor, name)
                if name in kept:
                    tensor = self._graph.initializer.add()
                    rounded.name = f"{name}.{self._precision}"
                tensor.CopyFrom(rounded)
                self._rounded[name] = rounded.name

    def _round(self, tensor: TensorProto, name: str) -> TensorProto:
        values = half_values(numpy_helper.to_array(tensor), self._precision, name)
        return numpy_helper.from_array(values.astype(np.float32), tensor.name)

    def _rounding(self, name: str) -> str:
        """The rounded form of a tensor, made once."""
        if name not in self._rounded:
            self._rounded[name] = f"{name}.{self._precision}"
            self._add_casts(name, self._rounded[name])
        return self._rounded[name]

    def _add_casts(self, source: str, target: str) -> None:
        half, kind = f"{target}{_HALF_VALUE}", ELEMENT_TYPE[self._precision]
        self._nodes += [
            helper.make_node("Cast", [source], [half], name=f"{half}/Cast", to=kind),
            helper.make_node("Cast", [half], [target], name=f"{target}/Cast", to=TensorProto.FLOAT),
        ]


@dataclasses.dataclass(frozen=True)
class NonFinite:
    """A tensor that held NaN or infinities. ``row``: the first row of all batches, counted from 0,
    where it did; None where the tensor has no rows."""

    tensor: str
    nan: int
    infinite: int
    row: int | None

    def __str__(self) -> str:
        place = "" if self.row is None else f", first in row {self.row}"
        return f"{self.tensor}: {self.nan} NaN, {self.infinite} infinite{place}"


def non_finite(
    workspace: Workspace,
    model: onnx.ModelProto,
    batches: Iterable[Batch],
    *,
    max_tokens: int = 1024,
) -> tuple[NonFinite, ...]:
    """Run ``model`` and count what is not finite in its intermediates.

    NaN and infinity inside a half-precision graph need not show at its outputs: a softmax or a
    QuantizeLinear makes finite, wrong numbers of them.

    Args:
        workspace: where ``model`` comes from, or any that is open for one with its weights inside.
        model: a float32, fp16 or emulated graph. ONNX Runtime's CPU provider cannot run bfloat16:
            give ``emulated_graph``.
        max_tokens: run a batch in pieces of at most so many tokens, and at least one row: all
            tensors of a piece are in memory at once.

    Returns:
        The tensors that were not finite, in graph order: the first is where it began.

    Raises:
        EngineError: ONNX Runtime cannot load the graph.
    """
    kinds = {TensorProto.FLOAT, TensorProto.FLOAT16}
    floats = float_tensors(model, kinds)
    names = [
        name
        for node in model.graph.node
        for name in node.output
        if name in floats and not name.endswith((_EXACT_VALUE, _HALF_VALUE))
    ]
    found: dict[str, NonFinite] = {}
    # optimizations would fuse tensors away, and with them what overflowed between
    with workspace.runner(model, outputs=names, optimize=False) as runner:
        first_row = 0
        for batch in batches:
            for piece in _pieces(batch, max_tokens):
                rows = len(piece["input_ids"])
                for name, array in runner.infer(piece).items():
                    if not np.isfinite(array).all():
                        found[name] = _counted(found.get(name), name, array, rows, first_row)
                first_row += rows
    return tuple(found[name] for name in names if name in found)


def _pieces(batch: Batch, max_tokens: int) -> Iterator[Batch]:
    ids = batch["input_ids"]
    rows = max(1, max_tokens // max(1, ids[0].size)) if len(ids) else 1
    for start in range(0, len(ids), rows):
        yield {name: array[start : start + rows] for name, array in batch.items()}


def _counted(
    before: NonFinite | None, name: str, array: np.ndarray, rows: int, first_row: int
) -> NonFinite:
    row = None
    # the rows of a multiple-choice batch are flattened with their choices
    if array.ndim and array.shape[0] % rows == 0 and array.shape[0]:
        position = int(np.flatnonzero(~np.isfinite(array).reshape(array.shape[0], -1).all(1))[0])
        row = first_row + position // (array.shape[0] // rows)
    counts = int(np.isnan(array).sum()), int(np.isinf(array).sum())
    if before is None:
        return NonFinite(name, *counts, row)
    return NonFinite(name, before.nan + counts[0], before.infinite + counts[1], before.row)
