"""Labelled texts: one JSON object a line, the request's keys (``serving.requests``) and its label.

========================= ======================================================================
task                      label
========================= ======================================================================
sequence-classification   ``"label"``: index or name; a number (or list) for regression; a list of
                          indices or names for multi-label
token-classification      ``"tags"``: a name or index for each of ``"words"``
question-answering        ``"answers"``: SQuAD's, ``["..."]`` or ``{"text": ["..."]}``
multiple-choice           ``"label"``: index of the choice, or its text
masked-lm                 ``"masks"``: a vocabulary entry for each mask of ``"text"``
encoder                   none
========================= ======================================================================

Labels may be left out, of all lines or of none. Other keys are ignored.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from convbert_deploy.errors import InputError
from convbert_deploy.evaluation.problem import Problem, problem_of
from convbert_deploy.serving.requests import (
    ChoiceRequest,
    Request,
    TextRequest,
    WordsRequest,
    request_from_json,
)
from convbert_deploy.serving.scorer import Scorer, ScorerOptions
from convbert_deploy.serving.tokenizer import Tokenizer

#: A class index; chosen indices (multi-label); values (regression); tags; right answers; a choice's
#: index; the tokens under the masks.
Gold = int | tuple[int, ...] | tuple[float, ...] | tuple[str, ...]

_KEYS = {
    Problem.SINGLE_LABEL: "label",
    Problem.MULTI_LABEL: "label",
    Problem.REGRESSION: "label",
    Problem.TAGS: "tags",
    Problem.SPAN: "answers",
    Problem.CHOICE: "label",
    Problem.MASKS: "masks",
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """One line: its number from 1, the request, and the right answer (None without a label)."""

    line: int
    request: Request
    gold: Gold | None


@dataclasses.dataclass(frozen=True)
class LabelledData:
    """Samples of one file, all with a label or all without."""

    name: str
    samples: tuple[Sample, ...]

    @property
    def labelled(self) -> bool:
        return self.samples[0].gold is not None


def read_labelled(
    path: str | pathlib.Path,
    tokenizer: Tokenizer,
    options: ScorerOptions,
    *,
    limit: int | None = None,
    lines: Collection[int] | None = None,
) -> LabelledData:
    """Read a file for the model that ``options`` describe; at most the first ``limit`` samples, or
    those of the line numbers ``lines`` (from 1).

    Every request is tokenized once, so that none is refused later.

    Raises:
        InputError: naming the line: not JSON, a request or label the task does not take, a line
            with a label in a file without (or the reverse); or the file is unreadable or empty.
    """
    path = pathlib.Path(path)
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, expected at least 1")
    reader = _Reader(tokenizer, options)
    samples: list[Sample] = []
    for number, line in _lines(path):
        if lines is not None and number not in lines:
            continue
        try:
            sample = reader.sample(number, line)
            _check_all_or_none(samples, sample, reader.key)
        except InputError as error:
            raise InputError(f"{path.name} line {number}: {error}", hint=error.hint) from error
        samples.append(sample)
        if len(samples) == limit:
            break
    if not samples:
        raise InputError(f"{path} holds no samples", hint="one JSON object a line")
    return LabelledData(path.name, tuple(samples))


def _lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank, read as they are needed."""
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error.reason}") from error


def _check_all_or_none(samples: list[Sample], sample: Sample, key: str | None) -> None:
    if samples and (samples[0].gold is None) != (sample.gold is None):
        here, there = ("no", "has one") if sample.gold is None else ("a", "has none")
        raise InputError(
            f'{here} "{key}", line {samples[0].line} {there}',
            hint="label every line, or none",
        )


class _Reader:
    """Lines to samples, for one model."""

    def __init__(self, tokenizer: Tokenizer, options: ScorerOptions) -> None:
        self._options, self._tokenizer = options, tokenizer
        self._scorer = Scorer(None, tokenizer, options)
        self._problem = problem_of(options)
        self.key = _KEYS.get(self._problem)

    def sample(self, number: int, line: str) -> Sample:
        try:
            obj = json.loads(line)
        except ValueError as error:
            raise InputError(f"not JSON: {error}", hint='for example {"text": "..."}') from error
        request = request_from_json(self._options.task, obj)
        self._scorer.encode(request)
        value = obj.get(self.key) if self.key else None
        return Sample(number, request, None if value is None else self._gold(request, value))

    def _gold(self, request: Request, value: Any) -> Gold:
        labels = self._options.labels
        if self._problem is Problem.SINGLE_LABEL:
            return _class(value, labels)
        if self._problem is Problem.MULTI_LABEL:
            return tuple(sorted({_class(one, labels) for one in _listed("label", value)}))
        if self._problem is Problem.REGRESSION:
            return _numbers(value, len(labels))
        if self._problem is Problem.TAGS:
            return _tags(request, value, labels)
        if self._problem is Problem.SPAN:
            return _answers(value)
        if self._problem is Problem.CHOICE:
            assert isinstance(request, ChoiceRequest)
            return _class(value, request.choices, "choices")
        assert isinstance(request, TextRequest)
        return self._masks(request, value)

    def _masks(self, request: TextRequest, value: Any) -> tuple[str, ...]:
        """Entries as the vocabulary spells them: "Paris" is ``paris`` to an uncased one."""
        tokenizer = self._tokenizer
        tokens = _listed("masks", value, str)
        count = tokenizer.pieces(request.text).ids.count(tokenizer.mask_id)
        if len(tokens) != count:
            raise InputError(f"{len(tokens)} masks, the text has {count} {tokenizer.mask_token}")
        return tuple(self._entry(token) for token in tokens)

    def _entry(self, token: str) -> str:
        if token.startswith("##"):  # a continuation has no spelling of its own
            return token
        pieces = self._tokenizer.pieces(token).tokens
        if len(pieces) != 1:
            raise InputError(f"{token!r} is {len(pieces)} word pieces, a mask stands for one")
        return pieces[0]


def _listed(name: str, value: Any, kind: type | Callable[..., Any] = object) -> Sequence[Any]:
    if not isinstance(value, list) or not all(isinstance(one, kind) for one in value):
        what = " of strings" if kind is str else ""
        raise InputError(f"{name} is {json.dumps(value)[:60]}, expected a list{what}")
    return value


def _class(value: Any, names: Sequence[str], kind: str = "labels") -> int:
    """An index of ``names`` from an index or a name."""
    if isinstance(value, str) and value in names:
        return list(names).index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
        return value
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    raise InputError(
        f"label {json.dumps(value)[:60]} is none of the {len(names)} {kind}",
        hint=f"an index from 0, or one of: {shown}",
    )


def _numbers(value: Any, count: int) -> tuple[float, ...]:
    values = value if isinstance(value, list) else [value]
    good = all(
        isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one)
        for one in values
    )
    if not good or len(values) != count:
        expected = "a number" if count == 1 else f"a list of {count} numbers"
        raise InputError(f"label is {json.dumps(value)[:60]}, expected {expected}")
    return tuple(map(float, values))


def _tags(request: Request, value: Any, labels: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(request, WordsRequest):
        raise InputError("tags need words", hint='{"words": ["A", "day"], "tags": ["DET", "NOUN"]}')
    tags = _listed("tags", value)
    if len(tags) != len(request.words):
        raise InputError(f"{len(tags)} tags for {len(request.words)} words")
    return tuple(labels[_class(tag, labels)] for tag in tags)


def _answers(value: Any) -> tuple[str, ...]:
    texts = _listed("answers", value.get("text") if isinstance(value, dict) else value, str)
    if not texts:
        raise InputError(
            "answers is empty",
            hint="leave unanswerable questions (SQuAD 2.0) out: spans always answer",
        )
    return tuple(texts)
