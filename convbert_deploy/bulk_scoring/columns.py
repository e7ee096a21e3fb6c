"""Columns of the output that are not the input's: where a row is from, and its answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from convbert_deploy.architecture import Task
from convbert_deploy.engine import Manifest
from convbert_deploy.serving.decode import MULTI_LABEL, REGRESSION, Answer

#: the row's file, its number there from 0; the whole answer, or why there is none
FIXED = ("file", "row", "answer", "error")


@dataclasses.dataclass(frozen=True)
class AnswerColumn:
    """A part of the answer that gets a column. value: None where the answer has no such part."""

    name: str
    kind: Literal["string", "int", "float", "strings", "floats"]
    value: Callable[[Answer], Any]


def answer_columns(manifest: Manifest) -> tuple[AnswerColumn, ...]:
    """One scalar a row where the task has such answers, lists for tokens and embeddings."""
    task = manifest.task
    if task is Task.SEQUENCE_CLASSIFICATION:
        return _classification(manifest)
    if task is Task.TOKEN_CLASSIFICATION:
        return (AnswerColumn("labels", "strings", _word_labels),)
    if task is Task.QUESTION_ANSWERING:
        return (
            AnswerColumn("answer_text", "string", _key("answer")),
            AnswerColumn("score", "float", lambda answer: answer["answers"][0]["score"]),
        )
    if task is Task.MULTIPLE_CHOICE:
        return (
            AnswerColumn("choice", "int", _key("choice")),
            AnswerColumn("score", "float", _key("score")),
        )
    if task is Task.MASKED_LM:
        return (AnswerColumn("filled_text", "string", _key("text")),)
    return (AnswerColumn("embedding", "floats", _key("embedding")),)


def reserved_names(manifest: Manifest) -> frozenset[str]:
    """Names that an input column cannot keep."""
    return frozenset(FIXED) | {column.name for column in answer_columns(manifest)}


def _classification(manifest: Manifest) -> tuple[AnswerColumn, ...]:
    if manifest.problem_type == MULTI_LABEL:
        return (AnswerColumn("labels", "strings", _key("labels")),)
    if manifest.problem_type == REGRESSION or len(manifest.labels) == 1:
        return (AnswerColumn("value", "float", _key("value")),)
    return (
        AnswerColumn("label", "string", _key("label")),
        AnswerColumn("score", "float", _key("score")),
    )


def _key(name: str) -> Callable[[Answer], Any]:
    return lambda answer: answer.get(name)


def _word_labels(answer: Answer) -> list[str | None]:
    return [word["label"] for word in answer["words"]]
