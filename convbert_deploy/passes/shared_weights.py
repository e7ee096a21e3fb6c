"""One copy of every weight: tied embeddings stay tied, equal tensors are stored once."""

from __future__ import annotations

import onnx_ir as ir

#: below this many elements a copy costs less than the confusion of a shared name
_MIN_ELEMENTS = 4096


class SharedWeights(ir.passes.InPlacePass):
    """Replace an initializer that equals another, or another's transpose, by that one.

    A MatMul on the transpose of a tied table (masked-LM head) reads it through a Transpose node,
    which every runtime folds when it loads the graph.
    Requires: initializers with values. Ensures: no two large initializers hold the same matrix.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        kept: dict[tuple[object, ...], ir.Value] = {}
        modified = False
        for value in list(model.graph.initializers.values()):
            tensor = value.const_value
            if tensor is None or tensor.size < _MIN_ELEMENTS:
                continue
            array = tensor.numpy()
            same = _key(array)
            if same in kept:
                _replace(value, kept[same])
                modified = True
                continue
            turned = _key(array.T) if array.ndim == 2 else None
            if turned in kept:
                _replace(value, _transposed(kept[turned], value, model))
                modified = True
                continue
            kept[same] = value
        for name in [n for n, v in model.graph.initializers.items() if not v.uses()]:
            del model.graph.initializers[name]
        return ir.passes.PassResult(model, modified=modified)


def _key(array: object) -> tuple[object, ...]:
    import hashlib

    import numpy as np

    contiguous = np.ascontiguousarray(array)
    return (contiguous.shape, str(contiguous.dtype), hashlib.sha256(contiguous).digest())


def _replace(old: ir.Value, new: ir.Value) -> None:
    for node, index in list(old.uses()):
        node.replace_input_with(index, new)


def _transposed(table: ir.Value, like: ir.Value, model: ir.Model) -> ir.Value:
    first_reader = min((node for node, _ in like.uses()), key=lambda n: _position(model, n))
    transpose = ir.node("Transpose", [table], attributes={"perm": [1, 0]})
    transpose.metadata_props.update(first_reader.metadata_props)
    model.graph.insert_before(first_reader, transpose)
    return transpose.outputs[0]


def _position(model: ir.Model, node: ir.Node) -> int:
    return next(index for index, other in enumerate(model.graph) if other is node)
