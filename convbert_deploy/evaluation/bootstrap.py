"""How far a difference of metrics may be from chance: the paired bootstrap."""

from __future__ import annotations

import math
import warnings

import numpy as np

from convbert_deploy.errors import MissingDependencyError
from convbert_deploy.evaluation.metrics import Golds, Metric, Predictions

#: resamples held at once
_AT_ONCE = 64


def paired_interval(
    metric: Metric,
    golds: Golds,
    reference: Predictions,
    candidate: Predictions,
    *,
    resamples: int,
    seed: int,
    confidence: float,
) -> tuple[float, float] | None:
    """Percentile interval, in points, of the candidate's value minus the reference's.

    Samples are drawn with replacement, the same ones for both sides (Efron and Tibshirani 1993,
    chapter 13). None for fewer than two samples, or where a metric is undefined on a resample.
    """
    try:
        from scipy.stats import bootstrap
    except ImportError as error:
        raise MissingDependencyError(
            "scipy", needed_for="the bootstrap interval", extra="evaluate"
        ) from error
    if len(golds) < 2:
        return None
    before, after = _resampled(metric, golds, reference), _resampled(metric, golds, candidate)

    def difference(indices: np.ndarray, axis: int = -1) -> np.ndarray:
        drawn = np.atleast_2d(indices)
        return (after(drawn) - before(drawn)).reshape(indices.shape[:-1])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that are NaN: there is no interval then
        found = bootstrap(
            (np.arange(len(golds)),),
            difference,
            n_resamples=resamples,
            batch=_AT_ONCE,
            vectorized=True,
            method="percentile",
            confidence_level=confidence,
            rng=np.random.default_rng(seed),
        ).confidence_interval
    low, high = float(found.low), float(found.high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def _resampled(metric: Metric, golds: Golds, predictions: Predictions):
    """(resamples, samples) indices to (resamples,) values."""
    if metric.sums is None:

        def one(drawn: np.ndarray) -> float:
            return metric.value([golds[i] for i in drawn], [predictions[i] for i in drawn])

        return lambda indices: np.array([one(drawn) for drawn in indices])
    terms, value = metric.sums.terms(golds, predictions), metric.sums.value

    def summed(indices: np.ndarray) -> np.ndarray:
        count = len(golds)
        shifted = indices + count * np.arange(len(indices))[:, None]
        times = np.bincount(shifted.ravel(), minlength=indices.shape[0] * count)
        return value(times.reshape(-1, count) @ terms)

    return summed
