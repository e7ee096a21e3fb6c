"""What is timed: a point (one shape) or a workload (batches of real texts)."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from convbert_deploy.architecture import Architecture, Task
from convbert_deploy.backends.base import Batch
from convbert_deploy.errors import InputError, ShapeError

#: Ends the name of the workload that a workload of texts is held against.
FIXED_LENGTH = ", fixed length"


@dataclasses.dataclass(frozen=True, order=True)
class Point:
    """A shape to time at: ``batch`` sequences of ``seq`` positions each."""

    batch: int
    seq: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.seq}"

    @property
    def sequences(self) -> int:
        return self.batch

    @classmethod
    def parse_list(cls, text: str) -> tuple[Point, ...]:
        """``1x512,32x128``. Raises ShapeError for anything else."""
        points = []
        for part in text.split(","):
            batch, _, seq = part.strip().partition("x")
            if not (batch.isdigit() and seq.isdigit() and int(batch) and int(seq)):
                raise ShapeError(f"{part!r} is not a shape: expected BATCHxSEQ, such as 8x128")
            points.append(cls(int(batch), int(seq)))
        return tuple(points)


@dataclasses.dataclass(frozen=True)
class Workload:
    """Sequences of many lengths in batches, each padded to its longest.

    lengths: tokens of every sequence, special tokens included, in order.
    """

    name: str
    batch_size: int
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        return self.name

    @property
    def sequences(self) -> int:
        return len(self.lengths)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "sequences": self.sequences,
            "batches": -(-self.sequences // self.batch_size),
            "batch_size": self.batch_size,
            "mean_tokens": float(np.mean(self.lengths)),
            "longest": max(self.lengths),
        }


@dataclasses.dataclass(frozen=True)
class Case:
    """A point or workload with its inputs.

    batches: computed one after the other; together they are one run.
    check: a batch without padding whose answers are compared; None takes the first batch. Pads
        change transformers' answer (see ``--padding``), so padded batches are not compared.
    """

    where: Point | Workload
    batches: tuple[Batch, ...]
    check: Batch | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Real tokens of every sequence."""
        rows = (batch["attention_mask"].reshape(-1, _seq(batch)) for batch in self.batches)
        return tuple(int(length) for mask in rows for length in np.count_nonzero(mask, axis=1))

    @property
    def tokens(self) -> int:
        """Positions with a mask of one."""
        return sum(self.lengths)

    @property
    def padded_tokens(self) -> int:
        """Positions given, pads included."""
        return sum(batch["attention_mask"].size for batch in self.batches)


def _seq(batch: Batch) -> int:
    return batch["attention_mask"].shape[-1]


def workload_cases(
    name: str, rows: Sequence[Batch], batch_size: int, architecture: Architecture, task: Task
) -> tuple[Case, Case]:
    """The workload, and as many tokens in batches of one length without padding.

    Args:
        rows: one sequence each, int64 [1, length], in the order they are to be timed.
        batch_size: sequences a batch; the last may hold fewer.
    """
    batches = tuple(
        padded(rows[start : start + batch_size], architecture.pad_token_id)
        for start in range(0, len(rows), batch_size)
    )
    lengths = tuple(row["input_ids"].shape[1] for row in rows)
    longest = rows[int(np.argmax(lengths))]
    texts = Case(Workload(name, batch_size, lengths), batches, check=longest)
    return texts, _fixed_length(name, batch_size, lengths, architecture, task)


def padded(rows: Sequence[Batch], pad_token_id: int) -> Batch:
    """One int64 batch [rows, longest]; pads have mask 0 and token type 0."""
    longest = max(row["input_ids"].shape[1] for row in rows)
    fills = {"input_ids": pad_token_id, "attention_mask": 0, "token_type_ids": 0}
    batch = {}
    for name, fill in fills.items():
        batch[name] = np.full((len(rows), longest), fill, np.int64)
        for index, row in enumerate(rows):
            batch[name][index, : row[name].shape[1]] = row[name][0]
    return batch


def _fixed_length(
    name: str, batch_size: int, lengths: tuple[int, ...], architecture: Architecture, task: Task
) -> Case:
    """Batches of the mean length, as many as hold about the same number of tokens."""
    from convbert_deploy.parity_cases import random_batch

    length = max(1, round(sum(lengths) / len(lengths)))
    count = max(1, round(sum(lengths) / (length * batch_size)))
    batch = random_batch(architecture, task, min(batch_size, len(lengths)), length)
    rows = batch["input_ids"].shape[0]
    where = Workload(name + FIXED_LENGTH, batch_size, (length,) * (rows * count))
    return Case(where, (batch,) * count)


def read_texts(path: pathlib.Path, tokenizer: Any, longest: int) -> list[Batch]:
    """Every line of a text or JSONL file as one sequence, int64 [1, length], cut at ``longest``.

    A JSON line gives its ``text`` (with ``text_pair``), ``words`` or ``question`` and ``context``.

    Raises:
        InputError: the file cannot be read, holds no text, or a line has none of these.
    """
    from convbert_deploy.serving.sequences import cut

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"texts {path} are unreadable: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        first, second = _pieces(tokenizer, line, f"{path}:{number}")
        sequence, _ = cut(tokenizer, first, second, longest)
        ids = np.array([sequence.ids], np.int64)
        types = np.array([sequence.types], np.int64)
        rows.append(
            {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": types}
        )
    if not rows:
        raise InputError(f"texts {path} hold no line", hint="one text a line, or JSON objects")
    return rows


def _pieces(tokenizer: Any, line: str, place: str) -> tuple[Any, Any]:
    if not line.lstrip().startswith("{"):
        return tokenizer.pieces(line), None
    try:
        data = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place} is neither text nor JSON: {error}") from error
    if "words" in data:
        return tokenizer.pieces_of_words(data["words"]), None
    for first, second in (("question", "context"), ("text", "text_pair")):
        if first in data:
            other = data.get(second)
            return tokenizer.pieces(data[first]), None if other is None else tokenizer.pieces(other)
    raise InputError(f"{place} has no text: expected text, words, or question and context")
