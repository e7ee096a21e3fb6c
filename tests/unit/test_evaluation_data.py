"""Labelled files: every form of every task, and lines that are wrong."""

from __future__ import annotations

import json

import pytest

from convbert_deploy.architecture import Task
from convbert_deploy.errors import EngineError, InputError
from convbert_deploy.evaluation.labelled import read_labelled
from convbert_deploy.serving.requests import InputLimits, TextRequest
from convbert_deploy.serving.scorer import Scorer, ScorerOptions
from convbert_deploy.serving.tokenizer import Tokenizer

pytest.importorskip("tokenizers")

NAMES = ("negative", "positive")


@pytest.fixture(scope="module")
def tokenizer(sample_path):
    return Tokenizer.load(sample_path)


def options(task, labels=(), problem_type=None, **changes):
    return ScorerOptions(
        InputLimits(task, 9000, 64, 2), labels=labels, problem_type=problem_type, **changes
    )


CLASSES = options(Task.SEQUENCE_CLASSIFICATION, NAMES)
MULTI = options(Task.SEQUENCE_CLASSIFICATION, ("a", "b", "c"), "multi_label_classification")
REGRESSION = options(Task.SEQUENCE_CLASSIFICATION, ("score",))
TAGS = options(Task.TOKEN_CLASSIFICATION, ("DET", "NOUN"))
SPAN = options(Task.QUESTION_ANSWERING)
CHOICE = options(Task.MULTIPLE_CHOICE)
MASKS = options(Task.MASKED_LM)

QUESTION = {"question": "Who?", "context": "The club opened in June."}
PROMPT = {"prompt": "The sky is", "choices": ["late", "open"]}

GOOD = {
    "class index": (CLASSES, {"text": "a day", "label": 1}, 1),
    "class name": (CLASSES, {"text": "a day", "text_pair": "so", "label": "negative"}, 0),
    "several labels": (MULTI, {"text": "a day", "label": ["c", 0]}, (0, 2)),
    "no label at all": (MULTI, {"text": "a day", "label": []}, ()),
    "a number": (REGRESSION, {"text": "a day", "label": 2.5}, (2.5,)),
    "tags": (TAGS, {"words": ["A", "day"], "tags": ["DET", "NOUN"]}, ("DET", "NOUN")),
    "answers": (SPAN, QUESTION | {"answers": ["The club", "club"]}, ("The club", "club")),
    "SQuAD's answers": (
        SPAN,
        QUESTION | {"answers": {"text": ["The club"], "answer_start": [0]}},
        ("The club",),
    ),
    "choice": (CHOICE, PROMPT | {"label": 1}, 1),
    "choice's text": (CHOICE, PROMPT | {"label": "late"}, 0),
    "masks": (MASKS, {"text": "A fine [MASK] in [MASK].", "masks": ["day", "June"]}, None),
}


def write(tmp_path, *objects):
    path = tmp_path / "data.jsonl"
    lines = [one if isinstance(one, str) else json.dumps(one) for one in objects]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("case", sorted(GOOD))
def test_labels_of_every_task(case, tokenizer, tmp_path):
    model, obj, gold = GOOD[case]
    data = read_labelled(write(tmp_path, obj), tokenizer, model)
    assert data.labelled
    if case == "masks":  # as an uncased vocabulary spells them
        gold = ("day", "june")
    assert data.samples[0].gold == gold


@pytest.mark.parametrize("case", sorted(GOOD))
def test_unlabelled_files_are_requests(case, tokenizer, tmp_path):
    model, obj, _ = GOOD[case]
    bare = {k: v for k, v in obj.items() if k not in ("label", "tags", "answers", "masks")}
    data = read_labelled(write(tmp_path, bare, bare | {"id": 7}), tokenizer, model)
    assert not data.labelled
    assert len(data.samples) == 2


BAD = {
    "not JSON": (CLASSES, "a fine day", "line 2: not JSON"),
    "a list": (CLASSES, [1], "line 2: the request is a list"),
    "another task": (CLASSES, QUESTION, "line 2: the request has the keys"),
    "nothing visible": (CLASSES, {"text": " "}, "line 2: text is empty"),
    "index too high": (CLASSES, {"text": "a", "label": 2}, "label 2 is none of the 2 labels"),
    "index below 0": (CLASSES, {"text": "a", "label": -1}, "none of the 2"),
    "a boolean": (CLASSES, {"text": "a", "label": True}, "none of the 2"),
    "unknown name": (CLASSES, {"text": "a", "label": "fine"}, '"fine" is none of the 2'),
    "one for many": (MULTI, {"text": "a", "label": 1}, "expected a list"),
    "text for a number": (REGRESSION, {"text": "a", "label": "2"}, "expected a number"),
    "NaN": (REGRESSION, '{"text": "a", "label": NaN}', "expected a number"),
    "tags of a text": (TAGS, {"text": "a day", "tags": ["DET"]}, "tags need words"),
    "too few tags": (TAGS, {"words": ["A", "day"], "tags": ["DET"]}, "1 tags for 2 words"),
    "unknown tag": (TAGS, {"words": ["A"], "tags": ["ADJ"]}, "none of the 2 labels"),
    "no answer": (SPAN, QUESTION | {"answers": []}, "answers is empty"),
    "numbers as answers": (SPAN, QUESTION | {"answers": [3]}, "expected a list of strings"),
    "choice too high": (CHOICE, PROMPT | {"label": 2}, "none of the 2 choices"),
    "too few masks": (MASKS, {"text": "[MASK] [MASK].", "masks": ["a"]}, "1 masks, the text has 2"),
    "a long mask": (MASKS, {"text": "[MASK]", "masks": ["deinstitutionalised"]}, "word pieces"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_lines_are_named(case, tokenizer, tmp_path):
    model, bad, message = BAD[case]
    good = {id(CLASSES): "class index", id(MULTI): "several labels", id(REGRESSION): "a number"}
    good |= {id(TAGS): "tags", id(SPAN): "answers", id(CHOICE): "choice", id(MASKS): "masks"}
    path = write(tmp_path, GOOD[good[id(model)]][1], bad)
    with pytest.raises(InputError) as caught:
        read_labelled(path, tokenizer, model)
    assert "data.jsonl line 2: " in str(caught.value)
    assert message in str(caught.value)


def test_labels_on_all_lines_or_none(tokenizer, tmp_path):
    with_label, without = {"text": "a", "label": 1}, {"text": "a"}
    for first, second, message in (
        (with_label, without, 'line 4: no "label", line 2 has one'),
        (without, with_label, 'line 4: a "label", line 2 has none'),
    ):
        with pytest.raises(InputError, match=message):
            read_labelled(write(tmp_path, "", first, "", second), tokenizer, CLASSES)


def test_limit_stops_reading(tokenizer, tmp_path):
    path = write(tmp_path, {"text": "a"}, {"text": "b"}, "broken")
    assert len(read_labelled(path, tokenizer, CLASSES, limit=2).samples) == 2
    with pytest.raises(InputError, match="limit is 0"):
        read_labelled(path, tokenizer, CLASSES, limit=0)


def test_files_that_cannot_be_read(tokenizer, tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        read_labelled(tmp_path / "nowhere.jsonl", tokenizer, CLASSES)
    with pytest.raises(InputError, match="no samples"):
        read_labelled(write(tmp_path, ""), tokenizer, CLASSES)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(InputError, match="not UTF-8"):
        read_labelled(tmp_path / "latin.jsonl", tokenizer, CLASSES)


def test_encode_gives_the_batches_that_score_runs(tokenizer):
    """Rows of one request, padded; no runner needed to make them, but to score."""
    model = options(Task.TOKEN_CLASSIFICATION, ("DET", "NOUN"), padding="masked")
    scorer = Scorer(None, tokenizer, model)
    (row,) = scorer.encode(TextRequest("A fine day."))
    assert {array.shape for array in row.values()} == {(16,)}
    assert {str(array.dtype) for array in row.values()} == {"int64"}
    assert row["attention_mask"].sum() == 6
    windows = scorer.encode(TextRequest("a day " * 60))
    assert len(windows) > 1
    (together,) = Scorer(None, tokenizer, CHOICE).encode(_choice())
    assert together["input_ids"].shape[0] == 2
    with pytest.raises(InputError):
        scorer.encode(_choice())
    with pytest.raises(EngineError, match="has no runner"):
        scorer.score([TextRequest("A fine day.")])


def _choice():
    from convbert_deploy.serving.requests import ChoiceRequest

    return ChoiceRequest("The sky is", ("late", "open"))
