"""What number format an engine may have, and the graph in it: rules of graph, backend and GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convbert_deploy.errors import EngineError, GraphError
from convbert_deploy.graph import Graph
from convbert_deploy.precision import Precision
from convbert_deploy.shapes import ShapeProfile

if TYPE_CHECKING:
    import onnx

CPU = "onnxruntime-cpu"
#: consumer and workstation GPUs that TensorRT-RTX 1.7 builds fp16 and bf16 for without one present
DEFAULT_CAPABILITIES = ("SM86", "SM89", "SM120")
_FIRST_WITH_FP8 = 89


def engine_precision(
    graph: Graph, asked: Precision | None, backend: str, *, plugin: bool = True
) -> Precision:
    """The precision of an engine of ``graph``; a calibrated graph decides it.

    plugin: with our kernels, which on a CPU measure an int8 product's input as they go.

    Raises:
        GraphError: another precision than the calibrated graph's; int8 or fp8 of an fp32 graph,
            but for int8 in our kernels on a CPU.
        EngineError: the backend cannot compute in it.
    """
    own = graph.info.precision
    precision = asked or own
    if own is not Precision.FP32 and precision is not own:
        raise GraphError(
            f"{graph.path} was calibrated as {own}, not {precision}",
            hint=f"leave out --{precision}, or build from the fp32 graph",
        )
    measures_itself = backend == CPU and plugin and precision is Precision.INT8
    if own is Precision.FP32 and precision.quantized and not measures_itself:
        raise needs_ranges(graph, precision)
    if backend == CPU and precision is Precision.FP8:
        raise EngineError(
            "no CPU computes in fp8: expected a GPU of SM 89 or later",
            hint="--int8, or --backend tensorrt-rtx --target SM89",
        )
    if backend == CPU and own in (Precision.FP16, Precision.BF16):
        raise EngineError(
            f"{graph.path} is typed {own} for GPUs; ONNX Runtime's CPU provider would cast around "
            "every operator, or has none",
            hint=f"build the CPU engine from the fp32 graph: its weights are stored as {own}",
        )
    return precision


def needs_ranges(graph: Graph, precision: Precision, why: str = "") -> GraphError:
    """The error of an exported graph in 8 bits; why: what kept our kernels from doing without."""
    return GraphError(
        f"{precision} needs ranges, and {graph.path} is an fp32 graph{why}",
        hint=f"build-engine --{precision} --data TEXTS.jsonl, or convbert-deploy calibrate",
    )


def engine_capabilities(asked: tuple[str, ...], precision: Precision) -> tuple[str, ...]:
    """GPUs of a tensorrt-rtx plan.

    Raises:
        EngineError: FP8 for a GPU without it.
    """
    if precision is not Precision.FP8:
        return asked or DEFAULT_CAPABILITIES
    without = [name for name in asked if _number(name) < _FIRST_WITH_FP8]
    if without:
        raise EngineError(
            f"{', '.join(without)} cannot compute in fp8: expected SM89 or later", hint="--int8"
        )
    return asked or tuple(n for n in DEFAULT_CAPABILITIES if _number(n) >= _FIRST_WITH_FP8)


def _number(capability: str) -> int:
    digits = capability.removeprefix("SM")
    return int(digits) if digits.isdigit() else _FIRST_WITH_FP8


def check_attention(graph: Graph, profile: ShapeProfile) -> None:
    """Raises EngineError where attention is in fp8 and the sequence length is not fixed: TensorRT
    then computes it in separate kernels, slower than in fp16."""
    if not (graph.info.calibration or {}).get("fp8_attention"):
        return
    if profile.seq.min != profile.seq.max:
        raise EngineError(
            f"{graph.path} has its attention in fp8, which TensorRT fuses for a fixed sequence "
            f"length only, and the profile has {profile.seq}",
            hint="--shapes batch=1:8:32,seq=128:128:128, or calibrate without --fp8-attention",
        )


def check_static_activations(graph: Graph) -> None:
    """Raises GraphError where ``graph`` has no activation scales to keep."""
    if not graph.info.precision.quantized:
        raise GraphError(
            f"static activations are those of a calibrated 8-bit graph, and {graph.path} is "
            f"{graph.info.precision}",
            hint="convbert-deploy calibrate GRAPH --int8 --data TEXTS.jsonl",
        )


def check_gemms(graph: Graph, gemms: dict[str, int] | None) -> None:
    """Raises EngineError where a plan has fewer 8-bit products than the graph has quantized linears:
    the others would silently run at high precision, and slower for their Q/DQ.

    gemms: ``PlanFacts.gemms``, None where TensorRT does not list its layers.
    """
    quantized = (graph.info.calibration or {}).get("quantized")
    if not quantized or gemms is None:
        return
    found = sum(count for kind, count in gemms.items() if kind in ("Int8", "FP8"))
    if found < len(quantized):
        raise EngineError(
            f"the plan computes {found} products in 8 bits, expected {len(quantized)}, one for each "
            f"quantized linear: {gemms}",
            hint="build-engine --fp16, or another --target",
        )


def graph_in_precision(
    graph: Graph, precision: Precision, high: Precision, backend: str
) -> onnx.ModelProto:
    """The graph that the backend gets. On a CPU, where ``build_cpu`` does not make it: 8-bit linears
    between float32, or half-precision weights and float32 arithmetic. On a GPU: every tensor typed,
    what ``calibrate`` found out of fp16's range left in float32."""
    from convbert_deploy.calibration import stored_graph, typed_graph

    own = graph.info.precision
    if backend == CPU:
        return graph.model if own.quantized else stored_graph(graph.model, precision)
    if own in (Precision.FP16, Precision.BF16):
        return graph.model
    if not own.quantized:
        return typed_graph(graph.model, precision)
    record = graph.info.calibration or {}
    names = {node["node"] for node in record.get("kept_fp32", ())}
    keep = names if high is Precision.FP16 else ()
    return typed_graph(graph.model, high, keep_fp32=keep)
