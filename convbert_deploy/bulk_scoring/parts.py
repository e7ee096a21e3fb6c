"""A shard's rows and answers as one file: Parquet with typed columns, or JSONL."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from convbert_deploy.bulk_scoring.columns import AnswerColumn
from convbert_deploy.bulk_scoring.plan import Column
from convbert_deploy.bulk_scoring.rows import Row, open_parquet
from convbert_deploy.errors import MissingDependencyError
from convbert_deploy.serving.decode import Answer

#: characters of answers that a row group of the output holds at least
_GROUP_CHARACTERS = 1 << 25


class PartWriter(Protocol):
    def write(self, file: str, first: int, rows: Sequence[Row], answers: Sequence[Answer]) -> None:
        """Append consecutive rows of an input file, the first of which is number ``first``."""


@contextlib.contextmanager
def part_writer(
    path: pathlib.Path,
    output_format: str,
    columns: Sequence[Column],
    answer_columns: Sequence[AnswerColumn],
    source_file: pathlib.Path,
) -> Iterator[PartWriter]:
    """A writer of ``path``, complete when the block is left. source_file: the input, whose types a
    Parquet input's columns have.

    Raises:
        MissingDependencyError: Parquet without pyarrow.
    """
    if output_format == "jsonl":
        with path.open("wb") as stream:
            yield _JsonLines(stream, columns, answer_columns)
        return
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingDependencyError("pyarrow", needed_for="Parquet", extra="bulk") from error
    schema = _schema(columns, answer_columns, source_file)
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        part = _Parquet(writer, schema, columns, answer_columns)
        yield part
        part.flush()


def plain(text: str) -> str:
    """The text with ``?`` for what UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


class _JsonLines:
    def __init__(
        self, stream: Any, columns: Sequence[Column], answer_columns: Sequence[AnswerColumn]
    ) -> None:
        self._stream, self._columns, self._answers = stream, columns, answer_columns

    def write(self, file: str, first: int, rows: Sequence[Row], answers: Sequence[Answer]) -> None:
        for number, (row, answer) in enumerate(zip(rows, answers, strict=True), first):
            found = {"file": file, "row": number}
            for column in self._columns:
                found[column.output] = self._value(row, column)
            if "error" in answer:
                found["error"] = answer["error"]
            else:
                found |= {column.name: column.value(answer) for column in self._answers}
                found["answer"] = answer
            # str is for what only Arrow has, such as a date.
            text = json.dumps(found, ensure_ascii=False, default=str)
            self._stream.write(text.encode("utf-8", "replace") + b"\n")

    @staticmethod
    def _value(row: Row, column: Column) -> Any:
        if row.batch is None:
            return row.values.get(column.name)
        return row.batch.column(column.name)[row.index].as_py()


class _Parquet:
    def __init__(
        self,
        writer: Any,
        schema: Any,
        columns: Sequence[Column],
        answer_columns: Sequence[AnswerColumn],
    ) -> None:
        self._writer, self._schema = writer, schema
        self._columns, self._answers = columns, answer_columns
        self._tables: list[Any] = []
        self._characters = 0

    def write(self, file: str, first: int, rows: Sequence[Row], answers: Sequence[Answer]) -> None:
        import pyarrow as pa

        good = [None if "error" in answer else answer for answer in answers]
        texts = [None if a is None else json.dumps(a, ensure_ascii=False) for a in good]
        values: list[Any] = [[file] * len(rows), range(first, first + len(rows))]
        values += [_kept(rows, column) for column in self._columns]
        values += [[None if a is None else c.value(a) for a in good] for c in self._answers]
        values += [texts, [_plain(answer.get("error")) for answer in answers]]
        arrays = [
            value
            if isinstance(value, (pa.Array, pa.ChunkedArray))
            else pa.array(value, type=field.type)
            for value, field in zip(values, self._schema, strict=True)
        ]
        self._tables.append(pa.Table.from_arrays(arrays, schema=self._schema))
        self._characters += sum(len(text) for text in texts if text)
        if self._characters >= _GROUP_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        """Write what has been gathered as row groups."""
        import pyarrow as pa

        if self._tables:
            self._writer.write_table(pa.concat_tables(self._tables))
        self._tables, self._characters = [], 0


def _plain(value: Any) -> Any:
    return plain(value) if isinstance(value, str) else value


def _kept(rows: Sequence[Row], column: Column) -> Any:
    """The rows' values of one input column, as its Arrow type takes them."""
    if column.kind == "arrow":
        return _sliced(rows, column.name)
    values = [row.values.get(column.name) for row in rows]
    if column.kind == "json":
        return [None if v is None else plain(json.dumps(v, ensure_ascii=False)) for v in values]
    if column.kind == "float":
        return [None if value is None else float(value) for value in values]
    return [_plain(value) for value in values]


def _sliced(rows: Sequence[Row], name: str) -> Any:
    """One column of consecutive Parquet rows, without a detour through Python values."""
    import pyarrow as pa

    chunks, first = [], 0
    for index in range(1, len(rows) + 1):
        if index == len(rows) or rows[index].batch is not rows[first].batch:
            chunks.append(rows[first].batch.column(name).slice(rows[first].index, index - first))
            first = index
    return pa.chunked_array(chunks)


def _schema(
    columns: Sequence[Column], answer_columns: Sequence[AnswerColumn], source_file: pathlib.Path
) -> Any:
    import pyarrow as pa

    types = {
        "string": pa.string(),
        "json": pa.string(),
        "int": pa.int64(),
        "float": pa.float64(),
        "bool": pa.bool_(),
        "strings": pa.list_(pa.string()),
        "floats": pa.list_(pa.float32()),
    }
    fields = [pa.field("file", pa.string()), pa.field("row", pa.int64())]
    if any(column.kind == "arrow" for column in columns):
        with open_parquet(source_file) as file:
            given = file.schema_arrow
        fields += [pa.field(c.output, given.field(c.name).type) for c in columns]
    else:
        fields += [pa.field(column.output, types[column.kind]) for column in columns]
    fields += [pa.field(column.name, types[column.kind]) for column in answer_columns]
    return pa.schema([*fields, pa.field("answer", pa.string()), pa.field("error", pa.string())])
