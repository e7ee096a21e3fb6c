"""Run an engine under its runtime's own profiler."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from convbert_deploy.backends.base import Batch, Runner, RunnerOptions
from convbert_deploy.engine import GRAPH, PLAN, CheckedRunner, Engine
from convbert_deploy.environment import benchmark_header, environment
from convbert_deploy.errors import EngineError, MissingDependencyError
from convbert_deploy.parity_cases import random_batch
from convbert_deploy.profiling.attribution import place_of
from convbert_deploy.profiling.findings import THRESHOLD, not_fused
from convbert_deploy.profiling.kernels import Kernel, Workload, kernels_of, middle_mean
from convbert_deploy.profiling.profile_report import ProfileReport
from convbert_deploy.profiling.recording import read_layer_times, read_recording

_CUDA_NOTE = (
    "on CUDA a node's time is what its launch took on the host, not its time on the device: only "
    "wall time and the counts are to be trusted here"
)
_UNTIMED_NOTE = "not timed: {reason}. The kernels are those that the builder listed"


@dataclasses.dataclass(frozen=True)
class ProfileOptions:
    """What to run. All ``batch`` x ``seq`` tokens are real.

    runs: timed passes, after ``warmup`` passes that are not. threads: intra-op CPU threads, None
    for the runtime's default. threshold: share of the kernels' time, 0 to 1, from which something
    that is not fused is told.
    """

    batch: int = 8
    seq: int = 128
    threads: int | None = None
    runs: int = 20
    warmup: int = 3
    threshold: float = THRESHOLD

    def __post_init__(self) -> None:
        if self.runs < 1 or self.warmup < 1:
            raise ValueError(f"expected runs and warmup of at least 1: {self}")


def profile(
    engine: Engine,
    options: ProfileOptions | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> ProfileReport:
    """Time by operator, by encoder layer and by kernel, and what is not fused.

    A TensorRT plan on a machine without its GPU gives the kernels its builder listed, untimed.

    Raises:
        EngineError: built for another machine, or its runtime cannot load or profile it.
        MissingDependencyError: the runtime is not installed.
        ShapeError: the shape is outside the engine's profile.
    """
    options = options or ProfileOptions()
    manifest = engine.manifest
    batch = random_batch(manifest.architecture, manifest.task, options.batch, options.seq)
    if manifest.backend.startswith("onnxruntime"):
        return _onnxruntime(engine, batch, options, progress)
    return _tensorrt(engine, batch, options, progress)


def _onnxruntime(
    engine: Engine, batch: Batch, options: ProfileOptions, progress: Callable[[str], None]
) -> ProfileReport:
    from convbert_deploy.backends.onnxruntime import LAYER_TIMES_FILE, profiled

    chosen = RunnerOptions(threads=options.threads)
    progress("without the profiler")
    wall_ms = _wall_ms(engine.runner(chosen), batch, options)
    progress("under the profiler")
    with tempfile.TemporaryDirectory(prefix="convbert-profile-") as name:
        folder = pathlib.Path(name)
        with profiled(folder), engine.runner(chosen) as runner:
            _repeat(runner, batch, options.warmup + options.runs)
        files = sorted(folder.glob("*.json"))
        if len(files) != 1:
            raise EngineError(f"ONNX Runtime wrote {len(files)} profiles, expected one")
        runs = read_recording(files[0])[options.warmup :]
        phases = read_layer_times(folder / LAYER_TIMES_FILE)
    *rows, seq = batch["input_ids"].shape
    workload = Workload(engine.manifest.architecture, math.prod(rows), seq)
    kernels = kernels_of(runs, workload, phases)
    cuda = engine.manifest.backend == "onnxruntime-cuda"
    passes = engine.manifest.target.get("passes") or {}
    built = tuple(f"when it was built, {name}: {text}" for name, text in passes.items())
    return ProfileReport(
        **_common(engine, options),
        kernels=kernels,
        findings=tuple(not_fused(kernels, _function_bodies(engine), options.threshold)),
        wall_ms=wall_ms,
        profiled_ms=middle_mean([run.wall_us for run in runs]) / 1e3,
        notes=(*built, *((_CUDA_NOTE,) if cuda else ())),
    )


def _tensorrt(
    engine: Engine, batch: Batch, options: ProfileOptions, progress: Callable[[str], None]
) -> ProfileReport:
    """Timed by the runtime's profiler where the GPU is there. That path follows TensorRT's
    documentation and has not been run yet: it needs a GPU."""
    from convbert_deploy.backends.tensorrt_profile import ProfilingRunner
    from convbert_deploy.plugin_library import tensorrt_library

    manifest = engine.manifest
    report = ProfileReport(**_common(engine, options), kernels=(), plan=manifest.plan)
    try:
        inner = ProfilingRunner(
            (engine.path / PLAN).read_bytes(),
            kind=manifest.backend,
            task=manifest.task,
            plugin_library=tensorrt_library() if manifest.plugin_nodes else None,
            name=engine.label,
            # a replayed graph reports no layers
            options=RunnerOptions(cuda_graphs=False),
        )
        progress("without the profiler")
        wall_ms = _wall_ms(engine.runner(), batch, options)
        progress("under the profiler")
        with CheckedRunner(inner, engine) as runner:
            _repeat(runner, batch, options.warmup)
            inner.forget()
            _repeat(runner, batch, options.runs)
            times = inner.layer_times_ms()
    except (EngineError, MissingDependencyError) as error:
        note = _UNTIMED_NOTE.format(reason=error)
        return dataclasses.replace(report, kernels=_listed(manifest.plan), notes=(note,))
    kernels = tuple(
        Kernel(name, "layer", middle_mean(spent), place_of(name)) for name, spent in times.items()
    )
    return dataclasses.replace(report, kernels=kernels, wall_ms=wall_ms)


def _listed(plan: dict[str, Any]) -> tuple[Kernel, ...]:
    """The kernels of a plan as its builder listed them: their class, no time."""
    classes = plan.get("kernels") or {}
    return tuple(Kernel(kind, kind, None) for kind, count in classes.items() for _ in range(count))


def _common(engine: Engine, options: ProfileOptions) -> dict[str, Any]:
    backend = engine.manifest.backend
    device = "cuda" if backend != "onnxruntime-cpu" else "cpu"
    return {
        "engine": engine.path.name,
        "backend": engine.label,
        "batch": options.batch,
        "seq": options.seq,
        "runs": options.runs,
        "header": benchmark_header(environment(), threads=options.threads, device=device),
    }


def _repeat(runner: Runner, batch: Batch, times: int) -> list[float]:
    """Milliseconds of each call."""
    spent = []
    for _ in range(times):
        start = time.perf_counter_ns()
        runner.infer(batch)
        spent.append((time.perf_counter_ns() - start) / 1e6)
    return spent


def _wall_ms(unopened: Runner, batch: Batch, options: ProfileOptions) -> float:
    with unopened as runner:
        _repeat(runner, batch, options.warmup)
        return statistics.median(_repeat(runner, batch, options.runs))


def _function_bodies(engine: Engine) -> dict[str, frozenset[str]]:
    """Operators of the function that stands for each of our operators, by ours."""
    import onnx

    from convbert_deploy.operators import DOMAIN, nodes_of

    model = onnx.load(engine.path / GRAPH, load_external_data=False)
    used = {node.op_type for node in nodes_of(model)}
    return {
        function.name: frozenset(node.op_type for node in function.node)
        for function in model.functions
        if function.domain == DOMAIN and function.name in used
    }
