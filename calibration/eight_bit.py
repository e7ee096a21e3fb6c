"""INT8 and FP8: from statistics to plans, from plans to the graph that meets the budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..backends.base import RunnerOptions
from ..evaluation.evaluation_report import EvaluationReport
from ..precision import Precision
from .activations import CollectOptions
from .attention import attention_inputs
from .budget import Budget
from .collect import sample_rows
from .judging import Judge
from .linears import Linear, linears
from .quantize import quantized_graph
from .samples import CalibrationSamples
from .sensitivity import Choice, Price, Sensitivity, choose, price, sensitivities
from .smoothing import ActivationPlan, SmoothingOptions, by_activation, plan_activation
from .table import CalibrationTable
from .workspace import Workspace

if TYPE_CHECKING:
    import onnx

#: rows of each activation that the smoothing search multiplies; its choices are the same from 256
_SEARCH_ROWS = 512

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class QuantizationResult:
    """report: what the written graph loses. smoothquant: exponent of each quantized linear, None
    for none. sensitivities: empty without a budget."""

    model: onnx.ModelProto
    quantized: tuple[str, ...]
    high: tuple[str, ...]
    smoothquant: dict[str, float | None]
    report: EvaluationReport
    sensitivities: tuple[Sensitivity, ...]
    price: Price

    def to_json(self) -> dict[str, Any]:
        return {
            "quantized": list(self.quantized),
            "high": list(self.high),
            "smoothquant": self.smoothquant,
            "losses": losses(self.report),
            "sensitivities": [dataclasses.asdict(found) for found in self.sensitivities],
            "price": dataclasses.asdict(self.price),
        }


def losses(report: EvaluationReport) -> dict[str, float | None]:
    """The figures a budget bounds."""
    names = ("metric_drop", "agreement", "mean_error", "max_error", "kl")
    return {name: getattr(report, name) for name in names}


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """Makes and measures 8-bit variants of one workspace's graph.

    judge: of the final graph; scout: of the search, on fewer texts. attention: its products too.
    """

    workspace: Workspace
    table: CalibrationTable
    samples: CalibrationSamples
    precision: Precision
    attention: bool
    judge: Judge
    scout: Judge
    threads: int | None
    progress: Progress

    def run(self, smoothing: SmoothingOptions, budget: Budget | None) -> QuantizationResult:
        """The graph within ``budget``; without one, with every linear in 8 bits.

        Raises:
            GraphError: the budget cannot be met, or the table lacks a tensor.
        """
        every = linears(self.workspace.model())
        plans = self._plans(every, smoothing)
        order: tuple[Sensitivity, ...] = ()
        if budget is None:
            choice = Choice(plans, (), self._measure(self.judge, plans))
        else:
            order = sensitivities(
                plans, lambda some: self._measure(self.scout, some), self.progress
            )
            choice = choose(
                plans, order, budget, lambda some: self._measure(self.judge, some), self.progress
            )
        chosen = [linear for plan in choice.quantized for linear in plan.linears]
        return QuantizationResult(
            model=self._graph(choice.quantized),
            quantized=tuple(linear.name for linear in chosen),
            high=choice.high,
            smoothquant={
                linear.name: plan.alpha for plan in choice.quantized for linear in plan.linears
            },
            report=choice.report,
            sensitivities=order,
            price=price(choice.high, every),
        )

    def _plans(
        self, every: Sequence[Linear], smoothing: SmoothingOptions
    ) -> tuple[ActivationPlan, ...]:
        """With ``auto``, all smoothing is dropped where the model as a whole is better without."""
        rows = sample_rows(
            self.workspace,
            tuple(by_activation(every)),
            self.samples,
            _SEARCH_ROWS,
            seed=0,
            options=CollectOptions(threads=self.threads),
            progress=lambda done, of: self.progress("sampling activations", done, of),
        )
        plain = SmoothingOptions(None)
        smoothed = self._searched(every, rows, smoothing)
        if smoothing.alpha != "auto" or all(plan.alpha is None for plan in smoothed):
            return smoothed
        without = self._searched(every, rows, plain)
        errors = [self._measure(self.scout, plans).mean_error for plans in (smoothed, without)]
        with_it, plain_error = (
            math.inf if error is None or math.isnan(error) else error for error in errors
        )
        return smoothed if with_it <= plain_error else without

    def _searched(
        self, every: Sequence[Linear], rows: dict[str, Any], smoothing: SmoothingOptions
    ) -> tuple[ActivationPlan, ...]:
        plans = []
        groups = by_activation(every)
        for index, (activation, group) in enumerate(groups.items()):
            weights = [self.workspace.weight(linear.weight) for linear in group]
            plans.append(
                plan_activation(
                    group, weights, self.table, rows[activation], self.precision, smoothing
                )
            )
            self.progress("choosing ranges", index + 1, len(groups))
        return tuple(plans)

    def _graph(self, plans: Sequence[ActivationPlan]) -> onnx.ModelProto:
        products = attention_inputs(self.workspace.model(), self.table) if self.attention else ()
        return quantized_graph(self.workspace, plans, self.precision, tuple(products))

    def _measure(self, judge: Judge, plans: Sequence[ActivationPlan]) -> EvaluationReport:
        options = RunnerOptions(threads=self.threads)
        with self.workspace.runner(self._graph(plans), options=options) as runner:
            return judge.report(runner)
