"""Names a person can search for: module path and operation, taken from the trace."""

from __future__ import annotations

import ast
import collections

import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"


class ReadableNames(ir.passes.InPlacePass):
    """Nodes become ``encoder.layer.0.attention.self.projections/MatMul``, their outputs the same
    with ``:0``; a weight that the tracer transposed gets its parameter's name back.

    Requires: the tracer's scope metadata. Ensures: unique names; the scope metadata is gone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        counts: collections.Counter[str] = collections.Counter()
        outputs = set(model.graph.outputs)
        for node in model.graph:
            base = f"{_scope(node)}/{node.op_type}".lstrip("/")
            counts[base] += 1
            node.name = base if counts[base] == 1 else f"{base}_{counts[base]}"
            for index, value in enumerate(node.outputs):
                if value not in outputs:
                    value.name = f"{node.name}:{index}"
                    value.shape, value.type = None, None
        _name_weights(model)
        for node in model.graph:
            node.metadata_props.clear()
            node.doc_string = None
        for value in [
            *model.graph.inputs,
            *model.graph.outputs,
            *model.graph.initializers.values(),
        ]:
            value.metadata_props.clear()
        model.graph.metadata_props.clear()
        return ir.passes.PassResult(model, modified=True)


def _scope(node: ir.Node) -> str:
    """The module a node was traced in; shape-like nodes that lost it take their producer's."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    path = scopes[-2] if len(scopes) > 1 else ""
    if path and not path.startswith("_empty"):
        return _short(path)
    producer = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    return producer.name.rpartition("/")[0] if producer is not None and producer.name else "inputs"


def _short(path: str) -> str:
    for prefix in ("model.", "convbert."):
        path = path.removeprefix(prefix)
    return "inputs" if path in ("model", "convbert") else path


def _name_weights(model: ir.Model) -> None:
    taken: collections.Counter[str] = collections.Counter()
    renamed: dict[str, ir.Value] = {}
    for value in list(model.graph.initializers.values()):
        name = _weight_name(value)
        taken[name] += 1
        renamed[name if taken[name] == 1 else f"{name}_{taken[name]}"] = value
    model.graph.initializers.clear()
    for name, value in renamed.items():
        value.name = name
        if value.const_value is not None:
            value.const_value.name = name
        model.graph.initializers[name] = value


def _weight_name(value: ir.Value) -> str:
    """The traced parameter's path; for a tensor the tracer folded, that of its first reader."""
    name = value.name or ""
    readers = [node for node, _ in value.uses()]
    table = next((node for node in readers if node.op_type == "Gather"), None)
    if table is not None:
        # a tied table is known by its embedding, not by the head that reads it too
        return f"{table.name.rpartition('/')[0]}.weight"
    if "." in name or name.startswith("shape_"):
        return _short(name)
    reader = readers[0] if readers else None
    if reader is None or value.const_value is None:
        return name
    scope = reader.name.rpartition("/")[0]
    if reader.op_type == "MatMul" and value.const_value.size > 1:
        return f"{scope}.weight"
    return f"{scope}.{reader.op_type.lower()}_constant".lstrip(".")
