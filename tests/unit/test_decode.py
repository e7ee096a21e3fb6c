"""Logits whose answer can be worked out by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from convbert_deploy.serving import decode
from convbert_deploy.serving.sequences import Sequence
from convbert_deploy.serving.tokenizer import Pieces


def pieces(text, words=None):
    """One piece a space-separated part; ``words`` numbers them otherwise."""
    parts, offsets, at = text.split(" "), [], 0
    for part in parts:
        offsets.append((at, at + len(part)))
        at += len(part) + 1
    words = tuple(range(len(parts))) if words is None else words
    spans = [
        (
            min(o[0] for o, w in zip(offsets, words, strict=True) if w == n),
            max(o[1] for o, w in zip(offsets, words, strict=True) if w == n),
        )
        for n in range(max(words) + 1)
    ]
    return Pieces(
        text, tuple(range(10, 10 + len(parts))), tuple(parts), tuple(offsets), words, tuple(spans)
    )


def one_hot(best, labels, logit=5.0):
    out = np.zeros((len(best), len(labels)), np.float32)
    out[np.arange(len(best)), [labels.index(b) for b in best]] = logit
    return out


def test_classification_softmax_regression_and_multi_label():
    logits = np.array([0.0, math.log(3)], np.float32)
    single = decode.sequence_classification(logits, ("no", "yes"), None)
    assert (single["label"], single["score"]) == ("yes", pytest.approx(0.75))
    assert decode.sequence_classification(np.array([2.5], np.float32), ("x",), None) == {
        "value": 2.5
    }
    both = decode.sequence_classification(np.array([1.0, 2.0]), ("a", "b"), "regression")
    assert both == {"values": {"a": 1.0, "b": 2.0}}
    multi = decode.sequence_classification(
        np.array([1.0, -1000.0, 4.0]), ("a", "b", "c"), "multi_label_classification"
    )
    assert multi["labels"] == ["c", "a"]
    assert multi["scores"]["a"] == pytest.approx(1 / (1 + math.exp(-1)))
    assert multi["scores"]["b"] == 0.0


def test_a_word_takes_the_label_of_its_first_piece():
    labels = ("NOUN", "VERB")
    answer = decode.token_classification(
        one_hot(["VERB", "NOUN", "NOUN"], labels), pieces("a b c", (0, 0, 1)), labels
    )
    assert [(w["word"], w["label"]) for w in answer["words"]] == [("a b", "VERB"), ("c", "NOUN")]
    assert [(t["start"], t["end"]) for t in answer["tokens"]] == [(0, 1), (2, 3), (4, 5)]
    assert "entities" not in answer


def test_bio_entities():
    labels = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    tags = ["B-PER", "I-PER", "B-PER", "O", "I-LOC", "I-LOC", "I-PER"]
    text = "Ada Byron Eve saw New York Bob"
    answer = decode.token_classification(one_hot(tags, labels), pieces(text), labels)
    found = [(e["entity"], e["text"]) for e in answer["entities"]]
    assert found == [("PER", "Ada Byron"), ("PER", "Eve"), ("LOC", "New York"), ("PER", "Bob")]
    assert all(text[e["start"] : e["end"]] == e["text"] for e in answer["entities"])
    assert not decode.is_bio(("NOUN", "VERB")) and not decode.is_bio(("O",))


def test_windows_are_merged_where_a_piece_has_most_context():
    rows = [Sequence((0,) * 6, (0,) * 6, 1, 0, 4), Sequence((0,) * 6, (0,) * 6, 1, 2, 4)]
    logits = [np.full((6, 1), 1.0, np.float32), np.full((6, 1), 2.0, np.float32)]
    assert decode.merged_windows(rows, logits, 6)[:, 0].tolist() == [1, 1, 1, 2, 2, 2]


def qa(start_logits, end_logits, text="a b c d", **options):
    options = {"top_k": 3, "max_answer_tokens": 30} | options
    count = len(text.split())
    row = Sequence((0,) * (count + 4), (0,) * (count + 4), start=3, first=0, count=count)
    return decode.question_answering(
        [row], [(np.asarray(start_logits), np.asarray(end_logits))], pieces(text), **options
    )


def test_answers_lie_inside_the_context_and_never_run_backwards():
    # The largest logits of all stand on [CLS] and the question; inside, end comes before start.
    start = np.array([99, 99, 99, 0, 0, 5, 0, 99], float)
    end = np.array([99, 99, 99, 4, 0, 0, 3, 99], float)
    answer = qa(start, end)
    assert [(a["text"], a["start"], a["end"]) for a in answer["answers"][:1]] == [("c d", 4, 7)]
    # spans by hand: logits start[i] + end[j] for j >= i
    total = sum(math.exp(start[3 + i] + end[3 + j]) for i in range(4) for j in range(i, 4))
    assert answer["answers"][0]["score"] == pytest.approx(math.exp(8) / total)
    assert qa(start, end, max_answer_tokens=1)["answer"] == "c"
    assert len(qa(np.zeros(6), np.zeros(6), text="a b", top_k=9)["answers"]) == 3


def test_windows_share_one_softmax_and_map_to_the_whole_context():
    context = pieces("a b c d e f")
    rows = [Sequence((0,) * 8, (0,) * 8, 3, 0, 4), Sequence((0,) * 8, (0,) * 8, 3, 2, 4)]
    first, second = np.zeros(8), np.zeros(8)
    second[3 + 2] = 6.0  # piece 4, only in the second window
    answer = decode.question_answering(
        rows, [(first, first), (second, second)], context, top_k=2, max_answer_tokens=30
    )
    assert (answer["answer"], answer["windows"]) == ("e", 2)
    assert context.text[answer["answers"][0]["start"]] == "e"
    every = decode.question_answering(
        rows, [(first, first), (first, first)], context, top_k=99, max_answer_tokens=30
    )
    assert len(every["answers"]) == 17  # 10 spans in each window of 4, 3 of them in both
    assert sum(a["score"] for a in every["answers"]) == pytest.approx(1.0)


def test_multiple_choice_and_encoder():
    answer = decode.multiple_choice(np.array([0.0, math.log(4.0)]), ("x", "y"))
    assert (answer["choice"], answer["text"]) == (1, "y")
    assert answer["scores"] == pytest.approx([0.2, 0.8])
    hidden = np.array([[1.0, 2.0], [3.0, 6.0]], np.float32)
    assert decode.encoder(hidden) == {"embedding": [2.0, 4.0], "shape": [2, 2]}
    json.dumps(answer)
