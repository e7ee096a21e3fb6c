"""Candidates beside a reference on the same texts: every task, faults, NaN, and no labels."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from convbert_deploy.architecture import Task
from convbert_deploy.backends.eager import EagerRunner
from convbert_deploy.errors import EngineError, InputError
from convbert_deploy.evaluation.compare import Evaluator, ReportOptions
from convbert_deploy.evaluation.distance import DistanceMeter
from convbert_deploy.evaluation.labelled import read_labelled
from convbert_deploy.evaluation.problem import Problem
from convbert_deploy.report_evaluation import evaluation_text
from convbert_deploy.serving.requests import InputLimits
from convbert_deploy.serving.scorer import Scorer, ScorerOptions
from convbert_deploy.serving.tokenizer import Tokenizer

import factories

pytest.importorskip("tokenizers")
pytest.importorskip("sklearn")

TEXTS = ["good", "a very long film about nothing at all", "bad", "not so good", "it was open"]
OBJECTS = {
    Task.ENCODER: [{"text": t} for t in TEXTS],
    Task.MASKED_LM: [{"text": f"{t} [MASK] is the [MASK]."} for t in TEXTS],
    Task.SEQUENCE_CLASSIFICATION: [{"text": t, "text_pair": "so it is"} for t in TEXTS],
    Task.TOKEN_CLASSIFICATION: [{"words": t.split()} for t in TEXTS],
    Task.QUESTION_ANSWERING: [{"question": "what is it?", "context": f"it is {t}"} for t in TEXTS],
    Task.MULTIPLE_CHOICE: [
        {"prompt": t, "choices": ["the end", "it was good of her"]} for t in TEXTS
    ],
}
LABELS = {
    Task.SEQUENCE_CLASSIFICATION: ("a", "b", "c"),
    Task.TOKEN_CLASSIFICATION: ("DET", "NOUN", "VERB"),
}
UNITS = {
    Task.MASKED_LM: 10,
    Task.SEQUENCE_CLASSIFICATION: 5,
    Task.TOKEN_CLASSIFICATION: None,  # word pieces
    Task.QUESTION_ANSWERING: 10,
    Task.MULTIPLE_CHOICE: 5,
}


@pytest.fixture(scope="module")
def tokenizer(sample_path):
    return Tokenizer.load(sample_path)


def options(task, **changes):
    return ScorerOptions(
        InputLimits(task, 9000, 64, 2), **{"labels": LABELS.get(task, ())} | changes
    )


def label_as_answered(task, obj, answer):
    """The object, labelled with what the model itself says."""
    if task is Task.SEQUENCE_CLASSIFICATION:
        return obj | {"label": answer["label"]}
    if task is Task.TOKEN_CLASSIFICATION:
        return obj | {"tags": [word["label"] for word in answer["words"]]}
    if task is Task.QUESTION_ANSWERING:
        return obj | {"answers": [answer["answer"]]}
    if task is Task.MULTIPLE_CHOICE:
        return obj | {"label": answer["choice"]}
    return obj | {"masks": [mask["fillings"][0]["token"] for mask in answer["masks"]]}


class Spoiled:
    """A runner's outputs, changed by ``change(name, array)``."""

    def __init__(self, inner, change, name="spoiled"):
        self.inner, self.change, self.name = inner, change, name
        self.input_names, self.output_names = inner.input_names, inner.output_names

    def infer(self, batch):
        return {name: self.change(name, out) for name, out in self.inner.infer(batch).items()}


def read(path, objects, tokenizer, model):
    path.write_text("".join(json.dumps(obj) + "\n" for obj in objects))
    return read_labelled(path, tokenizer, model)


# --- every task, with transformers' own model


@pytest.fixture(scope="module", params=[t for t in Task if t is not Task.ENCODER], ids=str)
def own_labels(request, tokenizer, tmp_path_factory):
    """(task, options, data labelled with the model's own answers, open runner)."""
    task = request.param
    model = options(task)
    runner = EagerRunner(factories.realistic_model("tiny", task, vocab_size=9000), task)
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    with runner:
        answers = Scorer(runner, tokenizer, model).score_json(OBJECTS[task])
        if task is Task.MASKED_LM:  # fillings such as "##ing" are entries, and stay what they are
            assert all("masks" in answer for answer in answers)
        objects = [
            label_as_answered(task, *pair) for pair in zip(OBJECTS[task], answers, strict=True)
        ]
        yield task, model, read(path, objects, tokenizer, model), runner


def test_the_reference_beside_itself(own_labels, tokenizer):
    task, model, data, runner = own_labels
    report = Evaluator(data, tokenizer, model, runner).report(runner, ReportOptions(resamples=50))
    assert report.metrics[0].candidate == pytest.approx(100.0)
    for metric in report.metrics:
        assert metric.candidate == metric.reference
        assert metric.interval == (0.0, 0.0)
    distance = report.distance
    assert (distance.agreement, distance.mean_error, distance.max_error, distance.kl) == (
        100.0,
        0.0,
        0.0,
        0.0,
    )
    assert distance.units == UNITS[task] or task is Task.TOKEN_CLASSIFICATION
    assert report.passed


def test_reversed_logits_lose_everything(own_labels, tokenizer):
    _, model, data, runner = own_labels
    evaluator = Evaluator(data, tokenizer, model, runner)
    report = evaluator.report(Spoiled(runner, lambda name, out: -out))
    assert report.metric_drop > 50
    assert report.agreement < 50
    assert report.kl > 0
    assert report.max_error > report.mean_error > 0
    assert report.metrics[0].interval is None, "no bootstrap unless asked for"


def test_nan_never_agrees(own_labels, tokenizer):
    """One row of each batch: its sample fails, the others are judged."""
    _, model, data, runner = own_labels

    def spoil(name, out):
        out = out.copy()
        out[0] = np.nan
        return out

    evaluator = Evaluator(data, tokenizer, model, runner)
    report = evaluator.report(Spoiled(runner, spoil), ReportOptions(resamples=20))
    assert 0 < report.failed <= len(data.samples)
    assert not report.passed
    assert report.metric_drop > 0
    assert report.agreement < 100
    assert all(math.isnan(x) for x in (report.mean_error, report.max_error, report.kl))
    text = json.dumps(report.to_json(), allow_nan=False)
    assert json.loads(text)["distance"]["max_error"] is None
    assert "FAILED: NaN or infinity" in evaluation_text(report)


def test_infinity_alone_is_a_failure_too(own_labels, tokenizer):
    """An infinite logit where the reference is largest leaves the argmax as it was."""
    _, model, data, runner = own_labels

    def spoil(name, out):
        out = out.copy()
        np.put_along_axis(out, out.argmax(-1)[..., None], np.inf, -1)
        return out

    report = Evaluator(data, tokenizer, model, runner).report(Spoiled(runner, spoil))
    assert report.failed == len(data.samples)
    assert report.agreement == 0.0
    assert math.isnan(report.max_error) and math.isnan(report.kl)


def test_a_bare_encoder_is_compared_without_metrics(tokenizer, tmp_path):
    task = Task.ENCODER
    model = options(task)
    runner = EagerRunner(factories.realistic_model("tiny", task, vocab_size=9000), task)
    with runner:
        data = read(tmp_path / "d.jsonl", OBJECTS[task], tokenizer, model)
        moved = Spoiled(runner, lambda name, out: out + np.float32(0.5))
        report = Evaluator(data, tokenizer, model, runner).report(moved)
    assert report.metrics == ()
    assert report.agreement is None and report.kl is None
    assert report.mean_error == pytest.approx(0.5, abs=1e-6)


# --- with logits that are known


def head(labels=3):
    """Logits that depend on the row's tokens alone."""

    def infer(batch):
        rows = (batch["input_ids"] * batch["attention_mask"]).sum(-1).astype(np.float32)
        return {"logits": np.stack([np.sin(rows + k) for k in range(labels)], -1)}

    return factories.FixedRunner("head", infer)


def sentences(count=120):
    words = ["the", "film", "was", "good", "bad", "day", "open", "a"]
    rng = np.random.default_rng(0)
    return [{"text": " ".join(rng.choice(words, rng.integers(2, 9)))} for _ in range(count)]


def test_without_labels_only_logits_are_compared(tokenizer, tmp_path):
    model = options(Task.SEQUENCE_CLASSIFICATION)
    data = read(tmp_path / "d.jsonl", sentences(), tokenizer, model)
    moved = Spoiled(head(), lambda name, out: out + np.float32([0, 0, 0.25]))
    report = Evaluator(data, tokenizer, model, head()).report(moved, ReportOptions(resamples=10))
    assert report.metrics == () and report.metric_drop is None and report.resamples == 0
    assert report.mean_error == pytest.approx(0.25 / 3, abs=1e-6)
    assert report.max_error == pytest.approx(0.25, abs=1e-6)
    assert 50 < report.agreement < 100
    assert "No labels" in evaluation_text(report)


def test_without_a_reference_only_metrics_are_given(tokenizer, tmp_path):
    model = options(Task.SEQUENCE_CLASSIFICATION)
    objects = [obj | {"label": index % 3} for index, obj in enumerate(sentences())]
    data = read(tmp_path / "d.jsonl", objects, tokenizer, model)
    report = Evaluator(data, tokenizer, model).report(head(), ReportOptions(resamples=10))
    assert report.distance is None and report.metric_drop is None and report.resamples == 0
    assert 0 < report.metrics[0].candidate < 100
    assert report.metrics[0].difference is None
    assert "accuracy" in evaluation_text(report)


def test_a_drop_on_many_samples_is_significant(tokenizer, tmp_path):
    model = options(Task.SEQUENCE_CLASSIFICATION)
    objects = sentences()
    answers = Scorer(head(), tokenizer, model).score_json(objects)
    objects = [o | {"label": a["label"]} for o, a in zip(objects, answers, strict=True)]
    data = read(tmp_path / "d.jsonl", objects, tokenizer, model)
    evaluator = Evaluator(data, tokenizer, model, head())
    asked = ReportOptions(resamples=300)
    shifted = evaluator.report(
        Spoiled(head(), lambda name, out: out + np.float32([0, 0, 0.25])), asked
    )
    low, high = shifted.metrics[0].interval
    assert low < -shifted.metric_drop < high < 0
    assert evaluator.report(head(), asked).metrics[0].interval == (0.0, 0.0)
    assert evaluator.report(head(), asked) == evaluator.report(head(), asked)


def test_the_reference_runs_once(tokenizer, tmp_path):
    model = options(Task.SEQUENCE_CLASSIFICATION)
    data = read(tmp_path / "d.jsonl", sentences(8), tokenizer, model)
    calls = []
    reference = Spoiled(head(), lambda name, out: calls.append(1) or out)
    evaluator = Evaluator(data, tokenizer, model, reference)
    once = len(calls)
    evaluator.report(head())
    evaluator.report(head())
    assert len(calls) == once


def test_multi_label_counts_each_label(tokenizer, tmp_path):
    model = options(Task.SEQUENCE_CLASSIFICATION, problem_type="multi_label_classification")
    data = read(tmp_path / "d.jsonl", sentences(10), tokenizer, model)
    flipped = Spoiled(head(), lambda name, out: out * np.float32([1, 1, -1]))
    report = Evaluator(data, tokenizer, model, head()).report(flipped)
    assert report.distance.units == 30
    assert report.agreement == pytest.approx(200 / 3)
    assert report.kl > 0


def test_regression_has_no_argmax(tokenizer, tmp_path):
    model = options(Task.SEQUENCE_CLASSIFICATION, labels=("score",))
    objects = [obj | {"label": index / 2} for index, obj in enumerate(sentences(20))]
    data = read(tmp_path / "d.jsonl", objects, tokenizer, model)
    doubled = Spoiled(head(1), lambda name, out: 2 * out)
    report = Evaluator(data, tokenizer, model, head(1)).report(doubled, ReportOptions(resamples=9))
    assert report.agreement is None and report.kl is None
    assert [metric.name for metric in report.metrics] == ["Spearman", "Pearson"]
    assert report.metrics[0].difference == pytest.approx(0.0, abs=1e-9), "ranks are as they were"


def test_a_reference_with_nan_is_refused(tokenizer, tmp_path):
    model = options(Task.SEQUENCE_CLASSIFICATION)
    data = read(tmp_path / "d.jsonl", sentences(4), tokenizer, model)
    with pytest.raises(EngineError, match="line 1: .*NaN or infinity"):
        Evaluator(data, tokenizer, model, Spoiled(head(), lambda name, out: out * np.nan))


def test_another_models_outputs_are_refused(tokenizer, tmp_path):
    model = options(Task.SEQUENCE_CLASSIFICATION)
    data = read(tmp_path / "d.jsonl", sentences(4), tokenizer, model)
    with pytest.raises(EngineError, match="4 logits, there are 3 labels"):
        Evaluator(data, tokenizer, model, head()).report(head(4))


@pytest.mark.parametrize("changes", [{"resamples": -1}, {"confidence": 1.0}])
def test_bad_options(changes):
    with pytest.raises(InputError):
        ReportOptions(**changes)


def test_distance_by_hand():
    """p = (1/4, 3/4) against q = (1/2, 1/2), then equal rows."""
    meter = DistanceMeter(Problem.SINGLE_LABEL)
    expected = np.float32([0, math.log(3)])
    meter.add([{"logits": expected}], [{"logits": np.zeros(2, np.float32)}])
    meter.add([{"logits": expected}], [{"logits": expected}])
    found = meter.result()
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert found.kl == pytest.approx(kl / 2, rel=1e-6)
    assert found.mean_error == pytest.approx(math.log(3) / 4, rel=1e-6)
    assert found.max_error == pytest.approx(math.log(3), rel=1e-6)
    assert (found.agreement, found.units) == (50.0, 2)


def test_special_tokens_of_taggers_are_not_judged():
    expected = np.eye(4, 3, dtype=np.float32)
    got = expected.copy()
    got[[0, -1]] = 9.0
    meter = DistanceMeter(Problem.TAGS)
    meter.add([{"logits": expected}], [{"logits": got}])
    assert (meter.result().max_error, meter.result().units) == (0.0, 2)
    got[1] = -got[1]
    meter.add([{"logits": expected}], [{"logits": got}])
    assert meter.result().max_error == 2.0
