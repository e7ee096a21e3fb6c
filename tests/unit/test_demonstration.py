"""The demo's report on a small model: every stage in it, every table filled."""

from __future__ import annotations

import convbert_deploy.demonstration as demonstration
from convbert_deploy.benchmark import BenchOptions
from convbert_deploy.checkpoint import Checkpoint


def test_agreement_counts_words():
    lines = ['{"words": ["a", "b"], "tags": ["X", "Y"]}', "plain text"]
    answers = [{"words": [{"label": "X"}, {"label": "Z"}]}, {"words": [{"label": "X"}]}]
    assert demonstration._agreement(lines, answers) == (1, 2)


def test_demo_on_the_sample(sample: Checkpoint, sample_texts, tmp_path, monkeypatch):
    monkeypatch.setattr(demonstration, "_BENCH", BenchOptions(0, 1, 1, 1))
    result = demonstration.demo(sample, sample_texts, tmp_path)
    assert result.passed
    text = result.report.read_text()
    for heading in ("## Export", "## Engines", "## Latency and throughput", "## Answers"):
        assert heading in text
    share = float(text.rsplit("words (", 1)[1].split("%")[0])
    assert share > 94
    assert (tmp_path / "convbert-pos-brown.onnxruntime.fp32.engine" / "manifest.json").is_file()
