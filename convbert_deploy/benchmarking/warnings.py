"""What a reader should know before trusting a measurement, with advice on what to change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from convbert_deploy.benchmarking.measurement import BenchmarkWarning, Measurement
from convbert_deploy.benchmarking.timing import OUTLIER_SCORE, modified_z_scores

#: p99 of fewer runs than this is an interpolation towards the single slowest one.
_RUNS_FOR_P99 = 100
#: Half-width of the median's confidence interval, as a fraction of the median.
_NOISY = 0.05
#: First warm-up run against the median: compilation, page faults, memory pools.
_SLOW_FIRST = 5.0
#: Change of the median from the first to the second half of the rounds, of one candidate alone and
#: of all of them.
_DRIFT, _COMMON_DRIFT = 0.10, 0.05
#: Largest difference of the answers, in standard deviations of the baseline's, that rounding in an
#: arithmetic leaves: ten times what ``benchmarks/results/accuracy-by-precision.md`` shows for float
#: types, and three times for 8 bits, as random ids are harder on these than texts.
_DIFFERENCE = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.3, "int8": 1.0, "fp8": 1.0}
#: Below this the clock's own cost and the Python call count.
_SHORT_MS = 0.05


def warnings_for(measurement: Measurement, warmup: int) -> Iterator[BenchmarkWarning]:
    """Warnings on one measurement; ``warmup`` is the number of warm-up runs it had."""
    times = measurement.times_ms
    for code, text in (
        *_first_run(measurement, warmup),
        *_outliers(times, warmup),
        *_spread(measurement),
        *_answers(measurement),
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
            "programs may be running; use a quiet machine or more runs (--min-time)",
        )


def _spread(measurement: Measurement) -> Iterator[tuple[str, str]]:
    runs, median = len(measurement.times_ms), measurement.p50_ms
    if runs < _RUNS_FOR_P99:
        yield (
            "few-runs",
            f"p99 of {runs} runs is close to the slowest one: {_RUNS_FOR_P99} runs or more are "
            "needed (--min-time)",
        )
    half_width = measurement.p50_interval_ms.half_width
    if not measurement.precise:
        ratio = measurement.speedup_interval.half_width / measurement.speedup
        yield (
            "imprecise",
            f"stopped by a limit with the median known to +- {half_width / median:.1%} and the "
            f"ratio to +- {ratio:.1%}: allow more runs (--max-time, --max-runs)",
        )
    elif half_width > _NOISY * median:
        yield (
            "noisy",
            f"the median is only known to +- {half_width / median:.0%}: use more runs "
            "(--min-time) or a quiet machine",
        )
    if median < _SHORT_MS:
        yield "short", f"one run takes {median:.3g} ms: the cost of calling it is not negligible"


def drift_warnings(measurements: Sequence[Measurement]) -> Iterator[BenchmarkWarning]:
    """The measurements of one point: did all candidates change speed together, or one alone?"""
    changes = [(one, _change(one.times_ms)) for one in measurements]
    point = str(measurements[0].point)
    common = min((abs(change) for _, change in changes), default=0)
    same_way = len({change > 0 for _, change in changes}) == 1
    if len(changes) > 1 and same_way and common > _COMMON_DRIFT:
        yield BenchmarkWarning(
            "throttling",
            "",
            point,
            f"every candidate was {_percent(changes[0][1])} in the second half of the runs: the "
            "clock frequency or the load of the machine changed; ratios are paired and stay valid",
        )
        return
    for one, change in changes:
        if abs(change) > _DRIFT:
            yield BenchmarkWarning(
                "drift",
                one.candidate,
                point,
                f"the second half of the runs was {_percent(change)} than the first",
            )


def _change(times: Sequence[float]) -> float:
    """Median of the second half over that of the first, less one; 0 for few runs."""
    half = len(times) // 2
    if half < 5:
        return 0.0
    return float(np.median(times[half:])) / float(np.median(times[:half])) - 1


def _percent(change: float) -> str:
    return f"{abs(change):.0%} {'slower' if change > 0 else 'faster'}"


def _answers(measurement: Measurement) -> Iterator[tuple[str, str]]:
    """Fast and wrong must be seen."""
    if measurement.finite is False:
        yield "not-finite", "its answers hold NaN or infinity"
    difference, spread = measurement.max_abs_difference, measurement.baseline_deviation
    allowed = _DIFFERENCE.get(measurement.facts.arithmetic, max(_DIFFERENCE.values()))
    if difference is not None and spread and difference > allowed * spread:
        yield (
            "different",
            f"its answers differ from the baseline's by up to {difference:.2g}, "
            f"{difference / spread:.2g} of their deviation: more than "
            f"{measurement.facts.arithmetic} arithmetic explains",
        )
