"""Which linear layers an accuracy budget needs at high precision, and what that costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from ..errors import GraphError
from ..evaluation.evaluation_report import EvaluationReport
from .budget import Budget
from .linears import Linear, share
from .smoothing import ActivationPlan

#: A candidate's losses when exactly these plans are quantized.
Measure = Callable[[Sequence[ActivationPlan]], EvaluationReport]
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What is lost when one activation and its linears alone are quantized.

    linears: their names. mean_error, max_error: of the logits. agreement: percent; None where the
    task has no argmax. metric_drop: points, None without labels.
    """

    linears: tuple[str, ...]
    mean_error: float
    max_error: float
    agreement: float | None
    metric_drop: float | None


@dataclasses.dataclass(frozen=True)
class Price:
    """What layers cost that stay at high precision.

    arithmetic: their share of the multiplications of all quantizable linears, 0..1. Where a product
    of 8-bit numbers takes half the time of one of 16-bit numbers, that is also the estimated extra
    time, as a share of the linears' time in 8 bits. extra_bytes: of their weights in 16 bits over 8.
    """

    arithmetic: float
    extra_bytes: int


@dataclasses.dataclass(frozen=True)
class Choice:
    """The plans that are quantized, the names of the linears that are not, and what is lost."""

    quantized: tuple[ActivationPlan, ...]
    high: tuple[str, ...]
    report: EvaluationReport


def sensitivities(
    plans: Sequence[ActivationPlan], measure: Measure, progress: Progress
) -> tuple[Sensitivity, ...]:
    """Each plan's loss alone, the most sensitive first."""
    found = []
    for index, plan in enumerate(plans):
        report = measure([plan])
        assert report.distance is not None
        names = tuple(linear.name for linear in plan.linears)
        found.append(
            Sensitivity(
                names,
                report.distance.mean_error,
                report.distance.max_error,
                report.agreement,
                report.metric_drop,
            )
        )
        progress("sensitivity of each layer", index + 1, len(plans))
    # a NaN is worse than any number
    return tuple(sorted(found, key=lambda s: (s.mean_error == s.mean_error, -s.mean_error)))


def choose(
    plans: Sequence[ActivationPlan],
    order: Sequence[Sensitivity],
    budget: Budget,
    measure: Measure,
    progress: Progress,
) -> Choice:
    """Keep as few layers high as the budget needs.

    The shortest head of ``order`` that meets the budget is found by bisection; then each of its
    layers, the least sensitive first, is tried in 8 bits again.

    Raises:
        GraphError: not one layer can be quantized within the budget.
    """
    by_name = {tuple(linear.name for linear in plan.linears): plan for plan in plans}
    ranked = [by_name[sensitivity.linears] for sensitivity in order]
    search = _Search(plans, budget, measure, progress)
    if search.meets([]):
        return search.choice([])
    few, many = 0, len(ranked)
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if search.meets(ranked[:middle]) else (middle, many)
    if many == len(ranked):
        raise GraphError(
            f"no layer can be quantized within the budget {budget}",
            hint="widen the budget, or build with --fp16",
        )
    high = ranked[:many]
    for plan in reversed(ranked[: many - 1]):
        fewer = [other for other in high if other is not plan]
        if search.meets(fewer):
            high = fewer
    return search.choice(high)


class _Search:
    """Remembers what each set of high layers lost."""

    def __init__(
        self,
        plans: Sequence[ActivationPlan],
        budget: Budget,
        measure: Measure,
        progress: Progress,
    ) -> None:
        self._plans, self._budget, self._measure = plans, budget, measure
        self._progress = progress
        self._reports: dict[frozenset[int], EvaluationReport] = {}

    def meets(self, high: Sequence[ActivationPlan]) -> bool:
        return not self._budget.violations(self._report(high))

    def _report(self, high: Sequence[ActivationPlan]) -> EvaluationReport:
        key = frozenset(map(id, high))
        if key not in self._reports:
            self._reports[key] = self._measure(self._rest(high))
            self._progress(f"budget: {len(high)} layers kept high", len(self._reports), 0)
        return self._reports[key]

    def _rest(self, high: Sequence[ActivationPlan]) -> tuple[ActivationPlan, ...]:
        return tuple(plan for plan in self._plans if all(plan is not other for other in high))

    def choice(self, high: Sequence[ActivationPlan]) -> Choice:
        names = tuple(
            linear.name
            for plan in self._plans
            if any(plan is other for other in high)
            for linear in plan.linears
        )
        return Choice(self._rest(high), names, self._report(high))


def price(high: Sequence[str], every: Sequence[Linear]) -> Price:
    """Of keeping the linears named ``high`` out of 8 bits."""
    kept = tuple(linear for linear in every if linear.name in set(high))
    return Price(share(kept, tuple(every)), sum(linear.rows * linear.columns for linear in kept))
