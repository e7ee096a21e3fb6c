"""The file that calibration data becomes: for each tensor what is needed to choose its range."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import GraphError, InputError
from ..provenance import atomic_file
from .observers import TensorSummary, check_method

SCHEMA = "convbert-deploy calibration table 1"
_COLLECT = "collect it again: convbert-deploy calibrate GRAPH --data FILE"
#: what reading a file's numbers raises where they are not those that were written
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


@dataclasses.dataclass(frozen=True)
class CalibrationTable:
    """Statistics of a graph's tensors over calibration data.

    Holds histograms, so ranges by another method need no new collection: ``amax`` takes one, and
    ``dataclasses.replace(table, method=...)`` changes the default.

    graph_sha256: of the graph file that ran. data: name of the data's file, data_sha256: digest of
    the rows taken from it (``CalibrationSamples.sha256``). samples: requests, tokens: word pieces
    with [CLS] and [SEP]. versions: of the packages that computed it.
    """

    graph_sha256: str
    data: str
    data_sha256: str
    samples: int
    tokens: int
    method: str
    percentile: float
    versions: Mapping[str, str]
    tensors: Mapping[str, TensorSummary]

    def __post_init__(self) -> None:
        check_method(self.method, self.percentile)

    def amax(
        self, name: str, method: str | None = None, *, percentile: float | None = None
    ) -> float:
        """Range of a tensor, by the table's method unless another is given.

        Raises:
            GraphError: the tensor was not observed, or no histogram was collected.
            InputError: an unknown method or a percentile out of range.
        """
        if name not in self.tensors:
            raise GraphError(
                f"the calibration table has no tensor {name}, only {len(self.tensors)} others",
                hint=_COLLECT,
            )
        return self.tensors[name].amax(
            self.method if method is None else method,
            percentile=self.percentile if percentile is None else percentile,
        )

    def check_graph(self, sha256: str) -> None:
        """Raises GraphError where the table was collected on another graph."""
        if sha256 != self.graph_sha256:
            raise GraphError(
                f"the calibration table is of graph {self.graph_sha256[:12]}, this one is "
                f"{sha256[:12]}: ranges of another graph would be wrong without a sign",
                hint=_COLLECT,
            )

    def to_json(self) -> dict[str, Any]:
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data["versions"] = dict(self.versions)
        data["tensors"] = {name: summary.to_json() for name, summary in self.tensors.items()}
        return {"schema": SCHEMA, **data}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CalibrationTable:
        """Raises KeyError, TypeError or ValueError where ``data`` is not what ``to_json`` gave."""
        tensors = {}
        for name, summary in data["tensors"].items():
            try:
                tensors[name] = TensorSummary.from_json(summary)
            except _DAMAGE as error:
                raise ValueError(f"tensor {name}: {_reason(error)}") from error
        return cls(
            graph_sha256=str(data["graph_sha256"]),
            data=str(data["data"]),
            data_sha256=str(data["data_sha256"]),
            samples=int(data["samples"]),
            tokens=int(data["tokens"]),
            method=str(data["method"]),
            percentile=float(data["percentile"]),
            versions=dict(data["versions"]),
            tensors=tensors,
        )

    def save(self, path: str | pathlib.Path) -> None:
        """Write readable JSON atomically.

        Raises:
            OutputError: the file cannot be written; nothing partial is left.
        """
        write_json(pathlib.Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | pathlib.Path) -> CalibrationTable:
        """Read what ``save`` wrote.

        Raises:
            GraphError: no such file, no calibration table, of another schema, or damaged.
        """
        path = pathlib.Path(path)
        if not path.is_file():
            raise GraphError(f"calibration table {path} does not exist", hint=_COLLECT)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise GraphError(f"{path} is no calibration table: {error}", hint=_COLLECT) from error
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise GraphError(
                f"{path} has schema {schema!r}, this version reads {SCHEMA!r}", hint=_COLLECT
            )
        try:
            return cls.from_json(data)
        except (*_DAMAGE, InputError) as error:
            raise GraphError(
                f"calibration table {path} is damaged: {_reason(error)}", hint=_COLLECT
            ) from error


def write_json(path: pathlib.Path, data: Mapping[str, Any]) -> None:
    """Atomically write ``data``: an object's keys a line each, arrays of numbers on one line.

    Raises:
        OutputError: the file cannot be written; nothing partial is left.
    """
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.writelines(_pieces(data, "\n"))
        stream.write("\n")


def _pieces(value: Any, line: str) -> Iterator[str]:
    if not isinstance(value, Mapping) or not value:
        yield json.dumps(value, separators=(",", ":"), allow_nan=False)
        return
    inner = line + " "
    for index, (key, item) in enumerate(value.items()):
        yield f"{',' if index else '{'}{inner}{json.dumps(key)}: "
        yield from _pieces(item, inner)
    yield line + "}"


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
