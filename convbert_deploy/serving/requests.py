"""What may be asked: requests in words, batches in token ids, and the bounds of both.

A GPU gather with an id outside the table is no error, only a wrong answer, and one bad row can fail
its batch-mates; so everything is checked here, per row, before a runtime sees it.

JSON forms, one object a request (keys other than these are ignored):

=========================== =============================================================
task                        forms
=========================== =============================================================
encoder, masked-lm          ``{"text"}``
sequence-classification     ``{"text"}`` or ``{"text", "text_pair"}``
token-classification        ``{"text"}`` or ``{"words": [...]}``, words split by the caller
question-answering          ``{"question", "context"}``
multiple-choice             ``{"prompt", "choices": [...]}``
=========================== =============================================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from convbert_deploy.architecture import Task
from convbert_deploy.errors import InputError
from convbert_deploy.shapes import ShapeProfile

INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")


@dataclasses.dataclass(frozen=True)
class InputLimits:
    """Bounds of a batch: ids in [0, vocab_size), 1 to max_positions tokens a sequence, types in
    [0, type_vocab_size). The task fixes the rank: 3 for multiple choice, else 2.
    """

    task: Task
    vocab_size: int
    max_positions: int
    type_vocab_size: int


def validated_batch(batch: Mapping[str, Any], limits: InputLimits) -> dict[str, np.ndarray]:
    """Check a batch and return it with all three inputs, as contiguous int64.

    ``input_ids`` is required, of shape (batch, seq) or (batch, choices, seq), any integer dtype. A
    mask left out is all ones, token types left out are zeros.

    Raises:
        InputError: naming the input and, where one element is at fault, its row, position, value
            and bound.
    """
    unknown = sorted(set(batch) - set(INPUT_NAMES))
    if unknown:
        raise InputError(f"unknown inputs {', '.join(unknown)}: expected {', '.join(INPUT_NAMES)}")
    if "input_ids" not in batch:
        raise InputError("input_ids is missing")
    ids = _integers("input_ids", batch["input_ids"])
    _check_shape(ids, limits)
    mask = _integers("attention_mask", batch.get("attention_mask", np.ones_like(ids)))
    types = _integers("token_type_ids", batch.get("token_type_ids", np.zeros_like(ids)))
    for name, array in (("attention_mask", mask), ("token_type_ids", types)):
        if array.shape != ids.shape:
            raise InputError(
                f"{name} has shape {list(array.shape)}, input_ids has {list(ids.shape)}: "
                "expected the same"
            )
    _check_range("input_ids", "token id", ids, limits.vocab_size)
    _check_range("attention_mask", "mask value", mask, 2)
    _check_range("token_type_ids", "token type", types, limits.type_vocab_size)
    _check_right_padded(mask)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def _integers(name: str, values: Any) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise InputError(f"{name} is ragged: every row needs the same length") from error
    if array.dtype.kind not in "iu":
        raise InputError(
            f"{name} has dtype {array.dtype}, expected an integer type",
            hint="token ids, masks and types are integers: array.astype('int64')",
        )
    if array.dtype.kind == "u" and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise InputError(f"{name} holds {int(array.max())}, which does not fit int64")
    return np.ascontiguousarray(array, np.int64)


def _check_shape(ids: np.ndarray, limits: InputLimits) -> None:
    axes = limits.task.input_axes
    if ids.ndim != len(axes):
        raise InputError(
            f"input_ids has shape {list(ids.shape)}, {limits.task} expects ({', '.join(axes)})"
        )
    if 0 in ids.shape:
        raise InputError(f"input_ids has shape {list(ids.shape)}: every axis needs at least 1")
    if ids.shape[-1] > limits.max_positions:
        raise InputError(
            f"{ids.shape[-1]} tokens a sequence, the model has {limits.max_positions} positions",
            hint="shorten the text, or let the Scorer cut or window it",
        )


def _check_range(name: str, what: str, array: np.ndarray, bound: int) -> None:
    bad = (array < 0) | (array >= bound)
    if bad.any():
        index = tuple(np.argwhere(bad)[0])
        raise InputError(f"{name} {_place(index)}: {what} {array[index]} is outside 0..{bound - 1}")


def _check_right_padded(mask: np.ndarray) -> None:
    real = mask.sum(axis=-1)
    if (real == 0).any():
        index = tuple(np.argwhere(real == 0)[0])
        raise InputError(f"attention_mask {_place(index, last='')}: all zeros, expected a token")
    gap = mask[..., 1:] > mask[..., :-1]
    if gap.any():
        index = tuple(np.argwhere(gap)[0])
        left = not mask[index[:-1]][: index[-1] + 1].any()
        raise InputError(
            f"attention_mask {_place(index)}: 0 before a 1, "
            f"{'left padding' if left else 'a gap inside the text'}; expected ones, then zeros",
            hint="pad on the right: positions and the convolution count from the first token",
        )


def _place(index: tuple[Any, ...], last: str = "position") -> str:
    """``row 2, choice 0, position 7`` from an array index."""
    rank = len(index) + (0 if last else 1)
    names = ["row", "choice", last] if rank == 3 else ["row", last]
    return ", ".join(f"{name} {number}" for name, number in zip(names, index, strict=False))


@dataclasses.dataclass(frozen=True)
class TextRequest:
    """One text, or two to be compared."""

    text: str
    text_pair: str | None = None


@dataclasses.dataclass(frozen=True)
class WordsRequest:
    """A sentence split into words by the caller; the answer has one entry a word."""

    words: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class QuestionRequest:
    """A question whose answer is a span of ``context``."""

    question: str
    context: str


@dataclasses.dataclass(frozen=True)
class ChoiceRequest:
    """Which of ``choices`` (two or more) continues or answers ``prompt``."""

    prompt: str
    choices: tuple[str, ...]


Request = TextRequest | WordsRequest | QuestionRequest | ChoiceRequest

_FORMS: dict[Task, tuple[tuple[type, str], ...]] = {
    Task.ENCODER: ((TextRequest, '{"text": "..."}'),),
    Task.MASKED_LM: ((TextRequest, '{"text": "... [MASK] ..."}'),),
    Task.SEQUENCE_CLASSIFICATION: (
        (TextRequest, '{"text": "...", "text_pair": "..." (optional)}'),
    ),
    Task.TOKEN_CLASSIFICATION: (
        (TextRequest, '{"text": "..."}'),
        (WordsRequest, '{"words": ["...", "..."]}'),
    ),
    Task.QUESTION_ANSWERING: ((QuestionRequest, '{"question": "...", "context": "..."}'),),
    Task.MULTIPLE_CHOICE: ((ChoiceRequest, '{"prompt": "...", "choices": ["...", "..."]}'),),
}


def request_from_json(task: Task, obj: Any) -> Request:
    """Read one request of the form its task takes.

    Raises:
        InputError: not an object, keys of another task, or a value of the wrong type.
    """
    if not isinstance(obj, Mapping):
        raise _wrong_form(task, f"the request is a {type(obj).__name__}")
    kinds = []
    for kind, _ in _FORMS[task]:
        required = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
        if all(name in obj for name in required):
            kinds.append(kind)
    if not kinds:
        raise _wrong_form(task, f"the request has the keys {_listed(obj)}")
    if len(kinds) > 1:
        raise _wrong_form(task, "the request has both text and words")
    names = [f.name for f in dataclasses.fields(kinds[0]) if obj.get(f.name) is not None]
    values = {name: tuple(v) if isinstance(v := obj[name], list) else v for name in names}
    missing = [f.name for f in dataclasses.fields(kinds[0]) if f.name not in values]
    if set(missing) - {"text_pair"}:
        raise _wrong_form(task, f"{missing[0]} is null")
    return checked_request(task, kinds[0](**values))


def _listed(names: Iterable[Any]) -> str:
    """Names in an error, but not a megabyte of them."""
    shown = sorted(str(name) for name in names)
    short = [name if len(name) <= 40 else f"{name[:40]}..." for name in shown[:8]]
    return f"{short}" + (f" and {len(shown) - len(short)} more" if len(shown) > len(short) else "")


def checked_request(task: Task, request: Request) -> Request:
    """The request itself, if the task takes it and its texts can be scored.

    Raises:
        InputError: form of another task, a value that is no text, empty or broken Unicode.
    """
    if not isinstance(request, tuple(kind for kind, _ in _FORMS[task])):
        raise _wrong_form(task, f"the request is a {type(request).__name__}")
    for field in dataclasses.fields(request):
        value = getattr(request, field.name)
        listed = field.name in ("words", "choices")
        if listed and not isinstance(value, tuple):
            raise _wrong_form(task, f"{field.name} is a {type(value).__name__}, expected a list")
        if listed and len(value) < (2 if field.name == "choices" else 1):
            raise _wrong_form(task, f"{field.name} has {len(value)} entries")
        for index, text in enumerate(value if listed else (value,)):
            if text is not None or listed or field.default is dataclasses.MISSING:
                _check_text(f"{field.name}[{index}]" if listed else field.name, text)
    if getattr(request, "text_pair", None) is not None and task is not Task.SEQUENCE_CLASSIFICATION:
        raise _wrong_form(task, "the request has a text_pair")
    return request


def characters_of(request: Request) -> int:
    """Characters of all its texts together."""
    values = [getattr(request, field.name) for field in dataclasses.fields(request)]
    texts = [text for v in values for text in (v if isinstance(v, tuple) else (v,))]
    return sum(len(text) for text in texts if text is not None)


def check_choices(request: ChoiceRequest, profile: ShapeProfile) -> None:
    """Raises InputError where the engine does not take as many choices."""
    count, choices = len(request.choices), profile.choices
    if count not in choices:
        raise InputError(
            f"{count} choices, the engine was built for {choices.min} to {choices.max}",
            hint="build-engine --shapes choices=MIN:OPT:MAX",
        )


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise InputError(f"{name} is a {type(text).__name__}, expected a string")
    if not text.strip():
        raise InputError(f"{name} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} is not valid Unicode: a lone surrogate at character {error.start}"
        ) from error


def _wrong_form(task: Task, seen: str) -> InputError:
    forms = " or ".join(form for _, form in _FORMS[task])
    return InputError(f"{seen}, which {task} does not take", hint=f"expected {forms}")
