"""Every metric against a value computed by hand, and its interval against what is known of it."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from convbert_deploy.errors import MissingDependencyError
from convbert_deploy.evaluation.bootstrap import _resampled, paired_interval
from convbert_deploy.evaluation.metrics import Metric, metrics_for
from convbert_deploy.evaluation.problem import Problem

pytest.importorskip("sklearn")
pytest.importorskip("seqeval")
pytest.importorskip("torchmetrics")

BIO = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")

# problem, labels, golds, predictions, and each metric's value
BY_HAND = {
    # class 1: 2 right of 3 gold and 3 predicted; (2 * 1 - 1 * 1) / sqrt(3 * 3 * 2 * 2)
    "two classes": (
        Problem.SINGLE_LABEL,
        ("negative", "positive"),
        [1, 1, 0, 0, 1],
        [1, 0, 0, 1, 1],
        {"accuracy": 60.0, "F1": 200 / 3, "Matthews": 100 / 6},
    ),
    # F1 of the classes 1, 0 and 1/2; the fourth occurs nowhere; R_3: (2 * 4 - 6) / (16 - 6)
    "more classes": (
        Problem.SINGLE_LABEL,
        ("a", "b", "c", "d"),
        [0, 1, 2, 2],
        [0, 2, 2, 1],
        {"accuracy": 50.0, "macro F1": 50.0, "Matthews": 100 * 2 / 10},
    ),
    # a: 1 right of 1 and 1; b: 0 right of 1 and 1; c nowhere
    "several labels": (
        Problem.MULTI_LABEL,
        ("a", "b", "c"),
        [(0, 1), (), ()],
        [(0,), (1,), ()],
        {"macro F1": 50.0, "exact match": 100 / 3},
    ),
    # ranks differ by 1 twice: 1 - 6 * 2 / (4 * 15); 130 / sqrt(5 * 5000)
    "regression": (
        Problem.REGRESSION,
        ("score",),
        [(1.0,), (2.0,), (3.0,), (4.0,)],
        [(10.0,), (30.0,), (20.0,), (100.0,)],
        {"Spearman": 80.0, "Pearson": 100 * 130 / math.sqrt(25000)},
    ),
    # found 2 of 3 entities and no other; 5 of 6 words
    "entities": (
        Problem.TAGS,
        BIO,
        [("B-PER", "I-PER", "O", "B-LOC"), ("B-LOC", "O")],
        [("B-PER", "I-PER", "O", "O"), ("B-LOC", "O")],
        {"entity F1": 80.0, "word accuracy": 100 * 5 / 6},
    ),
    # a word with another boundary spoils its entity
    "boundary": (
        Problem.TAGS,
        BIO,
        [("B-PER", "I-PER", "O")],
        [("B-PER", "O", "O")],
        {"entity F1": 0.0, "word accuracy": 200 / 3},
    ),
    # I- after nothing starts an entity, as conlleval reads it; a word without pieces is in none
    "conlleval": (
        Problem.TAGS,
        BIO,
        [("B-PER", "I-PER", "O")],
        [("I-PER", "I-PER", None)],
        {"entity F1": 100.0, "word accuracy": 100 / 3},
    ),
    "plain tags": (
        Problem.TAGS,
        ("DET", "NOUN", "None"),
        [("DET", "NOUN", "None"), ("NOUN",)],
        [("DET", "DET", None), ("NOUN",)],
        {"word accuracy": 50.0},
    ),
    # exact after normalisation; precision 1/3 and recall 1
    "spans": (
        Problem.SPAN,
        (),
        [("the club", "x"), ("June",)],
        ["A  Club!", "opened in June"],
        {"SQuAD F1": 75.0, "SQuAD EM": 50.0},
    ),
    "choices": (Problem.CHOICE, (), [0, 3, 1], [0, 3, 2], {"accuracy": 200 / 3}),
    # masks count, not texts
    "masks": (
        Problem.MASKS,
        (),
        [("day", "june", "a"), ("open",)],
        [("day", "may", "the"), ("open",)],
        {"accuracy": 50.0},
    ),
}


@pytest.mark.parametrize("case", sorted(BY_HAND))
def test_values_by_hand(case):
    problem, labels, golds, predictions, expected = BY_HAND[case]
    metrics = metrics_for(problem, labels)
    assert [metric.name for metric in metrics] == list(expected)
    for metric in metrics:
        assert metric.value(golds, predictions) == pytest.approx(expected[metric.name]), metric.name


@pytest.mark.parametrize("case", sorted(BY_HAND))
def test_a_failed_prediction_is_worth_nothing(case):
    """Every sample failed: rates are 0, correlations NaN."""
    problem, labels, golds, *_ = BY_HAND[case]
    for metric in metrics_for(problem, labels):
        value = metric.value(golds, [None] * len(golds))
        assert math.isnan(value) if problem is Problem.REGRESSION else value == 0.0


@pytest.mark.parametrize(
    ("answer", "right", "exact"),
    [
        ("The Garden of the Gods", "garden of gods", 100.0),  # articles
        ("U.S.", "us", 100.0),  # punctuation
        ("  two\twords ", "two words", 100.0),
        ("Zürich", "zurich", 0.0),
        ("twenty", "20", 0.0),
    ],
)
def test_squad_normalises_case_articles_punctuation_and_spaces(answer, right, exact):
    exact_match = metrics_for(Problem.SPAN, ())[1]
    assert exact_match.value([(right,)], [answer]) == exact


def random_answers(problem, rng, count):
    def tags(size):
        return tuple(rng.choice(BIO) for _ in range(size))

    sizes = rng.integers(1, 7, count)
    make = {
        Problem.SINGLE_LABEL: lambda i: int(rng.integers(3)),
        Problem.MULTI_LABEL: lambda i: tuple(np.flatnonzero(rng.random(3) < 0.4).tolist()),
        Problem.TAGS: lambda i: tags(sizes[i]),
        Problem.SPAN: lambda i: " ".join(rng.choice(["a", "fine", "day", "in"], sizes[i])),
        Problem.CHOICE: lambda i: int(rng.integers(4)),
        Problem.MASKS: lambda i: tags(sizes[i]),
    }[problem]
    golds, predictions = [make(i) for i in range(count)], [make(i) for i in range(count)]
    if problem is Problem.SPAN:
        golds = [(gold,) for gold in golds]
    predictions[3] = None
    return golds, predictions


@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        (Problem.SINGLE_LABEL, ("a", "b", "c")),
        (Problem.SINGLE_LABEL, ("a", "b")),
        (Problem.MULTI_LABEL, ("a", "b", "c")),
        (Problem.TAGS, BIO),
        (Problem.SPAN, ()),
        (Problem.CHOICE, ()),
        (Problem.MASKS, ()),
    ],
    ids=lambda value: value.name if isinstance(value, Problem) else len(value),
)
def test_sums_over_samples_are_what_the_library_says(problem, labels):
    rng = np.random.default_rng(5)
    golds, predictions = random_answers(problem, rng, 40)
    if len(labels) == 2:
        golds = [gold % 2 for gold in golds]
        predictions = [None if one is None else one % 2 for one in predictions]
    drawn = rng.integers(0, 40, (5, 40))
    for metric in metrics_for(problem, labels):
        assert metric.sums is not None
        expected = [
            metric.value([golds[i] for i in row], [predictions[i] for i in row]) for row in drawn
        ]
        got = _resampled(metric, golds, predictions)(drawn)
        assert got == pytest.approx(np.array(expected), abs=1e-9), metric.name


def test_multi_label_with_a_single_label():
    f1 = metrics_for(Problem.MULTI_LABEL, ("a",))[0]
    golds, predictions = [(0,), (), (0,)], [(0,), (0,), ()]
    assert f1.value(golds, predictions) == pytest.approx(50.0)
    assert _resampled(f1, golds, predictions)(np.array([[0, 1, 2]])) == pytest.approx([50.0])


def interval(metric, golds, reference, candidate, seed=0, resamples=500):
    return paired_interval(
        metric,
        golds,
        reference,
        candidate,
        resamples=resamples,
        seed=seed,
        confidence=0.95,
    )


def accuracy() -> Metric:
    return metrics_for(Problem.SINGLE_LABEL, ("a", "b"))[0]


def binary(count=400, wrong=60, seed=0):
    rng = np.random.default_rng(seed)
    golds = rng.integers(0, 2, count)
    said = golds.copy()
    said[rng.choice(count, wrong, replace=False)] ^= 1
    return golds.tolist(), said.tolist()


def test_the_same_predictions_differ_by_nothing():
    golds, said = binary()
    for metric in metrics_for(Problem.SINGLE_LABEL, ("a", "b")):
        assert interval(metric, golds, said, said) == (0.0, 0.0)


def test_a_clear_drop_is_no_chance_and_a_small_one_may_be():
    golds, said = binary()
    worse = [1 - one if index % 8 == 0 else one for index, one in enumerate(said)]
    for metric in metrics_for(Problem.SINGLE_LABEL, ("a", "b")):
        low, high = interval(metric, golds, said, worse)
        assert low < high < 0, metric.name
    one_off = [1 - said[0], *said[1:]]
    low, high = interval(accuracy(), golds, said, one_off)
    assert low <= 0 <= high


def test_interval_of_a_mean_has_the_width_theory_gives():
    """Paired differences are -1, 0 or 1: their deviation over the root of n, times 1.96."""
    golds, said = binary(count=1000, wrong=200)
    other = [1 - one if index % 5 == 0 else one for index, one in enumerate(said)]
    paired = np.equal(golds, other).astype(float) - np.equal(golds, said)
    expected = 100 * 2 * 1.96 * paired.std() / math.sqrt(len(golds))
    low, high = interval(accuracy(), golds, said, other, resamples=4000)
    assert high - low == pytest.approx(expected, rel=0.06)
    assert (low + high) / 2 == pytest.approx(100 * paired.mean(), abs=0.2)
    assert interval(accuracy(), golds, said, other, seed=3) == interval(
        accuracy(), golds, said, other, seed=3
    )


def test_interval_of_a_correlation():
    rng = np.random.default_rng(0)
    golds = [(float(value),) for value in rng.standard_normal(120)]
    near = [(value + 0.1 * float(rng.standard_normal()),) for (value,) in golds]
    far = [(value + 2.0 * float(rng.standard_normal()),) for (value,) in golds]
    spearman = metrics_for(Problem.REGRESSION, ("score",))[0]
    low, high = interval(spearman, golds, near, far, resamples=100)
    assert low < high < -20
    assert interval(spearman, golds, near, [None] * 120, resamples=10) is None


def test_one_sample_has_no_interval():
    assert interval(accuracy(), [1], [1], [0]) is None


@pytest.mark.parametrize(
    ("problem", "module", "package"),
    [
        (Problem.SINGLE_LABEL, "sklearn.metrics", "scikit-learn"),
        (Problem.REGRESSION, "scipy.stats", "scipy"),
        (Problem.TAGS, "seqeval.metrics", "seqeval"),
        (Problem.SPAN, "torchmetrics.functional.text", "torchmetrics"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(problem, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=package) as caught:
        metrics_for(problem, BIO)
    assert "[evaluate]" in caught.value.hint
