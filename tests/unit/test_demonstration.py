"""The demo's report on a small model: every stage in it, every table filled."""

from __future__ import annotations

import json

import convbert_deploy.demonstration as demonstration
from convbert_deploy.benchmarking import BenchOptions
from convbert_deploy.checkpoint import Checkpoint
from convbert_deploy.errors import PluginError
from convbert_deploy.triton.repository import Repository


def test_agreement_counts_words():
    lines = ['{"words": ["a", "b"], "tags": ["X", "Y"]}', "plain text"]
    answers = [{"words": [{"label": "X"}, {"label": "Z"}]}, {"words": [{"label": "X"}]}]
    assert demonstration._agreement(lines, answers) == (1, 2)


def test_demo_on_the_sample(sample: Checkpoint, sample_texts, tmp_path, monkeypatch):
    monkeypatch.setattr(demonstration, "_BENCH", BenchOptions(0, 1, 1, 1))
    result = demonstration.demo(sample, sample_texts, tmp_path)
    assert result.passed
    text = result.report.read_text()
    for heading in ("Export", "Engines", "Latency and throughput", "Answers", "Service"):
        assert f"## {heading}" in text
    scored = (tmp_path / "scored" / "part-00000.jsonl").read_text().splitlines()
    answered = (tmp_path / "answered.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answer"] for line in scored]
    agreed, words = demonstration._agreement(answered, answers)
    assert agreed > 0.94 * words > 0
    assert Repository.load(tmp_path / "service" / "models").name == "convbert_pos_brown_masked"
    share = float(text.rsplit("words (", 1)[1].split("%")[0])
    assert share > 94
    assert (tmp_path / "convbert-pos-brown.onnxruntime.fp32.engine" / "manifest.json").is_file()


def test_what_cannot_be_built_is_left_out_with_its_cure(classifier_graph, tmp_path, monkeypatch):
    def missing():
        raise PluginError("libconvbert_trt_plugins.so is not built", hint="make native")

    monkeypatch.setattr("convbert_deploy.plugin_library.tensorrt_library", missing)
    engines, skipped = demonstration._build(classifier_graph, tmp_path, lambda text: None)
    assert [engine.label for engine, _ in engines] == [
        "onnxruntime-cpu fp32",
        "onnxruntime-cpu fp16",
    ]
    assert len(skipped) == 1
    assert "is not built (make native)" in skipped[0]
