"""An engine's answers to labelled texts, beside those of the checkpoint it came from."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from convbert_deploy.backends.base import RunnerOptions
from convbert_deploy.checkpoint import Checkpoint
from convbert_deploy.engine import Engine
from convbert_deploy.errors import InputError
from convbert_deploy.evaluation.compare import Evaluator, ReportOptions
from convbert_deploy.evaluation.evaluation_report import EvaluationReport
from convbert_deploy.evaluation.labelled import LabelledData, read_labelled
from convbert_deploy.serving.answering import engine_tokenizer, scorer_options
from convbert_deploy.verification import candidate_runner, check_chain

if TYPE_CHECKING:
    from convbert_deploy.calibration.budget import Budget


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """budget: bounds on what may be lost to the eager model. graph: the graph a plan was built
    from, in stock ONNX Runtime, instead of the plan. limit: samples at most."""

    budget: Budget | None = None
    graph: bool = False
    limit: int | None = None
    threads: int | None = None
    report: ReportOptions = dataclasses.field(default_factory=lambda: ReportOptions(resamples=1000))


def evaluate(
    engine: Engine | pathlib.Path,
    data: pathlib.Path,
    checkpoint: Checkpoint | None = None,
    options: EvaluateOptions | None = None,
    progress: Callable[[str], None] | None = None,
) -> EvaluationReport:
    """Score the texts of ``data`` (see ``evaluation.labelled``) with the engine.

    With a checkpoint, the eager float32 model scores them too, in the same batches and with the
    engine's padding, and the report compares the two.

    Raises:
        EngineError: built from another checkpoint, has no tokenizer, or cannot run here.
        InputError: a line that cannot be read, or a budget without something to judge it by.
        MissingDependencyError: labels need a library of the extra ``evaluate``.
    """
    options = options or EvaluateOptions()
    engine = engine if isinstance(engine, Engine) else Engine.load(engine)
    if checkpoint:
        check_chain(engine, checkpoint)
    tokenizer, scoring = engine_tokenizer(engine), scorer_options(engine)
    runner_options = RunnerOptions(threads=options.threads)
    candidate = candidate_runner(engine, runner_options, graph=options.graph)
    labelled = read_labelled(data, tokenizer, scoring, limit=options.limit)
    _check_budget(options.budget, labelled, checkpoint)
    if checkpoint is None:
        evaluator = Evaluator(labelled, tokenizer, scoring, progress=progress)
    else:
        from convbert_deploy.backends.eager import EagerRunner

        with EagerRunner(
            checkpoint.eager_model(), scoring.task, runner_options, padding=scoring.padding
        ) as eager:
            evaluator = Evaluator(labelled, tokenizer, scoring, eager, progress=progress)
    with candidate:
        report = evaluator.report(candidate, options.report)
    if options.budget is None:
        return report
    violations = tuple(options.budget.violations(report))
    return dataclasses.replace(report, budget=str(options.budget), violations=violations)


def _check_budget(budget: Budget | None, data: LabelledData, checkpoint: Checkpoint | None) -> None:
    """What is missing is said before minutes of work, not after."""
    if budget is None:
        return
    if checkpoint is None:
        raise InputError(
            f"budget {budget} bounds what is lost to the eager model, and there is none",
            hint="--against CHECKPOINT",
        )
    if budget.metric_drop is not None and not data.labelled:
        raise InputError(
            f"budget {budget} bounds the metric, and {data.name} has no labels",
            hint="label every line, or bound the agreement or the errors",
        )
