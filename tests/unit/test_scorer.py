"""The scoring path: grouping, padding, cutting, windows, and bad requests among good ones."""

from __future__ import annotations

import json
import pathlib
import threading

import numpy as np
import pytest

from convbert_deploy.architecture import Task
from convbert_deploy.errors import CheckpointError, EngineError, InputError
from convbert_deploy.serving import sequences
from convbert_deploy.serving.requests import InputLimits, TextRequest
from convbert_deploy.serving.scorer import Scorer, ScorerOptions
from convbert_deploy.serving.tokenizer import Tokenizer
from convbert_deploy.shapes import ShapeProfile, ShapeRange

pytest.importorskip("tokenizers")
FOLDER = pathlib.Path(__file__).parents[2] / "samples" / "convbert-pos-brown"
VOCABULARY = 9000


class RecordingRunner:
    """Logits that only depend on each row's real tokens; keeps the batches it saw."""

    name = "recording"
    input_names = ("input_ids", "attention_mask", "token_type_ids")

    def __init__(self, task, labels=2):
        self.task, self.labels, self.batches = task, labels, []
        self.output_names = task.output_names
        self.inside = 0

    def infer(self, batch):
        self.inside += 1
        assert self.inside == 1, "two threads inside one runner"
        ids, mask = batch["input_ids"], batch["attention_mask"]
        self.batches.append({name: array.copy() for name, array in batch.items()})
        rows = (ids * mask).sum(-1).astype(np.float32)
        tokens = np.stack([np.sin(ids + k) for k in range(self.labels)], -1).astype(np.float32)
        self.inside -= 1
        if self.task is Task.MULTIPLE_CHOICE:
            return {"logits": np.sin(rows)}
        if self.task is Task.SEQUENCE_CLASSIFICATION:
            return {"logits": np.stack([np.sin(rows + k) for k in range(self.labels)], -1)}
        if self.task is Task.QUESTION_ANSWERING:
            return {"start_logits": tokens[..., 0], "end_logits": tokens[..., 1]}
        return {self.task.output_names[0]: tokens}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(FOLDER)


def options(task, positions=64, **changes):
    return ScorerOptions(InputLimits(task, VOCABULARY, positions, 2), **changes)


TEXTS = ["good", "a very long film about nothing at all", "bad", "not so good"]
OBJECTS = {
    Task.ENCODER: [{"text": t} for t in TEXTS],
    Task.MASKED_LM: [{"text": f"{t} [MASK] is the [MASK]."} for t in TEXTS],
    Task.SEQUENCE_CLASSIFICATION: [{"text": t, "text_pair": "so it is"} for t in TEXTS],
    Task.TOKEN_CLASSIFICATION: [{"words": t.split()} for t in TEXTS],
    Task.QUESTION_ANSWERING: [{"question": "what is it?", "context": t} for t in TEXTS],
    Task.MULTIPLE_CHOICE: [
        {"prompt": t, "choices": ["the end", "it was good of her"]} for t in TEXTS
    ],
}


# --- tokenizer and sequences


def test_sequences_are_those_of_the_tokenizer_file(tokenizer):
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(FOLDER / "tokenizer.json"))
    for first, second in (("Don't stop, café 中!", None), ("one two", "three (four) five")):
        pieces = [None if text is None else tokenizer.pieces(text) for text in (first, second)]
        row, lost = sequences.cut(tokenizer, *pieces, 64)
        expected = backend.encode(first, second)
        assert (list(row.ids), list(row.types), lost) == (expected.ids, expected.type_ids, False)
    # cutting takes from the longer text first, as longest_first does
    long, short = tokenizer.pieces("a b c d e f g h"), tokenizer.pieces("x y z")
    for length in range(5, 14):
        backend.enable_truncation(length, strategy="longest_first")
        expected = backend.encode("a b c d e f g h", "x y z")
        row, lost = sequences.cut(tokenizer, long, short, length)
        assert len(row) == length and lost and row.types.count(1) <= row.types.count(0)
        assert row.types.count(1) - 1 == min(3, (length - 3) // 2)
        if length >= 9:  # where only the longer text is cut there is one way to do it
            assert list(row.ids) == expected.ids


def test_vocab_txt_gives_the_same_pieces(tokenizer, tmp_path):
    vocabulary = json.loads((FOLDER / "tokenizer.json").read_text())["model"]["vocab"]
    lines = sorted(vocabulary, key=vocabulary.__getitem__)
    (tmp_path / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = "Don't STOP, café [MASK] unbelievableness 中!"
    assert Tokenizer.load(tmp_path).pieces(text) == tokenizer.pieces(text)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    cased = Tokenizer.load(tmp_path / "vocab.txt")
    assert cased.pieces("STOP").ids != tokenizer.pieces("stop").ids
    assert cased.mask_id == tokenizer.mask_id == vocabulary["[MASK]"]


def test_truncation_and_padding_saved_with_a_tokenizer_are_dropped(tokenizer, tmp_path):
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(FOLDER / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=12)
    backend.save(str(tmp_path / "tokenizer.json"))
    for text in ("a b c d e f g h", "a"):
        assert Tokenizer.load(tmp_path).pieces(text) == tokenizer.pieces(text)


@pytest.mark.parametrize("content", [None, "{broken", '{"version": "1.0"}'])
def test_unusable_tokenizers(tmp_path, content):
    if content:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="no tokenizer in|unreadable") as caught:
        Tokenizer.load(tmp_path)
    assert "--tokenizer" in caught.value.hint


def test_windows_hold_every_piece_and_overlap(tokenizer):
    question, text = tokenizer.pieces("why ?"), tokenizer.pieces("a b c d e f g h i j k")
    rows = sequences.windows(tokenizer, question, text, 10, 2)
    assert [(row.first, row.count) for row in rows] == [(0, 5), (3, 5), (6, 5)]
    assert all(
        row.ids[row.start : row.start + row.count] == text.ids[row.first :][: row.count]
        for row in rows
    )
    with pytest.raises(InputError, match="question has 2 tokens, which leaves 1 of 6"):
        sequences.windows(tokenizer, question, text, 6, 2)


# --- batches


@pytest.mark.parametrize("task", list(Task))
def test_hf_engines_see_no_pads(tokenizer, task):
    runner = RecordingRunner(task)
    answers = Scorer(runner, tokenizer, options(task)).score_json(OBJECTS[task] * 2)
    assert not [a for a in answers if "error" in a]
    assert answers[:4] == answers[4:]
    if task is not Task.MULTIPLE_CHOICE:  # its choices share one row
        assert all(batch["attention_mask"].all() for batch in runner.batches)
    assert max(len(batch["input_ids"]) for batch in runner.batches) >= 2
    json.dumps(answers, allow_nan=False)


@pytest.mark.parametrize("task", list(Task))
def test_masked_engines_share_buckets_and_answer_the_same(tokenizer, task):
    alone = Scorer(RecordingRunner(task), tokenizer, options(task)).score_json(OBJECTS[task])
    runner = RecordingRunner(task)
    scorer = Scorer(runner, tokenizer, options(task, padding="masked", length_multiple=32))
    if task is not Task.ENCODER:
        assert scorer.score_json(OBJECTS[task]) == alone
    else:
        assert [a["shape"] for a in scorer.score_json(OBJECTS[task])] == [a["shape"] for a in alone]
    assert [batch["input_ids"].shape[-1] for batch in runner.batches] == [32]
    ids, mask = runner.batches[0]["input_ids"], runner.batches[0]["attention_mask"]
    assert (ids[mask == 0] == tokenizer.pad_id).all() and (mask == 0).any()
    last = np.take_along_axis(ids, mask.sum(-1, keepdims=True) - 1, axis=-1)
    assert (last == tokenizer.sep_id).all()


def test_texts_of_like_length_share_a_batch_within_the_budget(tokenizer):
    task = Task.SEQUENCE_CLASSIFICATION
    objects = [{"text": "good " * count} for count in (1, 20, 2, 21, 3, 22)]
    alone = Scorer(RecordingRunner(task), tokenizer, options(task)).score_json(objects)
    runner = RecordingRunner(task)
    chosen = options(task, padding="masked", length_multiple=1, batch_tokens=75)

    assert Scorer(runner, tokenizer, chosen).score_json(objects) == alone
    shapes = [batch["input_ids"].shape for batch in runner.batches]
    assert shapes == [(3, 24), (3, 5)]
    assert (runner.batches[0]["attention_mask"].sum(1) == [24, 23, 22]).all()


def test_profile_bounds_the_batches(tokenizer):
    profile = ShapeProfile(batch=ShapeRange(3, 3, 3), seq=ShapeRange(8, 8, 32))
    task, runner = Task.SEQUENCE_CLASSIFICATION, RecordingRunner(Task.SEQUENCE_CLASSIFICATION)
    scorer = Scorer(runner, tokenizer, options(task, profile=profile))
    answers = scorer.score_json([{"text": "good"}] * 4)
    assert [batch["input_ids"].shape for batch in runner.batches] == [(3, 8), (3, 8)]
    assert len(answers) == 4 and answers[0] == answers[3]


# --- long texts


def test_long_texts_are_cut_and_say_so(tokenizer):
    task, runner = Task.SEQUENCE_CLASSIFICATION, RecordingRunner(Task.SEQUENCE_CLASSIFICATION)
    scorer = Scorer(runner, tokenizer, options(task, positions=16))
    short, long = scorer.score_json([{"text": "good"}, {"text": "good " * 40}])
    assert "truncated" not in short and long["truncated"] is True
    assert long["tokens_scored"] == 16
    refusing = Scorer(runner, tokenizer, options(task, positions=16, long_text="refuse"))
    assert "more than the 16 tokens" in refusing.score_json([{"text": "good " * 40}])[0]["error"]
    small = Scorer(runner, tokenizer, options(task, max_characters=100))
    assert "200 characters" in small.score_json([{"text": "good " * 40}])[0]["error"]


def test_windows_give_every_word_a_label_and_the_right_one(tokenizer):
    task = Task.TOKEN_CLASSIFICATION
    words = ["the", "film", "was", "not", "so", "good", "but", "long"] * 10
    whole = Scorer(RecordingRunner(task, 3), tokenizer, options(task, 512)).score_json(
        [{"words": words}]
    )
    runner = RecordingRunner(task, 3)
    parts = Scorer(runner, tokenizer, options(task, 20, window_overlap=6)).score_json(
        [{"words": words}]
    )
    assert sum(len(batch["input_ids"]) for batch in runner.batches) > 3
    assert parts[0]["words"] == whole[0]["words"] and len(whole[0]["words"]) == 80


def test_a_far_answer_is_found_at_its_characters(tokenizer):
    target = tokenizer.pieces("gold").ids[0]

    def infer(batch):
        logits = np.where(batch["input_ids"] == target, 9.0, 0.0).astype(np.float32)
        return {"start_logits": logits, "end_logits": logits}

    runner = RecordingRunner(Task.QUESTION_ANSWERING)
    runner.infer = infer
    scorer = Scorer(runner, tokenizer, options(Task.QUESTION_ANSWERING, 32, window_overlap=8))
    context = "The film was long , " * 12 + "and the Gold was hidden . " + "It was good . " * 12
    answer = scorer.score_json([{"question": "what ?", "context": context}])[0]
    assert (answer["answer"], answer["answers"][0]["start"]) == ("Gold", context.index("Gold"))
    assert answer["windows"] > 3


# --- bad requests and bad engines


def test_a_bad_request_never_fails_its_mates(tokenizer):
    task = Task.SEQUENCE_CLASSIFICATION
    good = [{"text": "good"}, {"text": "not so good"}]
    expected = Scorer(RecordingRunner(task), tokenizer, options(task)).score_json(good)
    poison = [{"text": ""}, {"text": "a\udcff"}, {"txt": "a"}, 7, {"text": "\u200b\u200b"}]
    answers = Scorer(RecordingRunner(task), tokenizer, options(task)).score_json(
        [good[0], *poison, good[1]]
    )
    assert [answers[0], answers[-1]] == expected
    assert all(set(a) == {"error", "hint"} for a in answers[1:-1])


def test_ids_past_the_model_vocabulary_are_the_requests_error(tokenizer):
    limits = InputLimits(Task.SEQUENCE_CLASSIFICATION, 200, 64, 2)
    scorer = Scorer(RecordingRunner(limits.task), tokenizer, ScorerOptions(limits))
    answer = scorer.score([TextRequest("good")])[0]
    assert "token id" in answer["error"] and "outside 0..199" in answer["error"]


def test_nan_and_wrong_label_counts(tokenizer):
    task, runner = Task.SEQUENCE_CLASSIFICATION, RecordingRunner(Task.SEQUENCE_CLASSIFICATION)
    good_id = tokenizer.pieces("good").ids[0]
    runner.infer = lambda b: {
        "logits": np.where((b["input_ids"] == good_id).any(-1)[:, None], np.nan, [[1.0, 2.0]])
    }
    answers = Scorer(runner, tokenizer, options(task)).score_json(
        [{"text": "good"}, {"text": "bad"}]
    )
    assert "NaN" in answers[0]["error"] and answers[1]["label"] == "LABEL_1"
    with pytest.raises(EngineError, match="2 logits, there are 3 labels"):
        Scorer(RecordingRunner(task), tokenizer, options(task, labels=("a", "b", "c"))).score_json(
            [{"text": "bad"}]
        )


def test_masks_must_be_there_and_readable(tokenizer):
    scorer = Scorer(RecordingRunner(Task.MASKED_LM), tokenizer, options(Task.MASKED_LM, 16))
    none, behind = scorer.score_json([{"text": "good"}, {"text": "good " * 40 + "[MASK]"}])
    assert "no [MASK]" in none["error"] and "lies behind" in behind["error"]


def test_choices_outside_the_profile(tokenizer):
    profile = ShapeProfile(choices=ShapeRange(2, 2, 3))
    scorer = Scorer(
        RecordingRunner(Task.MULTIPLE_CHOICE),
        tokenizer,
        options(Task.MULTIPLE_CHOICE, profile=profile),
    )
    answer = scorer.score_json([{"prompt": "p", "choices": ["a", "b", "c", "d"]}])[0]
    assert "4 choices, the engine was built for 2 to 3" in answer["error"]


def test_threads_share_a_scorer(tokenizer):
    task = Task.SEQUENCE_CLASSIFICATION
    scorer = Scorer(RecordingRunner(task), tokenizer, options(task))
    expected = [scorer.score_json([obj])[0] for obj in OBJECTS[task]]
    results: dict[int, list] = {}

    def work(number):
        results[number] = [scorer.score_json(OBJECTS[task]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(answers == expected for runs in results.values() for answers in runs)


def test_one_thread_at_a_time_is_inside_the_runner(tokenizer):
    task = Task.SEQUENCE_CLASSIFICATION
    runner = RecordingRunner(task)
    compute, entered, both = runner.infer, threading.Event(), threading.Event()

    def infer(batch):
        if entered.is_set():
            both.set()
        entered.set()
        # Gives a second thread, were it let in, ample time to get here.
        overlapped.append(not finished and both.wait(0.2))
        finished.append(True)
        return compute(batch)

    overlapped: list[bool] = []
    finished: list[bool] = []
    runner.infer = infer
    scorer = Scorer(runner, tokenizer, options(task))
    threads = [
        threading.Thread(target=scorer.score_json, args=(OBJECTS[task][:1],)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlapped == [False, False]
