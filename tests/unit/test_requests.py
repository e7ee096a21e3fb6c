"""What is refused at the edge, and in which words."""

from __future__ import annotations

import json

import numpy as np
import pytest

from convbert_deploy.architecture import Task
from convbert_deploy.errors import InputError
from convbert_deploy.serving.requests import (
    ChoiceRequest,
    InputLimits,
    QuestionRequest,
    TextRequest,
    WordsRequest,
    request_from_json,
    validated_batch,
)

LIMITS = InputLimits(Task.SEQUENCE_CLASSIFICATION, 100, 8, 2)
CHOICES = InputLimits(Task.MULTIPLE_CHOICE, 100, 8, 2)


def batch(ids=None, **changes):
    ids = np.array([[2, 5, 3, 0], [2, 6, 7, 3]]) if ids is None else ids
    return {"input_ids": ids, "attention_mask": (np.asarray(ids) != 0).astype(np.int64)} | changes


def test_a_good_batch_comes_back_whole_and_int64():
    out = validated_batch(batch(np.array([[2, 5, 3, 0]], np.int32)), LIMITS)
    assert {name: a.dtype for name, a in out.items()} == dict.fromkeys(out, np.dtype("int64"))
    assert out["attention_mask"].tolist() == [[1, 1, 1, 0]]
    assert out["token_type_ids"].tolist() == [[0, 0, 0, 0]]
    alone = validated_batch({"input_ids": [[2, 0, 3]]}, LIMITS)
    assert alone["attention_mask"].tolist() == [[1, 1, 1]]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"input_ids": np.array([[2, 5], [2, 100]])}, "row 1, position 1: token id 100 .* 0..99"),
        ({"input_ids": np.array([[2, 5], [-1, 3]])}, "row 1, position 0: token id -1 "),
        ({"input_ids": np.array([[2.0, 5.0]])}, "dtype float64, expected an integer"),
        ({"input_ids": np.array([[True, True]])}, "dtype bool"),
        ({"input_ids": np.array([[2**63 + 5]], np.uint64)}, "does not fit int64"),
        ({"input_ids": [[2, 3], [2]]}, "ragged"),
        ({"input_ids": np.full((1, 9), 5)}, "9 tokens a sequence, the model has 8 positions"),
        ({"input_ids": np.zeros((1, 0), np.int64)}, "at least 1"),
        ({"input_ids": np.array([2, 5, 3])}, r"shape \[3\].*\(batch, seq\)"),
        ({"input_ids": np.ones((1, 2, 3), np.int64)}, r"\(batch, seq\)"),
    ],
)
def test_bad_ids(changed, words):
    with pytest.raises(InputError, match=words):
        validated_batch(changed, LIMITS)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([[1, 1, 1, 0], [0, 0, 0, 0]], "attention_mask row 1: all zeros"),
        ([[1, 1, 1, 1], [0, 0, 1, 1]], "row 1, position 1: 0 before a 1, left padding"),
        ([[1, 0, 1, 1], [1, 1, 1, 1]], "row 0, position 1: .*gap inside"),
        ([[1, 1, 2, 1], [1, 1, 1, 1]], "row 0, position 2: mask value 2 is outside 0..1"),
        ([[1, 1, 1]], r"shape \[1, 3\], input_ids has \[2, 4\]"),
        ([[1.0] * 4] * 2, "attention_mask has dtype float64"),
    ],
)
def test_bad_masks(mask, words):
    with pytest.raises(InputError, match=words):
        validated_batch(batch(attention_mask=np.array(mask)), LIMITS)


def test_bad_types_unknown_and_missing_inputs():
    with pytest.raises(InputError, match="row 0, position 1: token type 2 is outside 0..1"):
        validated_batch(batch(token_type_ids=np.array([[0, 2, 0, 0], [0, 0, 0, 0]])), LIMITS)
    with pytest.raises(InputError, match="unknown inputs position_ids"):
        validated_batch(batch(position_ids=np.zeros((2, 4))), LIMITS)
    with pytest.raises(InputError, match="input_ids is missing"):
        validated_batch({}, LIMITS)


def test_multiple_choice_places_name_the_choice():
    ids = np.full((2, 3, 4), 5)
    assert validated_batch({"input_ids": ids}, CHOICES)["input_ids"].shape == (2, 3, 4)
    ids[1, 2, 3] = 500
    with pytest.raises(InputError, match="row 1, choice 2, position 3: token id 500"):
        validated_batch({"input_ids": ids}, CHOICES)
    mask = np.ones((2, 3, 4), int)
    mask[0, 1] = 0
    with pytest.raises(InputError, match="row 0, choice 1: all zeros"):
        validated_batch({"input_ids": np.full((2, 3, 4), 5), "attention_mask": mask}, CHOICES)


@pytest.mark.parametrize(
    ("task", "line", "expected"),
    [
        (Task.SEQUENCE_CLASSIFICATION, '{"text": "a"}', TextRequest("a")),
        (Task.SEQUENCE_CLASSIFICATION, '{"text": "a", "text_pair": "b"}', TextRequest("a", "b")),
        (Task.SEQUENCE_CLASSIFICATION, '{"text": "a", "text_pair": null}', TextRequest("a")),
        (Task.ENCODER, '{"text": "a", "label": 1}', TextRequest("a")),
        (Task.TOKEN_CLASSIFICATION, '{"words": ["a", "b"]}', WordsRequest(("a", "b"))),
        (Task.QUESTION_ANSWERING, '{"question": "q", "context": "c"}', QuestionRequest("q", "c")),
        (
            Task.MULTIPLE_CHOICE,
            '{"prompt": "p", "choices": ["a", "b"]}',
            ChoiceRequest("p", ("a", "b")),
        ),
    ],
)
def test_json_forms(task, line, expected):
    assert request_from_json(task, json.loads(line)) == expected


@pytest.mark.parametrize(
    ("task", "obj", "words"),
    [
        (Task.ENCODER, "a text", "the request is a str"),
        (Task.ENCODER, {"texts": "a"}, "keys .'texts'."),
        (Task.ENCODER, {"text": "a", "text_pair": "b"}, "text_pair, which encoder"),
        (Task.ENCODER, {"text": 3}, "text is a int, expected a string"),
        (Task.ENCODER, {"text": None}, "text is null"),
        (Task.ENCODER, {"text": " \n"}, "text is empty"),
        (Task.ENCODER, {"text": "ab\ud800"}, "lone surrogate at character 2"),
        (Task.SEQUENCE_CLASSIFICATION, {"words": ["a"]}, "does not take"),
        (Task.TOKEN_CLASSIFICATION, {"words": ["a"], "text": "a"}, "both text and words"),
        (Task.TOKEN_CLASSIFICATION, {"words": []}, "words has 0 entries"),
        (Task.TOKEN_CLASSIFICATION, {"words": "a b"}, "words is a str, expected a list"),
        (Task.TOKEN_CLASSIFICATION, {"words": ["a", None]}, r"words\[1\] is a NoneType"),
        (Task.MULTIPLE_CHOICE, {"prompt": "p", "choices": ["a"]}, "choices has 1 entries"),
        (Task.QUESTION_ANSWERING, {"question": "q", "context": ""}, "context is empty"),
    ],
)
def test_bad_requests(task, obj, words):
    with pytest.raises(InputError, match=words):
        request_from_json(task, obj)
