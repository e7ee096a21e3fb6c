"""How fast is each candidate? Paired, interleaved runs; every raw time kept.

At each point (a shape) all candidates take turns: one run of each is a round. A machine that slows
down half-way slows all of them, and as the ratio to the baseline is taken within a round, that
cancels. The order is turned from round to round, so that no candidate always runs on the heels of
the same other. What a run costs is asked of a ``Timer``: nothing here needs a clock to be tested.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from convbert_deploy.backends.base import Batch, Runner
from convbert_deploy.benchmark_warnings import BenchmarkWarning, warnings_for
from convbert_deploy.timing import Interval, median_interval, percentile


class Timer(Protocol):
    """Runs something once and says how long it took."""

    def time_ms(self, call: Callable[[], object]) -> float:
        """Milliseconds that ``call()`` took."""
        ...


class WallTimer:
    """Wall-clock time. Runners return arrays on the host, so device work has ended by then."""

    def time_ms(self, call: Callable[[], object]) -> float:
        start = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - start) / 1e6


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Something to time. ``name`` is unique in a benchmark; the runner is already entered."""

    name: str
    runner: Runner


@dataclasses.dataclass(frozen=True, order=True)
class Point:
    """A shape to time at: ``batch`` sequences of ``seq`` positions each."""

    batch: int
    seq: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.seq}"


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """How long to measure.

    A point ends once ``min_runs`` rounds are done and the rounds took ``min_time_s`` seconds for
    each candidate on average, or at ``max_runs`` rounds.

    warmup: runs of each candidate before the rounds, left out of the statistics; the very first is
        kept as ``first_ms``.
    baseline: candidate that ratios refer to; None takes the first.
    """

    min_time_s: float = 2.0
    min_runs: int = 10
    max_runs: int = 1000
    warmup: int = 3
    baseline: str | None = None

    def __post_init__(self) -> None:
        if not (1 <= self.min_runs <= self.max_runs and self.warmup >= 0 and self.min_time_s >= 0):
            raise ValueError(
                f"expected 1 <= min_runs <= max_runs, warmup >= 0, min_time_s >= 0: {self}"
            )


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One candidate at one point.

    tokens: real tokens in the batch (mask of one), whatever the padding.
    times_ms: of every round, in order; ``first_ms`` the first warm-up run, None without warm-up.
    baseline_ms: the baseline's times in the same rounds.
    extra: figures that other instruments add (peak memory, load time, ceiling), by name with unit.
    """

    candidate: str
    point: Point
    tokens: int
    times_ms: tuple[float, ...]
    baseline_ms: tuple[float, ...]
    first_ms: float | None = None
    extra: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def p50_ms(self) -> float:
        return percentile(self.times_ms, 50)

    @functools.cached_property
    def p90_ms(self) -> float:
        return percentile(self.times_ms, 90)

    @functools.cached_property
    def p99_ms(self) -> float:
        return percentile(self.times_ms, 99)

    @functools.cached_property
    def p50_interval_ms(self) -> Interval:
        """95 % confidence interval of the median."""
        return median_interval(self.times_ms)

    @property
    def sequences_per_s(self) -> float:
        return self.point.batch / self.p50_ms * 1e3

    @property
    def tokens_per_s(self) -> float:
        """Real tokens a second."""
        return self.tokens / self.p50_ms * 1e3

    @functools.cached_property
    def _ratios(self) -> list[float]:
        return [base / own for base, own in zip(self.baseline_ms, self.times_ms, strict=True)]

    @functools.cached_property
    def speedup(self) -> float:
        """Median over the rounds of baseline time / own time: 2 is twice as fast."""
        return percentile(self._ratios, 50)

    @functools.cached_property
    def speedup_interval(self) -> Interval:
        """95 % confidence interval of the median paired ratio."""
        return median_interval(self._ratios)

    def to_json(self) -> dict[str, Any]:
        return {
            "candidate": self.candidate,
            "batch": self.point.batch,
            "seq": self.point.seq,
            "tokens": self.tokens,
            "runs": len(self.times_ms),
            "p50_ms": self.p50_ms,
            "p50_interval_ms": list(dataclasses.astuple(self.p50_interval_ms)),
            "p90_ms": self.p90_ms,
            "p99_ms": self.p99_ms,
            "first_ms": self.first_ms,
            "sequences_per_s": self.sequences_per_s,
            "tokens_per_s": self.tokens_per_s,
            "speedup": self.speedup,
            "speedup_interval": list(dataclasses.astuple(self.speedup_interval)),
            "extra": dict(self.extra),
            "times_ms": list(self.times_ms),
        }


@dataclasses.dataclass(frozen=True)
class BenchmarkReport:
    """Every measurement, in the order of the points and, within one, of the candidates.

    header: what the figures depend on (device, threads, versions), as told by the caller.
    """

    baseline: str
    measurements: tuple[Measurement, ...]
    warnings: tuple[BenchmarkWarning, ...]
    options: BenchOptions
    header: Mapping[str, str]

    def at(self, candidate: str, point: Point) -> Measurement:
        """The measurement of one candidate at one point; KeyError if there is none."""
        for one in self.measurements:
            if (one.candidate, one.point) == (candidate, point):
                return one
        raise KeyError(f"no measurement of {candidate} at {point}")

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "benchmark",
            "header": dict(self.header),
            "options": dataclasses.asdict(self.options),
            "baseline": self.baseline,
            "measurements": [one.to_json() for one in self.measurements],
            "warnings": [dataclasses.asdict(one) for one in self.warnings],
        }


def measure(
    candidates: Sequence[Candidate],
    points: Sequence[Point],
    make_batch: Callable[[Point], Batch],
    options: BenchOptions | None = None,
    timer: Timer | None = None,
    *,
    header: Mapping[str, str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> BenchmarkReport:
    """Time every candidate at every point.

    Args:
        candidates: unique names; their runners already entered.
        points: shapes, timed one after the other.
        make_batch: inputs of a point; called once per point, all candidates get the same arrays.
            Tokenization is not part of the time.
        header: what to print above the figures (see ``environment.benchmark_header``).
        progress: told each point before it is timed.

    Raises:
        ValueError: nothing to time, names that repeat, or an unknown baseline.
        ConvBertDeployError: whatever a runner raises, such as a shape outside its profile.
    """
    options, timer = options or BenchOptions(), timer or WallTimer()
    names = [candidate.name for candidate in candidates]
    if not names or not points or len(set(names)) != len(names):
        raise ValueError(f"expected points and candidates with unique names, got {names}, {points}")
    baseline = options.baseline or names[0]
    if baseline not in names:
        raise ValueError(f"baseline {baseline!r} is not one of {', '.join(names)}")
    measurements: list[Measurement] = []
    for point in points:
        if progress:
            progress(f"{point}: {', '.join(names)}")
        batch = make_batch(point)
        first, times = _rounds(candidates, batch, options, timer)
        tokens = int(np.count_nonzero(batch["attention_mask"]))
        measurements += [
            Measurement(
                name, point, tokens, tuple(times[name]), tuple(times[baseline]), first.get(name)
            )
            for name in names
        ]
    return BenchmarkReport(
        baseline=baseline,
        measurements=tuple(measurements),
        warnings=tuple(
            warning for one in measurements for warning in warnings_for(one, options.warmup)
        ),
        options=options,
        header=dict(header or {}),
    )


def _rounds(
    candidates: Sequence[Candidate], batch: Batch, options: BenchOptions, timer: Timer
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """First warm-up time and the times of every round, by candidate."""
    first: dict[str, float] = {}
    # In turns, as in the rounds: a candidate must be warm beside the others, not alone.
    for _ in range(options.warmup):
        for candidate in candidates:
            spent = timer.time_ms(functools.partial(candidate.runner.infer, batch))
            first.setdefault(candidate.name, spent)
    times: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    spent_ms = 0.0
    for done in range(options.max_runs):
        enough = spent_ms >= options.min_time_s * 1e3 * len(candidates)
        if done >= options.min_runs and enough:
            break
        for candidate in turn(candidates, done):
            elapsed = timer.time_ms(functools.partial(candidate.runner.infer, batch))
            times[candidate.name].append(elapsed)
            spent_ms += elapsed
    return first, times


def turn(candidates: Sequence[Candidate], round_index: int) -> list[Candidate]:
    """Order of one round: rotated by one each round, and read backwards every other cycle, so that
    over two cycles every candidate takes every place and follows each neighbour equally often."""
    count = len(candidates)
    shift = round_index % count
    order = [*candidates[shift:], *candidates[:shift]]
    return order[::-1] if (round_index // count) % 2 else order
