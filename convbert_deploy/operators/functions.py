"""Building blocks of the model-local functions that stand in for our operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


class FunctionBody:
    """Nodes of a function, appended in order; every method returns the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def constant(self, name: str, values: list[int]) -> str:
        """int64, one-dimensional."""
        tensor = numpy_helper.from_array(np.asarray(values, np.int64), name)
        self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def node(self, op_type: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, outputs, **attributes))
        return outputs[0]

    def zero_at_pads(self, source: str, mask: str, output: str) -> str:
        """``source`` (batch, seq, channels) with zeros where ``mask`` (batch, seq) is 0.

        Where, not a product: what stands at a pad may be infinite.
        """
        nothing = self.constant(f"{output}_nothing", [0])
        zero = self.node("CastLike", [nothing, source], [f"{output}_zero"])
        pads = self.node("Equal", [mask, nothing], [f"{output}_pads"])
        axis = self.constant(f"{output}_axis", [-1])
        column = self.node("Unsqueeze", [pads, axis], [f"{output}_column"])
        return self.node("Where", [column, zero, source], [output])
