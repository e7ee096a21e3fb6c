"""Collecting that is interrupted goes on where it was, and ends with the same statistics."""

from __future__ import annotations

import json

import pytest

from convbert_deploy.calibration.collect import CollectOptions, collect
from convbert_deploy.calibration.workspace import Workspace

from collected import (
    GRAPH,
    SMALL,
    TENSORS,
    make_graph,
    make_samples,
)


@pytest.fixture
def workspace():
    with Workspace.open(make_graph()) as opened:
        yield opened


class Killed(Exception):
    pass


def killed_after(calls: int):
    def progress(done, total):
        nonlocal calls
        calls -= 1
        if calls == 0:
            raise Killed

    return progress


@pytest.mark.parametrize("calls", [3, 4, 5, 9])
def test_interrupted_run_ends_with_exactly_the_same_table(workspace, tmp_path, calls):
    samples, partial = make_samples(), tmp_path / "partial.json"
    whole = collect(workspace, TENSORS, samples, GRAPH, SMALL)
    notes, seen = [], []

    with pytest.raises(Killed):
        collect(
            workspace, TENSORS, samples, GRAPH, SMALL, partial=partial, progress=killed_after(calls)
        )
    again = collect(
        workspace,
        TENSORS,
        samples,
        GRAPH,
        SMALL,
        partial=partial,
        progress=lambda done, total: seen.append((done, total)),
        note=notes.append,
    )

    assert again == whole
    whole.save(tmp_path / "whole.json")
    again.save(tmp_path / "again.json")
    assert (tmp_path / "whole.json").read_bytes() == (tmp_path / "again.json").read_bytes()
    assert f"{calls // 3 * 3} batches are done" in notes[0]
    assert seen[-1] == (40, 40)
    assert not partial.exists()
    # what was done is not done again
    assert len(seen) == len(list_batches(workspace, samples)) - calls // 3 * 3


def list_batches(workspace, samples):
    calls = []
    collect(
        workspace, TENSORS, samples, GRAPH, SMALL, progress=lambda *progress: calls.append(progress)
    )
    return calls


def test_run_killed_twice_and_after_its_last_batch(workspace, tmp_path):
    samples, partial = make_samples(), tmp_path / "partial.json"
    options = CollectOptions(max_bytes=8 << 10, save_every=1, threads=1)
    whole = collect(workspace, TENSORS, samples, GRAPH, options)
    batches = len(list_batches(workspace, samples))

    for calls in (2, 3, batches - 5):
        with pytest.raises(Killed):
            collect(
                workspace,
                TENSORS,
                samples,
                GRAPH,
                options,
                partial=partial,
                progress=killed_after(calls),
            )

    assert json.loads(partial.read_text())["batches"] == batches
    assert collect(workspace, TENSORS, samples, GRAPH, options, partial=partial) == whole


@pytest.mark.parametrize(
    "change",
    [
        {"graph_sha256": "c" * 64},
        {"samples": make_samples(seed=1)},
        {"tensors": ("hidden", "relu")},
        {"options": CollectOptions(max_bytes=4 << 10, save_every=3, threads=1)},
        {"options": CollectOptions(max_bytes=8 << 10, save_every=3, threads=1, histograms=False)},
    ],
    ids=["graph", "data", "tensors", "max-bytes", "histograms"],
)
def test_partial_state_of_another_run_is_not_used(workspace, tmp_path, change):
    partial, notes = tmp_path / "partial.json", []
    arguments = {
        "tensors": TENSORS,
        "samples": make_samples(),
        "graph_sha256": GRAPH,
        "options": SMALL,
    }
    with pytest.raises(Killed):
        collect(workspace, **arguments, partial=partial, progress=killed_after(5))
    assert partial.exists()

    changed = arguments | change
    found = collect(workspace, **changed, partial=partial, note=notes.append)

    assert found == collect(workspace, **changed)
    assert "state of another calibration" in notes[0]
    assert not partial.exists()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"schema": 1}', None])
def test_damaged_partial_state_is_not_used(workspace, tmp_path, damage):
    samples, partial, notes = make_samples(), tmp_path / "partial.json", []
    with pytest.raises(Killed):
        collect(
            workspace, TENSORS, samples, GRAPH, SMALL, partial=partial, progress=killed_after(5)
        )
    if damage is None:
        data = json.loads(partial.read_text())
        data["observers"]["relu"]["count"] += 1
        damage = json.dumps(data).encode()
    partial.write_bytes(damage)

    found = collect(workspace, TENSORS, samples, GRAPH, SMALL, partial=partial, note=notes.append)

    assert found == collect(workspace, TENSORS, samples, GRAPH, SMALL)
    assert "starting anew" in notes[0]
