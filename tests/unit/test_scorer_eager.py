"""Every task through the eager model: an answer is the same alone and among others."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from convbert_deploy.architecture import Task
from convbert_deploy.backends.base import RunnerOptions
from convbert_deploy.backends.eager import EagerRunner
from convbert_deploy.serving.requests import InputLimits
from convbert_deploy.serving.scorer import Scorer, ScorerOptions
from convbert_deploy.serving.tokenizer import Tokenizer

from factories import architecture_of, realistic_model

FOLDER = pathlib.Path(__file__).parents[2] / "samples" / "convbert-pos-brown"
OBJECTS = {
    Task.ENCODER: [{"text": "a short one"}, {"text": "The film was long , and good ."}],
    Task.MASKED_LM: [
        {"text": "the [MASK] was good"},
        {"text": "she [MASK] the long road [MASK] ."},
    ],
    Task.SEQUENCE_CLASSIFICATION: [
        {"text": "so good"},
        {"text": "it is", "text_pair": "is it not ?"},
    ],
    Task.TOKEN_CLASSIFICATION: [{"text": "Don't stop ."}, {"words": ["New", "York", "is", "long"]}],
    Task.QUESTION_ANSWERING: [
        {"question": "what ?", "context": "The film was long ."},
        {"question": "where is it ?", "context": "It is in New York , she said to him ."},
    ],
    Task.MULTIPLE_CHOICE: [
        {"prompt": "he went", "choices": ["home", "to the long road"]},
        {"prompt": "it was", "choices": ["good", "not good at all ."]},
    ],
}


def numbers(answer):
    """Every number of an answer, in order."""
    if isinstance(answer, dict):
        return [n for value in answer.values() for n in numbers(value)]
    if isinstance(answer, list):
        return [n for value in answer for n in numbers(value)]
    return [answer] if isinstance(answer, (int, float)) else []


@pytest.mark.parametrize("padding", ["hf", "masked"])
@pytest.mark.parametrize("task", list(Task), ids=str)
def test_batched_answers_equal_single_ones(task, padding):
    model = realistic_model("tiny", task, vocab_size=9000)
    sizes = architecture_of(model)
    limits = InputLimits(
        task, sizes.vocab_size, sizes.max_position_embeddings, sizes.type_vocab_size
    )
    with EagerRunner(model, task, RunnerOptions(threads=1), padding=padding) as runner:
        scorer = Scorer(runner, Tokenizer.load(FOLDER), ScorerOptions(limits, padding=padding))
        together = scorer.score_json(OBJECTS[task] * 2)
        alone = [scorer.score_json([obj])[0] for obj in OBJECTS[task]]
    assert not [answer for answer in together if "error" in answer]
    for one, other in zip(together, alone * 2, strict=True):
        np.testing.assert_allclose(numbers(one), numbers(other), rtol=0, atol=2e-6)
    assert (
        max(abs(a - b) for a, b in zip(numbers(alone[0]), numbers(alone[1]), strict=False)) > 1e-3
    )


def test_classification_equals_transformers_pipeline():
    import torch
    from transformers import PreTrainedTokenizerFast, pipeline

    model = realistic_model("tiny", Task.SEQUENCE_CLASSIFICATION, vocab_size=9000)
    sizes = architecture_of(model)
    limits = InputLimits(
        Task.SEQUENCE_CLASSIFICATION, 9000, sizes.max_position_embeddings, sizes.type_vocab_size
    )
    texts = ["so good", "the film was not good at all", "New York"]
    with EagerRunner(model, Task.SEQUENCE_CLASSIFICATION, RunnerOptions(threads=1)) as runner:
        scorer = Scorer(runner, Tokenizer.load(FOLDER), ScorerOptions(limits))
        ours = scorer.score_json([{"text": text} for text in texts])
    theirs = pipeline(
        "text-classification",
        model=model,
        tokenizer=PreTrainedTokenizerFast(tokenizer_file=str(FOLDER / "tokenizer.json")),
        device=torch.device("cpu"),
    )(texts, batch_size=1)
    assert [a["label"] for a in ours] == [t["label"] for t in theirs]
    assert [a["score"] for a in ours] == pytest.approx([t["score"] for t in theirs], abs=1e-6)
