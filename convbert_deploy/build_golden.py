"""The golden request of an engine: the graph's own, or one of a shape that the engine takes."""

from __future__ import annotations

from collections.abc import Callable

from convbert_deploy.engine import Engine
from convbert_deploy.errors import EngineError
from convbert_deploy.golden import GoldenRequest
from convbert_deploy.graph import Graph
from convbert_deploy.shapes import ShapeProfile


def golden_within(
    graph: Graph, profile: ShapeProfile, progress: Callable[[str], None]
) -> GoldenRequest:
    """The graph's golden request where the engine takes its tokens and choices (of rows it may take
    any number: see ``GoldenRequest.answered``). Else one of the nearest size, answered by the graph
    in ONNX Runtime without our kernels: the graph was held to the eager model at many sizes when it
    was exported.

    Raises:
        EngineError: ONNX Runtime cannot run the graph, as where it is in bf16.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    info = graph.info
    shape = graph.info.golden.batch()["input_ids"].shape
    sizes = dict(zip(info.task.input_axes, shape, strict=True))
    wanted = {
        axis: _nearest(size, profile, axis) for axis, size in sizes.items() if axis != "batch"
    }
    if all(sizes[axis] == size for axis, size in wanted.items()):
        return info.golden
    from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner, session_config
    from convbert_deploy.parity_cases import golden_batch

    told = ", ".join(f"{axis} {size}" for axis, size in wanted.items())
    progress(f"a golden request of {told}, answered by the graph")
    batch = golden_batch(info.architecture, info.task, info.padding, **wanted)
    config = session_config(info.precision)
    try:
        with OnnxRuntimeRunner(graph.path, config=config, name=graph.path.name) as runner:
            return GoldenRequest.of(batch, runner.infer(batch))
    except EngineError as error:
        raise EngineError(
            f"the golden request of {graph.path} has {sizes['seq']} tokens, outside {profile}, and "
            f"the graph cannot answer another one: {error}",
            hint="build from the fp32 graph with --fp16 or --bf16, or widen --shapes",
        ) from error


def _nearest(size: int, profile: ShapeProfile, axis: str) -> int:
    bounds = getattr(profile, axis)
    return min(max(size, bounds.min), bounds.max)


def check_golden(engine: Engine) -> float:
    """Largest absolute difference to the golden answer.

    Raises:
        EngineError: outside the tolerance of the engine's backend and precision.
    """
    from convbert_deploy.tolerances import tolerance_for

    with engine.runner() as runner:
        outputs = engine.golden.answered(runner.infer, engine.manifest.profile.batch)
    difference = engine.golden.max_abs_difference(outputs)
    tolerance = tolerance_for(engine.manifest.backend, engine.manifest.precision)
    limit = tolerance.largest_abs(engine.golden.scale())
    if not difference <= limit:
        raise EngineError(
            f"the engine answers its golden request wrongly: max abs difference {difference:.3g}, "
            f"allowed {limit:.3g}"
        )
    return difference
