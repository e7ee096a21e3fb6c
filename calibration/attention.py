"""The two matrix products of attention, where FP8 may compute them too.

INT8 there un-fuses TensorRT's attention kernel; FP8 keeps it, for a fixed sequence length, with the
softmax's output (0 to 1) scaled by 1/448.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import GraphError
from .table import CalibrationTable

if TYPE_CHECKING:
    import onnx

#: what lies between the scores' product and the softmax: scaling and mask
_BETWEEN = ("Add", "Div", "Mul")


@dataclasses.dataclass(frozen=True)
class ProductInput:
    """One input of a product: the node's name, which input, and the range of its values."""

    node: str
    index: int
    amax: float


def attention_inputs(model: onnx.ModelProto, table: CalibrationTable) -> Iterator[ProductInput]:
    """Queries, keys, softmax output and values of every layer.

    Raises:
        GraphError: a softmax without the two products, or a tensor the table lacks.
    """
    producers = {output: node for node in model.graph.node for output in node.output}
    for softmax in [node for node in model.graph.node if node.op_type == "Softmax"]:
        after = [n for n in model.graph.node if softmax.output[0] in n.input]
        scores = producers.get(softmax.input[0])
        while scores is not None and scores.op_type in _BETWEEN:
            scores = producers.get(scores.input[0])
        if scores is None or [n.op_type for n in (scores, *after)] != ["MatMul", "MatMul"]:
            raise GraphError(
                f"{softmax.name} has no product of queries and keys before it or none of its result "
                "and the values behind it: expected attention as export writes it"
            )
        yield ProductInput(scores.name, 0, table.amax(scores.input[0], "minmax"))
        yield ProductInput(scores.name, 1, table.amax(scores.input[1], "minmax"))
        yield ProductInput(after[0].name, 0, 1.0)
        yield ProductInput(after[0].name, 1, table.amax(after[0].input[1], "minmax"))
