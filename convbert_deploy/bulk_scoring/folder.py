"""The output's folder: what job it belongs to, which shards are finished, and who writes it.

``_job.json`` is the job and its shards; ``part-NNNNN.parquet`` a shard's rows;
``_shards/NNNNN.json`` says that this part is finished and how large it is; ``_SUCCESS`` that all
are. Every file takes its name when it is complete, so a part without its record is done again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from convbert_deploy.errors import OutputError
from convbert_deploy.provenance import atomic_file

JOB = "_job.json"
SUCCESS = "_SUCCESS"
_SHARDS = "_shards"
_LOCK = ".lock"


class BulkFolder:
    """output_format: ``parquet`` or ``jsonl``, the suffix of the parts."""

    def __init__(self, path: pathlib.Path, output_format: str) -> None:
        self.path, self._suffix = path, output_format

    def part(self, index: int) -> pathlib.Path:
        return self.path / f"part-{index:05d}.{self._suffix}"

    def finished_shard(self, index: int) -> dict[str, Any] | None:
        """The record of a finished shard whose file is still as long as it was."""
        record = _read_json(self._record(index))
        try:
            intact = record is not None and self.part(index).stat().st_size == record["bytes"]
        except (OSError, KeyError, TypeError):
            return None
        return record if intact else None

    def mark_finished(self, index: int, record: dict[str, Any]) -> None:
        _write_json(self._record(index), record)
        for attempt in self._attempts(index):
            attempt.unlink(missing_ok=True)

    def begin_attempt(self, index: int) -> int:
        """How often this run has begun the shard, this time included.

        Raises:
            OutputError: the folder cannot be written.
        """
        number = 1 + sum(1 for _ in self._attempts(index))
        try:
            (self.path / _SHARDS).mkdir(exist_ok=True)
            self._attempt(index, number).touch()
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from error
        return number

    def _attempts(self, index: int) -> Iterator[pathlib.Path]:
        """By name, as listing a folder of many shards for each of them would take long."""
        for number in itertools.count(1):
            file = self._attempt(index, number)
            if not file.exists():
                return
            yield file

    def _attempt(self, index: int, number: int) -> pathlib.Path:
        return self.path / _SHARDS / f".{index:05d}.attempt-{number}"

    def job(self) -> dict[str, Any] | None:
        """What ``begin`` wrote, None in a folder without a job.

        Raises:
            OutputError: the folder holds something else.
        """
        job = _read_json(self.path / JOB)
        if job is not None:
            return job
        if (self.path / JOB).exists():
            raise OutputError(f"{self.path / JOB} is damaged", hint="use another folder: -o FOLDER")
        names = sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else []
        foreign = [name for name in names if name != _LOCK and not name.startswith(f".{JOB}.")]
        if foreign:
            raise OutputError(
                f"{self.path} holds {foreign[0]} and no {JOB}: expected an empty folder or one "
                "that a bulk job has begun",
                hint="use another folder: -o FOLDER",
            )
        return None

    def begin(self, job: dict[str, Any]) -> None:
        _write_json(self.path / JOB, job)

    def succeed(self, summary: dict[str, Any]) -> None:
        _write_json(self.path / SUCCESS, summary)

    def unsucceed(self) -> None:
        """For a finished job of which a part was lost: it is not finished while that is redone."""
        (self.path / SUCCESS).unlink(missing_ok=True)

    def remove_unfinished(self) -> None:
        """Temporary files of workers that were killed. Only while no worker writes."""
        for pattern in (".part-*", f".{JOB}.*", f".{SUCCESS}.*", f"{_SHARDS}/.*"):
            for file in self.path.glob(pattern):
                file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, which two jobs must not write at once. The lock ends with the process.

        Raises:
            OutputError: another process holds it, or the folder cannot be made.
        """
        import fcntl

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            stream = (self.path / _LOCK).open("w")
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from error
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise OutputError(
                    f"another bulk job writes {self.path}",
                    hint="wait for it, or use another folder: -o FOLDER",
                ) from error
            yield

    def _record(self, index: int) -> pathlib.Path:
        return self.path / _SHARDS / f"{index:05d}.json"


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def _write_json(path: pathlib.Path, data: dict[str, Any]) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(data, ensure_ascii=False) + "\n", encoding="utf-8")
