"""Metrics as functions of sums over samples: the form that a bootstrap repeats cheaply.

A resample is a row of multiplicities, how often each sample was drawn; its sums are that row times
the samples' terms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sums:
    """terms(golds, predictions): (samples, terms) float64. value: (resamples, terms) of summed terms
    to (resamples,) metric values times 100."""

    terms: Callable[[Sequence[Any], Sequence[Any]], np.ndarray]
    value: Callable[[np.ndarray], np.ndarray]


def accuracy(items: Callable[[Any], Sequence[Any]]) -> Sums:
    """Right items over all items; ``items`` lists those of one gold or prediction. None, a failed
    prediction, is all wrong."""

    def terms(golds: Sequence[Any], predictions: Sequence[Any]) -> np.ndarray:
        rows = []
        for gold, predicted in zip(golds, predictions, strict=True):
            right = items(gold)
            said = (None,) * len(right) if predicted is None else items(predicted)
            rows.append((sum(a == b for a, b in zip(right, said, strict=True)), len(right)))
        return np.array(rows, np.float64)

    return Sums(terms, lambda s: 100.0 * _ratio(s[:, 0], s[:, 1], np.nan))


def mean(score: Callable[[Any, Any], float]) -> Sums:
    """Mean of a per-sample score that is already times 100."""

    def terms(golds: Sequence[Any], predictions: Sequence[Any]) -> np.ndarray:
        rows = [(score(*pair), 1.0) for pair in zip(golds, predictions, strict=True)]
        return np.array(rows, np.float64)

    return Sums(terms, lambda s: s[:, 0] / s[:, 1])


def macro_f1(classes: Sequence[int], undefined: float) -> Sums:
    """Mean over ``classes`` of F1 = 2 right / (gold + predicted); ``undefined`` for a class that is
    in neither, NaN leaves it out."""
    wanted = np.asarray(classes)

    def terms(golds: Sequence[Any], predictions: Sequence[Any]) -> np.ndarray:
        gold = np.asarray(golds)[:, None] == wanted
        predicted = _indices(predictions)[:, None] == wanted
        return _f1_terms(gold, predicted)

    return Sums(terms, lambda s: _mean_f1(s, undefined))


def multi_label_f1(count: int) -> Sums:
    """The same where a sample has any number of ``count`` labels."""

    def terms(golds: Sequence[Any], predictions: Sequence[Any]) -> np.ndarray:
        return _f1_terms(*indicators(golds, predictions, count))

    return Sums(terms, lambda s: _mean_f1(s, np.nan))


def micro_f1(counts: Callable[[Any, Any], tuple[int, int, int]]) -> Sums:
    """F1 = 2 right / (gold + predicted) from ``counts`` (right, gold, predicted) of a sample."""

    def terms(golds: Sequence[Any], predictions: Sequence[Any]) -> np.ndarray:
        return np.array([counts(*pair) for pair in zip(golds, predictions, strict=True)], float)

    return Sums(terms, lambda s: 100.0 * _ratio(2.0 * s[:, 0], s[:, 1] + s[:, 2], 0.0))


def matthews(count: int) -> Sums:
    """Matthews' correlation for any number of classes (Gorodkin 2004, R_K), as scikit-learn's."""
    classes = np.arange(-1, count)  # -1: failed predictions

    def terms(golds: Sequence[Any], predictions: Sequence[Any]) -> np.ndarray:
        gold = np.asarray(golds)[:, None] == classes
        predicted = _indices(predictions)[:, None] == classes
        right = (gold & predicted).any(axis=1, keepdims=True)
        return np.hstack([right, gold, predicted]).astype(np.float64)

    def value(s: np.ndarray) -> np.ndarray:
        right, gold, predicted = s[:, 0], s[:, 1 : count + 2], s[:, count + 2 :]
        total = gold.sum(axis=1)
        above = right * total - (gold * predicted).sum(axis=1)
        below = (total**2 - (gold**2).sum(axis=1)) * (total**2 - (predicted**2).sum(axis=1))
        return 100.0 * _ratio(above, np.sqrt(below), 0.0)

    return Sums(terms, value)


def indicators(
    golds: Sequence[Any], predictions: Sequence[Any], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """(samples, count) bool, twice. A failed prediction has every label wrong."""
    gold = np.zeros((len(golds), count), bool)
    predicted = np.zeros_like(gold)
    for row, (right, said) in enumerate(zip(golds, predictions, strict=True)):
        gold[row, list(right)] = True
        if said is None:
            predicted[row] = ~gold[row]
        else:
            predicted[row, list(said)] = True
    return gold, predicted


def _indices(predictions: Sequence[Any]) -> np.ndarray:
    return np.array([-1 if one is None else one for one in predictions])


def _f1_terms(gold: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """(samples, 2 * classes): right, then gold + predicted."""
    return np.hstack([gold & predicted, gold.astype(np.float64) + predicted]).astype(np.float64)


def _mean_f1(s: np.ndarray, undefined: float) -> np.ndarray:
    right, both = np.hsplit(s, 2)
    f1 = _ratio(2.0 * right, both, undefined)
    defined = ~np.isnan(f1)
    return 100.0 * _ratio(np.where(defined, f1, 0.0).sum(axis=1), defined.sum(axis=1), np.nan)


def _ratio(above: np.ndarray, below: np.ndarray, otherwise: float) -> np.ndarray:
    out = np.full(np.shape(above), otherwise, np.float64)
    return np.divide(above, below, out=out, where=np.asarray(below) != 0)
