"""How fast is each candidate? Paired, interleaved runs; every raw time kept.

At each case all candidates take turns: one turn of each is a round. A machine that slows down
half-way slows all of them, and as the ratio to the baseline is taken within a round, that cancels.
A turn is one run, or as many as make handing over to another process worth its time; each is kept.
The order is turned from round to round, so that no candidate always runs on the heels of the same
other. Candidates say themselves what a run cost: nothing here needs a clock to be tested.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np

from convbert_deploy.backends.base import Batch, Runner
from convbert_deploy.benchmarking.cases import Case, Point
from convbert_deploy.benchmarking.floor import Ceiling, Costs
from convbert_deploy.benchmarking.measurement import (
    BenchmarkReport,
    BenchmarkWarning,
    CandidateFacts,
    LeftOut,
    Measurement,
)
from convbert_deploy.benchmarking.options import BenchOptions, StopRule, is_precise
from convbert_deploy.benchmarking.warnings import drift_warnings, warnings_for
from convbert_deploy.errors import ConvBertDeployError

_Any = TypeVar("_Any")


class CandidateFailed(ConvBertDeployError):
    """A candidate could not compute a case; ``gone`` where it cannot compute any more at all."""

    def __init__(self, message: str, *, gone: bool = False, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.gone = gone


@dataclasses.dataclass(frozen=True)
class Prepared:
    """prepare_ms: what the runtime did once for a case before it can run; None: not known."""

    prepare_ms: float | None = None


class Subject(Protocol):
    """Something to time, one case at a time. ``name`` is unique in a benchmark.

    essential: its failure ends the benchmark; another is left out. ``facts`` may change with the
    case (a runtime that compiles for each shape). turn_ms: a turn of less time than this is not
    worth handing over to the next candidate.
    """

    name: str
    essential: bool
    facts: CandidateFacts
    turn_ms: float

    def open(self, case: Case) -> Prepared:
        """Take the inputs; whatever the runtime does once per shape happens here."""
        ...

    def runs_ms(self, count: int) -> list[float]:
        """Compute the opened case ``count`` times: milliseconds of each computation alone."""
        ...

    def answers(self) -> Mapping[str, np.ndarray]:
        """Outputs for the case's check batch."""
        ...

    def close(self) -> int | None:
        """Let the case go; the peak memory in bytes since it was opened, if known."""
        ...


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
    """A runner of this process to time. The runner is already entered."""

    name: str
    runner: Runner


class InProcess:
    """A Candidate as a Subject."""

    essential = True
    turn_ms = 0.0

    def __init__(self, candidate: Candidate, timer: Timer) -> None:
        self.name, self.facts = candidate.name, CandidateFacts()
        self._runner, self._timer = candidate.runner, timer
        self._batches: tuple[Batch, ...] = ()

    def open(self, case: Case) -> Prepared:
        self._batches = case.batches
        return Prepared()

    def runs_ms(self, count: int) -> list[float]:
        return [sum(map(self._time_ms, self._batches)) for _ in range(count)]

    def _time_ms(self, batch: Batch) -> float:
        return self._timer.time_ms(functools.partial(self._runner.infer, batch))

    def answers(self) -> Mapping[str, np.ndarray]:
        return {}

    def close(self) -> int | None:
        self._batches = ()
        return None


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
    """Time runners of this process at points. Their answers are not compared.

    Args:
        candidates: unique names; their runners already entered.
        make_batch: inputs of a point; called once per point, all candidates get the same arrays.

    Raises:
        ValueError: as ``measure_cases``.
        ConvBertDeployError: whatever a runner raises, such as a shape outside its profile.
    """
    clock = timer or WallTimer()
    return measure_cases(
        [InProcess(candidate, clock) for candidate in candidates],
        [functools.partial(_point_case, make_batch, point) for point in points],
        options,
        header=header,
        progress=progress,
    )


def _point_case(make_batch: Callable[[Point], Batch], point: Point) -> Case:
    return Case(point, (make_batch(point),))


def measure_cases(
    subjects: Sequence[Subject],
    cases: Sequence[Callable[[], Case]],
    options: BenchOptions | None = None,
    *,
    header: Mapping[str, str] | None = None,
    progress: Callable[[str], None] | None = None,
    costs: Costs | None = None,
    ceiling: Ceiling | None = None,
) -> BenchmarkReport:
    """Time every subject at every case, one case after the other.

    Args:
        cases: makers, each called once: only one case's arrays are held at a time.
        header: what to print above the figures (see ``environment.benchmark_header``).
        progress: told each case before it is timed, and what is left out.
        costs, ceiling: what a case takes and what the machine can do; both give the floor.

    Raises:
        ValueError: nothing to time, names that repeat, or an unknown baseline.
        ConvBertDeployError: an essential subject or the baseline failed.
    """
    options = options or BenchOptions()
    names = [subject.name for subject in subjects]
    if not names or not cases or len(set(names)) != len(names):
        raise ValueError(f"expected cases and candidates with unique names, got {names}")
    baseline = options.baseline or names[0]
    if baseline not in names:
        raise ValueError(f"baseline {baseline!r} is not one of {', '.join(names)}")
    tell = progress or (lambda _: None)
    session = _Session(list(subjects), baseline, options, tell)
    measurements: list[Measurement] = []
    warnings: list[BenchmarkWarning] = []
    for make_case in cases:
        measured = session.measure(make_case())
        if costs and ceiling:
            measured = [_with_floor(one, costs, ceiling) for one in measured]
        measurements += measured
        warnings += [w for one in measured for w in warnings_for(one, options.warmup)]
        warnings += drift_warnings(measured)
    return BenchmarkReport(
        baseline=baseline,
        measurements=tuple(measurements),
        warnings=tuple(warnings),
        options=options,
        header=dict(header or {}),
        candidates={subject.name: subject.facts for subject in subjects},
        ceiling=ceiling,
        left_out=tuple(session.left_out),
    )


def _with_floor(one: Measurement, costs: Costs, ceiling: Ceiling) -> Measurement:
    point = one.point
    if isinstance(point, Point):
        lengths, batches = (one.tokens // point.batch,) * point.batch, 1
    else:
        lengths, batches = point.lengths, -(-point.sequences // point.batch_size)
    floor = costs.floor(lengths, batches, one.facts.arithmetic, ceiling)
    return dataclasses.replace(one, floor=floor)


class _Session:
    """The subjects that still run, and those that were left out."""

    def __init__(
        self,
        subjects: list[Subject],
        baseline: str,
        options: BenchOptions,
        tell: Callable[[str], None],
    ) -> None:
        self._subjects, self._baseline = subjects, baseline
        self._options, self._tell = options, tell
        self.left_out: list[LeftOut] = []

    def measure(self, case: Case) -> list[Measurement]:
        self._tell(f"{case.where}: {', '.join(one.name for one in self._subjects)}")
        state = _CaseState(list(self._subjects))
        for subject in tuple(state.running):
            self._try(subject, state, case, lambda s=subject: state.open(s, case))
        self._warm_up(state, case)
        self._rounds(state, case)
        for subject in tuple(state.running):
            self._try(subject, state, case, lambda s=subject: state.ask(s))
        for subject in tuple(state.running):
            self._try(subject, state, case, lambda s=subject: state.close(s))
        return state.measurements(case, self._baseline, self._options)

    def _try(
        self, subject: Subject, state: _CaseState, case: Case, call: Callable[[], _Any]
    ) -> _Any:
        """``call()``, or leave the subject out of the case where it may be."""
        try:
            return call()
        except CandidateFailed as failure:
            if subject.essential or subject.name == self._baseline:
                raise
            state.drop(subject)
            if failure.gone:
                self._subjects.remove(subject)
            reason = str(failure).removeprefix(f"{subject.name}: ")
            self.left_out.append(LeftOut(subject.name, str(case.where), reason, failure.hint))
            self._tell(f"{case.where}: left out {subject.name}: {reason}")
            return None

    def _warm_up(self, state: _CaseState, case: Case) -> None:
        # In turns, as in the rounds: a candidate must be warm beside the others, not alone.
        for _ in range(self._options.warmup):
            for subject in tuple(state.running):
                spent = self._try(subject, state, case, lambda s=subject: s.runs_ms(1))
                if spent is not None:
                    state.first.setdefault(subject.name, spent[0])
                    state.warm[subject.name] = spent[0]

    def _rounds(self, state: _CaseState, case: Case) -> None:
        rule = StopRule(self._options, self._baseline)
        wanted = runs_in_turn(state.running, state.warm)
        done = 0
        while not rule.done(state.times):
            count = min(wanted, self._options.max_runs - len(state.times[self._baseline]))
            for subject in turn(tuple(state.running), done):
                spent = self._try(subject, state, case, lambda s=subject, n=count: s.runs_ms(n))
                if spent is not None:
                    state.times[subject.name] += spent
            done += 1


class _CaseState:
    """One case's subjects and what they gave so far."""

    def __init__(self, running: list[Subject]) -> None:
        self.running = running
        self.first: dict[str, float] = {}
        #: of the last run before the rounds
        self.warm: dict[str, float] = {}
        self.times: dict[str, list[float]] = {subject.name: [] for subject in running}
        self._prepared: dict[str, Prepared] = {}
        self._answers: dict[str, Mapping[str, np.ndarray]] = {}
        self._peaks: dict[str, int | None] = {}

    def open(self, subject: Subject, case: Case) -> None:
        self._prepared[subject.name] = subject.open(case)

    def ask(self, subject: Subject) -> None:
        self._answers[subject.name] = subject.answers()

    def close(self, subject: Subject) -> None:
        self._peaks[subject.name] = subject.close()

    def drop(self, subject: Subject) -> None:
        self.running.remove(subject)
        del self.times[subject.name]

    def measurements(self, case: Case, baseline: str, options: BenchOptions) -> list[Measurement]:
        reference = self._answers[baseline]
        spread = np.concatenate([array.ravel() for array in reference.values()] or [np.zeros(1)])
        measured = []
        for subject in self.running:
            name, own = subject.name, self._answers[subject.name]
            measured.append(
                Measurement(
                    candidate=name,
                    point=case.where,
                    tokens=case.tokens,
                    padded_tokens=case.padded_tokens,
                    times_ms=tuple(self.times[name]),
                    baseline_ms=tuple(self.times[baseline]),
                    first_ms=self.first.get(name),
                    facts=subject.facts,
                    prepare_ms=self._prepared[name].prepare_ms,
                    peak_bytes=self._peaks[name],
                    max_abs_difference=None
                    if name == baseline
                    else largest_difference(reference, own),
                    baseline_deviation=float(spread.std()) if np.isfinite(spread).all() else None,
                    finite=all(bool(np.isfinite(array).all()) for array in own.values())
                    if own
                    else None,
                    precise=is_precise(self.times[name], self.times[baseline], options.precision),
                )
            )
        return measured


def largest_difference(
    reference: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray]
) -> float | None:
    """Largest absolute difference of outputs of the same names; None where there is nothing to
    compare, shapes differ, or one side is not finite."""
    largest = None
    for name, expected in reference.items():
        actual = own.get(name)
        if actual is None or actual.shape != expected.shape or not expected.size:
            return None
        difference = float(np.abs(expected.astype(np.float64) - actual).max())
        if not np.isfinite(difference):
            return None
        largest = max(largest or 0.0, difference)
    return largest


def runs_in_turn(subjects: Sequence[Subject], warm: Mapping[str, float]) -> int:
    """As many runs of the fastest as fit the longest ``turn_ms``, at least one; the same number for
    all, as the runs of a round are compared with one another. warm: milliseconds of a run."""
    fastest = min((warm[subject.name] for subject in subjects if subject.name in warm), default=0.0)
    longest = max(subject.turn_ms for subject in subjects)
    return max(1, int(longest / fastest)) if fastest > 0 else 1


def turn(subjects: Sequence[_Any], round_index: int) -> list[_Any]:
    """Order of one round: rotated by one each round, and read backwards every other cycle, so that
    over two cycles every candidate takes every place and follows each neighbour equally often."""
    count = len(subjects)
    shift = round_index % count
    order = [*subjects[shift:], *subjects[:shift]]
    return order[::-1] if (round_index // count) % 2 else order
