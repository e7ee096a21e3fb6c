"""How much accuracy a cheaper graph may cost: ``metric drop <= 0.3, agreement >= 99%``."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Protocol

from ..errors import ConvBertDeployError, InputError

_GRAMMAR = (
    "a comma list of: metric drop <= POINTS, agreement >= PERCENT%, mean error <= X, "
    "max error <= X, kl <= X"
)
_CLAUSE = re.compile(
    r"(?P<name>[a-z]+(?: [a-z]+)?)\s*(?P<sign><=|>=)\s*"
    r"(?P<number>\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?)\s*(?P<percent>%?)"
)
_SIGNS = {
    "metric drop": "<=",
    "agreement": ">=",
    "mean error": "<=",
    "max error": "<=",
    "kl": "<=",
}


class Losses(Protocol):
    """What a budget looks at; ``EvaluationReport`` has these. None is not known, NaN is bad."""

    @property
    def metric_drop(self) -> float | None: ...
    @property
    def agreement(self) -> float | None: ...
    @property
    def mean_error(self) -> float | None: ...
    @property
    def max_error(self) -> float | None: ...
    @property
    def kl(self) -> float | None: ...


@dataclasses.dataclass(frozen=True)
class Budget:
    """Bounds on what a candidate may lose to the eager model; None is not bounded.

    metric_drop: points (0 to 100) of the task's first metric. agreement: percent of equal argmaxes,
    at least. mean_error, max_error: of the logits, absolute. kl: nats, KL(reference || candidate).
    """

    metric_drop: float | None = None
    agreement: float | None = None
    mean_error: float | None = None
    max_error: float | None = None
    kl: float | None = None

    def __post_init__(self) -> None:
        for name, bound in self._bounds():
            if not (math.isfinite(bound) and bound >= 0):
                raise InputError(
                    f"{name} bound is {bound}, expected a number from 0", hint=_GRAMMAR
                )
            if name == "agreement" and bound > 100:
                raise InputError(f"agreement >= {bound}% can never be met", hint=_GRAMMAR)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read clauses such as ``metric drop <= 0.3, agreement >= 99%``; case does not matter.

        Raises:
            InputError: no clause, an unknown one, one given twice, or the wrong sign.
        """
        bounds: dict[str, float] = {}
        for clause in text.split(","):
            name, bound = _clause(clause.strip())
            field = name.replace(" ", "_")
            if field in bounds:
                raise InputError(f"budget bounds {name} twice", hint=_GRAMMAR)
            bounds[field] = bound
        return cls(**bounds)

    def violations(self, report: Losses) -> list[str]:
        """Each broken bound, as text. A NaN breaks every bound on it.

        Raises:
            ConvBertDeployError: a bound on something the report lacks.
        """
        broken = []
        for name, bound in self._bounds():
            value = getattr(report, name.replace(" ", "_"))
            if value is None:
                raise ConvBertDeployError(
                    f"budget bounds the {name}, which this evaluation does not have",
                    hint="a metric drop needs labels and the eager model, agreement and kl a task "
                    "that chooses, errors the eager model",
                )
            # Written so that NaN is a violation.
            met = value >= bound if _SIGNS[name] == ">=" else value <= bound
            if not met:
                over = "under" if _SIGNS[name] == ">=" else "over"
                percent = "%" if name == "agreement" else ""
                broken.append(f"{name} {value:.6g}{percent} is {over} {bound:g}{percent}")
        return broken

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {_SIGNS[name]} {repr(bound).removesuffix('.0')}"
            f"{'%' if name == 'agreement' else ''}"
            for name, bound in self._bounds()
        )

    def _bounds(self) -> Iterator[tuple[str, float]]:
        for name in _SIGNS:
            bound = getattr(self, name.replace(" ", "_"))
            if bound is not None:
                yield name, float(bound)


def _clause(text: str) -> tuple[str, float]:
    match = _CLAUSE.fullmatch(" ".join(text.lower().split()))
    if match is None or match["name"] not in _SIGNS:
        raise InputError(f"cannot read the budget clause {text!r}", hint=_GRAMMAR)
    name = match["name"]
    if match["sign"] != _SIGNS[name]:
        raise InputError(
            f"budget clause {text!r}: expected {name} {_SIGNS[name]} ...", hint=_GRAMMAR
        )
    if match["percent"] and name != "agreement":
        raise InputError(
            f"budget clause {text!r}: only the agreement is a percentage", hint=_GRAMMAR
        )
    return name, float(match["number"])
