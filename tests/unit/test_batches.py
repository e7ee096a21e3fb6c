"""Which rows share a batch."""

from __future__ import annotations

import numpy as np
import pytest

from convbert_deploy.errors import InputError
from convbert_deploy.serving.batches import BatchBudget, batches_of


def test_every_row_is_in_one_batch_and_no_batch_is_over_budget():
    lengths = np.random.default_rng(0).integers(1, 500, 400).tolist()
    budget = BatchBudget(rows=32, tokens=2048)

    batches = batches_of(lengths, budget)

    assert sorted(row for rows in batches for row in rows) == list(range(400))
    for rows in batches:
        longest = max(lengths[row] for row in rows)
        assert len(rows) <= 32
        assert len(rows) * longest <= 2048


def test_neighbours_in_length_share_a_batch():
    lengths = [5, 50, 6, 49, 7, 48]

    assert batches_of(lengths, BatchBudget(rows=3, tokens=1000)) == [[1, 3, 5], [4, 2, 0]]


def test_sorted_batches_waste_less_than_batches_in_order():
    lengths = np.random.default_rng(1).integers(5, 51, 320).tolist()

    def positions(batches):
        return sum(len(rows) * max(lengths[row] for row in rows) for rows in batches)

    in_order = [list(range(first, first + 32)) for first in range(0, 320, 32)]
    by_length = batches_of(lengths, BatchBudget(rows=32, tokens=32 * 50))
    assert positions(in_order) > 1.6 * sum(lengths)
    assert positions(by_length) < 1.1 * sum(lengths)


def test_a_row_above_the_budget_runs_alone():
    assert batches_of([300, 10, 10], BatchBudget(rows=8, tokens=100)) == [[0], [1, 2]]


def test_equal_lengths_keep_their_order():
    assert batches_of([4] * 5, BatchBudget(rows=2, tokens=100)) == [[0, 1], [2, 3], [4]]


def test_nothing_makes_no_batch():
    assert batches_of([], BatchBudget(rows=2, tokens=100)) == []


@pytest.mark.parametrize(("rows", "tokens", "said"), [(0, 10, "rows"), (2, 0, "tokens")])
def test_an_empty_budget_is_refused(rows, tokens, said):
    with pytest.raises(InputError, match=said):
        BatchBudget(rows, tokens)
