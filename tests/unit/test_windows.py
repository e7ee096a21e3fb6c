"""Long texts over windows: each entity and answer once, at its own characters."""

from __future__ import annotations

import pathlib
import random
import unicodedata

import numpy as np
import pytest

from convbert_deploy.architecture import Task
from convbert_deploy.errors import InputError
from convbert_deploy.serving import sequences
from convbert_deploy.serving.requests import InputLimits
from convbert_deploy.serving.scorer import Scorer, ScorerOptions
from convbert_deploy.serving.tokenizer import Tokenizer
from convbert_deploy.shapes import ShapeProfile, ShapeRange

pytest.importorskip("tokenizers")
FOLDER = pathlib.Path(__file__).parents[2] / "samples" / "convbert-pos-brown"
VOCABULARY = 9000
LABELS = ("O", "B-LOC", "I-LOC")
FILLER = ["the", "film", "was", "long", "and", "good", "she", "saw", "it", "again", ",", "."]
#: wide enough for every text below in one sequence
WIDE = ShapeProfile(seq=ShapeRange(1, 128, 8192))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(FOLDER)


class FixedRunner:
    """infer is a function of the batch."""

    name = "fixed"
    input_names = ("input_ids", "attention_mask", "token_type_ids")

    def __init__(self, task, infer):
        self.output_names, self.rows = task.output_names, []
        self._infer = infer

    def infer(self, batch):
        self.rows += batch["attention_mask"].sum(-1).reshape(-1).tolist()
        return self._infer(batch)


def scorer(task, tokenizer, infer, positions=64, **options):
    limits = InputLimits(task, VOCABULARY, positions, 2)
    options = {"labels": LABELS, "window_overlap": 16, "profile": WIDE} | options
    if task is Task.QUESTION_ANSWERING:
        options["labels"] = ()
    return Scorer(FixedRunner(task, infer), tokenizer, ScorerOptions(limits, **options))


def entity_logits(tokenizer, edge=0):
    """``new`` begins an entity and ``york`` continues one. Within ``edge`` tokens of either end of
    the row everything is taken for a beginning."""
    begin, inside = (tokenizer.pieces(word).ids[0] for word in ("new", "york"))

    def infer(batch):
        ids = batch["input_ids"]
        labels = np.where(ids == begin, 1, np.where(ids == inside, 2, 0))
        if edge:
            labels[:, 1 : 1 + edge] = 1
            for row, length in enumerate(batch["attention_mask"].sum(-1)):
                labels[row, length - 1 - edge : length - 1] = 1
        return {"logits": 8.0 * np.eye(3, dtype=np.float32)[labels]}

    return infer


def answer_logits(tokenizer, words):
    """Starts at the first word's token, ends at the last one's; all else is equal."""
    first, last = (tokenizer.pieces(word).ids[0] for word in (words[0], words[-1]))

    def infer(batch):
        ids = batch["input_ids"]
        return {
            "start_logits": np.where(ids == first, 9.0, 0.0).astype(np.float32),
            "end_logits": np.where(ids == last, 9.0, 0.0).astype(np.float32),
        }

    return infer


@pytest.mark.parametrize("at", range(40, 66))
def test_an_entity_at_any_place_of_the_overlap_is_found_once(tokenizer, at):
    # Windows of 62 pieces share 16: the first overlap is pieces 46 to 61.
    words = [FILLER[i % len(FILLER)] for i in range(140)]
    words[at : at + 2] = ["New", "York"]
    text = " ".join(words)
    answer = scorer(Task.TOKEN_CLASSIFICATION, tokenizer, entity_logits(tokenizer)).score_json(
        [{"text": text}]
    )[0]
    assert len(answer["words"]) == 140
    (entity,) = answer["entities"]
    assert (entity["text"], entity["entity"]) == ("New York", "LOC")
    assert (entity["start"], entity["end"]) == (text.index("New"), text.index("York") + 4)


def test_what_only_a_window_s_edge_sees_is_not_believed(tokenizer):
    """The first and last tokens of the text have no other window; all others must be right."""
    words = [FILLER[i % len(FILLER)] for i in range(200)]
    words[50:52] = words[97:99] = ["new", "york"]
    infer = entity_logits(tokenizer, edge=7)
    answer = scorer(Task.TOKEN_CLASSIFICATION, tokenizer, infer).score_json([{"words": words}])[0]
    labels = [word["label"] for word in answer["words"]]
    expected = ["B-LOC" if w == "new" else "I-LOC" if w == "york" else "O" for w in words]
    assert labels[7:-7] == expected[7:-7]
    assert labels[:7] == ["B-LOC"] * 7 == labels[-7:]


@pytest.mark.parametrize("at", range(36, 60, 3))
def test_an_answer_in_the_overlap_is_found_once(tokenizer, at):
    words = [FILLER[i % len(FILLER)] for i in range(120)]
    words[at : at + 3] = ["New", "old", "York"]
    context = " ".join(words)
    infer = answer_logits(tokenizer, ["new", "york"])
    answer = scorer(Task.QUESTION_ANSWERING, tokenizer, infer).score_json(
        [{"question": "where ?", "context": context}]
    )[0]
    assert answer["windows"] > 1 and answer["answer"] == "New old York"
    best = answer["answers"][0]
    assert (best["start"], best["end"]) == (context.index("New"), context.index("York") + 4)
    places = [(a["start"], a["end"]) for a in answer["answers"]]
    assert len(set(places)) == len(places) == 5


def test_windows_and_one_sequence_agree_where_logits_do(tokenizer):
    words = [FILLER[i % 7] for i in range(150)]
    words[77] = "york"
    request = {"question": "where ?", "context": " ".join(words)}
    infer = answer_logits(tokenizer, ["york"])
    cut, whole = (
        scorer(
            Task.QUESTION_ANSWERING, tokenizer, infer, n, max_answer_tokens=5, top_k=3
        ).score_json([request])[0]
        for n in (64, 512)
    )
    assert (cut["windows"] > 3, whole["windows"]) == (True, 1)
    assert cut["answer"] == whole["answer"] == "york"
    # Neighbours share 16 pieces: every span of at most 5 lies in one of them, so scores agree too.
    assert cut["answers"][0]["score"] == pytest.approx(whole["answers"][0]["score"], rel=1e-12)


@pytest.mark.parametrize("strong_where", [lambda position: position < 30, lambda p: p >= 30])
def test_of_two_windows_the_surer_one_counts(tokenizer, strong_where):
    """One window sees the answer early, the other late; either may be the one that is sure."""
    words = [FILLER[i % len(FILLER)] for i in range(100)]
    words[52] = "york"
    target = tokenizer.pieces("york").ids[0]

    def infer(batch):
        positions = np.broadcast_to(
            np.arange(batch["input_ids"].shape[1]), batch["input_ids"].shape
        )
        seen.extend(positions[batch["input_ids"] == target].tolist())
        sure = np.where(strong_where(positions), 9.0, 1.0)
        logits = np.where(batch["input_ids"] == target, sure, 0.0).astype(np.float32)
        return {"start_logits": logits, "end_logits": logits}

    seen: list[int] = []
    answer = scorer(Task.QUESTION_ANSWERING, tokenizer, infer).score_json(
        [{"question": "where ?", "context": " ".join(words)}]
    )[0]
    assert len(seen) == 2 and min(seen) < 30 <= max(seen)
    assert answer["answer"] == "york" and answer["answers"][0]["score"] > 0.99


# --- any text


MARKS = "\u0300\u0301\u0308\u0327\u20d7\ufe0f"
LETTERS = "abcdefghijklmnopqrstuvwxyz" + "ABCXYZ" + "éüñçøßÅİıǅﬁ" + "дляж" + "ξως" + "हिन्दी" + "ของ"
#: emoji with modifiers and joiners, a flag, scripts without spaces, signs, an invisible character
OTHERS = ["👍", "👍🏽", "👨\u200d👩\u200d👧", "❤\ufe0f", "🇩🇪", "中", "日本", "한국"]
OTHERS += ["\U0001d4b3", "½", "…", "\u2014", "\u200b"]
SPACES = [" ", " ", " ", "  ", "\n", "\t", "\u00a0", "\u3000", "\r\n"]


def random_word(random):
    kind = random.random()
    if kind < 0.3:
        return random.choice(FILLER)
    if kind < 0.45:
        return random.choice(OTHERS)
    letters = random.choices(LETTERS, k=random.randint(1, 12))
    marked = [c + random.choice(MARKS) if random.random() < 0.2 else c for c in letters]
    return "".join(marked) + random.choice(["", "", "!", "'s", "\u0000", "."])


def random_text(random, tokens, tokenizer):
    """About as many tokens."""
    parts, count = [], 0
    while count < tokens:
        word = random_word(random)
        parts += [word, random.choice(SPACES)]
        count += len(tokenizer.pieces(word))
    return "".join(parts)


def plain(text):
    """As the sample's normalizer leaves it: decomposed, without marks and controls, lower case."""
    kept = (c for c in text if c in "\t\n\r" or unicodedata.category(c)[0] != "C")
    lower = unicodedata.normalize("NFD", "".join(kept)).lower()
    return "".join(
        c for c in unicodedata.normalize("NFD", lower) if unicodedata.category(c) != "Mn"
    )


@pytest.mark.parametrize("tokens", [1, 2, 7, 61, 62, 63, 64, 200, 700, 2000])
@pytest.mark.parametrize("seed", range(3))
def test_offsets_slice_the_original_of_any_text(tokenizer, tokens, seed):
    text = random_text(random.Random(1000 * tokens + seed), tokens, tokenizer)
    infer = entity_logits(tokenizer)
    task = Task.TOKEN_CLASSIFICATION
    cut, whole = (
        scorer(task, tokenizer, infer, n).score_json([{"text": text}])[0] for n in (64, 8192)
    )
    assert "error" not in cut
    for key in ("words", "tokens", "entities"):
        assert cut[key] == whole[key]
    at = 0
    for token in cut["tokens"]:
        start, end = token["start"], token["end"]
        assert at <= start < end <= len(text)
        # several pieces may come of one character (a ligature), so starts need not advance
        at = start
        if token["token"] != "[UNK]":
            assert plain(text[start:end]) == token["token"].removeprefix("##")
        assert end == len(text) or unicodedata.category(text[end])[0] != "M" or len(text) == end
    at = 0
    for word in cut["words"]:
        assert text[word["start"] : word["end"]] == word["word"] != ""
        assert at <= word["start"]
        at = word["end"]
    for entity in cut["entities"]:
        assert text[entity["start"] : entity["end"]] == entity["text"]
        assert plain(entity["text"]).split()[0] == "new"


@pytest.mark.parametrize("seed", range(8))
def test_an_answer_is_its_slice_of_any_context(tokenizer, seed):
    dice = random.Random(seed)
    before, after = (random_text(dice, dice.randint(1, 900), tokenizer) for _ in range(2))
    context = before + " Yo\u0308rk\u0301 " + after
    infer = answer_logits(tokenizer, ["york"])
    answer = scorer(Task.QUESTION_ANSWERING, tokenizer, infer).score_json(
        [{"question": "where ?", "context": context}]
    )[0]
    for found in answer["answers"]:
        assert context[found["start"] : found["end"]] == found["text"]
    assert answer["answer"] == "Yo\u0308rk\u0301"
    assert answer["answers"][0]["start"] == len(before) + 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cafe\u0301 ole", ["cafe\u0301", "ole"]),
        ("नमस्ते dear", ["नमस्ते", "dear"]),
        ("I ❤\ufe0f it", ["I", "❤\ufe0f", "it"]),
        ("e\u0301\u0300", ["e\u0301\u0300"]),
        ("\u0301 a", ["a"]),
    ],
)
def test_marks_stay_with_their_letter(tokenizer, text, words):
    answer = scorer(Task.TOKEN_CLASSIFICATION, tokenizer, entity_logits(tokenizer)).score_json(
        [{"text": text}, {"words": words}]
    )
    assert [word["word"] for word in answer[0]["words"]] == words
    assert [word["word"] for word in answer[1]["words"]] == words


# --- the price of one request


def test_a_request_cannot_ask_for_thousands_of_windows(tokenizer):
    infer = answer_logits(tokenizer, ["york"])
    long = {"question": "film " * 55, "context": "film " * 3000}
    short = {"question": "film ?", "context": "film " * 3000}
    here = scorer(Task.QUESTION_ANSWERING, tokenizer, infer, max_windows=80)
    refused, answered = here.score_json([long, short])
    assert "3000 tokens take 999 windows of 6, expected at most 80" in refused["error"]
    assert "question" in refused["hint"]
    assert answered["windows"] == 70
    exact = scorer(Task.QUESTION_ANSWERING, tokenizer, infer, max_windows=70)
    assert exact.score_json([short])[0]["windows"] == 70
    with pytest.raises(InputError, match="max_windows is 0"):
        scorer(Task.QUESTION_ANSWERING, tokenizer, infer, max_windows=0)


@pytest.mark.parametrize("count", range(1, 40))
def test_as_many_windows_as_are_counted(tokenizer, count):
    text = tokenizer.pieces("a " * count)
    rows = sequences.windows(tokenizer, None, text, 10, 3)
    assert sequences.windows(tokenizer, None, text, 10, 3, most=len(rows)) == rows
    if len(rows) > 1:
        with pytest.raises(InputError, match=f"take {len(rows)} windows"):
            sequences.windows(tokenizer, None, text, 10, 3, most=len(rows) - 1)
