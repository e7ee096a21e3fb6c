"""Engines and the eager baseline on one machine, in interleaved runs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable

from convbert_deploy.architecture import Architecture, Task
from convbert_deploy.backends.base import Batch, Runner, RunnerOptions
from convbert_deploy.benchmark import BenchmarkReport, BenchOptions, Candidate, Point, measure
from convbert_deploy.checkpoint import Checkpoint
from convbert_deploy.engine import Engine
from convbert_deploy.errors import EngineError

EAGER = "eager fp32"


@dataclasses.dataclass(frozen=True)
class BenchRequest:
    """What to time. batches x seqs are the shapes; all tokens are real (no padding)."""

    engines: tuple[pathlib.Path, ...]
    baseline: Checkpoint | None = None
    batches: tuple[int, ...] = (1, 8)
    seqs: tuple[int, ...] = (32, 128)
    threads: int | None = None
    options: BenchOptions = dataclasses.field(default_factory=BenchOptions)


def bench(request: BenchRequest, progress: Callable[[str], None] | None = None) -> BenchmarkReport:
    """Time every engine, and the eager model when a baseline is given.

    Raises:
        EngineError: engines of different models, or one that cannot run here.
        ShapeError: a shape outside an engine's profile.
    """
    from convbert_deploy.backends.eager import EagerRunner
    from convbert_deploy.environment import benchmark_header, environment

    engines = [Engine.load(path) for path in request.engines]
    architecture, task = _one_model(engines)
    runner_options = RunnerOptions(threads=request.threads)
    runners: dict[str, Runner] = {}
    if request.baseline:
        runners[EAGER] = EagerRunner(request.baseline.eager_model(), task, runner_options)
    for engine in engines:
        name = engine.label
        if name in runners:
            name = f"{name} ({engine.path.name})"
        runners[name] = engine.runner(runner_options)
    points = [Point(batch, seq) for batch in request.batches for seq in request.seqs]
    with contextlib.ExitStack() as scope:
        for runner in runners.values():
            scope.enter_context(runner)
        return measure(
            [Candidate(name, runner) for name, runner in runners.items()],
            points,
            functools.partial(_batch, architecture, task),
            request.options,
            header=benchmark_header(environment(), threads=request.threads),
            progress=progress,
        )


def _one_model(engines: list[Engine]) -> tuple[Architecture, Task]:
    first = engines[0].manifest
    for engine in engines[1:]:
        if (engine.manifest.architecture, engine.manifest.task) != (first.architecture, first.task):
            raise EngineError(
                f"{engine.path} and {engines[0].path} are different models; "
                "one benchmark compares engines of the same one"
            )
    return first.architecture, first.task


def _batch(architecture: Architecture, task: Task, point: Point) -> Batch:
    from convbert_deploy.parity_cases import random_batch

    return random_batch(architecture, task, point.batch, point.seq)
