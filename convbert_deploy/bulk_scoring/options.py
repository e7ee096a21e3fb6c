"""What a bulk job may be told."""

from __future__ import annotations

import dataclasses
from typing import Literal

from convbert_deploy.errors import InputError

#: by name; the suffixes that choose it
FORMATS = {
    "jsonl": (".jsonl", ".ndjson"),
    "csv": (".csv",),
    "tsv": (".tsv",),
    "parquet": (".parquet", ".pq"),
    "text": (".txt", ".text"),
}


@dataclasses.dataclass(frozen=True)
class BulkOptions:
    """How the input is read, cut, scored and written.

    format: one of ``FORMATS``; None goes by suffix. text_column: the column that is the request's
    ``text``. keep: input columns that the output has too; None keeps all.
    shard_rows: rows of a shard, which is what a resumed job or a dead worker does again.
    workers, threads: how many, and CPU threads of each; None is what the machine or cluster has.
    local: processes of this machine, without Ray; None: where no ``address`` is given and Ray is
        not installed. address: of a Ray cluster; None starts Ray on this machine.
    """

    format: str | None = None
    output_format: Literal["parquet", "jsonl"] = "parquet"
    text_column: str | None = None
    keep: tuple[str, ...] | None = None
    shard_rows: int = 10_000
    workers: int | None = None
    threads: int | None = None
    local: bool | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        for name in ("shard_rows", "workers", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}, expected at least 1")
        if self.format is not None and self.format not in FORMATS:
            raise InputError(f"format {self.format!r}: expected {', '.join(FORMATS)}")
        if self.output_format not in ("parquet", "jsonl"):
            raise InputError(f"output format {self.output_format!r}: expected parquet or jsonl")
        if self.local and self.address is not None:
            raise InputError(
                f"local and the Ray address {self.address} exclude each other",
                hint="leave out --local or --address",
            )
