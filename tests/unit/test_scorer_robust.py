"""Requests and runners that are at fault: each is named, and touches nobody else."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from convbert_deploy.architecture import Task
from convbert_deploy.errors import EngineError
from convbert_deploy.serving import decode
from convbert_deploy.serving.requests import InputLimits, TextRequest
from convbert_deploy.serving.scorer import Scorer, ScorerOptions
from convbert_deploy.serving.tokenizer import Tokenizer

pytest.importorskip("tokenizers")
FOLDER = pathlib.Path(__file__).parents[2] / "samples" / "convbert-pos-brown"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(FOLDER)


class ShapedRunner:
    """Zeros of the shape that ``shape`` makes of the inputs'."""

    name = "shaped"
    input_names = ("input_ids", "attention_mask", "token_type_ids")

    def __init__(self, task, shape):
        self.output_names, self._shape = task.output_names, shape

    def infer(self, batch):
        zeros = np.zeros(self._shape(batch["input_ids"].shape), np.float32)
        return dict.fromkeys(self.output_names, zeros)


def scorer(task, tokenizer, shape, **options):
    limits = InputLimits(task, 9000, 64, 2)
    return Scorer(ShapedRunner(task, shape), tokenizer, ScorerOptions(limits, **options))


REQUESTS = {
    Task.TOKEN_CLASSIFICATION: {"text": "it was good"},
    Task.ENCODER: {"text": "it was good"},
    Task.MASKED_LM: {"text": "it was [MASK]"},
    Task.QUESTION_ANSWERING: {"question": "how ?", "context": "it was good"},
    Task.MULTIPLE_CHOICE: {"prompt": "it was", "choices": ["good", "bad"]},
    Task.SEQUENCE_CLASSIFICATION: {"text": "it was good"},
}


@pytest.mark.parametrize("task", list(Task), ids=str)
def test_outputs_of_another_shape_are_the_engines_fault(task, tokenizer):
    wrong = [lambda ids: (0,), lambda ids: (), lambda ids: (ids[0] + 1, *ids[1:], 2)]
    if task is not Task.SEQUENCE_CLASSIFICATION:
        wrong.append(lambda ids: (ids[0], ids[1] - 1, 2))
    for shape in wrong:
        with pytest.raises(EngineError, match="shaped gave .* of shape"):
            scorer(task, tokenizer, shape).score_json([REQUESTS[task]])


def test_any_error_in_a_request_s_place_is_its_answer(tokenizer):
    here = scorer(Task.SEQUENCE_CLASSIFICATION, tokenizer, lambda ids: (ids[0], 2))
    broken, good = here.score([EngineError("no luck", hint="try again"), TextRequest("good")])
    assert broken == {"error": "no luck", "hint": "try again"}
    assert good["score"] == 0.5


def test_errors_do_not_repeat_a_megabyte(tokenizer):
    here = scorer(Task.SEQUENCE_CLASSIFICATION, tokenizer, lambda ids: (ids[0], 2))
    objects = [
        {"k" * 1_000_000: 1},
        {f"key {n}": n for n in range(100_000)},
        {"text": "word " * 200_000},
        {"text": ["x"] * 100_000},
        "x" * 1_000_000,
        {"text": "x" * 199_999 + "\ud800"},
    ]
    answers = here.score_json(objects)
    assert all("error" in answer for answer in answers)
    assert max(len(answer["error"]) for answer in answers) < 600
    assert "and 99992 more" in answers[1]["error"]


def test_words_that_cannot_be_seen_do_not_break_an_entity(tokenizer):
    begin, inside = (tokenizer.pieces(word).ids[0] for word in ("new", "york"))

    class Runner(ShapedRunner):
        def infer(self, batch):
            ids = batch["input_ids"]
            labels = np.where(ids == begin, 1, np.where(ids == inside, 2, 0))
            return {"logits": 9.0 * np.eye(3, dtype=np.float32)[labels]}

    task = Task.TOKEN_CLASSIFICATION
    options = ScorerOptions(InputLimits(task, 9000, 64, 2), labels=("O", "B-LOC", "I-LOC"))
    here = Scorer(Runner(task, None), tokenizer, options)
    answer = here.score_json([{"words": ["New", "\u200b", "York", "\u200b", "is"]}])[0]
    assert [word["label"] for word in answer["words"]] == ["B-LOC", None, "I-LOC", None, "O"]
    assert [entity["text"] for entity in answer["entities"]] == ["New \u200b York"]


@pytest.mark.parametrize("size", [3, 100, 30_522])
def test_of_equal_scores_the_first_wins(tokenizer, size):
    scores = np.zeros(size)
    scores[size // 2] = 1.0
    assert decode._largest(scores, 3).tolist() == [size // 2, 0, 2 if size == 3 else 1]
    assert decode._largest(scores, size + 5).tolist()[0] == size // 2
    assert len(decode._largest(scores, size + 5)) == size
    assert decode._largest(np.zeros(size), 2).tolist() == [0, 1]
