"""Every encoder layer becomes one node of the CPU engine, on rows without padding."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

from convbert_deploy.operators import encoder_layer
from convbert_deploy.operators.domain import DOMAIN, DOMAIN_VERSION
from convbert_deploy.operators.encoder_layer import LayerInputs
from convbert_deploy.operators.packed_weight import WeightType, packed
from convbert_deploy.passes.layer_pattern import Layer, layer_around
from convbert_deploy.passes.linear_patterns import Linear, linear_weight
from convbert_deploy.passes.matching import MismatchError
from convbert_deploy.passes.pass_report import PassReport

_REPLACED = ("SpanDynamicConv", "DepthwiseConv1D")


@dataclasses.dataclass(frozen=True)
class EncoderLayersOptions:
    """What the layers compute in.

    linears: of linear layers in float32; those that a calibrated graph has in 8 bits stay in 8 bits.
    generator: of the kernel generator. static_activations: quantize the inputs of a calibrated
    graph's linears by the calibrated steps, else by one for each token. bfloat16_attention: attention
    and rows between the products in bfloat16.
    """

    linears: WeightType = WeightType.FP32
    generator: WeightType = WeightType.FP32
    static_activations: bool = False
    bfloat16_attention: bool = False


@dataclasses.dataclass
class ReportedResult(ir.passes.PassResult):
    """A pass's result with its report."""

    report: PassReport


class EncoderLayers(ir.passes.InPlacePass):
    """``PackRows``, an ``EncoderLayer`` for each encoder layer, ``UnpackRows``.

    Where only the first row of each sequence is read of the last layer, as by a sequence classifier,
    that layer computes no other, and nothing is unpacked.

    A graph with padding hf keeps its pads as rows, a masked one leaves them out. All or nothing:
    one layer that does not match leaves the graph as it is, and the report names it.

    Requires: initializers with values. Ensures: either no node has changed, or no operator of an
    exported layer is left. The result is a ``ReportedResult``.
    """

    def __init__(self, options: EncoderLayersOptions | None = None) -> None:
        super().__init__()
        self._options = options or EncoderLayersOptions()

    def requires(self, model: ir.Model) -> None:
        without = [n for n, value in model.graph.initializers.items() if value.const_value is None]
        if without:
            raise ir.passes.PreconditionError(f"initializers without values: {', '.join(without)}")

    def call(self, model: ir.Model) -> ReportedResult:
        anchors = [n for n in model.graph if (n.domain, n.op_type) == (DOMAIN, "SpanDynamicConv")]
        layers, reasons = _matched(anchors)
        if not reasons:
            reasons = _chain_faults(layers)
        name, expected = type(self).__name__, len(anchors)
        if reasons or not layers:
            report = PassReport(name, expected, 0, reasons or ("no SpanDynamicConv in the graph",))
            return ReportedResult(model, False, report)
        _Rewrite(model, layers, self._options).run()
        RemoveUnusedNodesPass()(model)
        RemoveUnusedFunctionsPass()(model)
        return ReportedResult(model, True, PassReport(name, expected, len(layers)))

    def ensures(self, model: ir.Model) -> None:
        counts = {
            kind: sum(node.op_type == kind for node in model.graph if node.domain == DOMAIN)
            for kind in (
                encoder_layer.OP_TYPE,
                encoder_layer.PACK_ROWS,
                encoder_layer.UNPACK_ROWS,
                *_REPLACED,
            )
        }
        whole = [1, 0 if _of_first_rows(model) else 1, 0, 0]
        if counts[encoder_layer.OP_TYPE] and list(counts.values())[1:] != whole:
            raise ir.passes.PostconditionError(f"half a rewrite: {counts}")


def _of_first_rows(model: ir.Model) -> bool:
    nodes = [node for node in model.graph if node.op_type == encoder_layer.OP_TYPE]
    return any(node.attributes.get_int("first_row_only", 0) for node in nodes)


def _matched(anchors: list[ir.Node]) -> tuple[list[Layer], tuple[str, ...]]:
    layers, reasons = [], []
    for index, anchor in enumerate(anchors):
        try:
            layers.append(layer_around(anchor))
        except MismatchError as mismatch:
            reasons.append(f"encoder.layer.{index}: {mismatch}")
    return layers, tuple(reasons)


def _chain_faults(layers: list[Layer]) -> tuple[str, ...]:
    """Why layers that match alone are no encoder: each reads the one before, and nothing else does."""
    faults = []
    nodes = set().union(*(layer.nodes for layer in layers))
    for index, layer in enumerate(layers[1:]):
        before = layers[index]
        outside = [node for node, _ in before.output.uses() if node not in nodes]
        if layer.hidden is not before.output or before.output.is_graph_output() or outside:
            faults.append(
                f"encoder.layer.{index}: {before.output.name} is not read by the next alone"
            )
        if (layer.mask, layer.masked) != (before.mask, before.masked):
            faults.append(
                f"encoder.layer.{index + 1}: another attention mask than the layer before"
            )
    return tuple(faults)


def _first_row_selections(hidden: ir.Value) -> list[ir.Node]:
    """The Gathers of each sequence's first row, if they are all that reads ``hidden`` (B, S, H)."""
    readers = [node for node, _ in hidden.uses()]
    if hidden.is_graph_output() or not all(_is_first_row(node) for node in readers):
        return []
    return readers


def _is_first_row(node: ir.Node) -> bool:
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 1:
        return False
    index = node.inputs[1].const_value if node.inputs[1] is not None else None
    return index is not None and index.shape.rank() == 0 and index.numpy().item() == 0


class _Rewrite:
    """One graph on its way from many nodes a layer to one."""

    def __init__(self, model: ir.Model, layers: list[Layer], options: EncoderLayersOptions) -> None:
        self._model, self._graph = model, model.graph
        self._layers, self._options = layers, options

    def run(self) -> None:
        self._model.opset_imports[DOMAIN] = DOMAIN_VERSION
        first, last = self._layers[0], self._layers[-1]
        attributes = {"keep_pads": int(not first.masked)}
        pack = self._insert(
            first, encoder_layer.PACK_ROWS, [first.hidden, first.mask], attributes, outputs=2
        )
        rows, row_starts = pack.outputs
        rows.name, row_starts.name = "encoder.rows", "encoder.row_starts"
        selections = _first_row_selections(last.output)
        for index, layer in enumerate(self._layers):
            only = bool(selections) and layer is last
            rows = self._layer(index, layer, (rows, row_starts), first_row_only=only)
        for selection in selections:
            self._take_place_of(selection.outputs[0], rows)
        if not selections:
            unpack = self._insert(last, encoder_layer.UNPACK_ROWS, [rows, first.mask], attributes)
            self._take_place_of(last.output, unpack.outputs[0])

    def _layer(
        self, index: int, layer: Layer, rows: tuple[ir.Value, ir.Value], *, first_row_only: bool
    ) -> ir.Value:
        prefix = f"encoder.layer.{index}"

        def constants(name: str, linear: Linear, kind: WeightType) -> dict[str, ir.Value]:
            weight = linear_weight(linear, kind, static=self._options.static_activations)
            return {
                f"{name}_weight": self._constant(f"{prefix}.{name}.packed_weight", packed(weight)),
                f"{name}_bias": self._constant(f"{prefix}.{name}.bias", linear.bias),
            }

        generator = {"generator": self._options.generator}
        values: dict[str, ir.Value] = {}
        for name, linear in layer.linears.items():
            values |= constants(name, linear, generator.get(name, self._options.linears))
        for name, array in layer.vectors.items():
            values[name] = self._constant(f"{prefix}.{name}", array)
        inputs = LayerInputs[ir.Value](
            rows=rows[0],
            row_starts=rows[1],
            attention_mask=None if layer.masked else layer.mask,
            **values,
        )
        attributes = dataclasses.replace(
            layer.attributes,
            attention=int(self._options.bfloat16_attention),
            first_row_only=int(first_row_only),
        )
        node = self._insert(
            layer,
            encoder_layer.OP_TYPE,
            inputs.in_order(),
            dataclasses.asdict(attributes),
            name=f"{prefix}/{encoder_layer.OP_TYPE}",
        )
        return node.outputs[0]

    def _insert(
        self,
        layer: Layer,
        op_type: str,
        inputs: list[ir.Value],
        attributes: dict[str, int | float],
        *,
        outputs: int = 1,
        name: str = "",
    ) -> ir.Node:
        """A node before the last of ``layer``, where all that the layer reads is there."""
        node = ir.node(
            op_type,
            inputs,
            attributes,
            domain=DOMAIN,
            num_outputs=outputs,
            name=name or f"encoder/{op_type}",
        )
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}:{index}"
        last = layer.output.producer()
        assert last is not None
        self._graph.insert_before(last, node)
        return node

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(np.ascontiguousarray(array), name=name)
        value = ir.Value(
            name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self._graph.register_initializer(value)
        return value

    def _take_place_of(self, old: ir.Value, new: ir.Value) -> None:
        """All that read ``old``, the graph's outputs included, get ``new``."""
        if old.is_graph_output():
            new.name, new.shape, new.type = old.name, old.shape, old.type
            old.name = f"{old.name}.unpacked"
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
