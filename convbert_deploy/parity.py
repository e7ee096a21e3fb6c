"""Is the candidate the same model as the reference? Judged by numbers, case by case.

``compare`` runs both on the same batches and returns a ``ParityReport``; a failed comparison is a
report whose ``passed`` is False, never an exception. The batches come from
``convbert_deploy.parity_cases``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from convbert_deploy.backends.base import Batch, Runner
from convbert_deploy.parity_cases import LeftOut, NamedBatch, ParityBatches
from convbert_deploy.parity_errors import (
    Errors,
    Scale,
    json_number,
    measure_errors,
    real_token_errors,
    token_mask,
    worst,
)
from convbert_deploy.tolerances import Tolerance

#: A runtime's own count of bad values: (tensor name, NaN count, Inf count) for every intermediate
#: tensor of one batch.
IntermediateCheck = Callable[[Batch], Iterable[tuple[str, int, int]]]


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """What is judged besides the outputs.

    real_tokens_only: judge per-token outputs at real tokens only. The default compares padded
        positions too, as the graph must equal transformers at the same padded shape; a graph
        with masked padding differs there by design.
    intermediates: asked for every batch of at most ``intermediates_max_tokens`` tokens (keeping
        every intermediate tensor of a large batch takes gigabytes).
    progress: told the name of each case before it runs.
    """

    real_tokens_only: bool = False
    intermediates: IntermediateCheck | None = None
    intermediates_max_tokens: int = 1024
    progress: Callable[[str], None] | None = None


@dataclasses.dataclass(frozen=True)
class OutputComparison:
    """One output in one case. ``errors`` are over every position, ``real_tokens`` over the real
    tokens of a per-token output (None for other outputs). ``problem`` says why the arrays cannot
    be compared at all."""

    output: str
    shape: tuple[int, ...]
    errors: Errors | None
    real_tokens: Errors | None = None
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "output": self.output,
            "shape": list(self.shape),
            "errors": self.errors and self.errors.to_json(),
            "real_tokens": self.real_tokens and self.real_tokens.to_json(),
            "problem": self.problem,
        }


@dataclasses.dataclass(frozen=True)
class CaseComparison:
    """Every output of one batch."""

    name: str
    outputs: tuple[OutputComparison, ...]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "outputs": [output.to_json() for output in self.outputs]}


@dataclasses.dataclass(frozen=True)
class BadIntermediate:
    """A tensor inside the candidate that held NaN or Inf in one case."""

    case: str
    tensor: str
    nan_count: int
    inf_count: int


@dataclasses.dataclass(frozen=True)
class OutputSummary:
    """One output over all cases: the worst errors, the pooled argmax agreement.

    scale: standard deviation of the reference over all judged positions of all cases;
        ``max_scaled`` and ``mean_scaled`` are the absolute errors divided by it.
    """

    output: str
    scale: float
    errors: Errors
    real_tokens: Errors | None

    @property
    def max_abs(self) -> float:
        return self.errors.max_abs

    @property
    def max_scaled(self) -> float:
        return self.errors.max_abs / self.scale

    @property
    def mean_scaled(self) -> float:
        return self.errors.mean_abs / self.scale

    def to_json(self) -> dict[str, Any]:
        return {
            "output": self.output,
            "scale": json_number(self.scale),
            "max_scaled": json_number(self.max_scaled),
            "mean_scaled": json_number(self.mean_scaled),
            "errors": self.errors.to_json(),
            "real_tokens": self.real_tokens and self.real_tokens.to_json(),
        }


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """The answer to "is it the same model", with every number behind it.

    outputs: by output name.
    reasons: why it did not pass, worst first within each output; empty when it passed.
    intermediates_checked: names of the cases whose intermediate tensors were looked at; empty
        where the runtime does not allow it.
    left_out: cases that were not run, each with its reason.
    """

    reference: str
    candidate: str
    tolerance: Tolerance
    real_tokens_only: bool
    cases: tuple[CaseComparison, ...]
    outputs: dict[str, OutputSummary]
    intermediates_checked: tuple[str, ...]
    bad_intermediates: tuple[BadIntermediate, ...]
    left_out: tuple[LeftOut, ...]
    reasons: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.reasons

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "parity",
            "passed": self.passed,
            "reasons": list(self.reasons),
            "reference": self.reference,
            "candidate": self.candidate,
            "tolerance": dataclasses.asdict(self.tolerance),
            "real_tokens_only": self.real_tokens_only,
            "outputs": {name: summary.to_json() for name, summary in self.outputs.items()},
            "cases": [case.to_json() for case in self.cases],
            "intermediates_checked": list(self.intermediates_checked),
            "bad_intermediates": [dataclasses.asdict(bad) for bad in self.bad_intermediates],
            "left_out": [dataclasses.asdict(case) for case in self.left_out],
        }


def compare(
    reference: Runner,
    candidate: Runner,
    batches: Sequence[NamedBatch],
    tolerance: Tolerance,
    *,
    options: CompareOptions | None = None,
) -> ParityReport:
    """Run both on every batch and judge the candidate.

    Args:
        reference: the truth, usually the eager fp32 model; already entered.
        candidate: already entered. Each batch goes to the reference first.
        batches: cases with unique names; a ``ParityBatches`` hands on what it left out.
        tolerance: from ``tolerances.tolerance_for``.
        options: see ``CompareOptions``.

    Raises:
        ValueError: no batches: nothing would have been proven.
        ConvBertDeployError: whatever the runners raise.
    """
    options = options or CompareOptions()
    if not len(batches):
        raise ValueError("no batches to compare: nothing would be proven")
    cases: list[CaseComparison] = []
    bad: list[BadIntermediate] = []
    checked: list[str] = []
    scales: dict[str, Scale] = {}
    for case in batches:
        if options.progress:
            options.progress(case.name)
        truth = reference.infer(case.batch)
        answer = candidate.infer(case.batch)
        for name, array in truth.items():
            real = token_mask(name, array, case.batch) if options.real_tokens_only else None
            scales.setdefault(name, Scale()).add(array if real is None else array[real])
        cases.append(CaseComparison(case.name, tuple(_compare_outputs(truth, answer, case.batch))))
        tokens = case.batch["input_ids"].size
        if options.intermediates and tokens <= options.intermediates_max_tokens:
            checked.append(case.name)
            bad += [
                BadIntermediate(case.name, tensor, nans, infs)
                for tensor, nans, infs in options.intermediates(case.batch)
                if nans or infs
            ]
    outputs = _summarise(cases, scales)
    reasons = [
        *_reasons(cases, outputs, tolerance, options.real_tokens_only),
        *(
            f"tensor {one.tensor} holds {one.nan_count} NaN and {one.inf_count} Inf in {one.case}"
            for one in bad
        ),
    ]
    return ParityReport(
        reference=reference.name,
        candidate=candidate.name,
        tolerance=tolerance,
        real_tokens_only=options.real_tokens_only,
        cases=tuple(cases),
        outputs=outputs,
        intermediates_checked=tuple(checked),
        bad_intermediates=tuple(bad),
        left_out=batches.left_out if isinstance(batches, ParityBatches) else (),
        reasons=tuple(reasons),
    )


def _compare_outputs(
    truth: dict[str, np.ndarray], answer: dict[str, np.ndarray], batch: Batch
) -> Iterable[OutputComparison]:
    for name, expected in truth.items():
        if name not in answer:
            problem = f"missing; the candidate gives {', '.join(answer) or 'nothing'}"
            yield OutputComparison(name, expected.shape, None, problem=problem)
            continue
        got = answer[name]
        if got.shape != expected.shape:
            problem = f"shape {list(got.shape)}, expected {list(expected.shape)}"
            yield OutputComparison(name, expected.shape, None, problem=problem)
            continue
        yield OutputComparison(
            name,
            expected.shape,
            measure_errors(name, expected, got),
            real_token_errors(name, expected, got, batch),
        )
    for name in answer:
        if name not in truth:
            problem = f"unexpected; the reference gives {', '.join(truth)}"
            yield OutputComparison(name, answer[name].shape, None, problem=problem)


def _summarise(
    cases: Sequence[CaseComparison], scales: dict[str, Scale]
) -> dict[str, OutputSummary]:
    summaries = {}
    for name, scale in scales.items():
        compared = [
            output
            for case in cases
            for output in case.outputs
            if output.output == name and output.errors is not None
        ]
        if not compared:
            continue
        everywhere = [output.errors for output in compared if output.errors]
        real = [output.real_tokens for output in compared if output.real_tokens]
        summaries[name] = OutputSummary(
            name, scale.value(), worst(everywhere), worst(real) if real else None
        )
    return summaries


def _reasons(
    cases: Sequence[CaseComparison],
    outputs: dict[str, OutputSummary],
    tolerance: Tolerance,
    real_tokens_only: bool,
) -> Iterable[str]:
    for case in cases:
        for output in case.outputs:
            if output.problem:
                yield f"{output.output} in {case.name}: {output.problem}"
    for name, summary in outputs.items():
        judged = summary.real_tokens if real_tokens_only else None
        errors = judged or summary.errors
        where = " at real tokens" if judged else ""
        if errors.nan_count or errors.inf_count:
            yield f"{name} holds {errors.nan_count} NaN and {errors.inf_count} Inf{where}"
        # Which of a row's pads scores highest matters to nobody: the argmax is judged at real
        # tokens wherever they can be told apart.
        agreement = (summary.real_tokens or summary.errors).argmax_agreement
        for text in tolerance.violations(errors, summary.scale, agreement):
            where_worst = _worst_case(cases, name, real_tokens_only)
            yield f"{name}{where}: {text}; largest error in {where_worst}"


def _worst_case(cases: Sequence[CaseComparison], output: str, real_tokens_only: bool) -> str:
    """Name of the case with the largest absolute error of one output."""

    def size(case: CaseComparison) -> float:
        found = next((one for one in case.outputs if one.output == output), None)
        if found is None or found.errors is None:
            return -1.0
        judged = found.real_tokens if real_tokens_only else None
        return (judged or found.errors).max_abs

    return max(cases, key=size).name
