"""What a reader should know before trusting a measurement, with advice on what to change."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from convbert_deploy.timing import OUTLIER_SCORE, modified_z_scores

if TYPE_CHECKING:
    from convbert_deploy.benchmark import Measurement

#: p99 of fewer runs than this is an interpolation towards the single slowest one.
_RUNS_FOR_P99 = 100
#: Half-width of the median's confidence interval, as a fraction of the median.
_NOISY = 0.05
#: First warm-up run against the median: compilation, page faults, memory pools.
_SLOW_FIRST = 5.0
#: Change of the median from the first to the second half of the rounds.
_DRIFT = 0.10
#: Below this the clock's own cost and the Python call count.
_SHORT_MS = 0.05


@dataclasses.dataclass(frozen=True)
class BenchmarkWarning:
    """``code`` is stable, for programs; ``text`` is for people."""

    code: str
    candidate: str
    point: str
    text: str


def warnings_for(measurement: Measurement, warmup: int) -> Iterator[BenchmarkWarning]:
    """Warnings on one measurement; ``warmup`` is the number of warm-up runs it had."""
    times = measurement.times_ms
    for code, text in (
        *_first_run(measurement, warmup),
        *_outliers(times, warmup),
        *_spread(measurement),
        *_drift(times),
    ):
        yield BenchmarkWarning(code, measurement.candidate, str(measurement.point), text)


def _first_run(measurement: Measurement, warmup: int) -> Iterator[tuple[str, str]]:
    first, median = measurement.first_ms, measurement.p50_ms
    if warmup == 0:
        yield "no-warmup", "there was no warm-up run: use --warmup 3 or more"
    if first is not None and first > _SLOW_FIRST * median:
        yield (
            "slow-first",
            f"the first run ever took {first:.4g} ms, {first / median:.3g} times the median: a "
            "server should send a request of this shape before it takes traffic",
        )


def _outliers(times: Sequence[float], warmup: int) -> Iterator[tuple[str, str]]:
    scores = modified_z_scores(times)
    if scores[0] > OUTLIER_SCORE:
        advice = "increase --warmup" if warmup else "use --warmup"
        yield "slow-first-round", f"the first timed run is an outlier ({times[0]:.4g} ms): {advice}"
    outliers = sum(abs(score) > OUTLIER_SCORE for score in scores)
    if outliers:
        yield (
            "outliers",
            f"{outliers} of {len(times)} runs are outliers (slowest {max(times):.4g} ms): other "
            "programs may be running; use a quiet machine or more runs (--min-time-s)",
        )


def _spread(measurement: Measurement) -> Iterator[tuple[str, str]]:
    runs, median = len(measurement.times_ms), measurement.p50_ms
    if runs < _RUNS_FOR_P99:
        yield (
            "few-runs",
            f"p99 of {runs} runs is close to the slowest one: {_RUNS_FOR_P99} runs or more are "
            "needed (--min-runs)",
        )
    half_width = measurement.p50_interval_ms.half_width
    if half_width > _NOISY * median:
        yield (
            "noisy",
            f"the median is only known to +- {half_width / median:.0%}: use more runs "
            "(--min-time-s) or a quiet machine",
        )
    if median < _SHORT_MS:
        yield "short", f"one run takes {median:.3g} ms: the cost of calling it is not negligible"


def _drift(times: Sequence[float]) -> Iterator[tuple[str, str]]:
    half = len(times) // 2
    if half < 5:
        return
    early, late = float(np.median(times[:half])), float(np.median(times[half:]))
    if abs(late / early - 1) > _DRIFT:
        direction = "slower" if late > early else "faster"
        yield (
            "drift",
            f"the second half of the runs was {abs(late / early - 1):.0%} {direction} than the "
            "first: the clock frequency or the load changed; ratios are paired and stay valid",
        )
