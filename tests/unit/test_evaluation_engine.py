"""``evaluate`` on the trained sample: its value, faults in the graph, budgets and bad commands."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from convbert_deploy.architecture import Task
from convbert_deploy.build import BuildOptions, build_engine
from convbert_deploy.cli import main
from convbert_deploy.engine import MANIFEST, Engine
from convbert_deploy.exporting import ExportOptions, export
from convbert_deploy.graph import Graph
from convbert_deploy.operators.packed_weight import packed, unpacked
from convbert_deploy.provenance import sha256_of_file
from convbert_deploy.serving.answering import open_scorer

pytest.importorskip("tokenizers")
pytest.importorskip("sklearn")

BUDGET = "metric drop <= 0.3, agreement >= 99%, mean error <= 0.03"
LAYER = "encoder.layer.3."


@pytest.fixture(scope="module")
def engine(sample, tmp_path_factory) -> Engine:
    folder = tmp_path_factory.mktemp("sample")
    export(sample, folder / "s.onnx", ExportOptions(check=False))
    options = BuildOptions(backend="onnxruntime")
    return build_engine(Graph.load(folder / "s.onnx"), folder / "s.fp32.engine", options)


@pytest.fixture
def call(engine, sample_path, sample_texts):
    """``evaluate`` against the sample on 50 sentences, with more arguments."""

    def run(*arguments, path=engine.path, against=sample_path, data=sample_texts):
        base = ["evaluate", path, "--data", data, "--limit", 50]
        base += ["--against", against] if against else []
        return CliRunner().invoke(main, [str(one) for one in (*base, *arguments)])

    return run


@pytest.fixture
def tampered(engine, tmp_path):
    """A copy of the bundle with changed weights, its hashes made to fit."""

    def make(**changes):
        import onnx
        from onnx import numpy_helper

        copy = shutil.copytree(engine.path, tmp_path / "tampered.engine")
        model = onnx.load(copy / "model.onnx")
        for ending, change in changes.items():
            (tensor,) = [
                tensor
                for tensor in model.graph.initializer
                if tensor.name.endswith(ending.replace("__", "."))
            ]
            array = change(numpy_helper.to_array(tensor))
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        onnx.save(model, copy / "model.onnx")
        manifest = json.loads((copy / MANIFEST).read_text())
        manifest["files"]["model.onnx"] = sha256_of_file(copy / "model.onnx")
        (copy / MANIFEST).write_text(json.dumps(manifest))
        return copy

    return make


def test_a_true_engine_keeps_everything(call):
    result = call("--budget", BUDGET, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    (metric,) = report["metrics"]
    assert metric["name"] == "word accuracy"
    assert 93 < metric["candidate"] < 98, "README: 95.7 % of 200 sentences"
    assert metric["difference"] == 0.0 and metric["interval"] == [0.0, 0.0]
    assert report["distance"]["agreement"] == 100.0
    assert report["distance"]["max_error"] < 2e-5
    assert report["passed"] and report["samples"] == 50
    assert "eager fp32: 50 of 50" in result.stderr


def test_the_metric_is_what_counting_gives(engine, call, sample_texts):
    objects = [json.loads(line) for line in sample_texts.read_text().splitlines()[:50]]
    with open_scorer(engine) as scorer:
        answers = scorer.score_json(objects)
    right = [
        word["label"] == tag
        for obj, answer in zip(objects, answers, strict=True)
        for word, tag in zip(answer["words"], obj["tags"], strict=True)
    ]
    report = json.loads(call("--json", against=None).stdout)
    assert report["metrics"][0]["candidate"] == pytest.approx(100 * np.mean(right))
    assert report["reference"] is None and report["distance"] is None


def _doubled(blob: np.ndarray) -> np.ndarray:
    linear = unpacked(blob)
    return packed(dataclasses.replace(linear, weight=2 * linear.weight))


FAULTS = {
    # NOUN and VERB are each other's answers
    "classifier rows swapped": {
        "classifier__weight": lambda w: w[:, [4, 1, 2, 3, 0, *range(5, 14)]],
    },
    "a scale doubled": {f"{LAYER}down.packed_weight": _doubled},
    "an axis turned": {f"{LAYER}depthwise_weight": lambda w: w[::-1].copy()},
    "a zero point off": {f"{LAYER}up.bias": lambda b: b + np.float32(0.25)},
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_faults_break_the_budget(fault, call, tampered):
    result = call("--budget", BUDGET, path=tampered(**FAULTS[fault]))
    assert result.exit_code == 1, result.output
    assert "OVER THE BUDGET" in result.stdout


def test_swapped_rows_are_a_significant_drop(call, tampered):
    result = call("--json", path=tampered(**FAULTS["classifier rows swapped"]))
    assert result.exit_code == 0, "no budget was given"
    low, high = json.loads(result.stdout)["metrics"][0]["interval"]
    assert low < high < -1.0


def test_nan_fails_without_a_budget(call, tampered):
    path = tampered(classifier__bias=lambda b: np.full_like(b, np.nan))
    for against in (None, True):
        result = call(path=path, **({} if against else {"against": None}))
        assert result.exit_code == 1, result.output
        assert "NaN or infinity in the outputs of 50 samples" in result.stdout


def test_unlabelled_texts_are_compared(call, sample_texts, tmp_path):
    data = tmp_path / "bare.jsonl"
    words = [json.loads(line)["words"] for line in sample_texts.read_text().splitlines()[:8]]
    data.write_text("\n".join(json.dumps({"words": one}) for one in words))
    result = call("--budget", "agreement >= 99%", data=data)
    assert result.exit_code == 0, result.output
    assert "No labels" in result.stdout and "within the budget" in result.stdout
    refused = call("--budget", BUDGET, data=data)
    assert refused.exit_code == 3
    assert "bare.jsonl has no labels" in refused.stderr


def test_the_graph_stands_in_for_a_plan(call, engine, tmp_path, monkeypatch):
    copy = shutil.copytree(engine.path, tmp_path / "plan.engine")
    manifest = json.loads((copy / MANIFEST).read_text()) | {"backend": "tensorrt-rtx"}
    (copy / MANIFEST).write_text(json.dumps(manifest))
    from convbert_deploy import environment

    without = environment.environment()
    monkeypatch.setattr(
        "convbert_deploy.environment.environment",
        lambda: dataclasses.replace(without, gpus=()),
    )
    refused = call(path=copy)
    assert refused.exit_code == 3
    assert "--graph" in refused.stderr
    result = call("--graph", "--budget", BUDGET, path=copy)
    assert result.exit_code == 0, result.output
    assert "graph of tensorrt-rtx fp32" in result.stdout


def test_mistakes_are_one_line_and_exit_3(call, tmp_path, save_checkpoint):
    import torch

    torch.save(dict(save_checkpoint(task=Task.TOKEN_CLASSIFICATION).tensors), tmp_path / "other.pt")
    (tmp_path / "bad.jsonl").write_text('{"words": ["A"], "tags": ["POETRY"]}\n')
    for result, message in (
        (call("--budget", BUDGET, against=None), "bounds what is lost to the eager model"),
        (call("--budget", "accuracy > 3"), "cannot read the budget clause"),
        (call(data=tmp_path / "nowhere.jsonl"), "cannot read"),
        (call(data=tmp_path / "bad.jsonl"), 'bad.jsonl line 1: label "POETRY" is none of the 14'),
        (call(path=tmp_path), "is not an engine"),
        (call(against=tmp_path / "other.pt"), "was built from"),
    ):
        assert result.exit_code == 3, result.output
        assert message in result.stderr
        assert "Traceback" not in result.output
    assert call("--limit", "0").exit_code == 2
