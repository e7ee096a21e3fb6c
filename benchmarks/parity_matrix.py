"""Every size x head x shape: stock ONNX Runtime and our kernels against eager float32.

Run from a checkout: ``python benchmarks/parity_matrix.py --markdown benchmarks/results/FILE.md``.
Weights are realistic (tests/factories.py), so that the convolution matters; the shapes include ones
the tracer never saw, and right-padded batches.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests"))

import torch

from convbert_deploy.architecture import Task
from convbert_deploy.backends.eager import EagerRunner
from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner
from convbert_deploy.build import for_our_kernels
from convbert_deploy.checkpoint import Checkpoint
from convbert_deploy.environment import benchmark_header, environment
from convbert_deploy.exporting import traced_graph
from convbert_deploy.parity import compare
from convbert_deploy.parity_cases import NamedBatch, random_batch
from convbert_deploy.plugin_library import ort_library
from convbert_deploy.precision import Precision
from convbert_deploy.report_table import markdown_table
from convbert_deploy.tolerances import tolerance_for

import factories

#: (batch, seq, padded): one token, two, K-1, K, odd lengths, the longest, one row and many
SHAPES = (
    (1, 1, False),
    (1, 2, False),
    (2, 8, True),
    (3, 9, False),
    (8, 17, True),
    (1, 33, False),
    (5, 64, True),
    (1, 128, False),
    (8, 128, True),
    (2, 200, True),
    (1, 384, False),
    (1, 512, False),
)


#: the graph itself, and what build-engine makes of it for a backend (all run on the CPU)
CANDIDATES = {
    "stock ORT": None,
    "our kernels": "onnxruntime-cpu",
    "our kernels, generator fused": "onnxruntime-cuda",
}


@dataclasses.dataclass(frozen=True)
class Row:
    size: str
    task: Task
    worst: dict[str, float]  # by candidate, in the order of CANDIDATES
    nodes: int


def measure(size: str, task: Task, layers: int | None) -> Row:
    model = factories.realistic_model(size, task, layers=layers)
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(model.state_dict(), file.name)
        checkpoint = Checkpoint.load(file.name)
    graph = traced_graph(model, task)
    cases = [
        NamedBatch(
            f"b{b}-s{s}{'-padded' if padded else ''}",
            random_batch(checkpoint.architecture, task, b, s, padded=padded),
        )
        for b, s, padded in SHAPES
    ]
    tolerance = tolerance_for("onnx", Precision.FP32)
    worst = {}
    for name, backend in CANDIDATES.items():
        candidate = OnnxRuntimeRunner.from_model(
            for_our_kernels(graph, backend) if backend else graph,
            library=ort_library() if backend else None,
        )
        with EagerRunner(model, task) as eager, candidate:
            report = compare(eager, candidate, cases, tolerance)
        worst[name] = max(output.errors.max_abs for output in report.outputs.values())
    return Row(size, task, worst, len(graph.graph.node))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, help="encoder layers (default: all)")
    parser.add_argument("--sizes", default=",".join(factories.SIZES))
    parser.add_argument("--markdown", type=pathlib.Path)
    options = parser.parse_args()
    rows = []
    for size in options.sizes.split(","):
        for task in Task:
            rows.append(measure(size, task, options.layers))
            print(rows[-1], file=sys.stderr, flush=True)
    limit = tolerance_for("onnx", Precision.FP32).max_abs
    table = markdown_table(
        ["model", "nodes", *(f"{name}, max abs error" for name in CANDIDATES)],
        [
            [f"{row.size}, {row.task}", str(row.nodes), *(f"{w:.2g}" for w in row.worst.values())]
            for row in rows
        ],
    )
    header = benchmark_header(environment(), threads=None)
    text = "\n".join(
        [
            "# Parity with eager float32",
            "",
            *[f"- {k}: {v}" for k, v in header.items()],
            f"- 12 shapes each, worst of all outputs; allowed {limit:g}",
            "",
            table,
            "",
        ]
    )
    print(text)
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(text)
    return 0 if all(max(row.worst.values()) <= limit for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
