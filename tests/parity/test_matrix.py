"""Stock ONNX Runtime and our kernels against eager, over sizes, heads and shapes.

Two layers of each size keep this quick; ``benchmarks/parity_matrix.py`` runs all twelve.
"""

from __future__ import annotations

import pytest

from convbert_deploy.architecture import Task
from convbert_deploy.backends.eager import EagerRunner
from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner
from convbert_deploy.build import for_our_kernels
from convbert_deploy.exporting import traced_graph
from convbert_deploy.parity import compare
from convbert_deploy.parity_cases import NamedBatch, random_batch
from convbert_deploy.plugin_library import ort_library
from convbert_deploy.precision import Precision
from convbert_deploy.tolerances import tolerance_for

import factories

#: (batch, seq, padded): the tracer saw 2 x 16 only
SHAPES = (
    (1, 1, False),
    (1, 2, False),
    (2, 8, True),
    (3, 9, False),
    (8, 17, True),
    (1, 33, False),
    (5, 64, True),
    (1, 128, False),
    (2, 100, True),
    (1, 126, False),
    (4, 16, False),
    (7, 31, True),
)
TOLERANCE = tolerance_for("onnxruntime-cpu", Precision.FP32)


def cases(model, task):
    architecture = factories.architecture_of(model)
    return [
        NamedBatch(f"b{b}-s{s}-{padded}", random_batch(architecture, task, b, s, padded=padded))
        for b, s, padded in SHAPES
        if s <= architecture.max_position_embeddings
    ]


def candidates(graph):
    def ours(backend):
        return OnnxRuntimeRunner.from_model(for_our_kernels(graph, backend), library=ort_library())

    return {
        "stock": OnnxRuntimeRunner.from_model(graph),
        "as built for CPUs": ours("onnxruntime-cpu"),
        "as built for GPUs": ours("onnxruntime-cuda"),  # the CPU runs it, too
    }


def check(model, task, graph=None):
    graph = graph or traced_graph(model, task)
    reports = {}
    for name, candidate in candidates(graph).items():
        with EagerRunner(model, task) as eager, candidate:
            reports[name] = compare(eager, candidate, cases(model, task), TOLERANCE)
    return reports


@pytest.mark.parametrize("task", list(Task), ids=str)
@pytest.mark.parametrize("size", ["small", "medium-small"])
def test_sizes_and_heads(size, task):
    for name, report in check(factories.realistic_model(size, task, layers=2), task).items():
        assert report.passed, (name, report.reasons)


def test_base():
    task = Task.SEQUENCE_CLASSIFICATION
    for name, report in check(factories.realistic_model("base", task, layers=2), task).items():
        assert report.passed, (name, report.reasons)


@pytest.mark.parametrize("shape", sorted(factories.ODD_SHAPES))
def test_odd_shapes(shape):
    task = Task.TOKEN_CLASSIFICATION
    for name, report in check(factories.realistic_model(shape, task), task).items():
        assert report.passed, (name, report.reasons)


@pytest.mark.parametrize("kind", factories.SABOTAGES)
def test_a_sabotaged_convolution_fails_the_same_check(kind):
    """The fault is in the reference, so the graph, the fused engine and the check are the real ones."""
    task = Task.SEQUENCE_CLASSIFICATION
    model = factories.realistic_model("small", task, layers=2)
    graph = traced_graph(model, task)
    with factories.sabotage(model, kind):
        reports = check(model, task, graph)
    assert not any(report.passed for report in reports.values())


@pytest.mark.parametrize("kind", factories.ONNX_SABOTAGES)
def test_a_sabotaged_graph_fails_the_same_check(kind):
    task = Task.SEQUENCE_CLASSIFICATION
    model = factories.realistic_model("small", task, layers=2)
    reports = check(model, task, factories.sabotage_onnx(traced_graph(model, task), kind))
    assert not any(report.passed for report in reports.values())
