"""Engines of every range of shapes are checked on a golden request that they take."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from convbert_deploy.architecture import Task
from convbert_deploy.backends.eager import EagerRunner
from convbert_deploy.build import BuildOptions, build_engine
from convbert_deploy.build_golden import check_golden
from convbert_deploy.errors import EngineError
from convbert_deploy.exporting import ExportOptions, export
from convbert_deploy.golden import GoldenOutput, GoldenRequest
from convbert_deploy.graph import Graph
from convbert_deploy.shapes import ShapeProfile, ShapeRange


def _built(graph, folder, shapes):
    options = BuildOptions(backend="onnxruntime", profile=ShapeProfile.parse(shapes))
    return build_engine(graph, folder / "a.engine", options)


@pytest.mark.parametrize("shapes", ["batch=4:8:16", "batch=1", "batch=3"])
def test_rows_are_split_or_filled_up_and_the_request_is_the_graphs(
    classifier_graph, tmp_path, shapes
):
    engine = _built(classifier_graph, tmp_path, shapes)
    assert engine.golden == classifier_graph.info.golden
    assert engine.manifest.golden_max_abs < 1e-5


@pytest.mark.parametrize("shapes", ["seq=32:64:128", "seq=1:4:8", "batch=1,seq=48"])
def test_another_length_is_answered_as_by_the_eager_model(
    classifier, classifier_graph, tmp_path, shapes
):
    engine = _built(classifier_graph, tmp_path, shapes)
    batch = engine.golden.batch()
    assert batch["input_ids"].shape[1] in engine.manifest.profile.seq
    assert (batch["attention_mask"] == 0).any(), "a padded row is among them"
    with EagerRunner(classifier.eager_model(), classifier.task) as eager:
        assert engine.golden.max_abs_difference(eager.infer(batch)) < 1e-5
    assert engine.manifest.golden_max_abs < 1e-5


def test_another_number_of_choices(save_checkpoint, tmp_path):
    checkpoint = save_checkpoint(task=Task.MULTIPLE_CHOICE)
    export(checkpoint, tmp_path / "a.onnx", ExportOptions(padding="masked", check=False))
    engine = _built(Graph.load(tmp_path / "a.onnx"), tmp_path, "choices=4,seq=24:24:64")
    assert engine.golden.batch()["input_ids"].shape == (2, 4, 24)
    with EagerRunner(checkpoint.eager_model(), checkpoint.task, padding="masked") as eager:
        assert engine.golden.max_abs_difference(eager.infer(engine.golden.batch())) < 1e-5


def test_a_wrong_answer_at_another_length_is_refused(classifier_graph, tmp_path):
    engine = _built(classifier_graph, tmp_path, "batch=1,seq=48")
    (output,) = engine.golden.outputs.values()
    wrong = dataclasses.replace(output, values=(output.values[0] + 0.01, *output.values[1:]))
    golden = dataclasses.replace(engine.golden, outputs={"logits": wrong})
    with pytest.raises(EngineError, match=r"wrongly: max abs difference 0\.01"):
        check_golden(dataclasses.replace(engine, golden=golden))


def test_a_graph_that_onnx_runtime_cannot_run_says_what_else_can_be_done(
    classifier_graph, tmp_path, monkeypatch
):
    def broken(self):
        raise EngineError("no kernel for Gemm of bfloat16")

    monkeypatch.setattr("convbert_deploy.backends.onnxruntime.OnnxRuntimeRunner.__enter__", broken)
    with pytest.raises(EngineError, match="cannot answer another one: no kernel") as error:
        _built(classifier_graph, tmp_path, "seq=32:64:128")
    assert "--shapes" in error.value.hint
    assert not (tmp_path / "a.engine").exists()


@pytest.mark.parametrize(
    ("rows", "sizes"), [((1, 1), [1, 1, 1]), ((1, 8), [3]), ((2, 2), [2, 2]), ((4, 4), [4])]
)
def test_batches_have_the_rows_that_are_allowed(rows, sizes):
    ids = np.arange(6).reshape(3, 2)
    golden = GoldenRequest.of({"ids": ids}, {"out": ids * 2.0})
    seen = []

    def infer(batch):
        seen.append(len(batch["ids"]))
        return {"out": batch["ids"] * 2.0}

    low, high = rows
    outputs = golden.answered(infer, ShapeRange(low, high, high))
    assert seen == sizes
    assert golden.max_abs_difference(outputs) == 0


def test_what_is_missing_or_changes_its_shape_is_infinitely_wrong():
    golden = GoldenRequest({"ids": [[1], [2]]}, {"out": GoldenOutput.of(np.ones((2, 3)))})
    one = ShapeRange(1, 1, 1)
    assert golden.max_abs_difference(golden.answered(lambda _: {}, one)) == float("inf")
    shapes = iter([(1, 3), (1, 2)])
    outputs = golden.answered(lambda _: {"out": np.ones(next(shapes))}, one)
    assert outputs == {} and golden.max_abs_difference(outputs) == float("inf")
    scalar = golden.answered(lambda _: {"out": np.float32(1)}, one)
    assert golden.max_abs_difference(scalar) == float("inf")
