"""Fixtures for tests of calibration: the trained tagger of samples/, exported and calibrated once a
precision and session, and a tiny classifier that is calibrated in a second.

A test file takes them with ``pytest_plugins = ["quantized_sample"]``.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from convbert_deploy.calibration.calibrating import (
    CalibrateOptions,
    CalibrationResult,
    Progress,
    calibrate,
)
from convbert_deploy.calibration.smoothing import SmoothingOptions
from convbert_deploy.checkpoint import Checkpoint
from convbert_deploy.engine import Engine
from convbert_deploy.graph import Graph
from convbert_deploy.precision import Precision

#: sentences of the calibrations
SAMPLES = 64


@pytest.fixture(scope="session")
def tagger_graph(sample: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The exported fp32 graph of the part-of-speech tagger, its tokenizer beside it."""
    from convbert_deploy.exporting import ExportOptions, export

    path = tmp_path_factory.mktemp("tagger") / "tagger.onnx"
    export(sample, path, ExportOptions(check=False))
    return path


@pytest.fixture(scope="session")
def calibrated(
    tagger_graph: pathlib.Path,
    sample_texts: pathlib.Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., CalibrationResult]:
    """``calibrated("int8")``: the tagger's graph, calibrated on 64 labelled sentences, once for the
    same arguments. fp8 reads the statistics of int8, and is not smoothed: its search takes seconds
    and chooses none. ``smooth=False``: int8 without SmoothQuant."""

    @functools.cache
    def make(
        precision: str, *, fp8_attention: bool = False, smooth: bool = True
    ) -> CalibrationResult:
        kind = Precision(precision)
        plain = kind is Precision.FP8 or not smooth
        options = CalibrateOptions(
            precision=kind,
            samples=SAMPLES,
            smoothing=SmoothingOptions(None if plain else "auto"),
            fp8_attention=fp8_attention,
            table=make("int8").table if plain else None,
            threads=1,
        )
        target = tmp_path_factory.mktemp("calibrated") / f"tagger.{precision}.onnx"
        return calibrate(tagger_graph, sample_texts, target, options)

    return make


@pytest.fixture(scope="session")
def int8_engine(calibrated: Callable[..., CalibrationResult]) -> Engine:
    """The calibrated tagger as an engine of ONNX Runtime's own operators: its graph has the Q/DQ
    nodes, which our kernels' engines have in their packed weights."""
    from convbert_deploy.build import BuildOptions, build_engine

    path = calibrated("int8").path
    options = BuildOptions(backend="onnxruntime", plugin=False)
    return build_engine(Graph.load(path), path.with_suffix(".engine"), options)


@pytest.fixture(scope="session")
def rows_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[np.ndarray], pathlib.Path]:
    """Writes an .npz of random ids for the tiny factory models: rows of these lengths, padded."""

    def write(lengths: np.ndarray) -> pathlib.Path:
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        ids = np.random.default_rng(0).integers(1, 500, mask.shape) * mask
        path = tmp_path_factory.mktemp("rows") / "rows.npz"
        np.savez(path, input_ids=ids, attention_mask=mask)
        return path

    return write


@pytest.fixture(scope="session")
def token_rows(rows_of: Callable[[np.ndarray], pathlib.Path]) -> pathlib.Path:
    """24 rows, 5 to 16 tokens long."""
    return rows_of(np.tile(np.arange(5, 17), 2))


@pytest.fixture
def tiny(
    classifier_graph: Graph, token_rows: pathlib.Path, tmp_path: pathlib.Path
) -> Callable[..., CalibrationResult]:
    """Calibrates the two-layer classifier on rows of ids, to int8 unless told otherwise."""

    def run(
        name: str = "out.onnx",
        graph: pathlib.Path = classifier_graph.path,
        data: pathlib.Path = token_rows,
        progress: Progress | None = None,
        **options: Any,
    ) -> CalibrationResult:
        chosen = CalibrateOptions(threads=1, **options)
        return calibrate(graph, data, tmp_path / name, chosen, progress)

    return run
