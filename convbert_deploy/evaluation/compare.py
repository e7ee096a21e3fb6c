"""One reference, run once; any number of candidates beside it, on the same labelled texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from convbert_deploy.backends.base import Runner
from convbert_deploy.errors import EngineError, InputError
from convbert_deploy.evaluation.bootstrap import paired_interval
from convbert_deploy.evaluation.distance import DistanceMeter, Outputs, all_finite
from convbert_deploy.evaluation.evaluation_report import EvaluationReport, MetricValue
from convbert_deploy.evaluation.labelled import LabelledData
from convbert_deploy.evaluation.metrics import metrics_for
from convbert_deploy.evaluation.predictions import Prediction, prediction
from convbert_deploy.evaluation.problem import problem_of
from convbert_deploy.serving.decode import Answer
from convbert_deploy.serving.scorer import Scorer, ScorerOptions
from convbert_deploy.serving.tokenizer import Tokenizer

#: samples scored at once; texts of one length among them share a batch
_AT_ONCE = 128


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """resamples: of the bootstrap, 0 for no intervals. confidence: of the intervals, in (0, 1)."""

    resamples: int = 0
    seed: int = 0
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.resamples < 0:
            raise InputError(f"resamples is {self.resamples}, expected at least 0")
        if not 0 < self.confidence < 1:
            raise InputError(f"confidence is {self.confidence}, expected between 0 and 1")


class Evaluator:
    """Holds the reference's predictions and the outputs they were decoded from.

    That is (labels) or (choices) a text, (tokens, labels) of a tagger, (masks, vocabulary) of a
    masked LM, two (tokens) a window of question answering, and (tokens, hidden) of a bare encoder:
    1.5 MB for 512 tokens of base.
    """

    def __init__(
        self,
        data: LabelledData,
        tokenizer: Tokenizer,
        options: ScorerOptions,
        reference: Runner | None = None,
        *,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        """Runs ``reference``, which is open here and is not needed afterwards.

        Raises:
            EngineError: the reference computes NaN or infinity.
            MissingDependencyError: labels need a library of the extra ``evaluate``.
        """
        self._data, self._tokenizer, self._options = data, tokenizer, options
        self._progress = progress or (lambda text: None)
        self._problem = problem_of(options)
        self._metrics = metrics_for(self._problem, options.labels) if data.labelled else ()
        self._golds = [sample.gold for sample in data.samples]
        self._reference = reference.name if reference else None
        self._outputs: list[Outputs] = []
        self._predictions: list[Prediction] = []
        for answer, outputs in self._scored(reference) if reference else ():
            if not all_finite(outputs):
                line = data.samples[len(self._outputs)].line
                raise EngineError(f"line {line}: {answer['error']}", hint=answer["hint"])
            self._outputs.append(outputs)
            self._predictions.append(prediction(self._problem, answer))
        self._expected = (
            [metric.value(self._golds, self._predictions) for metric in self._metrics]
            if reference
            else []
        )

    def report(self, candidate: Runner, options: ReportOptions | None = None) -> EvaluationReport:
        """Run ``candidate``, which is open, on the same texts in the same batches.

        Raises:
            EngineError: its outputs are not those of the task, or of another shape than the
                reference's.
        """
        options = options or ReportOptions()
        meter = DistanceMeter(self._problem)
        predictions: list[Prediction] = []
        truncated = failed = 0
        for index, (answer, outputs) in enumerate(self._scored(candidate)):
            predictions.append(prediction(self._problem, answer))
            truncated += "truncated" in answer
            failed += not all_finite(outputs)
            if self._reference:
                meter.add(self._outputs[index], outputs)
        return EvaluationReport(
            candidate=candidate.name,
            reference=self._reference,
            data=self._data.name,
            samples=len(predictions),
            truncated=truncated,
            failed=failed,
            metrics=self._values(predictions, options),
            distance=meter.result() if self._reference else None,
            resamples=options.resamples if self._reference and self._metrics else 0,
            confidence=options.confidence,
        )

    def _scored(self, runner: Runner) -> Iterator[tuple[Answer, Outputs]]:
        scorer = Scorer(runner, self._tokenizer, self._options)
        requests = [sample.request for sample in self._data.samples]
        for first in range(0, len(requests), _AT_ONCE):
            scored = scorer.score_with_outputs(requests[first : first + _AT_ONCE])
            for index, (answer, outputs) in enumerate(scored):
                if not outputs:  # refused: the data was read for another model
                    line = self._data.samples[first + index].line
                    raise InputError(f"line {line}: {answer['error']}", hint=answer["hint"])
                yield answer, outputs
            self._progress(f"{runner.name}: {first + len(scored)} of {len(requests)} samples")

    def _values(
        self, predictions: list[Prediction], options: ReportOptions
    ) -> tuple[MetricValue, ...]:
        values = []
        for index, metric in enumerate(self._metrics):
            value = metric.value(self._golds, predictions)
            if self._reference is None:
                values.append(MetricValue(metric.name, value))
                continue
            interval = options.resamples and paired_interval(
                metric,
                self._golds,
                self._predictions,
                predictions,
                resamples=options.resamples,
                seed=options.seed,
                confidence=options.confidence,
            )
            values.append(MetricValue(metric.name, value, self._expected[index], interval or None))
        return tuple(values)
