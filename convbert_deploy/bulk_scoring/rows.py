"""Rows of each input format: counted and cut when a job is planned, read when a shard is scored."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from convbert_deploy.bulk_scoring.lines import LONGEST_LINE, lines, records
from convbert_deploy.bulk_scoring.plan import Shard, Source
from convbert_deploy.errors import InputError, MissingDependencyError

_MOST_COLUMNS = 1000
#: what the requests of all tasks are made of
REQUEST_COLUMNS = ("text", "text_pair", "words", "question", "context", "prompt", "choices")
#: those that hold lists; in CSV as JSON
_LISTS = ("words", "choices")
_PARQUET_ROWS = 256


@dataclasses.dataclass
class Row:
    """values: the input's columns, of Parquet only those that a request may have. error: why the row
    could not be read. batch, index: the pyarrow RecordBatch that a Parquet row is in, and where."""

    values: Mapping[str, Any]
    error: InputError | None = None
    batch: Any = None
    index: int = 0


class Scan:
    """What is learnt on the way through the files. header: of CSV and Parquet, the same in all."""

    def __init__(self, shard_rows: int, columns_wanted: tuple[str, ...] | None = None) -> None:
        self.shard_rows, self._wanted = shard_rows, columns_wanted
        self.header: tuple[str, ...] | None = None
        self.schema: Any = None
        self._kinds: dict[str, str | None] = {}

    def columns(self) -> dict[str, str]:
        """Kind by name of column, in order of appearance."""
        return {name: kind or "string" for name, kind in self._kinds.items()}

    def see(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if self._wanted is None or name in self._wanted:
                self._kinds[name] = merged_kind(self._kinds.get(name), value)
        if len(self._kinds) > _MOST_COLUMNS:
            raise InputError(
                f"the objects have more than {_MOST_COLUMNS} different keys",
                hint="--keep NAME,NAME names those that the output needs",
            )

    def see_header(self, path: pathlib.Path, header: tuple[str, ...], kind: str) -> None:
        """Raises InputError where it is not that of the files before, or names a column twice."""
        if self.header is None:
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise InputError(f"{path} has two columns called {', '.join(twice)}")
            self.header = header
            self._kinds = dict.fromkeys(header, kind)
        elif header != self.header:
            raise InputError(
                f"{path} has the columns {', '.join(header)}, the files before it "
                f"{', '.join(self.header)}",
                hint="score files of different columns in jobs of their own",
            )


def merged_kind(kind: str | None, value: Any) -> str | None:
    """Kind of a column that was ``kind`` before ``value`` came; None has only seen nulls."""
    if value is None:
        return kind
    found = {bool: "bool", int: "int", float: "float", str: "string"}.get(type(value), "json")
    if found == "int" and not -(2**63) <= value < 2**63:
        found = "json"
    if kind in (None, found):
        return found
    return "float" if {kind, found} == {"int", "float"} else "json"


def scanner(format: str) -> Callable[[pathlib.Path, Scan], Iterator[tuple[int, int, int, int]]]:
    """A function that yields (first row, rows, start byte, stop byte) for each shard of a file."""
    if format == "parquet":
        return _scan_parquet
    if format in ("csv", "tsv"):
        return lambda path, scan: _scan_records(path, scan, format)
    return lambda path, scan: _scan_lines(path, scan, format)


def read_rows(source: Source, shard: Shard) -> Iterator[Row]:
    """The shard's rows, exactly ``shard.rows`` of them.

    Raises:
        InputError: the file was changed, or cannot be read.
    """
    path = source.path(shard)
    if source.format == "parquet":
        return _parquet_rows(
            path, shard, REQUEST_COLUMNS + ((source.text_column,) if source.text_column else ())
        )
    if source.format in ("csv", "tsv"):
        found = records(path, source.format, shard.start, shard.stop)
        return (_record_row(fields, source.header) for fields, _ in found)
    parse = _text_row if source.format == "text" else _object_row
    return (parse(text) for text, _ in lines(path, shard.start, shard.stop))


def _cut(ends: Iterator[int], start: int, shard_rows: int) -> Iterator[tuple[int, int, int, int]]:
    """Shards from the byte behind each row."""
    first = rows = 0
    stop = start
    for stop in ends:
        rows += 1
        if rows == shard_rows:
            yield first, rows, start, stop
            first, rows, start = first + rows, 0, stop
    if rows:
        yield first, rows, start, stop


def _scan_lines(path: pathlib.Path, scan: Scan, format: str) -> Iterator[tuple[int, int, int, int]]:
    def ends() -> Iterator[int]:
        for text, end in lines(path):
            if format == "jsonl":
                scan.see(_object_row(text).values)
            yield end

    if format == "text":
        scan.see({"text": ""})
    return _cut(ends(), 0, scan.shard_rows)


def _scan_records(
    path: pathlib.Path, scan: Scan, format: str
) -> Iterator[tuple[int, int, int, int]]:
    found = records(path, format)
    header, start = next(found, ((), 0))
    if not header:
        raise InputError(f"{path} is empty: expected a first line with the names of the columns")
    scan.see_header(path, tuple(header), "string")
    return _cut((end for _, end in found), start, scan.shard_rows)


def _text_row(text: str | None) -> Row:
    return _too_long() if text is None else Row({"text": text.rstrip("\r\n")})


def _too_long() -> Row:
    return Row({}, InputError(f"the line has more than {LONGEST_LINE} bytes"))


def _object_row(text: str | None) -> Row:
    if text is None:
        return _too_long()
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return Row({}, InputError(f"the line is not JSON: {error}"))
    if not isinstance(value, dict):
        return Row({}, InputError(f"the line is a JSON {type(value).__name__}, expected an object"))
    return Row(value)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _record_row(fields: list[str], header: tuple[str, ...]) -> Row:
    values = dict(zip(header, fields, strict=False))
    if len(fields) != len(header):
        message = f"the row has {len(fields)} fields, the header {len(header)}"
        return Row(values, InputError(message))
    return Row(values)


def request_object(source: Source, values: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON form of a request (``serving.requests``) from a row's columns.

    CSV has no null and no lists: an empty cell is null, ``words`` and ``choices`` hold JSON.

    Raises:
        InputError: such a cell is not a JSON list, or the row has no such text column.
    """
    found = dict(values)
    if source.format in ("csv", "tsv"):
        found = {name: value or None for name, value in found.items()}
        for name in _LISTS:
            if isinstance(found.get(name), str):
                found[name] = _json_list(name, found[name])
    if source.text_column is not None:
        if source.text_column not in found:
            raise InputError(f"the row has no {source.text_column}, which --text-column names")
        found["text"] = found[source.text_column]
    return found


def _json_list(name: str, cell: str) -> list[Any]:
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise InputError(f"{name} is not a JSON list", hint=f'expected {name} such as ["a", "b"]')
    return value


def open_parquet(path: pathlib.Path) -> Any:
    """A pyarrow ParquetFile.

    Raises:
        InputError: not Parquet. MissingDependencyError: no pyarrow.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError("pyarrow", needed_for="Parquet", extra="bulk") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} is not a readable Parquet file: {error}") from error


def _scan_parquet(path: pathlib.Path, scan: Scan) -> Iterator[tuple[int, int, int, int]]:
    with open_parquet(path) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
        scan.see_header(path, tuple(schema.names), "arrow")
        if scan.schema is None:
            scan.schema = schema
        elif not schema.equals(scan.schema):
            raise InputError(f"{path} has columns of other types than the files before it")
    for first in range(0, rows, scan.shard_rows):
        yield first, min(scan.shard_rows, rows - first), 0, 0


def parquet_batches(path: pathlib.Path, shard: Shard) -> Iterator[Any]:
    """The shard's rows as RecordBatches of a few hundred rows; row groups before it are skipped.

    Raises:
        InputError: the file is damaged.
    """
    import pyarrow

    with open_parquet(path) as file:
        groups, skip = _row_groups(file.metadata, shard)
        left = shard.rows
        try:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, row_groups=groups):
                if skip >= batch.num_rows:
                    skip -= batch.num_rows
                    continue
                part = batch.slice(skip, left)
                skip, left = 0, left - part.num_rows
                yield part
                if not left:
                    return
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"cannot read {path}: {error}") from error


def _row_groups(metadata: Any, shard: Shard) -> tuple[list[int], int]:
    """Row groups that hold rows of the shard, and how many rows come before it in the first."""
    groups, skip, row = [], 0, 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if row + rows > shard.first and row < shard.first + shard.rows:
            skip = skip if groups else shard.first - row
            groups.append(group)
        row += rows
    return groups, skip


def _parquet_rows(path: pathlib.Path, shard: Shard, wanted: tuple[str, ...]) -> Iterator[Row]:
    for batch in parquet_batches(path, shard):
        names = [name for name in wanted if name in batch.schema.names]
        columns = [batch.column(name) for name in names]
        for index in range(batch.num_rows):
            try:
                values = {n: c[index].as_py() for n, c in zip(names, columns, strict=True)}
            except ValueError as error:  # UnicodeDecodeError is one
                yield Row({}, InputError(f"the row cannot be read: {error}"), batch, index)
                continue
            yield Row(values, None, batch, index)
