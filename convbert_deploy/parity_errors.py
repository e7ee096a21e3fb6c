"""Distance of an array from its reference: the numbers that parity is judged by."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from convbert_deploy.backends.base import Batch

#: Rows whose reference norm is below this fraction of the output's typical row norm have no
#: direction worth comparing; they are left to the absolute errors.
_NO_DIRECTION = 1e-2


@dataclasses.dataclass(frozen=True)
class Errors:
    """Distance of one array from its reference, over the finite elements of both.

    A row is a vector along the last axis: the logits of one sequence or one token.

    max_abs, mean_abs: of ``|candidate - reference|``.
    max_rel: of ``|candidate - reference| / max(|reference|, rms(reference))``: near-zero elements
        are measured against the typical size of the array, so they cannot blow it up.
    min_cosine: smallest over the rows; rows of almost no length have no direction and are left
        out. None when no row is left.
    argmax_matches, argmax_rows: rows whose largest element is at the same place, of how many; no
        rows where an argmax has no meaning (a hidden state, a single logit).
    rows, elements: how many were compared.
    nan_count, inf_count: in the candidate.
    """

    max_abs: float
    mean_abs: float
    max_rel: float
    min_cosine: float | None
    argmax_matches: int
    argmax_rows: int
    rows: int
    elements: int
    nan_count: int
    inf_count: int

    @property
    def argmax_agreement(self) -> float | None:
        """Fraction of rows whose argmax agrees; None where an argmax has no meaning."""
        return self.argmax_matches / self.argmax_rows if self.argmax_rows else None

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self) | {"argmax_agreement": self.argmax_agreement}
        return {key: json_number(value) for key, value in data.items()}


def measure_errors(name: str, expected: np.ndarray, got: np.ndarray) -> Errors:
    """Distance of ``got`` from ``expected``: arrays of one shape, rows along the last axis.

    ``name`` is the output's: an argmax of ``last_hidden_state`` means nothing.
    """
    reference = expected.reshape(-1, expected.shape[-1]).astype(np.float64)
    values = got.reshape(reference.shape).astype(np.float64)
    finite = np.isfinite(values) & np.isfinite(reference)
    difference = np.where(finite, np.abs(np.where(finite, values - reference, 0.0)), 0.0)
    magnitude = np.where(finite, np.abs(np.where(finite, reference, 0.0)), 0.0)
    typical = math.sqrt(float(np.mean(magnitude**2))) if magnitude.size else 0.0
    floor = np.maximum(magnitude, max(typical, np.finfo(np.float64).tiny))
    has_classes = name != "last_hidden_state" and reference.shape[-1] > 1
    same = np.argmax(reference, axis=-1) == np.argmax(values, axis=-1)
    return Errors(
        max_abs=float(difference.max(initial=0.0)),
        mean_abs=float(difference.mean()) if difference.size else 0.0,
        max_rel=float((difference / floor).max(initial=0.0)),
        min_cosine=_min_cosine(reference, values, finite),
        # A row with NaN never agrees.
        argmax_matches=int(np.count_nonzero(same & finite.all(axis=-1))) if has_classes else 0,
        argmax_rows=reference.shape[0] if has_classes else 0,
        rows=reference.shape[0],
        elements=reference.size,
        nan_count=int(np.isnan(values).sum()),
        inf_count=int(np.isinf(values).sum()),
    )


def _min_cosine(reference: np.ndarray, values: np.ndarray, finite: np.ndarray) -> float | None:
    keep = finite.all(axis=-1)
    reference, values = reference[keep], values[keep]
    # The cosine of two single numbers is their signs: no direction to compare.
    if not len(reference) or reference.shape[-1] < 2:
        return None
    norms = np.linalg.norm(reference, axis=-1)
    directed = norms > _NO_DIRECTION * math.sqrt(float(np.mean(norms**2)))
    if not directed.any():
        return None
    products = np.sum(reference * values, axis=-1)[directed]
    lengths = norms[directed] * np.linalg.norm(values, axis=-1)[directed]
    cosines = np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)
    return float(np.clip(cosines.min(), -1.0, 1.0))


def real_token_errors(
    name: str, expected: np.ndarray, got: np.ndarray, batch: Batch
) -> Errors | None:
    """Errors at the real tokens of a per-token output; None for other outputs."""
    mask = token_mask(name, expected, batch)
    if mask is None:
        return None
    if expected.ndim == 3:
        return measure_errors(name, expected[mask], got[mask])
    # One logit a token, one argmax a sequence: drop each row's pads, keep the rows apart.
    rows = [
        measure_errors(name, expected[row][keep][None], got[row][keep][None])
        for row, keep in enumerate(mask)
        if keep.any()
    ]
    return worst(rows) if rows else None


def token_mask(name: str, output: np.ndarray, batch: Batch) -> np.ndarray | None:
    """Where a per-token output, [batch, seq] or [batch, seq, classes], holds real tokens; None for
    other outputs."""
    mask = np.asarray(batch["attention_mask"]) != 0
    if mask.ndim != 2 or output.ndim not in (2, 3) or output.shape[:2] != mask.shape:
        return None
    # Logits [batch, labels] look per-token where the batch's seq equals the number of labels.
    if output.ndim == 2 and name not in ("start_logits", "end_logits"):
        return None
    return mask


def worst(errors: Sequence[Errors]) -> Errors:
    """The largest errors, the summed counts, the mean error over all elements."""
    cosines = [one.min_cosine for one in errors if one.min_cosine is not None]
    elements = sum(one.elements for one in errors)
    total = sum(one.mean_abs * one.elements for one in errors)
    return Errors(
        max_abs=max(one.max_abs for one in errors),
        mean_abs=total / elements if elements else 0.0,
        max_rel=max(one.max_rel for one in errors),
        min_cosine=min(cosines) if cosines else None,
        argmax_matches=sum(one.argmax_matches for one in errors),
        argmax_rows=sum(one.argmax_rows for one in errors),
        rows=sum(one.rows for one in errors),
        elements=elements,
        nan_count=sum(one.nan_count for one in errors),
        inf_count=sum(one.inf_count for one in errors),
    )


class Scale:
    """Standard deviation of an output over all cases, in one pass.

    Pooled, because one small case (two logits of a batch of one) may hardly vary. An output that
    does not vary at all is measured by its size, an all-zero one by 1.
    """

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, array: np.ndarray) -> None:
        values = array[np.isfinite(array)].astype(np.float64)
        self.count += values.size
        self.total += float(values.sum())
        self.squares += float((values**2).sum())

    def value(self) -> float:
        if not self.count:
            return 1.0
        mean_square = self.squares / self.count
        deviation = math.sqrt(max(0.0, mean_square - (self.total / self.count) ** 2))
        size = math.sqrt(mean_square)
        # Below float64's resolution of the subtraction, the deviation is rounding.
        return deviation if deviation > 1e-6 * size else (size or 1.0)


def json_number(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
