"""Statistics of repeated timings. All times in milliseconds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

#: hyperfine's threshold on the modified z-score (Iglewicz and Hoaglin's 3.5 finds far too many in
#: the skewed distribution of run times): about ten standard deviations of a normal distribution.
OUTLIER_SCORE = 14.826


@dataclasses.dataclass(frozen=True)
class Interval:
    """A confidence interval, ends included."""

    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between order statistics (numpy's default, Hyndman and Fan type 7)."""
    return float(np.percentile(np.asarray(values, np.float64), percent))


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Confidence interval of the median from order statistics.

    Needs no assumption on the shape of the distribution and no random numbers: the number of
    values below the true median is Binomial(n, 1/2), so the interval between the k-th smallest and
    k-th largest value holds it with probability ``1 - 2 P(Binomial <= k - 1)``. Up to 5 values
    cannot reach 95 %: the full range is returned, which then covers less than asked for.
    """
    ordered = sorted(values)
    count = len(ordered)
    if not count:
        raise ValueError("no values: there is no median")
    tail, outside = (1 - confidence) / 2, 0
    # Largest number of values that can be cut from each end; log-gamma keeps n in the thousands
    # out of overflow.
    below = 0.0
    for index in range(count // 2):
        log_term = (
            math.lgamma(count + 1)
            - math.lgamma(index + 1)
            - math.lgamma(count - index + 1)
            - count * math.log(2)
        )
        below += math.exp(log_term)
        if below > tail:
            break
        outside = index + 1
    outside = max(outside, 1)
    return Interval(ordered[outside - 1], ordered[count - outside])


def modified_z_scores(values: Sequence[float]) -> list[float]:
    """``0.6745 (x - median) / MAD``; all zero where half of the values or more are equal."""
    array = np.asarray(values, np.float64)
    deviations = array - np.median(array)
    spread = float(np.median(np.abs(deviations)))
    if spread == 0:
        return [0.0] * len(array)
    return [float(score) for score in 0.6745 * deviations / spread]
