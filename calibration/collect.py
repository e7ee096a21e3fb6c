"""Runs a graph over calibration data and keeps statistics of the tensors inside it.

Memory does not grow with the data: a batch holds at most ``CollectOptions.max_bytes`` of observed
activations, and statistics are of one size whatever was seen.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..environment import versions
from ..errors import GraphError, InputError
from .activations import CollectOptions, activations
from .observers import Observer, TensorSummary
from .samples import CalibrationSamples
from .table import CalibrationTable, write_json
from .workspace import Workspace

_PARTIAL_SCHEMA = "convbert-deploy partial calibration 1"
#: packages whose arithmetic the statistics come from
_VERSIONED = ("convbert_deploy", "onnx", "onnxruntime")


def collect(
    workspace: Workspace,
    tensors: Sequence[str],
    samples: CalibrationSamples,
    graph_sha256: str,
    options: CollectOptions | None = None,
    *,
    partial: pathlib.Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> CalibrationTable:
    """Statistics of ``tensors`` over all rows of ``samples``; the table's method is ``minmax``.

    Pads take no part: batches have none, and where a request's choices differ in length, padded
    positions of tensors of shape (batch, seq, ...) are left out.

    Args:
        tensors: names of float32 tensors inside the workspace's graph.
        graph_sha256: of the graph's file; the table is valid for no other.
        partial: where the state is kept every ``save_every`` batches and removed at the end. A call
            with the same graph, data, tensors, options and package versions goes on from there, to
            exactly the table of an uninterrupted run; a file of another run is not used.
        progress: called after each batch with the rows done and all rows.
        note: called with a sentence when a partial state is used or cannot be.

    Raises:
        GraphError: a tensor the graph lacks or that is not float32; NaN or infinity in one, named
            with the sample's line.
        OutputError: ``partial`` cannot be written.
    """
    options = options or CollectOptions()
    names = _unique(tensors)
    run = _run_identity(names, samples, graph_sha256, options)
    done, observers = _resumed(partial, run, note)
    if not done:
        observers = {name: Observer(histograms=options.histogram_of(name)) for name in names}
    rows_done = 0
    with contextlib.closing(activations(workspace, names, samples, options, done)) as batches:
        for number, observed in enumerate(batches, 1):
            rows_done += len(observed.rows)
            if number <= done:
                continue
            for name in names:
                observers[name].update(observed.values.pop(name))
            if partial is not None and number % options.save_every == 0:
                _save_partial(partial, run, number, observers)
            if progress is not None:
                progress(rows_done, len(samples.rows))
    if partial is not None:
        partial.unlink(missing_ok=True)
    return CalibrationTable(
        graph_sha256=graph_sha256,
        data=samples.source,
        data_sha256=run["data_sha256"],
        samples=samples.samples,
        tokens=samples.tokens,
        method="minmax",
        percentile=99.99,
        versions=run["versions"],
        tensors={name: observer.summary() for name, observer in observers.items()},
    )


def sample_rows(
    workspace: Workspace,
    tensors: Sequence[str],
    samples: CalibrationSamples,
    rows_per_tensor: int = 512,
    seed: int = 0,
    options: CollectOptions | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, np.ndarray]:
    """A uniform random sample of each tensor's rows, a row being one token's last axis.

    The same ``seed``, data, tensors and options give the same rows. Tensors with equally many rows
    get the same tokens. Memory: the result, rows_per_tensor x channels x 4 bytes a tensor, and one
    batch.

    Returns:
        float32 arrays of shape (min(rows_per_tensor, rows there are), channels), in the order of
        the data.

    Raises:
        GraphError: as ``collect``; also a tensor whose last axis changes its length.
    """
    if rows_per_tensor < 1:
        raise InputError(f"{rows_per_tensor} rows a tensor, expected at least 1")
    options = options or CollectOptions()
    names = _unique(tensors)
    reservoirs = {name: _Reservoir(name, rows_per_tensor, seed) for name in names}
    rows_done = 0
    with contextlib.closing(activations(workspace, names, samples, options)) as batches:
        for observed in batches:
            for name in names:
                reservoirs[name].update(observed.values.pop(name))
            rows_done += len(observed.rows)
            if progress is not None:
                progress(rows_done, len(samples.rows))
    return {name: reservoir.rows() for name, reservoir in reservoirs.items()}


class _Reservoir:
    """The rows with the smallest of random keys: a uniform sample of however many come."""

    def __init__(self, name: str, size: int, seed: int) -> None:
        self._name, self._size = name, size
        self._random = np.random.default_rng(seed)
        self._keys = np.empty(0)
        self._places = np.empty(0, np.int64)
        self._kept: np.ndarray | None = None
        self._seen = 0

    def update(self, values: np.ndarray) -> None:
        if self._kept is None:
            self._kept = np.empty((0, values.shape[1]), np.float32)
        if values.shape[1] != self._kept.shape[1]:
            raise GraphError(
                f"tensor {self._name} has {self._kept.shape[1]} channels in one batch and "
                f"{values.shape[1]} in another, expected a last axis of one length"
            )
        keys = self._random.random(len(values))
        places = np.arange(self._seen, self._seen + len(values))
        self._seen += len(values)
        if len(self._keys) == self._size:
            candidates = keys < self._keys.max()
            keys, places, values = keys[candidates], places[candidates], values[candidates]
        keys = np.concatenate([self._keys, keys])
        # ties of 53-bit keys go to the earlier row
        chosen = np.sort(np.argsort(keys, kind="stable")[: self._size])
        self._keys = keys[chosen]
        self._places = np.concatenate([self._places, places])[chosen]
        self._kept = np.concatenate([self._kept, values])[chosen]

    def rows(self) -> np.ndarray:
        assert self._kept is not None
        return self._kept[np.argsort(self._places)]


def _unique(tensors: Sequence[str]) -> tuple[str, ...]:
    if not tensors:
        raise GraphError("no tensor to observe, expected at least one")
    return tuple(dict.fromkeys(tensors))


def _run_identity(
    names: tuple[str, ...],
    samples: CalibrationSamples,
    graph_sha256: str,
    options: CollectOptions,
) -> dict[str, Any]:
    """All that a partial state depends on; ``save_every`` does not change the numbers."""
    installed = versions()
    return {
        "graph_sha256": graph_sha256,
        "data_sha256": samples.sha256,
        "tensors": list(names),
        "max_bytes": options.max_bytes,
        "threads": options.threads,
        "histograms": [name for name in names if options.histogram_of(name)],
        "versions": {name: installed[name] for name in _VERSIONED if installed[name]}
        | {"numpy": np.__version__},
    }


def _save_partial(
    path: pathlib.Path, run: dict[str, Any], batches: int, observers: dict[str, Observer]
) -> None:
    state = {name: observer.summary().to_json() for name, observer in observers.items()}
    write_json(
        path, {"schema": _PARTIAL_SCHEMA, "run": run, "batches": batches, "observers": state}
    )


def _resumed(
    path: pathlib.Path | None, run: dict[str, Any], note: Callable[[str], None] | None
) -> tuple[int, dict[str, Observer]]:
    """Batches done and the observers' state; (0, {}) where there is nothing to go on from."""
    if path is None or not path.is_file():
        return 0, {}
    tell = note or (lambda sentence: None)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != _PARTIAL_SCHEMA or data["run"] != run:
            tell(f"{path} is the state of another calibration: starting anew")
            return 0, {}
        done = int(data["batches"])
        observers = {
            name: Observer.resumed(TensorSummary.from_json(data["observers"][name]))
            for name in run["tensors"]
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        tell(f"{path} is damaged: starting anew")
        return 0, {}
    tell(f"going on from {path}: {done} batches are done")
    return done, observers
