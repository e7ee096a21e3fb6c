"""The rows a model is calibrated with: read, tokenized, and put into batches without padding."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backends.base import Batch
from ..errors import InputError
from ..serving.requests import INPUT_NAMES, InputLimits, request_from_json, validated_batch
from ..serving.scorer import Scorer, ScorerOptions
from ..shapes import ShapeProfile, ShapeRange

if TYPE_CHECKING:
    from ..serving.tokenizer import Tokenizer

_FORMATS = ".jsonl (one request a line) or .npz (input_ids, attention_mask, token_type_ids)"
#: calibration runs no engine whose bounds would limit the choices of a request
_ANY_CHOICES = ShapeRange(2, 4, 1 << 16)


@dataclasses.dataclass(frozen=True, eq=False)
class SampleRow:
    """One row of a batch, without padding.

    inputs: int64 arrays of shape (seq,), or (choices, seq); only choices shorter than the longest
    one of their request are padded. number: of the line (from 1) or of the array's row (from 0).
    """

    number: int
    inputs: Mapping[str, np.ndarray]

    @property
    def positions(self) -> int:
        """Positions the model computes for the row, pads of short choices among them."""
        return self.inputs["input_ids"].size

    @property
    def tokens(self) -> int:
        """Positions that are no pads."""
        return int(self.inputs["attention_mask"].sum())


@dataclasses.dataclass(frozen=True, eq=False)
class CalibrationSamples:
    """Rows in the order of their file. ``source``: the file's name; ``unit``: ``line`` or ``row``."""

    source: str
    unit: str
    rows: tuple[SampleRow, ...]

    def __post_init__(self) -> None:
        if not self.rows:
            raise InputError(f"{self.source} holds no sample", hint=f"expected {_FORMATS}")

    @property
    def samples(self) -> int:
        """Requests; a long text may have several rows."""
        return len({row.number for row in self.rows})

    @property
    def tokens(self) -> int:
        return sum(row.tokens for row in self.rows)

    @property
    def sha256(self) -> str:
        """Digest of the rows: shapes, ids, masks and types in order; not of the file's name."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(repr(row.inputs["input_ids"].shape).encode())
            for name in INPUT_NAMES:
                digest.update(np.ascontiguousarray(row.inputs[name], "<i8").tobytes())
        return digest.hexdigest()

    def place(self, row: int) -> str:
        """``line 12 of texts.jsonl``: where the row with this index came from."""
        return f"{self.unit} {self.rows[row].number} of {self.source}"

    def batches(self, max_positions: int) -> Iterator[tuple[tuple[int, ...], Batch]]:
        """Indices of rows of one shape, and those rows as a batch.

        Equal shapes only: ConvBERT's convolutions read pads, so padding to a common length would
        change what is measured. At most ``max_positions`` positions a batch; a longer row runs
        alone. Ordered by the first row, so lengths come mixed as they do in the file.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, row in enumerate(self.rows):
            groups.setdefault(row.inputs["input_ids"].shape, []).append(index)
        parts = []
        for shape, indices in groups.items():
            size = max(1, max_positions // int(np.prod(shape)))
            parts += [tuple(indices[i : i + size]) for i in range(0, len(indices), size)]
        for part in sorted(parts):
            yield part, self.batch(part)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Rows of one shape as inputs of shape (batch, seq) or (batch, choices, seq)."""
        chosen = [self.rows[index].inputs for index in indices]
        return {name: np.stack([inputs[name] for inputs in chosen]) for name in INPUT_NAMES}


def read_samples(
    path: str | pathlib.Path,
    *,
    limits: InputLimits,
    tokenizer: Tokenizer | None = None,
    samples: int = 512,
    seed: int = 0,
    max_length: int | None = None,
    window_overlap: int = 128,
) -> CalibrationSamples:
    """Read at most ``samples`` requests; of a longer file a random choice fixed by ``seed``.

    A choice and not the head of the file, because files are often sorted. Memory grows with the
    choice, not with the file (of a .jsonl).

    Args:
        path: ``.jsonl``, a request of ``serving.requests`` a line (other keys are ignored, blank
            lines skipped; lines that are not chosen are not read), or ``.npz`` with ``input_ids``,
            ``attention_mask`` and ``token_type_ids`` (the last two may be left out) of shape
            (N, seq) or (N, choices, seq), padded on the right.
        limits: the model's bounds and its task.
        tokenizer: of the checkpoint; needed for text.
        max_length: tokens a row may have; None is all positions the model has. Longer texts are cut
            or windowed as the Scorer does it.
        window_overlap: tokens that neighbouring windows share.

    Raises:
        InputError: no such file, another format, nothing in it, or a request that cannot be scored,
            named by its line (from 1; rows of an .npz from 0).
    """
    path = pathlib.Path(path)
    if samples < 1:
        raise InputError(f"{samples} calibration samples, expected at least 1")
    if not path.is_file():
        raise InputError(f"calibration data {path} does not exist", hint=f"expected {_FORMATS}")
    if path.suffix == ".npz":
        return _from_arrays(path, limits, _chooser(samples, seed))
    if path.suffix != ".jsonl":
        raise InputError(f"calibration data {path} is a {path.suffix} file", hint=_FORMATS)
    if tokenizer is None:
        raise InputError(
            f"{path} holds text, and the graph has no tokenizer",
            hint="--tokenizer FOLDER names one, or give token ids as .npz",
        )
    length = limits.max_positions if max_length is None else min(max_length, limits.max_positions)
    options = ScorerOptions(
        limits=limits,
        profile=ShapeProfile(seq=ShapeRange(1, length, length), choices=_ANY_CHOICES),
        padding="hf",
        window_overlap=window_overlap,
    )
    return _from_lines(path, Scorer(None, tokenizer, options), _chooser(samples, seed))  # type: ignore[arg-type]


def _chooser(samples: int, seed: int) -> Callable[[int], np.ndarray]:
    """A function from how many there are to the chosen indices, in order."""

    def choose(count: int) -> np.ndarray:
        if count <= samples:
            return np.arange(count)
        return np.sort(np.random.default_rng(seed).choice(count, samples, replace=False))

    return choose


def _filled_lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            # editors on Windows begin a file with a byte order mark
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield number, line


def _from_lines(
    path: pathlib.Path, scorer: Scorer, choose: Callable[[int], np.ndarray]
) -> CalibrationSamples:
    chosen = set(choose(sum(1 for _ in _filled_lines(path))).tolist())
    rows = []
    for index, (number, line) in enumerate(_filled_lines(path)):
        if index in chosen:
            rows += [SampleRow(number, row) for row in _encoded(path, number, line, scorer)]
    return CalibrationSamples(path.name, "line", tuple(rows))


def _encoded(
    path: pathlib.Path, number: int, line: bytes, scorer: Scorer
) -> list[dict[str, np.ndarray]]:
    try:
        request = request_from_json(scorer.options.task, json.loads(line))
        return scorer.encode(request)
    except InputError as error:
        raise InputError(f"{path} line {number}: {error}", hint=error.hint) from error
    except (ValueError, RecursionError) as error:  # bad JSON, or bytes that are no UTF-8
        raise InputError(
            f"{path} line {number} is not JSON: {error}", hint="one JSON object a line, in UTF-8"
        ) from error


def _from_arrays(
    path: pathlib.Path, limits: InputLimits, choose: Callable[[int], np.ndarray]
) -> CalibrationSamples:
    batch = _validated_arrays(path, limits)
    rows = []
    for index in choose(len(batch["input_ids"])):
        inputs = {name: array[index] for name, array in batch.items()}
        length = int(inputs["attention_mask"].sum(axis=-1).max())
        # a copy, or the row would hold the whole file's array
        trimmed = {name: array[..., :length].copy() for name, array in inputs.items()}
        rows.append(SampleRow(int(index), trimmed))
    return CalibrationSamples(path.name, "row", tuple(rows))


def _validated_arrays(path: pathlib.Path, limits: InputLimits) -> dict[str, np.ndarray]:
    arrays: dict[str, Any] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in INPUT_NAMES if name in file.files}
            found = ", ".join(file.files)
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no .npz file, or damaged: {error}") from error
    if "input_ids" not in arrays:
        raise InputError(f"{path} has no input_ids, only: {found or 'nothing'}")
    try:
        return validated_batch(arrays, limits)
    except InputError as error:
        raise InputError(f"{path}: {error}", hint=error.hint) from error
