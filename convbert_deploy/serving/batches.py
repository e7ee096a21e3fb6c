"""Which rows share a batch: rows of like length, as many as a budget of tokens allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from convbert_deploy.errors import InputError


@dataclasses.dataclass(frozen=True)
class BatchBudget:
    """rows: a batch has at most. tokens: its rows times its longest row at most, so that what a
    batch takes of time and memory is bounded however long its texts are; a row that is longer runs
    alone."""

    rows: int
    tokens: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise InputError(f"{field.name} of a batch is {value}, expected at least 1")


def batches_of(lengths: Sequence[int], budget: BatchBudget) -> list[list[int]]:
    """Indices of ``lengths`` batch by batch, longest first: a batch is padded to its first row, and
    neighbours in length waste least. Rows of equal length keep their order."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches:
            last = batches[-1]
            rows = len(last) + 1
            if rows <= budget.rows and rows * lengths[last[0]] <= budget.tokens:
                last.append(index)
                continue
        batches.append([index])
    return batches
