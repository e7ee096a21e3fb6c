"""The metrics of each problem, from scikit-learn, SciPy, seqeval and torchmetrics.

All are times 100, as GLUE and SQuAD report them, so a difference is in points. A metric also says
how to compute itself from sums over samples where it can: a bootstrap then needs no thousand calls
of a library. Tests hold both ways equal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from convbert_deploy.errors import MissingDependencyError
from convbert_deploy.evaluation import sums
from convbert_deploy.evaluation.labelled import Gold
from convbert_deploy.evaluation.predictions import Prediction
from convbert_deploy.evaluation.problem import Problem
from convbert_deploy.serving.decode import is_bio

#: stands for a word or mask without an answer; no label is empty
_NO_ANSWER = ""

Golds = Sequence[Gold]
Predictions = Sequence[Prediction]


@dataclasses.dataclass(frozen=True)
class Metric:
    """value(golds, predictions): over all samples, times 100; NaN where a failed prediction leaves
    nothing to compute. sums: the same from sums over samples, or None."""

    name: str
    value: Callable[[Golds, Predictions], float]
    sums: sums.Sums | None = None


def metrics_for(problem: Problem, labels: Sequence[str]) -> tuple[Metric, ...]:
    """The problem's metrics, the one that budgets refer to first; none for a bare encoder.

    single-label: accuracy, F1 (of the last of two labels; of more, macro over those that occur),
    Matthews. multi-label: macro F1, exact matches. regression: Spearman, Pearson (mean over the
    values). tags: seqeval's F1 where the labels are BIO, accuracy of words. span: SQuAD F1 and EM.
    choices, masks: accuracy.

    Raises:
        MissingDependencyError: a library of the extra ``evaluate`` is not installed.
    """
    if problem is Problem.SINGLE_LABEL:
        return _classification(len(labels))
    if problem is Problem.MULTI_LABEL:
        return _multi_label(len(labels))
    if problem is Problem.REGRESSION:
        return _regression()
    if problem is Problem.TAGS:
        words = Metric("word accuracy", _flat_accuracy(), sums.accuracy(tuple))
        return (_entity_f1(), words) if is_bio(labels) else (words,)
    if problem is Problem.SPAN:
        return _squad()
    if problem is Problem.CHOICE:
        return (_accuracy(),)
    if problem is Problem.MASKS:
        return (Metric("accuracy", _flat_accuracy(), sums.accuracy(tuple)),)
    return ()


def _imported(package: str, module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            package, needed_for="this task's metric", extra="evaluate"
        ) from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _accuracy() -> Metric:
    sklearn = _imported("scikit-learn", "sklearn.metrics")

    def value(golds: Golds, predictions: Predictions) -> float:
        return 100.0 * float(sklearn.accuracy_score(golds, _classes(predictions)))

    return Metric("accuracy", value, sums.accuracy(lambda one: (one,)))


def _classes(predictions: Predictions) -> list[int]:
    """A failed one is a class of its own, which is never right."""
    return [-1 if one is None else one for one in predictions]


def _classification(count: int) -> tuple[Metric, ...]:
    sklearn = _imported("scikit-learn", "sklearn.metrics")
    binary = count == 2
    judged = [1] if binary else list(range(count))
    undefined = 0.0 if binary else np.nan  # NaN: left out of the mean

    def f1(golds: Golds, predictions: Predictions) -> float:
        return 100.0 * float(
            sklearn.f1_score(
                golds,
                _classes(predictions),
                labels=judged,
                average="macro",
                zero_division=undefined,
            )
        )

    def matthews(golds: Golds, predictions: Predictions) -> float:
        with _silence():  # about a single class, whose correlation is 0
            return 100.0 * float(sklearn.matthews_corrcoef(golds, _classes(predictions)))

    return (
        _accuracy(),
        Metric("F1" if binary else "macro F1", f1, sums.macro_f1(judged, undefined)),
        Metric("Matthews", matthews, sums.matthews(count)),
    )


def _multi_label(count: int) -> tuple[Metric, ...]:
    sklearn = _imported("scikit-learn", "sklearn.metrics")

    # scikit-learn takes a single column for a question of two classes, 0 and 1
    judged = [1] if count == 1 else None

    def f1(golds: Golds, predictions: Predictions) -> float:
        gold, predicted = sums.indicators(golds, predictions, count)
        return 100.0 * float(
            sklearn.f1_score(gold, predicted, labels=judged, average="macro", zero_division=np.nan)
        )

    def exact(golds: Golds, predictions: Predictions) -> float:
        return 100.0 * float(sklearn.accuracy_score(*sums.indicators(golds, predictions, count)))

    return (
        Metric("macro F1", f1, sums.multi_label_f1(count)),
        Metric("exact match", exact, sums.accuracy(lambda one: (one,))),
    )


def _regression() -> tuple[Metric, ...]:
    stats = _imported("scipy", "scipy.stats")

    def mean(correlation: Callable[..., Any], golds: Golds, predictions: Predictions) -> float:
        if any(one is None for one in predictions) or len(golds) < 2:
            return float("nan")
        columns = zip(np.transpose(golds), np.transpose(predictions), strict=True)
        with _silence():  # about constant values, whose correlation is NaN
            return 100.0 * float(np.mean([correlation(x, y).statistic for x, y in columns]))

    return (
        Metric("Spearman", functools.partial(mean, stats.spearmanr)),
        Metric("Pearson", functools.partial(mean, stats.pearsonr)),
    )


def _flat_accuracy() -> Callable[[Golds, Predictions], float]:
    sklearn = _imported("scikit-learn", "sklearn.metrics")

    def value(golds: Golds, predictions: Predictions) -> float:
        right = [one for gold in golds for one in gold]
        said = [
            one or _NO_ANSWER
            for gold, predicted in zip(golds, predictions, strict=True)
            for one in (predicted or (None,) * len(gold))
        ]
        return 100.0 * float(sklearn.accuracy_score(right, said))

    return value


def _entity_f1() -> Metric:
    seqeval = _imported("seqeval", "seqeval.metrics")
    entities = _imported("seqeval", "seqeval.metrics.sequence_labeling").get_entities

    def value(golds: Golds, predictions: Predictions) -> float:
        return 100.0 * float(
            seqeval.f1_score(
                [list(gold) for gold in golds],
                [_tags(*pair) for pair in zip(golds, predictions, strict=True)],
                zero_division=0,
            )
        )

    def counts(gold: Gold, predicted: Prediction) -> tuple[int, int, int]:
        expected, found = set(entities(list(gold))), set(entities(_tags(gold, predicted)))
        return len(expected & found), len(expected), len(found)

    return Metric("entity F1", value, sums.micro_f1(counts))


def _tags(gold: Gold, predicted: Prediction) -> list[str]:
    """A word without an answer is in no entity."""
    return [tag or "O" for tag in (predicted or (None,) * len(gold))]


def _squad() -> tuple[Metric, ...]:
    squad = _imported("torchmetrics", "torchmetrics.functional.text").squad

    @functools.lru_cache(maxsize=100_000)  # candidates of one search mostly say the same
    def both(answer: str, right: tuple[str, ...]) -> tuple[float, float]:
        target = {"answers": {"text": list(right), "answer_start": [0] * len(right)}, "id": "0"}
        found = squad([{"prediction_text": answer, "id": "0"}], [target])
        return float(found["f1"]), float(found["exact_match"])

    def one(which: int, right: Gold, answer: Prediction) -> float:
        return 0.0 if answer is None else both(answer, right)[which]

    def metric(name: str, which: int) -> Metric:
        score = functools.partial(one, which)

        def value(golds: Golds, predictions: Predictions) -> float:
            return float(np.mean([score(*pair) for pair in zip(golds, predictions, strict=True)]))

        return Metric(name, value, sums.mean(score))

    return metric("SQuAD F1", 0), metric("SQuAD EM", 1)
