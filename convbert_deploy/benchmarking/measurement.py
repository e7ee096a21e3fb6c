"""What was measured, as data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from convbert_deploy.benchmarking.cases import Point, Workload
from convbert_deploy.benchmarking.floor import Ceiling, Floor
from convbert_deploy.benchmarking.options import BenchOptions
from convbert_deploy.benchmarking.timing import Interval, median_interval, percentile


@dataclasses.dataclass(frozen=True)
class BenchmarkWarning:
    """``code`` is stable, for programs; ``text`` is for people. An empty ``candidate`` means all of
    them, an empty ``point`` the whole run."""

    code: str
    candidate: str
    point: str
    text: str


@dataclasses.dataclass(frozen=True)
class CandidateFacts:
    """What is known of a candidate whatever it computes. None: not known.

    kind: ``engine``, ``peer`` or ``in-process``. arithmetic: what its products compute in (fp32,
    bf16, fp16, int8, fp8). packs: computes no pads. command: what installs the same by hand.
    load_ms: loading the model; ready_ms: from starting the process until it can take a batch.
    loaded_bytes: peak resident memory by then. weights_bytes: of the weights it computes with.
    """

    kind: str = "in-process"
    arithmetic: str = "fp32"
    packs: bool = False
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    command: str | None = None
    notes: tuple[str, ...] = ()
    load_ms: float | None = None
    ready_ms: float | None = None
    loaded_bytes: int | None = None
    weights_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A peer that was asked for and not measured, at ``case`` or (empty) from there on."""

    name: str
    case: str
    reason: str
    hint: str | None = None


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One candidate at one point or workload.

    point: where. tokens: real tokens (mask of one), padded_tokens: positions with pads; None where
        there are no pads.
    times_ms: of every round, in order; ``first_ms`` the first warm-up run, None without warm-up.
    baseline_ms: the baseline's times in the same rounds.
    prepare_ms: what the runtime did once for this shape. peak_bytes: peak resident memory since.
    max_abs_difference: largest difference of an output to the baseline's on the same unpadded
        batch; None for the baseline, or where one of them was not finite. baseline_deviation: the
        standard deviation of the baseline's outputs. finite: its own outputs are; None: not looked.
    fixed_length_ms: median time of as many tokens in batches of one length, scaled to ``tokens``.
    precise: the intervals were within the precision asked for.
    extra: figures that other instruments add, by name with unit.
    """

    candidate: str
    point: Point | Workload
    tokens: int
    times_ms: tuple[float, ...]
    baseline_ms: tuple[float, ...]
    first_ms: float | None = None
    padded_tokens: int | None = None
    facts: CandidateFacts = dataclasses.field(default_factory=CandidateFacts)
    prepare_ms: float | None = None
    peak_bytes: int | None = None
    max_abs_difference: float | None = None
    baseline_deviation: float | None = None
    finite: bool | None = None
    floor: Floor | None = None
    fixed_length_ms: float | None = None
    precise: bool = True
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
        return self.point.sequences / self.p50_ms * 1e3

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

    @property
    def waste(self) -> float:
        """Share of the positions that this candidate computes that are pads."""
        if self.facts.packs or not self.padded_tokens:
            return 0.0
        return 1 - self.tokens / self.padded_tokens

    @property
    def fixed_length_ratio(self) -> float | None:
        """Its time over the same number of real tokens without padding: 1 is no loss."""
        return self.p50_ms / self.fixed_length_ms if self.fixed_length_ms else None

    @property
    def floor_ms(self) -> float | None:
        return self.floor.ms if self.floor else None

    @property
    def fraction_of_floor(self) -> float | None:
        """Floor / measured: 1 is as fast as the machine's measured rates allow, and more means
        that the kernel is better than what measured them."""
        return self.floor.ms / self.p50_ms if self.floor else None

    def to_json(self) -> dict[str, Any]:
        workload = self.point if isinstance(self.point, Workload) else None
        point = self.point if isinstance(self.point, Point) else None
        return {
            "candidate": self.candidate,
            "case": str(self.point),
            "batch": point.batch if point else None,
            "seq": point.seq if point else None,
            "workload": workload.to_json() if workload else None,
            "tokens": self.tokens,
            "padded_tokens": self.padded_tokens or self.tokens,
            "waste": self.waste,
            "fixed_length_ratio": self.fixed_length_ratio,
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
            "load_ms": self.facts.load_ms,
            "ready_ms": self.facts.ready_ms,
            "prepare_ms": self.prepare_ms,
            "peak_bytes": self.peak_bytes,
            "weights_bytes": self.facts.weights_bytes,
            "flops": self.floor.flops if self.floor else None,
            "floor_ms": self.floor_ms,
            "floor_bound": self.floor.bound if self.floor else None,
            "fraction_of_floor": self.fraction_of_floor,
            "max_abs_difference": self.max_abs_difference,
            "precise": self.precise,
            "extra": dict(self.extra),
            "times_ms": list(self.times_ms),
        }


@dataclasses.dataclass(frozen=True)
class BenchmarkReport:
    """Every measurement, in the order of the cases and, within one, of the candidates.

    header: what the figures depend on (device, threads, versions), as told by the caller.
    candidates: facts by name. ceiling: None where it was not measured. left_out: peers that failed.
    """

    baseline: str
    measurements: tuple[Measurement, ...]
    warnings: tuple[BenchmarkWarning, ...]
    options: BenchOptions
    header: Mapping[str, str]
    candidates: Mapping[str, CandidateFacts] = dataclasses.field(default_factory=dict)
    ceiling: Ceiling | None = None
    left_out: tuple[LeftOut, ...] = ()

    def at(self, candidate: str, point: Point | Workload) -> Measurement:
        """The measurement of one candidate at one point; KeyError if there is none."""
        for one in self.measurements:
            if (one.candidate, one.point) == (candidate, point):
                return one
        raise KeyError(f"no measurement of {candidate} at {point}")

    def to_json(self) -> dict[str, Any]:
        facts = {name: one.to_json() for name, one in self.candidates.items()}
        return {
            "kind": "benchmark",
            "header": dict(self.header),
            "options": dataclasses.asdict(self.options),
            "baseline": self.baseline,
            "candidates": facts,
            "peers": {
                name: {"versions": one["versions"], "command": one["command"]}
                for name, one in facts.items()
                if one["kind"] == "peer"
            },
            "ceiling": self.ceiling.to_json() if self.ceiling else None,
            "refused": [dataclasses.asdict(one) for one in self.left_out],
            "measurements": [one.to_json() for one in self.measurements],
            "warnings": [dataclasses.asdict(one) for one in self.warnings],
        }
