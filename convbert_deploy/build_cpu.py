"""The graph of a CPU engine: every encoder layer one node of ours, on weights packed for it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from convbert_deploy.errors import GraphError, MissingDependencyError
from convbert_deploy.graph import Graph
from convbert_deploy.precision import Precision

if TYPE_CHECKING:
    import onnx_ir as ir

    from convbert_deploy.passes import EncoderLayersOptions
    from convbert_deploy.passes.pass_report import PassReport


@dataclasses.dataclass(frozen=True)
class LayersRequest:
    """precision: of the engine. high: BF16 or FP32, what linear layers that calibration kept out of
    int8 compute in. static_activations: the calibrated steps instead of one for each token."""

    precision: Precision
    high: Precision = Precision.FP32
    static_activations: bool = False


@dataclasses.dataclass(frozen=True)
class LayersGraph:
    """model: None where the pass did not fire. arithmetic: what is computed in what."""

    model: ir.Model | None
    report: PassReport
    arithmetic: str


def graph_with_layers(graph: Graph, request: LayersRequest) -> LayersGraph:
    """``graph`` with an EncoderLayer node for each layer; ``graph`` itself is not changed.

    Raises:
        GraphError: a pass broke its contract.
        MissingDependencyError: onnx_ir is not installed.
    """
    try:
        import onnx_ir as ir
    except ImportError as error:
        raise MissingDependencyError(
            "onnx-ir", needed_for="a CPU engine's graph", extra="ort"
        ) from error
    from convbert_deploy.passes.encoder_layers import EncoderLayers
    from convbert_deploy.passes.half_tables import HalfTables

    model = ir.from_proto(graph.model)
    try:
        result = EncoderLayers(_options(graph, request))(model)
        if result.modified and request.precision is not Precision.FP32:
            HalfTables()(model)
    except (ir.passes.PreconditionError, ir.passes.PostconditionError) as error:
        raise GraphError(f"{graph.path}: {error}") from error
    return LayersGraph(
        model if result.modified else None, result.report, _arithmetic(graph, request)
    )


def _options(graph: Graph, request: LayersRequest) -> EncoderLayersOptions:
    from convbert_deploy.operators.packed_weight import WeightType
    from convbert_deploy.passes.encoder_layers import EncoderLayersOptions

    if request.precision is Precision.FP32:
        return EncoderLayersOptions()
    linears = WeightType.BF16
    if request.precision is Precision.INT8:
        high = WeightType.BF16 if request.high is Precision.BF16 else WeightType.FP32
        # an exported graph has all its linears in float32; a calibrated one what must stay high
        linears = high if graph.info.precision is Precision.INT8 else WeightType.INT8
    return EncoderLayersOptions(
        linears=linears,
        generator=WeightType.BF16,
        static_activations=request.static_activations,
        bfloat16_attention=True,
    )


def _arithmetic(graph: Graph, request: LayersRequest) -> str:
    if request.precision is Precision.FP32:
        return "fp32"
    if request.precision is Precision.BF16:
        return "bf16 products and attention, fp32 sums and LayerNorm"
    steps = "calibrated steps" if request.static_activations else "a step for each token"
    kept = len((graph.info.calibration or {}).get("high", ()))
    rest = f"{kept} linears in {request.high}, " if kept else ""
    return f"int8 products ({steps}), {rest}bf16 attention, fp32 sums and LayerNorm"


def report_text(report: PassReport) -> str:
    """``12 of 12``, or ``0 of 12: encoder.layer.3: ... (and 2 more)``."""
    count = f"{report.fired} of {report.expected}"
    if not report.reasons:
        return count
    more = f" (and {len(report.reasons) - 1} more)" if len(report.reasons) > 1 else ""
    return f"{count}: {report.reasons[0]}{more}"
