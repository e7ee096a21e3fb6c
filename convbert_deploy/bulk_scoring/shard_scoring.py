"""One shard from its rows to its finished file, in whatever process does it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from typing import Any

from convbert_deploy.bulk_scoring.columns import answer_columns
from convbert_deploy.bulk_scoring.folder import BulkFolder
from convbert_deploy.bulk_scoring.parts import part_writer
from convbert_deploy.bulk_scoring.plan import Shard, Source
from convbert_deploy.bulk_scoring.rows import Row, read_rows, request_object
from convbert_deploy.engine import MANIFEST, Engine
from convbert_deploy.errors import ConvBertDeployError, EngineError, InputError
from convbert_deploy.provenance import atomic_file, sha256_of_file
from convbert_deploy.serving.answering import open_scorer
from convbert_deploy.serving.requests import Request, request_from_json
from convbert_deploy.serving.scorer import Scorer

#: rows and characters that one call of the Scorer gets: enough to fill batches with texts of like
#: length, few enough that the outputs of all (3 KB a token for an encoder) fit in memory
_ROWS_AT_ONCE = 1024
_CHARACTERS_AT_ONCE = 250_000


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a worker has to know. Paths are those of every machine that takes part.

    engine_sha256: of the engine's manifest, which holds that of each of its files.
    """

    source: Source
    output: str
    output_format: str
    engine: str
    engine_sha256: str
    threads: int


@dataclasses.dataclass(frozen=True)
class ShardResult:
    """What a finished shard holds. bytes, sha256: of its file. seconds: to read, score and write.

    worker: host and process id, for the record.
    """

    index: int
    rows: int
    errors: int
    tokens: int
    bytes: int
    sha256: str
    seconds: float
    worker: str

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def engine_sha256(path: str | pathlib.Path) -> str:
    return sha256_of_file(pathlib.Path(path) / MANIFEST)


class ShardScorer:
    """Scores shards of one job with one Scorer; open inside a ``with`` block."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._folder = BulkFolder(pathlib.Path(job.output), job.output_format)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> ShardScorer:
        """Raises EngineError where the engine is not the job's, or cannot run here."""
        job = self._job
        engine = Engine.load(job.engine)
        if engine_sha256(job.engine) != job.engine_sha256:
            raise EngineError(
                f"{job.engine} was replaced since the job began",
                hint="score with the new engine into another folder: -o FOLDER",
            )
        self._columns = answer_columns(engine.manifest)
        self._scorer = self._stack.enter_context(open_scorer(engine, threads=job.threads))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def score(self, shard: Shard) -> ShardResult:
        """Write the shard's file and mark it as finished; a finished one is left as it is.

        Raises:
            InputError: the input was changed or has become unreadable.
            OutputError: the disk is full.
        """
        done = self._folder.finished_shard(shard.index)
        if done is not None:
            return ShardResult(**done)
        began = time.perf_counter()
        target = self._folder.part(shard.index)
        rows = errors = tokens = 0
        with atomic_file(target) as temporary:
            source_file = self._job.source.path(shard)
            with part_writer(
                temporary,
                self._job.output_format,
                self._job.source.columns,
                self._columns,
                source_file,
            ) as writer:
                for block in blocks(self._job.source, shard, self._scorer):
                    answers = self._scorer.score([request for _, request in block])
                    writer.write(shard.file, shard.first + rows, [r for r, _ in block], answers)
                    rows += len(block)
                    errors += sum("error" in answer for answer in answers)
                    tokens += sum(answer.get("tokens_scored", 0) for answer in answers)
            if rows != shard.rows:
                raise InputError(
                    f"{source_file} gave {rows} rows from row {shard.first} on, expected "
                    f"{shard.rows}: it was changed since the job began"
                )
            size, digest = temporary.stat().st_size, sha256_of_file(temporary)
        result = ShardResult(
            shard.index,
            rows,
            errors,
            tokens,
            size,
            digest,
            round(time.perf_counter() - began, 3),
            f"{socket.gethostname()}:{os.getpid()}",
        )
        self._folder.mark_finished(shard.index, result.to_json())
        return result


def blocks(
    source: Source, shard: Shard, scorer: Scorer
) -> Iterator[list[tuple[Row, Request | ConvBertDeployError]]]:
    """Rows with their requests, as many as are scored at once."""
    block: list[tuple[Row, Request | ConvBertDeployError]] = []
    characters = 0
    for row in read_rows(source, shard):
        request = _request(source, row, scorer)
        size = _characters(row)
        if block and (len(block) == _ROWS_AT_ONCE or characters + size > _CHARACTERS_AT_ONCE):
            yield block
            block, characters = [], 0
        block.append((row, request))
        characters += size
    if block:
        yield block


def _request(source: Source, row: Row, scorer: Scorer) -> Request | ConvBertDeployError:
    if row.error is not None:
        return row.error
    try:
        return request_from_json(scorer.options.task, request_object(source, row.values))
    except InputError as error:
        return error


def _characters(row: Row) -> int:
    """Of the row's texts, roughly: lists of words too."""
    return sum(len(str(value)) for value in row.values.values() if isinstance(value, (str, list)))
