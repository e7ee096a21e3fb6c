"""What candidates lose, by texts and by arrays of token ids: the same figures on the same rows."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from convbert_deploy.architecture import Task
from convbert_deploy.calibration import judging
from convbert_deploy.calibration.judging import ArrayJudge, input_limits, judge_of_texts
from convbert_deploy.calibration.samples import CalibrationSamples, read_samples
from convbert_deploy.errors import EngineError, InputError, MissingDependencyError
from convbert_deploy.golden import GoldenRequest
from convbert_deploy.graph import GraphInfo
from convbert_deploy.precision import Precision
from convbert_deploy.serving.tokenizer import Tokenizer

import factories

pytest.importorskip("tokenizers")
pytest.importorskip("sklearn")

VOCABULARY, WIDTH = 9000, 32
TEXTS = ["good", "a very long film about nothing at all", "bad", "not so good", "it was open"]
OBJECTS = {
    Task.ENCODER: [{"text": t} for t in TEXTS],
    Task.SEQUENCE_CLASSIFICATION: [{"text": t, "text_pair": "so it is"} for t in TEXTS],
    Task.TOKEN_CLASSIFICATION: [{"words": t.split()} for t in TEXTS],
    Task.QUESTION_ANSWERING: [{"question": "what is it?", "context": f"it is {t}"} for t in TEXTS],
    Task.MULTIPLE_CHOICE: [
        {"prompt": t, "choices": ["the end", "it was good of her"]} for t in TEXTS
    ],
}
TASKS = pytest.mark.parametrize("task", list(OBJECTS))


@pytest.fixture(scope="module")
def tokenizer(sample_path):
    return Tokenizer.load(sample_path)


def info_of(task: Task, **changes) -> GraphInfo:
    architecture = factories.architecture_of(
        factories.default_model("head-dim-8", vocab_size=VOCABULARY)
    )
    labels = (
        ("a", "b", "c") if task in (Task.SEQUENCE_CLASSIFICATION, Task.TOKEN_CLASSIFICATION) else ()
    )
    info = GraphInfo(
        architecture=architecture,
        task=task,
        labels=labels,
        problem_type=None,
        padding="hf",
        precision=Precision.FP32,
        opset=20,
        golden=GoldenRequest({}, {}),
        chain=(),
        versions={},
        command="",
    )
    return dataclasses.replace(info, **changes)


class Fake(factories.FixedRunner):
    """Outputs of the task's shape that are functions of the ids alone, plus ``noise`` of them."""

    def __init__(self, info: GraphInfo, noise: float = 0.0, width: int | None = None) -> None:
        super().__init__(f"fake {noise}", self._outputs_of)
        self.output_names = info.task.output_names
        self._task, self._noise = info.task, noise
        widths = {Task.ENCODER: WIDTH, Task.MASKED_LM: VOCABULARY}
        self._width = width or widths.get(info.task, len(info.labels))
        self.positions: list[int] = []

    def _values(self, ids: np.ndarray, width: int) -> np.ndarray:
        channels = np.arange(width)
        clean = np.sin(ids[..., None] * (channels + 1) * 0.37)
        return (clean + self._noise * np.cos(ids[..., None] * (channels + 2))).astype(np.float32)

    def _outputs_of(self, batch):
        ids = batch["input_ids"]
        self.positions.append(ids.size)
        if self._task is Task.QUESTION_ANSWERING:
            both = self._values(ids, 2)
            return {"start_logits": both[..., 0], "end_logits": both[..., 1]}
        if self._task is Task.MULTIPLE_CHOICE:
            return {"logits": self._values(ids.sum(-1), 1)[..., 0]}
        if self._task is Task.SEQUENCE_CLASSIFICATION:
            return {"logits": self._values(ids.sum(-1), self._width)}
        return {self.output_names[0]: self._values(ids, self._width)}


@pytest.fixture
def texts(tmp_path):
    def write(task, **keys):
        path = tmp_path / "texts.jsonl"
        path.write_text("".join(json.dumps(one | keys) + "\n" for one in OBJECTS[task]))
        return path

    return write


def rows_of(path, info, tokenizer) -> CalibrationSamples:
    return read_samples(path, limits=input_limits(info), tokenizer=tokenizer)


def as_npz(samples: CalibrationSamples, path) -> None:
    longest = max(row.inputs["input_ids"].shape[-1] for row in samples.rows)
    arrays = {
        name: np.stack(
            [
                np.pad(
                    row.inputs[name],
                    [(0, 0)] * (row.inputs[name].ndim - 1)
                    + [(0, longest - row.inputs[name].shape[-1])],
                )
                for row in samples.rows
            ]
        )
        for name in samples.rows[0].inputs
    }
    np.savez(path, **arrays)


@TASKS
def test_texts_and_arrays_give_the_same_distance(task, texts, tokenizer, tmp_path):
    info = info_of(task)
    path = texts(task)
    as_npz(rows_of(path, info, tokenizer), tmp_path / "rows.npz")
    samples = read_samples(tmp_path / "rows.npz", limits=input_limits(info))
    reference, candidate = Fake(info), Fake(info, 0.3)

    by_text = judge_of_texts(path, info, tokenizer, reference).report(candidate)
    by_row = ArrayJudge(samples, info, reference).report(candidate)

    assert by_row.samples == by_text.samples == len(TEXTS)
    assert by_row.distance.mean_error > 0.01
    one, other = (dataclasses.asdict(r.distance) for r in (by_text, by_row))
    assert one == {k: v if isinstance(v, str) else pytest.approx(v) for k, v in other.items()}
    assert by_row.passed and by_row.metrics == ()
    assert (by_row.candidate, by_row.reference, by_row.data) == ("fake 0.3", "fake 0.0", "rows.npz")


@TASKS
def test_a_candidate_like_the_reference(task, texts, tokenizer):
    info = info_of(task)
    samples = rows_of(texts(task), info, tokenizer)

    report = ArrayJudge(samples, info, Fake(info)).report(Fake(info))

    assert report.mean_error == report.max_error == 0
    assert report.agreement in (100.0, None) and report.failed == 0


def test_the_figures_by_hand(texts, tokenizer):
    info = info_of(Task.SEQUENCE_CLASSIFICATION)
    samples = rows_of(texts(info.task), info, tokenizer)

    report = ArrayJudge(samples, info, Fake(info)).report(Fake(info, 0.5))

    batches = [samples.batch([index]) for index in range(len(TEXTS))]
    expected, got = (
        np.concatenate([Fake(info, noise).infer(batch)["logits"] for batch in batches])
        for noise in (0, 0.5)
    )
    assert report.mean_error == pytest.approx(np.abs(got - expected).mean())
    assert report.max_error == pytest.approx(np.abs(got - expected).max())
    assert report.agreement == 100 * (got.argmax(-1) == expected.argmax(-1)).mean()


def test_chosen_lines_of_a_file(texts, tokenizer):
    info = info_of(Task.SEQUENCE_CLASSIFICATION)
    path = texts(info.task, label="b")
    samples = rows_of(path, info, tokenizer)
    some = dataclasses.replace(samples, rows=samples.rows[1::2])
    reference, candidate = Fake(info), Fake(info, 0.3)

    by_text = judge_of_texts(path, info, tokenizer, reference, lines=(2, 4)).report(candidate)
    by_row = ArrayJudge(some, info, reference).report(candidate)

    assert by_text.samples == by_row.samples == 2
    assert by_text.mean_error == pytest.approx(by_row.mean_error)
    assert by_text.metric_drop is not None and by_row.metric_drop is None


def test_texts_need_a_tokenizer(texts):
    info = info_of(Task.SEQUENCE_CLASSIFICATION)
    with pytest.raises(InputError, match="holds text, and the graph has no tokenizer"):
        judge_of_texts(texts(info.task), info, None, Fake(info))


def test_without_the_metrics_library_only_a_bound_on_the_metric_fails(
    texts, tokenizer, monkeypatch
):
    def missing(problem, labels):
        raise MissingDependencyError("sklearn", needed_for="accuracy", extra="evaluate")

    monkeypatch.setattr("convbert_deploy.evaluation.compare.metrics_for", missing)
    info = info_of(Task.SEQUENCE_CLASSIFICATION)
    path, reference = texts(info.task, label="b"), Fake(info)

    report = judge_of_texts(path, info, tokenizer, reference).report(Fake(info, 0.3))

    assert report.metric_drop is None and report.mean_error > 0
    with pytest.raises(MissingDependencyError, match="sklearn"):
        judge_of_texts(path, info, tokenizer, reference, metric_needed=True)


class Spoiled(Fake):
    """NaN or infinity for one of the texts."""

    def __init__(self, info, row: int, value: float) -> None:
        super().__init__(info)
        self._row, self._value = row, value

    def infer(self, batch):
        outputs = super().infer(batch)
        bad = batch["input_ids"].shape[-1] == self._row
        return {n: np.where(bad, np.float32(self._value), a) for n, a in outputs.items()}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_of_a_candidate_is_counted(texts, tokenizer, value):
    info = info_of(Task.TOKEN_CLASSIFICATION)
    samples = rows_of(texts(info.task), info, tokenizer)
    lengths = [row.inputs["input_ids"].size for row in samples.rows]
    judge = ArrayJudge(samples, info, Fake(info))

    report = judge.report(Spoiled(info, max(lengths), value))

    assert report.failed == lengths.count(max(lengths)) == 1
    assert not report.passed
    assert math.isnan(report.mean_error) and math.isnan(report.max_error)


def test_nan_of_the_reference_is_an_error_that_names_the_line(texts, tokenizer):
    info = info_of(Task.TOKEN_CLASSIFICATION)
    samples = rows_of(texts(info.task), info, tokenizer)
    longest = max(row.inputs["input_ids"].size for row in samples.rows)

    with pytest.raises(EngineError, match=r"NaN or infinity for line 2 of texts\.jsonl"):
        ArrayJudge(samples, info, Spoiled(info, longest, math.nan))


def test_outputs_of_another_task_or_shape(texts, tokenizer):
    info = info_of(Task.TOKEN_CLASSIFICATION)
    samples = rows_of(texts(info.task), info, tokenizer)
    judge = ArrayJudge(samples, info, Fake(info))

    with pytest.raises(EngineError, match="no output logits"):
        judge.report(Fake(info_of(Task.QUESTION_ANSWERING)))
    with pytest.raises(EngineError, match="logits have shape"):
        judge.report(Fake(info, width=5))


@pytest.mark.parametrize("task", [Task.MASKED_LM, Task.ENCODER])
def test_outputs_with_a_vector_a_token_are_bounded(task, tokenizer, texts, monkeypatch):
    """A vocabulary's logits of 512 texts would be gigabytes: fewer tokens and smaller batches."""
    info = info_of(task)
    samples = rows_of(texts(Task.ENCODER), info_of(Task.ENCODER), tokenizer)
    # 6 of each length: without a bound all of them are one batch
    samples = dataclasses.replace(samples, rows=samples.rows * 6)
    width = Fake(info)._width
    rows = sum(row.positions for row in samples.rows)
    monkeypatch.setattr(judging, "_MAX_BYTES", rows * width * 4 // 12)
    reference = Fake(info)

    judge = ArrayJudge(samples, info, reference)
    report = judge.report(Fake(info, 0.3))

    held = sum(a.nbytes for outputs in judge._expected.values() for a in outputs.values())
    assert held <= judging._MAX_BYTES + len(samples.rows) * width * 4
    assert all(a.base is None for outputs in judge._expected.values() for a in outputs.values())
    assert max(reference.positions) <= rows // 12
    # every row is still looked at
    assert report.distance.units >= len(samples.rows)
    assert report.mean_error == pytest.approx(0.3 * 2 / math.pi, rel=0.1)


def test_limits_are_the_models():
    info = info_of(Task.QUESTION_ANSWERING)

    limits = input_limits(info)

    assert (limits.task, limits.vocab_size) == (Task.QUESTION_ANSWERING, VOCABULARY)
    assert (limits.max_positions, limits.type_vocab_size) == (128, 2)
