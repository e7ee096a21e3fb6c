"""Answers of the Scorer to what metrics compare with the labels."""

from __future__ import annotations

from typing import Any

from convbert_deploy.evaluation.problem import Problem
from convbert_deploy.serving.decode import Answer

#: Shaped as the problem's ``labelled.Gold``; a tag is None for a word without pieces; None where
#: the model computed NaN or infinity.
Prediction = Any


def prediction(problem: Problem, answer: Answer) -> Prediction:
    """What ``answer`` says, in the form of the problem's label; None where it is an error."""
    if "error" in answer or problem is Problem.HIDDEN:
        return None
    if problem is Problem.SINGLE_LABEL:
        return list(answer["scores"]).index(answer["label"])
    if problem is Problem.MULTI_LABEL:
        return tuple(sorted(map(list(answer["scores"]).index, answer["labels"])))
    if problem is Problem.REGRESSION:
        return tuple(answer["values"].values()) if "values" in answer else (answer["value"],)
    if problem is Problem.TAGS:
        return tuple(word["label"] for word in answer["words"])
    if problem is Problem.SPAN:
        return answer["answer"]
    if problem is Problem.CHOICE:
        return answer["choice"]
    return tuple(mask["fillings"][0]["token"] for mask in answer["masks"])
