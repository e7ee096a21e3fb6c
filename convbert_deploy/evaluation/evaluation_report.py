"""What an evaluation found."""

from __future__ import annotations

import dataclasses
from typing import Any

from convbert_deploy.evaluation.distance import Distance
from convbert_deploy.parity_errors import json_number


@dataclasses.dataclass(frozen=True)
class MetricValue:
    """One metric of both models, times 100; NaN where it cannot be computed.

    interval: of ``difference``, by the paired bootstrap; None where not asked for, or undefined.
    """

    name: str
    candidate: float
    reference: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def difference(self) -> float | None:
        """Points, candidate minus reference; None without a reference."""
        return None if self.reference is None else self.candidate - self.reference

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "candidate": json_number(self.candidate),
            "reference": json_number(self.reference),
            "difference": json_number(self.difference),
            "interval": None if self.interval is None else list(self.interval),
        }


@dataclasses.dataclass(frozen=True)
class EvaluationReport:
    """One candidate on one file of texts.

    reference: None where no eager model was asked; then there is no ``distance`` and no difference.
    metrics: the task's own first; empty for data without labels.
    truncated: samples of which text was cut off. failed: samples for which the candidate computed
        NaN or infinity; their answers count as wrong.
    resamples, confidence: of the intervals; 0 resamples where there are none.
    budget, violations: what was asked for, and each bound that is broken.
    """

    candidate: str
    reference: str | None
    data: str
    samples: int
    truncated: int
    failed: int
    metrics: tuple[MetricValue, ...]
    distance: Distance | None
    resamples: int = 0
    confidence: float = 0.95
    budget: str | None = None
    violations: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Finite outputs, and no bound broken."""
        return not self.failed and not self.violations

    @property
    def metric_drop(self) -> float | None:
        """Points that the task's metric is below the reference's, negative where above; None
        without labels or without a reference."""
        first = self.metrics[0] if self.metrics else None
        if first is None or first.reference is None:
            return None
        return first.reference - first.candidate

    @property
    def agreement(self) -> float | None:
        return self.distance.agreement if self.distance else None

    @property
    def mean_error(self) -> float | None:
        return self.distance.mean_error if self.distance else None

    @property
    def max_error(self) -> float | None:
        return self.distance.max_error if self.distance else None

    @property
    def kl(self) -> float | None:
        return self.distance.kl if self.distance else None

    def to_json(self) -> dict[str, Any]:
        """Strict JSON: a number that is not finite is null (``failed`` says why)."""
        distance = dataclasses.asdict(self.distance) if self.distance else None
        return {
            "kind": "evaluation",
            "passed": self.passed,
            "candidate": self.candidate,
            "reference": self.reference,
            "data": self.data,
            "samples": self.samples,
            "truncated": self.truncated,
            "failed": self.failed,
            "metrics": [metric.to_json() for metric in self.metrics],
            "distance": distance and {k: json_number(v) for k, v in distance.items()},
            "resamples": self.resamples,
            "confidence": self.confidence,
            "budget": self.budget,
            "violations": list(self.violations),
        }
