"""A bulk job from its command to its summary: plan or go on, score what is missing, conclude."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from convbert_deploy import __version__
from convbert_deploy.bulk_scoring.columns import reserved_names
from convbert_deploy.bulk_scoring.folder import BulkFolder
from convbert_deploy.bulk_scoring.options import BulkOptions
from convbert_deploy.bulk_scoring.plan import Plan, Shard, Source
from convbert_deploy.bulk_scoring.planning import find_files, input_root, make_plan
from convbert_deploy.bulk_scoring.rows import request_object
from convbert_deploy.bulk_scoring.shard_scoring import Job, ShardResult, engine_sha256
from convbert_deploy.engine import Engine
from convbert_deploy.errors import (
    InputError,
    MissingDependencyError,
    OutputError,
)
from convbert_deploy.serving.answering import engine_tokenizer
from convbert_deploy.serving.requests import request_from_json

_SCHEMA = 1
#: processes that a local job has unless told otherwise: each holds the model
_MOST_LOCAL_WORKERS = 4

Note = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class BulkSummary:
    """rows: of the whole input, ``errors`` of which have no answer. shards: files of the output,
    ``earlier_shards`` of which were finished before this run. seconds, rows_per_second: of this run.
    """

    output: str
    rows: int
    errors: int
    tokens: int
    shards: int
    earlier_shards: int
    workers: int
    threads: int
    runs_on: str
    seconds: float
    rows_per_second: float

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def bulk(
    source: pathlib.Path,
    output: pathlib.Path,
    engine: pathlib.Path,
    options: BulkOptions | None = None,
    note: Note = lambda text: None,
) -> BulkSummary:
    """Score every row of ``source`` into the folder ``output``; what is finished there stays.

    note: told of progress, at most once a second.

    Raises:
        InputError: the input or the settings cannot be used.
        OutputError: the folder is another job's, or cannot be written.
        EngineError: the engine has no tokenizer, cannot run here, or kills its workers.
        MissingDependencyError: pyarrow or Ray is not installed.
    """
    options = options or BulkOptions()
    _check_apart(source, output)
    bundle = Engine.load(engine)
    engine_tokenizer(bundle)
    check_installed(options)
    folder = BulkFolder(output, options.output_format)
    with folder.locked():
        plan = _plan(source, folder, bundle, options, note)
        folder.remove_unfinished()
        try:
            return _Run(folder, plan, bundle, options, note).score()
        finally:
            folder.remove_unfinished()


def check_installed(options: BulkOptions) -> None:
    """Raises MissingDependencyError where what the options ask for is not there."""
    if options.output_format == "parquet" and not _installed("pyarrow"):
        raise MissingDependencyError("pyarrow", needed_for="Parquet", extra="bulk")
    if not is_local(options) and not (_installed("ray") and _installed("pyarrow")):
        raise MissingDependencyError("ray[data]", needed_for="bulk on Ray", extra="ray")


def is_local(options: BulkOptions) -> bool:
    if options.local is not None:
        return options.local
    return options.address is None and not _installed("ray")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _check_apart(source: pathlib.Path, output: pathlib.Path) -> None:
    inside, outside = output.resolve(), source.resolve()
    if inside == outside or outside in inside.parents or inside in outside.parents:
        raise OutputError(
            f"{output} and the input {source} lie in each other",
            hint="-o FOLDER beside the input: parts must not be read as input",
        )


def _plan(
    source: pathlib.Path, folder: BulkFolder, engine: Engine, options: BulkOptions, note: Note
) -> Plan:
    """The plan of the job that the folder holds, if it is this one, else a new one."""
    begun = folder.job()
    if begun is not None:
        wanted = _identity(source, engine, options)
        _check_same(begun, wanted, folder.path)
        found = Source.from_json(begun["source"], str(input_root(source).resolve()))
        return Plan(found, tuple(Shard.from_json(shard) for shard in begun["shards"]))
    note(f"reading {source}")
    plan = make_plan(source, options, reserved_names(engine.manifest))
    _check_header(plan.source, engine)
    folder.begin(
        _identity(source, engine, options)
        | {
            "source": plan.source.to_json(),
            "shards": [shard.to_json() for shard in plan.shards],
            "version": __version__,
        }
    )
    return plan


def _identity(source: pathlib.Path, engine: Engine, options: BulkOptions) -> dict[str, Any]:
    """What must be the same for a job to go on."""
    wanted, files = find_files(source, options.format)
    return {
        "schema": _SCHEMA,
        "engine": {"name": engine.manifest.name, "sha256": engine_sha256(engine.path)},
        "input": {"format": wanted, "files": [dataclasses.asdict(file) for file in files]},
        "options": {
            "output_format": options.output_format,
            "text_column": options.text_column,
            "keep": None if options.keep is None else list(options.keep),
            "shard_rows": options.shard_rows,
        },
    }


def _check_same(begun: dict[str, Any], wanted: dict[str, Any], path: pathlib.Path) -> None:
    for name, what in (
        ("schema", "by another version of convbert-deploy"),
        ("engine", "with another engine"),
        ("input", "on another input, or the input was changed since"),
        ("options", "with other options"),
    ):
        if begun.get(name) != wanted[name]:
            detail = ""
            if name == "options":
                detail = f": {begun.get(name)}, now {wanted[name]}"
            raise OutputError(
                f"the job in {path} was begun {what}{detail}",
                hint="use another folder: -o FOLDER; a job goes on only as it was begun",
            )


def _check_header(source: Source, engine: Engine) -> None:
    """A table whose columns make no request would give nothing but errors."""
    if not source.header:
        return
    lists = ("words", "choices")
    sample = {name: '["a", "b"]' if name in lists else "a" for name in source.header}
    if source.format == "parquet":
        sample |= {name: ["a", "b"] for name in lists if name in source.header}
    try:
        request_from_json(engine.manifest.task, request_object(source, sample))
    except InputError as error:
        raise InputError(
            f"no request can be made of the columns {', '.join(source.header)}: {error}",
            hint=f"--text-column NAME; {error.hint or ''}".rstrip("; "),
        ) from error


class _Run:
    """One run of a job."""

    def __init__(
        self,
        folder: BulkFolder,
        plan: Plan,
        engine: Engine,
        options: BulkOptions,
        note: Note,
    ) -> None:
        self._folder, self._plan, self._engine = folder, plan, engine
        self._options, self._note = options, note
        self._done = {
            shard.index: ShardResult(**record)
            for shard in plan.shards
            if (record := folder.finished_shard(shard.index)) is not None
        }
        self._earlier = len(self._done)
        self._earlier_rows = sum(result.rows for result in self._done.values())

    def score(self) -> BulkSummary:
        missing = [shard for shard in self._plan.shards if shard.index not in self._done]
        if self._earlier:
            self._note(f"{self._earlier} of {len(self._plan.shards)} shards are finished already")
        local = is_local(self._options)
        workers, threads, seconds = 0, 0, 0.0
        if missing:
            self._folder.unsucceed()
            if self._engine.manifest.padding == "hf":
                self._note(
                    "an engine of padding hf: only texts of one length share a batch; "
                    "export --padding masked fills batches better"
                )
            with contextlib.ExitStack() as stack:
                started = self._local(missing) if local else self._ray(missing, stack)
                workers, threads, results = started
                self._note(
                    f"{len(missing)} shards on {workers} "
                    f"{'processes' if local else 'Ray actors'} of {threads} threads"
                )
                stack.callback(results.close)  # ends workers first, whatever happens here
                began = time.perf_counter()
                self._collect(results)
                seconds = time.perf_counter() - began
        return self._conclude(workers, threads, "processes" if local else "ray", seconds)

    def _job(self, threads: int) -> Job:
        return Job(
            source=self._plan.source,
            output=str(self._folder.path.resolve()),
            output_format=self._options.output_format,
            engine=str(self._engine.path.resolve()),
            engine_sha256=engine_sha256(self._engine.path),
            threads=threads,
        )

    def _local(self, missing: list[Shard]) -> tuple[int, int, Iterator[ShardResult]]:
        from convbert_deploy.bulk_scoring.processes import score_in_processes

        workers, threads = local_sizes(self._options, usable_cpus(), _gpus(self._engine))
        workers = min(workers, len(missing))
        return (
            workers,
            threads,
            score_in_processes(self._job(threads), missing, workers, self._note),
        )

    def _ray(
        self, missing: list[Shard], stack: contextlib.ExitStack
    ) -> tuple[int, int, Iterator[ShardResult]]:
        from convbert_deploy.bulk_scoring.cluster import (
            check_room,
            connected,
            live_nodes,
            score_on_ray,
        )

        ray = stack.enter_context(connected(self._options.address))
        threads, gpus = self._options.threads or 1, _gpus(self._engine)
        workers = check_room(self._options.workers, threads, gpus, live_nodes(ray))
        workers = min(workers, len(missing))
        return workers, threads, score_on_ray(ray, self._job(threads), missing, workers, gpus)

    def _collect(self, results: Iterator[ShardResult]) -> None:
        began = shown = time.perf_counter()
        rows = 0
        for result in results:
            self._done[result.index] = result
            rows += result.rows
            now = time.perf_counter()
            if now - shown >= 1 or len(self._done) == len(self._plan.shards):
                shown = now
                errors = sum(done.errors for done in self._done.values())
                self._note(
                    f"{len(self._done)} of {len(self._plan.shards)} shards, {rows} rows at "
                    f"{rows / (now - began):.0f} a second, {errors} with an error"
                )

    def _conclude(self, workers: int, threads: int, runs_on: str, seconds: float) -> BulkSummary:
        results = [self._done[shard.index] for shard in self._plan.shards]
        rows = sum(result.rows for result in results)
        if rows != self._plan.rows:
            raise OutputError(f"{rows} rows were written, {self._plan.rows} were planned")
        summary = BulkSummary(
            output=str(self._folder.path),
            rows=rows,
            errors=sum(result.errors for result in results),
            tokens=sum(result.tokens for result in results),
            shards=len(results),
            earlier_shards=self._earlier,
            workers=workers,
            threads=threads,
            runs_on=runs_on,
            seconds=round(seconds, 3),
            rows_per_second=round((rows - self._earlier_rows) / seconds, 1) if workers else 0.0,
        )
        self._folder.succeed(
            {
                "rows": summary.rows,
                "errors": summary.errors,
                "tokens": summary.tokens,
                "engine_sha256": engine_sha256(self._engine.path),
                "parts": [
                    {"name": self._folder.part(result.index).name} | result.to_json()
                    for result in results
                ],
            }
        )
        return summary


def local_sizes(options: BulkOptions, cpus: int, gpus: int) -> tuple[int, int]:
    """Processes and threads of each. One process for an engine on a GPU, which they would share."""
    workers = options.workers or (1 if gpus else min(cpus, _MOST_LOCAL_WORKERS))
    return workers, options.threads or max(1, cpus // workers)


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0))


def _gpus(engine: Engine) -> int:
    backend = engine.manifest.backend
    return int(backend.startswith("tensorrt") or backend == "onnxruntime-cuda")
