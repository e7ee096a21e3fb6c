"""What a candidate graph loses to the fp32 graph, on the calibration data itself or on other texts."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from ..backends.base import Runner
from ..errors import InputError
from ..evaluation.compare import Evaluator
from ..evaluation.distance import DistanceMeter
from ..evaluation.evaluation_report import EvaluationReport
from ..evaluation.labelled import read_labelled
from ..evaluation.problem import problem_of
from ..serving.requests import InputLimits
from ..serving.scorer import ScorerOptions
from .samples import CalibrationSamples

if TYPE_CHECKING:
    import numpy as np

    from ..graph import GraphInfo
    from ..serving.tokenizer import Tokenizer

#: positions a batch; larger batches are no faster per token
_MAX_POSITIONS = 2048


class Judge(Protocol):
    """Compares candidates, one after the other, with a reference that was run once."""

    def report(self, candidate: Runner) -> EvaluationReport: ...


def input_limits(info: GraphInfo) -> InputLimits:
    """What the graph's inputs may hold."""
    architecture = info.architecture
    return InputLimits(
        task=info.task,
        vocab_size=architecture.vocab_size,
        max_positions=architecture.max_position_embeddings,
        type_vocab_size=architecture.type_vocab_size,
    )


def judge_of_texts(
    path: pathlib.Path,
    info: GraphInfo,
    tokenizer: Tokenizer | None,
    reference: Runner,
    *,
    lines: Sequence[int] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Evaluator:
    """A judge by texts, with the task's metric where they have labels. ``lines``: which, from 1.

    Raises:
        InputError: no tokenizer, or a line that cannot be read.
    """
    if tokenizer is None:
        raise InputError(
            f"{path} holds text, and the graph has no tokenizer",
            hint="--tokenizer FOLDER names one",
        )
    options = ScorerOptions(
        limits=input_limits(info),
        labels=info.labels,
        problem_type=info.problem_type,
        padding="masked" if info.padding == "masked" else "hf",
    )
    chosen = None if lines is None else frozenset(lines)
    data = read_labelled(path, tokenizer, options, lines=chosen)
    return Evaluator(data, tokenizer, options, reference, progress=progress)


class ArrayJudge:
    """A judge by rows of token ids, which have no labels."""

    def __init__(self, samples: CalibrationSamples, info: GraphInfo, reference: Runner) -> None:
        options = ScorerOptions(
            limits=input_limits(info), labels=info.labels, problem_type=info.problem_type
        )
        self._samples, self._problem = samples, problem_of(options)
        self._names = info.task.output_names
        self._reference = reference.name
        self._expected = self._outputs(reference)

    def report(self, candidate: Runner) -> EvaluationReport:
        """Raises EngineError: other outputs or shapes than the reference's."""
        import numpy as np

        meter = DistanceMeter(self._problem)
        failed = 0
        for expected, got in zip(self._expected, self._outputs(candidate), strict=True):
            failed += not all(np.isfinite(array).all() for array in got.values())
            meter.add([expected], [got])
        return EvaluationReport(
            candidate=candidate.name,
            reference=self._reference,
            data=self._samples.source,
            samples=len(self._expected),
            truncated=0,
            failed=failed,
            metrics=(),
            distance=meter.result(),
        )

    def _outputs(self, runner: Runner) -> list[dict[str, np.ndarray]]:
        """Of each row, in the order of the batches."""
        rows = []
        for indices, batch in self._samples.batches(_MAX_POSITIONS):
            outputs = runner.infer(batch)
            for index in range(len(indices)):
                rows.append({name: outputs[name][index] for name in self._names})
        return rows
