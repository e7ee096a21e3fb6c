"""Is this engine the checkpoint it claims to be? Compared with eager, at the same padded shapes."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

from convbert_deploy.backends.base import Runner, RunnerOptions
from convbert_deploy.checkpoint import Checkpoint
from convbert_deploy.engine import GRAPH, Engine
from convbert_deploy.errors import EngineError
from convbert_deploy.parity import CompareOptions, ParityReport, compare
from convbert_deploy.parity_cases import ParityShapes, parity_batches
from convbert_deploy.tolerances import tolerance_for


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
    """graph: compare the graph a plan was built from, in stock ONNX Runtime, instead of the plan;
    for machines without the plan's GPU. shapes: which cases; their profile is the engine's."""

    graph: bool = False
    shapes: ParityShapes = dataclasses.field(default_factory=ParityShapes)
    seed: int = 0
    threads: int | None = None


def verify(
    engine: Engine,
    checkpoint: Checkpoint,
    options: VerifyOptions | None = None,
    progress: Callable[[str], None] | None = None,
) -> ParityReport:
    """Compare every output on every shape, look for NaN and Inf inside where possible, and at the
    form of quantized graphs.

    The reference of a ``masked`` engine is each row alone, without its pads; that of an ``hf``
    engine is the same padded batch.

    Raises:
        EngineError: the engine was not built from this checkpoint, or cannot run here.
    """
    from convbert_deploy.backends.eager import EagerRunner

    options = options or VerifyOptions()
    check_chain(engine, checkpoint)
    manifest = engine.manifest
    runner_options = RunnerOptions(threads=options.threads)
    runner = candidate_runner(engine, runner_options, graph=options.graph)
    masked = manifest.padding == "masked"
    shapes = dataclasses.replace(options.shapes, profile=manifest.profile)
    reference = EagerRunner(
        checkpoint.eager_model(), manifest.task, runner_options, padding=manifest.padding
    )
    backend = "onnx" if options.graph else manifest.backend
    with reference, runner as candidate:
        report = compare(
            reference,
            candidate,
            parity_batches(manifest.architecture, manifest.task, shapes, options.seed),
            tolerance_for(backend, manifest.precision),
            options=CompareOptions(
                real_tokens_only=masked,
                intermediates=_intermediates(engine, options),
                progress=progress,
            ),
        )
    faults = _structural_faults(engine)
    return dataclasses.replace(report, reasons=(*faults, *report.reasons)) if faults else report


def _structural_faults(engine: Engine) -> list[str]:
    """What is wrong with the Q/DQ nodes of an engine's graph, though its answers may be close."""
    if not engine.manifest.precision.quantized:
        return []
    import onnx

    from convbert_deploy.calibration.quantization_check import quantization_faults

    return quantization_faults(onnx.load(engine.path / GRAPH))


def check_chain(engine: Engine, checkpoint: Checkpoint) -> None:
    """Raises EngineError where the engine's first ancestor is another checkpoint."""
    origin = engine.manifest.chain[0]
    digest = checkpoint.digest()
    if origin.sha256 != digest:
        raise EngineError(
            f"{engine.path} was built from {origin.name} ({origin.sha256[:12]}), not from "
            f"{checkpoint.path} ({digest[:12]})",
            hint="verify against the checkpoint it was exported from, or export this one",
        )


def _check_gpu(engine: Engine) -> None:
    from convbert_deploy.environment import environment

    backend = engine.manifest.backend
    if backend.startswith("tensorrt") and not environment().gpus:
        raise EngineError(
            f"{engine.path} is a {backend} plan, and this machine has no NVIDIA GPU to run it",
            hint="--graph takes the graph the plan was built from, on this CPU",
        )


def candidate_runner(engine: Engine, options: RunnerOptions, *, graph: bool = False) -> Runner:
    """What computes as the engine; with ``graph``, the graph it was built from in ONNX Runtime.

    Raises:
        EngineError: a plan on a machine without its GPU, and no ``graph``.
    """
    if not graph:
        _check_gpu(engine)
        return engine.runner(options)
    from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner, session_config

    return OnnxRuntimeRunner(
        engine.path / GRAPH,
        options,
        config=session_config(engine.manifest.precision),
        library=_library(engine),
        name=f"graph of {engine.label} in ONNX Runtime",
    )


def _library(engine: Engine) -> pathlib.Path | None:
    """Our operators, for graphs whose functions were taken out."""
    from convbert_deploy.plugin_library import ort_library

    return ort_library() if engine.manifest.plugin_nodes else None


def _intermediates(engine: Engine, options: VerifyOptions) -> Callable | None:
    """Only ONNX Runtime shows its intermediates; a plan's are its own."""
    if not (options.graph or engine.manifest.backend.startswith("onnxruntime")):
        return None
    import onnx

    from convbert_deploy.backends.onnxruntime import Intermediates

    return Intermediates(onnx.load(engine.path / GRAPH), library=_library(engine))
