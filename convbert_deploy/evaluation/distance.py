"""How far a candidate's logits are from the reference's, where answers are read off."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from convbert_deploy.errors import EngineError
from convbert_deploy.evaluation.problem import Problem

#: One sample's outputs by name, for each of its rows; see ``Scorer.score_with_outputs``.
Outputs = Sequence[Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Distance:
    """Over all samples.

    units: how many argmaxes were compared; ``unit`` says of what: sequences; each label of a
        sequence, above or below 0 (multi-label); word pieces of every window, without [CLS] and
        [SEP]; start and end of every window, [CLS] to [SEP] (question answering); prompts; masks.
    agreement: percent of units whose argmax is the same; None for regression and bare encoders.
    mean_error, max_error: of ``|candidate - reference|`` over all logits of those units.
    kl: mean over units of KL(reference || candidate) of the softmax (of the sigmoid for
        multi-label), in nats; None where agreement is.

    A unit with NaN or infinity does not agree and makes both errors and kl NaN.
    """

    unit: str
    units: int
    agreement: float | None
    mean_error: float
    max_error: float
    kl: float | None


class DistanceMeter:
    """Adds up samples one at a time."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._decides = problem not in (Problem.REGRESSION, Problem.HIDDEN)
        self._units = self._same = self._elements = 0
        self._total = self._largest = self._kl = 0.0

    def add(self, reference: Outputs, candidate: Outputs) -> None:
        """One sample, of which the reference's outputs are finite.

        Raises:
            EngineError: the two have other rows or shapes.
        """
        pairs = zip(
            logit_rows(self._problem, reference), logit_rows(self._problem, candidate), strict=True
        )
        for expected, got in pairs:
            if expected.shape != got.shape:
                raise EngineError(
                    f"the candidate's logits have shape {list(got.shape)}, the reference's "
                    f"{list(expected.shape)}: these are two models"
                )
            self._add_rows(expected.astype(np.float64), got.astype(np.float64))

    def _add_rows(self, expected: np.ndarray, got: np.ndarray) -> None:
        with np.errstate(invalid="ignore"):
            error = np.abs(got - expected)
        self._elements += error.size
        self._total += float(error.sum())
        # np.max keeps a NaN; the comparison of two floats would lose it
        self._largest = float(np.max([self._largest, error.max(initial=0.0)]))
        if self._problem is Problem.MULTI_LABEL:
            expected, got = _yes_or_no(expected), _yes_or_no(got)
        self._units += len(expected)
        if self._decides:
            finite = np.isfinite(got).all(axis=-1)
            same = expected.argmax(axis=-1) == np.where(finite[:, None], got, 0.0).argmax(axis=-1)
            self._same += int(np.count_nonzero(same & finite))
            self._kl += float(_kl(expected, got).sum()) if finite.all() else float("nan")

    def result(self) -> Distance:
        units = self._units
        finite = bool(np.isfinite(self._total))
        return Distance(
            unit=self._problem.value,
            units=units,
            agreement=100.0 * self._same / units if self._decides else None,
            mean_error=self._total / self._elements if finite else float("nan"),
            max_error=self._largest if finite else float("nan"),
            kl=self._kl / units if self._decides else None,
        )


def logit_rows(problem: Problem, outputs: Outputs) -> list[np.ndarray]:
    """The (units, classes) arrays of one sample that are compared."""
    rows = [array for row in outputs for array in row.values()]
    if problem is Problem.TAGS:
        return [array[1:-1] for array in rows]
    return [array if array.ndim == 2 else array[None] for array in rows]


def all_finite(outputs: Outputs) -> bool:
    """Whether one sample's outputs hold neither NaN nor infinity."""
    return all(bool(np.isfinite(array).all()) for row in outputs for array in row.values())


def _yes_or_no(logits: np.ndarray) -> np.ndarray:
    """Each sigmoid as a softmax over its logit and 0; at 0 itself the label is chosen."""
    flat = logits.reshape(-1)
    return np.stack([flat, np.zeros_like(flat)], axis=-1)


def _kl(expected: np.ndarray, got: np.ndarray) -> np.ndarray:
    """(units,): sum of p (log p - log q)."""
    p, q = _log_softmax(expected), _log_softmax(got)
    return (np.exp(p) * (p - q)).sum(axis=-1)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
