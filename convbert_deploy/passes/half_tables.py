"""Embedding tables in half the bytes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

#: smaller tables are no weight on disk
_MIN_ELEMENTS = 1 << 16


class HalfTables(ir.passes.InPlacePass):
    """``Gather(table, ids)`` of a float32 table becomes ``Cast(Gather(float16 table, ids))``.

    Only the rows that are looked up are converted. float16 rounds eight times finer than bfloat16,
    and embeddings need no range: a table with a number beyond 65504 stays as it is, and so does one
    that something else reads too (a tied masked-LM head).
    Requires: initializers with values. Ensures: all other tensors keep their types.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for value in list(model.graph.initializers.values()):
            tensor = value.const_value
            if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < _MIN_ELEMENTS:
                continue
            readers = {(node.op_type, index) for node, index in value.uses()}
            inside = not any(node.outputs[0].is_graph_output() for node, _ in value.uses())
            if readers == {("Gather", 0)} and inside:
                modified |= _halved(model, value, tensor.numpy())
        return ir.passes.PassResult(model, modified)


def _halved(model: ir.Model, value: ir.Value, table: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        half = table.astype(np.float16)
    if not np.isfinite(half).all():
        return False
    value.const_value = ir.tensor(half, name=value.name)
    value.type = ir.TensorType(ir.DataType.FLOAT16)
    for gather, _ in list(value.uses()):
        rows = gather.outputs[0]
        cast = ir.node("Cast", [rows], {"to": ir.DataType.FLOAT.value}, name=f"{gather.name}/Cast")
        cast.outputs[0].name = f"{cast.name}:0"
        model.graph.insert_after(gather, cast)
        ir.convenience.replace_all_uses_with(rows, cast.outputs[0])
        cast.replace_input_with(0, rows)
    return True
