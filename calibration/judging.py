"""What a candidate graph loses to the fp32 graph, on the calibration data itself or on other texts."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from ..backends.base import Runner
from ..errors import EngineError, InputError, MissingDependencyError
from ..evaluation.compare import Evaluator
from ..evaluation.distance import DistanceMeter, all_finite
from ..evaluation.evaluation_report import EvaluationReport
from ..evaluation.labelled import read_labelled
from ..evaluation.problem import Problem, problem_of
from ..serving.requests import InputLimits
from ..serving.scorer import ScorerOptions
from .samples import CalibrationSamples

if TYPE_CHECKING:
    import numpy as np

    from ..graph import GraphInfo
    from ..serving.tokenizer import Tokenizer

#: positions a batch; larger batches are no faster per token
_MAX_POSITIONS = 2048
#: of outputs: all that are kept of the reference, and those of one batch
_MAX_BYTES = 64 << 20


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
    metric_needed: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Evaluator:
    """A judge by texts, with the task's metric where they have labels and its library is installed.

    Args:
        lines: which, from 1; None for all.
        metric_needed: a library that is missing is an error.

    Raises:
        InputError: no tokenizer, or a line that cannot be read.
        MissingDependencyError: a metric is needed, and the extra ``evaluate`` is not installed.
    """
    tokenizer, options = _text_options(path, info, tokenizer)
    chosen = None if lines is None else frozenset(lines)
    data = read_labelled(path, tokenizer, options, lines=chosen)
    try:
        return Evaluator(data, tokenizer, options, reference, progress=progress)
    except MissingDependencyError:
        if metric_needed:
            raise
    bare = tuple(dataclasses.replace(sample, gold=None) for sample in data.samples)
    unlabelled = dataclasses.replace(data, samples=bare)
    return Evaluator(unlabelled, tokenizer, options, reference, progress=progress)


def labelled(path: pathlib.Path, info: GraphInfo, tokenizer: Tokenizer | None) -> bool:
    """Whether the texts have labels, by the first of them.

    Raises:
        InputError: no tokenizer, or a line that cannot be read.
    """
    tokenizer, options = _text_options(path, info, tokenizer)
    return read_labelled(path, tokenizer, options, limit=1).labelled


def _text_options(
    path: pathlib.Path, info: GraphInfo, tokenizer: Tokenizer | None
) -> tuple[Tokenizer, ScorerOptions]:
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
    return tokenizer, options


class ArrayJudge:
    """A judge by rows of token ids, which have no labels.

    Holds the reference's outputs. Where those have a vector a token, of long data it compares
    every n-th token of a row only, so that they stay below ``_MAX_BYTES``.
    """

    def __init__(self, samples: CalibrationSamples, info: GraphInfo, reference: Runner) -> None:
        """Runs ``reference``, which is open here and is not needed afterwards.

        Raises:
            EngineError: the reference computes NaN or infinity.
        """
        options = ScorerOptions(
            limits=input_limits(info), labels=info.labels, problem_type=info.problem_type
        )
        self._samples, self._problem = samples, problem_of(options)
        self._names = info.task.output_names
        wide = {
            Problem.MASKS: info.architecture.vocab_size,
            Problem.HIDDEN: info.architecture.hidden_size,
        }
        positions = sum(row.positions for row in samples.rows)
        bytes_a_token = 4 * wide.get(self._problem, 0)
        self._step = max(1, math.ceil(positions * bytes_a_token / _MAX_BYTES))
        # a batch's own outputs are in memory as well
        most = _MAX_BYTES // bytes_a_token if bytes_a_token else _MAX_POSITIONS
        self._positions = max(1, min(_MAX_POSITIONS, most))
        self._reference = reference.name
        self._expected = {}
        for index, outputs in self._outputs(reference):
            if not all_finite([outputs]):
                raise EngineError(
                    f"{reference.name} computes NaN or infinity for {samples.place(index)}",
                    hint="convbert-deploy verify ENGINE --against CHECKPOINT tells where it begins",
                )
            self._expected[index] = outputs

    def report(self, candidate: Runner) -> EvaluationReport:
        """Raises EngineError: other outputs or shapes than the reference's."""
        meter = DistanceMeter(self._problem)
        failed = 0
        for index, got in self._outputs(candidate):
            failed += not all_finite([got])
            meter.add([self._expected[index]], [got])
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

    def _outputs(self, runner: Runner) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Each row's index and its outputs by name."""
        for indices, batch in self._samples.batches(self._positions):
            outputs = runner.infer(batch)
            for name in self._names:
                if name not in outputs or len(outputs[name]) != len(indices):
                    raise EngineError(
                        f"{runner.name} has no output {name} with a row for each of {len(indices)}, "
                        f"only {', '.join(outputs)}: expected a graph of the same task"
                    )
            for position, index in enumerate(indices):
                yield index, {name: self._kept(outputs[name][position]) for name in self._names}

    def _kept(self, output: np.ndarray) -> np.ndarray:
        """Without what is not compared; a copy then, or all of the batch would stay in memory."""
        return output if self._step == 1 else output[:: self._step].copy()
