"""How long to measure, and when it is enough."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from convbert_deploy.benchmarking.timing import median_interval, percentile

#: Intervals cost more to compute than a short run: they are looked at again once there are this
#: many times more runs.
_LOOK_AGAIN = 1.1


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """When a point ends.

    A point ends once ``min_runs`` rounds are done, the rounds took ``min_time_s`` seconds for each
    candidate on average, and the 95 % intervals of every candidate's median time and of its ratio
    to the baseline reach at most ``precision`` (a fraction) to either side. It also ends at
    ``max_runs`` rounds, or when the rounds took ``max_time_s`` for each candidate on average and
    ``min_runs`` are done.

    warmup: runs of each candidate before the rounds, left out of the statistics; the very first is
        kept as ``first_ms``.
    precision: None ends at the minimum.
    baseline: candidate that ratios refer to; None takes the first.
    """

    min_time_s: float = 2.0
    min_runs: int = 10
    max_runs: int = 1000
    warmup: int = 3
    baseline: str | None = None
    precision: float | None = 0.02
    max_time_s: float = 20.0

    def __post_init__(self) -> None:
        if not (1 <= self.min_runs <= self.max_runs and self.warmup >= 0 and self.min_time_s >= 0):
            raise ValueError(
                f"expected 1 <= min_runs <= max_runs, warmup >= 0, min_time_s >= 0: {self}"
            )
        if self.precision is not None and self.precision <= 0:
            raise ValueError(f"precision is {self.precision}, expected a fraction above 0")


class StopRule:
    """Decides after each round of one point whether to go on."""

    def __init__(self, options: BenchOptions, baseline: str) -> None:
        self._options, self._baseline = options, baseline
        self._next_look = 0

    def done(self, times: Mapping[str, Sequence[float]]) -> bool:
        """``times``: milliseconds of every round so far, by candidate."""
        options = self._options
        rounds = len(times[self._baseline])
        if rounds < options.min_runs:
            return False
        spent_s = sum(map(sum, times.values())) / 1e3 / len(times)
        if rounds >= options.max_runs or spent_s >= max(options.max_time_s, options.min_time_s):
            return True
        if spent_s < options.min_time_s:
            return False
        if options.precision is None:
            return True
        if rounds < self._next_look:
            return False
        self._next_look = int(rounds * _LOOK_AGAIN) + 1
        base = times[self._baseline]
        return all(is_precise(own, base, options.precision) for own in times.values())


def is_precise(own: Sequence[float], base: Sequence[float], precision: float | None) -> bool:
    """The median of ``own`` and of the paired ratio ``base / own`` are known to within
    ``precision`` of themselves."""
    if precision is None:
        return True
    ratios = [first / second for first, second in zip(base, own, strict=True)]
    return _known(own, precision) and _known(ratios, precision)


def _known(values: Sequence[float], precision: float) -> bool:
    median, interval = percentile(values, 50), median_interval(values)
    return max(interval.high - median, median - interval.low) <= precision * median
