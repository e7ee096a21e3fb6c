"""What the served models answer: batches of like length, and a failure for each bad request alone."""

from __future__ import annotations

import json

import numpy as np
import pytest

from convbert_deploy.architecture import Task
from convbert_deploy.errors import EngineError
from convbert_deploy.serving.answering import engine_tokenizer, scorer_options
from convbert_deploy.serving.scorer import Scorer
from convbert_deploy.shapes import ShapeProfile
from convbert_deploy.triton.serving_models import EngineModel, Failure, TextModel, described_engine

import triton_engines

pytest.importorskip("tokenizers")
HIDDEN = 4


class Runner:
    """Outputs that only depend on each row's real tokens; keeps the shapes it saw."""

    name = "recording"
    input_names = ("input_ids", "attention_mask", "token_type_ids")

    def __init__(self, task, fail=lambda batch: False):
        self.task, self.fail, self.shapes = task, fail, []
        self.output_names = task.output_names

    def infer(self, batch):
        self.shapes.append(batch["input_ids"].shape)
        if self.fail(batch):
            raise RuntimeError("the runtime broke")
        ids = (batch["input_ids"] * batch["attention_mask"]).astype(np.float32)
        rows = ids.sum(-1)
        if self.task is Task.MULTIPLE_CHOICE:
            return {"logits": np.sin(rows)}
        if self.task is Task.SEQUENCE_CLASSIFICATION:
            return {"logits": np.stack([np.sin(rows + k) for k in range(3)], -1)}
        if self.task is Task.QUESTION_ANSWERING:
            return {"start_logits": np.sin(ids), "end_logits": np.cos(ids)}
        width = 3 if self.task is Task.TOKEN_CLASSIFICATION else HIDDEN
        if self.task is Task.MASKED_LM:
            width = 9000
        return {self.output_names[0]: np.sin(ids[..., None] + np.arange(width, dtype=np.float32))}


def batch(rows, length, start=5, choices=()):
    ids = start + np.arange(rows * length * max(1, *choices, 1)).reshape(rows, *choices, length)
    return {
        "input_ids": ids % 400 + 5,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }


# --- the tensor model


@pytest.mark.parametrize("task", list(Task))
def test_requests_of_unlike_length_share_a_batch_and_get_their_own_answers(task):
    engine = triton_engines.described(task, padding="masked")
    choices = (3,) if task is Task.MULTIPLE_CHOICE else ()
    requests = [batch(2, 7, 5, choices), batch(1, 12, 90, choices), batch(1, 3, 40, choices)]
    runner = Runner(task)
    answers = EngineModel(runner, engine).answer(requests)
    assert runner.shapes == [(4, *choices, 12)]
    for request, answer in zip(requests, answers, strict=True):
        alone = Runner(task).infer(request)
        assert set(answer) == set(task.output_names)
        for name in answer:
            np.testing.assert_array_equal(answer[name], alone[name])


def test_hf_rows_are_never_padded():
    engine = triton_engines.described(padding="hf")
    runner = Runner(Task.SEQUENCE_CLASSIFICATION)
    EngineModel(runner, engine).answer([batch(1, 7), batch(1, 12), batch(2, 7)])
    assert sorted(runner.shapes) == [(1, 12), (3, 7)]


def test_choices_of_unlike_number_do_not_share_a_batch():
    engine = triton_engines.described(Task.MULTIPLE_CHOICE, padding="masked")
    runner = Runner(Task.MULTIPLE_CHOICE)
    answers = EngineModel(runner, engine).answer(
        [batch(1, 7, choices=(2,)), batch(1, 7, choices=(3,)), batch(1, 9, choices=(2,))]
    )
    assert sorted(runner.shapes) == [(1, 3, 7), (2, 2, 9)]
    assert [answer["logits"].shape for answer in answers] == [(1, 2), (1, 3), (1, 2)]


def test_batches_keep_to_the_profile():
    profile = ShapeProfile.parse("batch=3:3:4,seq=4:8:16")
    engine = triton_engines.described(padding="masked", profile=profile)
    runner = Runner(Task.SEQUENCE_CLASSIFICATION)
    requests = [batch(1, 8, start) for start in range(5)]
    answers = EngineModel(runner, engine).answer(requests)
    assert runner.shapes == [(4, 8), (3, 8)]  # the last batch is filled up to the smallest
    for request, answer in zip(requests, answers, strict=True):
        expected = Runner(Task.SEQUENCE_CLASSIFICATION).infer(request)["logits"]
        np.testing.assert_array_equal(answer["logits"], expected)


BAD = {
    "id": ("input_ids", 500, "token id 500"),
    "negative id": ("input_ids", -1, "token id -1"),
    "mask": ("attention_mask", 0, "all zeros"),
    "type": ("token_type_ids", 2, "token type 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_fails_alone(case):
    name, value, message = BAD[case]
    engine = triton_engines.described(padding="masked")
    good, bad = batch(1, 7), batch(1, 9)
    bad[name] = np.full_like(bad[name], value)
    model = EngineModel(Runner(Task.SEQUENCE_CLASSIFICATION), engine)
    first, failed, last = model.answer([good, bad, good])
    assert isinstance(failed, Failure) and failed.invalid and message in failed.message
    np.testing.assert_array_equal(first["logits"], model.answer([good])[0]["logits"])
    np.testing.assert_array_equal(first["logits"], last["logits"])


def test_shapes_outside_the_engine_fail_alone():
    profile = ShapeProfile.parse("seq=4:8:16")
    engine = triton_engines.described(padding="masked", profile=profile)
    requests = [
        batch(1, 3),
        batch(1, 17),
        batch(1, 0),
        {"input_ids": np.ones((1, 8))},
        batch(1, 16),
    ]
    answers = EngineModel(Runner(Task.SEQUENCE_CLASSIFICATION), engine).answer(requests)
    assert [isinstance(answer, Failure) for answer in answers] == [True] * 4 + [False]
    assert "seq 3" in answers[0].message and "hint:" in answers[0].message
    assert all(answer.invalid for answer in answers[:4])


def test_a_batch_that_the_runtime_breaks_on_is_not_the_requests_fault():
    engine = triton_engines.described(padding="masked", profile=ShapeProfile.parse("batch=1:1:1"))
    runner = Runner(Task.SEQUENCE_CLASSIFICATION, lambda b: b["input_ids"].shape[1] == 9)
    first, failed, last = EngineModel(runner, engine).answer(
        [batch(1, 7), batch(1, 9), batch(1, 5)]
    )
    assert failed == Failure("the runtime broke", invalid=False)
    assert "logits" in first and "logits" in last


# --- the text model


@pytest.fixture
def tagger(tmp_path):
    return triton_engines.on_disk(tmp_path, Task.TOKEN_CLASSIFICATION, padding="masked")


def payload(**request):
    return json.dumps(request).encode()


def test_all_requests_are_scored_in_one_call_as_the_scorer_scores(tagger):
    runner = Runner(Task.TOKEN_CLASSIFICATION)
    model = TextModel(tagger, runner.infer)
    requests = [[b"A fine day."], [payload(words=["the", "sky"]), payload(text="so it is")]]
    answers = [[json.loads(item) for item in answer] for answer in model.answer(requests)]
    assert len(runner.shapes) == 1
    scorer = Scorer(
        Runner(Task.TOKEN_CLASSIFICATION), engine_tokenizer(tagger), scorer_options(tagger)
    )
    expected = scorer.score_json(
        [{"text": "A fine day."}, {"words": ["the", "sky"]}, {"text": "so it is"}]
    )
    assert answers == [expected[:1], expected[1:]]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"caf\xe9", "not UTF-8: byte 0xe9 at 3"),
        (b"", "text is empty"),
        (b"{", "neither text nor JSON"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (payload(question="a", context="b"), "token-classification does not take"),
        (b'{"text": "\\udcff"}', "not valid Unicode"),
        (b"a" * 1_000_000, "1000000 characters"),
    ],
)
def test_a_bad_text_fails_alone_and_is_called_invalid(tagger, bad, message):
    model = TextModel(tagger, Runner(Task.TOKEN_CLASSIFICATION).infer)
    first, failed, last = model.answer([[b"good"], [bad], [b"good"]])
    assert isinstance(failed, Failure) and failed.invalid and message in failed.message
    assert first == last == model.answer([[b"good"]])[0]


def test_a_bad_element_fails_its_request_and_is_named(tagger):
    model = TextModel(tagger, Runner(Task.TOKEN_CLASSIFICATION).infer)
    failed, good = model.answer([[b"good", b" "], [b"good"]])
    assert failed.message.startswith("element 1: text is empty") and failed.invalid
    assert len(good) == 1


def test_answers_keep_text_outside_ascii(tagger):
    model = TextModel(tagger, Runner(Task.TOKEN_CLASSIFICATION).infer)
    answer = model.answer([["naïve 中".encode()]])[0][0]
    assert "naïve" in answer.decode()


def test_a_failing_engine_is_not_the_requests_fault(tagger):
    def infer(batch):
        raise EngineError("model x: gone", hint="start it")

    failed, invalid = TextModel(tagger, infer).answer([[b"good"], [b" "]])
    assert failed == Failure("model x: gone (hint: start it)", invalid=False)
    assert invalid.invalid


def test_a_request_that_the_engine_breaks_on_fails_alone(tagger):
    poison = engine_tokenizer(tagger).pieces("gold").ids[0]
    runner = Runner(Task.TOKEN_CLASSIFICATION, lambda b: (b["input_ids"] == poison).any())
    model = TextModel(tagger, runner.infer)
    first, failed, last = model.answer([[b"good"], [b"the gold"], [b"a day"]])
    assert failed == Failure("the runtime broke", invalid=False)
    assert json.loads(first[0])["words"][0]["word"] == "good"
    assert json.loads(last[0])["words"][1]["word"] == "day"


def test_nan_is_the_engines_fault(tagger):
    runner = Runner(Task.TOKEN_CLASSIFICATION)

    def infer(batch):
        outputs = runner.infer(batch)
        return {name: np.where(array > 0, np.nan, array) for name, array in outputs.items()}

    failed = TextModel(tagger, infer).answer([[b"A fine day."]])[0]
    assert not failed.invalid and "NaN" in failed.message


def test_a_described_engine_has_no_model(tagger):
    (tagger.path / "model.onnx").unlink()
    engine = described_engine(tagger.path)
    assert engine.manifest == tagger.manifest and engine.tokenizer_folder is not None
    (tagger.path / "golden.json").write_text("{")
    with pytest.raises(EngineError, match="does not describe an engine") as caught:
        described_engine(tagger.path)
    assert "package triton" in caught.value.hint
