"""What each precision keeps of a trained checkpoint: the accuracy table, ours beside the peers'.

Exports the checkpoint, calibrates the graph in every precision, INT8 by every method with and
without SmoothQuant and within a budget, and compares each with the eager float32 model on labelled
texts, by the code of ``convbert-deploy evaluate``. From a checkout:

    python benchmarks/calibration.py CHECKPOINT --calibration calib.jsonl \\
        --data eval1.jsonl --data eval2.jsonl --threads 1 [--modelopt-python VENV/bin/python]

fp16 and fp8 rows run the graph that TensorRT gets, fp16 and bf16 in ONNX Runtime with a rounding
after each operator (bf16 emulated: its CPU provider has no such type); int8 runs as the CPU engine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import int8_peers as peers

from convbert_deploy.backends.base import RunnerOptions
from convbert_deploy.backends.eager import EagerRunner
from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner, session_config
from convbert_deploy.calibration.budget import Budget
from convbert_deploy.calibration.calibrating import CalibrateOptions, Progress, calibrate
from convbert_deploy.calibration.emulated import emulated_graph
from convbert_deploy.calibration.smoothing import SmoothingOptions
from convbert_deploy.checkpoint import Checkpoint
from convbert_deploy.environment import benchmark_header, environment
from convbert_deploy.evaluation.compare import Evaluator
from convbert_deploy.evaluation.labelled import read_labelled
from convbert_deploy.exporting import export
from convbert_deploy.graph import Graph
from convbert_deploy.plugin_library import ort_library
from convbert_deploy.precision import Precision
from convbert_deploy.provenance import atomic_file
from convbert_deploy.serving.tokenizer import Tokenizer

METHODS = ("minmax", "entropy", "percentile", "mse")
BUDGETS = (
    "metric drop <= 0.3, agreement >= 99%",
    "metric drop <= 0.3, agreement >= 99.5%, mean error <= 0.009",
)


def recipes() -> Iterator[tuple[str, CalibrateOptions]]:
    """Every row that ``calibrate`` makes."""
    for precision in (Precision.FP16, Precision.BF16, Precision.FP8):
        yield str(precision), CalibrateOptions(precision=precision)
    for method in METHODS:
        for label, alpha in (("no SmoothQuant", None), ("SmoothQuant auto", "auto")):
            options = CalibrateOptions(method=method, smoothing=SmoothingOptions(alpha))
            yield f"int8 {method}, {label}", options
    for budget in BUDGETS:
        yield f"int8, budget {budget}", CalibrateOptions(budget=Budget.parse(budget))


def rows(
    checkpoint: Checkpoint,
    calibration: pathlib.Path,
    evaluations: Sequence[pathlib.Path],
    threads: int | None,
) -> Iterator[peers.Row]:
    """The eager model first, then each recipe's graph."""
    runner_options = RunnerOptions(threads=threads)
    tokenizer, scoring = Tokenizer.load(checkpoint.path), peers.scoring_of(checkpoint)
    data = peers.together([read_labelled(path, tokenizer, scoring) for path in evaluations])
    with EagerRunner(checkpoint.eager_model(), checkpoint.task, runner_options) as eager:
        evaluator = Evaluator(data, tokenizer, scoring, eager)
        yield peers.row_of(evaluator.report(eager), None)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        graph = folder / "model.onnx"
        export(checkpoint, graph)
        with _runner(graph, Precision.FP32, runner_options, "fp32") as runner:
            yield peers.row_of(evaluator.report(runner), graph.stat().st_size)
        tables: dict[bool, pathlib.Path] = {}
        for label, options in recipes():
            eight_bit = options.precision.quantized
            options = dataclasses.replace(options, threads=threads, table=tables.get(eight_bit))
            target = folder / f"{len(tables)}-{time.monotonic_ns()}.onnx"
            started = time.perf_counter()
            result = calibrate(graph, calibration, target, options, Progress())
            took = time.perf_counter() - started
            print(f"{label}: {took:.1f} s", file=sys.stderr, flush=True)
            tables.setdefault(eight_bit, result.table)
            note = _note(result.record, took, collected=options.table is None)
            with _candidate(graph, result.path, options.precision, runner_options, label) as runner:
                row = peers.row_of(evaluator.report(runner), result.bytes)
            yield dataclasses.replace(
                row, name=label, note="; ".join(filter(None, (row.note, note)))
            )


def _note(record: dict[str, Any], took: float, *, collected: bool) -> str:
    high = [name.removeprefix("encoder.layer.") for name in record.get("high", ())]
    parts = [f"high: {', '.join(high)}"] if high else []
    if collected:
        parts.append(f"calibrated in {took:.0f} s")
    return "; ".join(parts)


@contextlib.contextmanager
def _candidate(
    graph: pathlib.Path,
    calibrated: pathlib.Path,
    precision: Precision,
    options: RunnerOptions,
    name: str,
) -> Iterator[OnnxRuntimeRunner]:
    if precision is not Precision.BF16:
        with _runner(calibrated, precision, options, name) as runner:
            yield runner
        return
    model = emulated_graph(Graph.load(graph).model, precision)
    with OnnxRuntimeRunner.from_model(
        model, options=options, library=ort_library(), name=name
    ) as runner:
        yield runner


def _runner(
    path: pathlib.Path, precision: Precision, options: RunnerOptions, name: str
) -> OnnxRuntimeRunner:
    return OnnxRuntimeRunner(
        path, options, library=ort_library(), config=session_config(precision), name=name
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=pathlib.Path, help="a Hugging Face folder")
    parser.add_argument("--calibration", type=pathlib.Path, required=True, metavar="JSONL")
    parser.add_argument("--data", type=pathlib.Path, action="append", required=True)
    parser.add_argument("--modelopt-python", type=pathlib.Path)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--markdown", type=pathlib.Path)
    given = parser.parse_args()
    checkpoint = Checkpoint.load(given.checkpoint)
    found = list(rows(checkpoint, given.calibration, given.data, given.threads))
    if not given.no_peers:
        options = peers.PeerOptions(given.threads, modelopt_python=given.modelopt_python)
        theirs = peers.rows(given.checkpoint, given.calibration, given.data, options)
        found += theirs[1:]  # without eager, which stands above
    header = benchmark_header(environment(), threads=given.threads)
    facts = [
        *(f"{key}: {value}" for key, value in header.items()),
        f"{found[0].samples} texts of {' + '.join(path.name for path in given.data)}; calibrated "
        f"on at most 512 texts of {given.calibration.name}",
        "d: difference of the logits to eager float32; drop: points below it",
    ]
    text = peers.section(f"Accuracy by precision: {given.checkpoint.name}", found, facts)
    print(text)
    if given.markdown:
        with atomic_file(given.markdown) as file:
            file.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
