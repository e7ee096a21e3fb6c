"""What kind of answer is judged: it decides the labels, the metrics and what may agree."""

from __future__ import annotations

import enum

from convbert_deploy.architecture import Task
from convbert_deploy.serving.decode import MULTI_LABEL, REGRESSION
from convbert_deploy.serving.scorer import ScorerOptions


class Problem(enum.Enum):
    """The value names what one comparison of two answers counts; see ``distance``."""

    SINGLE_LABEL = "sequences"
    MULTI_LABEL = "labels of sequences"
    REGRESSION = "sequences, no argmax"
    TAGS = "word pieces"
    SPAN = "span starts and ends"
    CHOICE = "prompts"
    MASKS = "masks"
    HIDDEN = "tokens, no argmax"


_OF_TASK = {
    Task.ENCODER: Problem.HIDDEN,
    Task.MASKED_LM: Problem.MASKS,
    Task.TOKEN_CLASSIFICATION: Problem.TAGS,
    Task.QUESTION_ANSWERING: Problem.SPAN,
    Task.MULTIPLE_CHOICE: Problem.CHOICE,
}


def problem_of(options: ScorerOptions) -> Problem:
    """As ``decode.sequence_classification`` tells its three kinds apart."""
    if options.task is not Task.SEQUENCE_CLASSIFICATION:
        return _OF_TASK[options.task]
    if options.problem_type == MULTI_LABEL:
        return Problem.MULTI_LABEL
    if options.problem_type == REGRESSION or len(options.labels) == 1:
        return Problem.REGRESSION
    return Problem.SINGLE_LABEL
