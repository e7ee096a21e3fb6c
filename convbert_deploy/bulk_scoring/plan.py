"""What a job is: which rows of which files make a shard, and which columns come out."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from convbert_deploy.errors import InputError


@dataclasses.dataclass(frozen=True)
class InputFile:
    """name: path relative to the input, with ``/``. size: bytes. mtime_ns: nanoseconds."""

    name: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: pathlib.Path, name: str) -> InputFile:
        """Raises InputError where it cannot be read."""
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        return cls(name, status.st_size, status.st_mtime_ns)


@dataclasses.dataclass(frozen=True)
class Shard:
    """Consecutive rows of one file. first: number of its first row in that file, from 0.

    start, stop: the bytes that hold the rows; both 0 for Parquet, which is read by row number.
    """

    index: int
    file: str
    first: int
    rows: int
    start: int = 0
    stop: int = 0

    def to_json(self) -> list[Any]:
        return list(dataclasses.astuple(self))

    @classmethod
    def from_json(cls, values: list[Any]) -> Shard:
        return cls(*values)


@dataclasses.dataclass(frozen=True)
class Column:
    """A kept input column. kind: ``string``, ``int``, ``float``, ``bool``, ``json`` (written as
    JSON text), or ``arrow`` (the type it has in the Parquet input)."""

    name: str
    kind: str
    output: str


@dataclasses.dataclass(frozen=True)
class Source:
    """The input as a worker needs it. root: the folder that file names are relative to.

    header: all columns of a CSV or Parquet file, in order; empty where rows are objects or lines.
    """

    root: str
    format: str
    text_column: str | None
    files: tuple[InputFile, ...]
    header: tuple[str, ...]
    columns: tuple[Column, ...]

    def path(self, shard: Shard) -> pathlib.Path:
        """Raises InputError where the file is not the one that was planned."""
        path = pathlib.Path(self.root, *shard.file.split("/"))
        planned = next(file for file in self.files if file.name == shard.file)
        if InputFile.of(path, shard.file) != planned:
            raise InputError(
                f"{path} was changed since the job began",
                hint="score the changed input into another folder: -o FOLDER",
            )
        return path

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"root": None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], root: str) -> Source:
        return cls(
            root=root,
            format=data["format"],
            text_column=data["text_column"],
            files=tuple(InputFile(**file) for file in data["files"]),
            header=tuple(data["header"]),
            columns=tuple(Column(**column) for column in data["columns"]),
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """A source and its shards, in order: together they hold each row once."""

    source: Source
    shards: tuple[Shard, ...]

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)
