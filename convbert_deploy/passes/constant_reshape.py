"""Reshapes whose target is computed from Shape nodes get a constant target instead."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


class ConstantReshape(ir.passes.InPlacePass):
    """``Reshape(x, Concat(Shape(..), ..))`` becomes ``Reshape(x, [0, 0, heads, head_dim])``.

    Requires: shapes on the values (the tracer leaves them). A target is constant when every axis
    is a number, keeps the input's axis at the same position (0), or is the only other one (-1).
    Ensures: nothing else changes; shape arithmetic left unread is removed by dead-code removal.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        targets: dict[tuple[int, ...], ir.Value] = {}
        for node in list(model.graph):
            if node.op_type != "Reshape" or node.domain != "":
                continue
            target = _constant_target(node)
            if target is None:
                continue
            if target not in targets:
                tensor = ir.tensor(np.asarray(target, np.int64), name=_name(target))
                value = ir.Value(
                    name=tensor.name,
                    shape=tensor.shape,
                    type=ir.TensorType(tensor.dtype),
                    const_value=tensor,
                )
                model.graph.register_initializer(value)
                targets[target] = value
            node.replace_input_with(1, targets[target])
            node.attributes.pop("allowzero", None)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _constant_target(node: ir.Node) -> tuple[int, ...] | None:
    source, shape = node.inputs[0], node.inputs[1]
    before, after = source.shape, node.outputs[0].shape
    if before is None or after is None or shape is None or shape.const_value is not None:
        return None
    target: list[int] = []
    for position, size in enumerate(after):
        if isinstance(size, int):
            target.append(size)
        elif position < len(before) and before[position] == size:
            target.append(0)
        else:
            target.append(-1)
    return tuple(target) if target.count(-1) <= 1 else None


def _name(target: tuple[int, ...]) -> str:
    parts = ["keep" if size == 0 else "rest" if size == -1 else str(size) for size in target]
    return f"shape_{'_'.join(parts)}"
