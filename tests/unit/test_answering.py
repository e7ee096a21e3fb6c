"""Every task the whole way: checkpoint, graph, engine, and answers from ``run``."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from convbert_deploy.architecture import Task
from convbert_deploy.build import BuildOptions, build_engine
from convbert_deploy.checkpoint import Checkpoint, CheckpointOptions
from convbert_deploy.cli import main
from convbert_deploy.engine import Engine
from convbert_deploy.errors import EngineError
from convbert_deploy.exporting import ExportOptions, export
from convbert_deploy.graph import Graph
from convbert_deploy.serving.answering import run

import factories

LINES = {
    Task.ENCODER: ["A fine day."],
    Task.MASKED_LM: ["A fine [MASK] in June."],
    Task.SEQUENCE_CLASSIFICATION: ["A fine day.", '{"text": "One.", "text_pair": "Two."}'],
    Task.TOKEN_CLASSIFICATION: ["A fine day.", '{"words": ["A", "fine", "day"]}'],
    Task.QUESTION_ANSWERING: ['{"question": "Who?", "context": "The club opened in June."}'],
    Task.MULTIPLE_CHOICE: ['{"prompt": "The sky is", "choices": ["blue", "a fish", "late"]}'],
}


@pytest.fixture
def make_engine(sample_path, tmp_path):
    def make(task: Task, padding: str = "hf", tokenizer: bool = True) -> Engine:
        model = factories.realistic_model("tiny", task, vocab_size=9000)
        torch.save(model.state_dict(), tmp_path / "m.pt")
        options = CheckpointOptions(tokenizer=sample_path if tokenizer else None, task=task)
        checkpoint = Checkpoint.load(tmp_path / "m.pt", options)
        export(checkpoint, tmp_path / "m.onnx", ExportOptions(padding=padding, check=False))
        graph = Graph.load(tmp_path / "m.onnx")
        return build_engine(graph, tmp_path / "m.engine", BuildOptions(backend="onnxruntime"))

    return make


@pytest.mark.parametrize("task", list(Task), ids=str)
def test_every_task_answers(task, make_engine):
    engine = make_engine(task)
    result = CliRunner().invoke(main, ["run", str(engine.path)], input="\n".join(LINES[task]))
    assert result.exit_code == 0, result.output
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(answers) == len(LINES[task])
    assert not any("error" in answer for answer in answers)
    again = list(run(engine, LINES[task], threads=1))
    assert [sorted(answer) for answer in again] == [sorted(answer) for answer in answers]


def test_a_bad_line_spoils_only_itself(make_engine):
    engine = make_engine(Task.SEQUENCE_CLASSIFICATION)
    lines = ["A fine day.", '{"txt": 1}', "{broken", "", "A fine day."]
    result = CliRunner().invoke(main, ["run", str(engine.path)], input="\n".join(lines))
    assert result.exit_code == 3
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert ["error" in answer for answer in answers] == [False, True, True, True, False]
    assert answers[0] == answers[4]


def test_masked_engine_answers_the_same_in_any_company(make_engine):
    engine = make_engine(Task.SEQUENCE_CLASSIFICATION, padding="masked")
    text, company = "A fine day.", "The club will have its gala summer opening on Saturday, June 3."
    alone = next(run(engine, [text]))
    beside = next(run(engine, [text, company]))
    for label, score in alone["scores"].items():
        assert beside["scores"][label] == pytest.approx(score, abs=1e-6)


def test_without_a_tokenizer_text_is_refused(make_engine):
    with pytest.raises(EngineError, match="has no tokenizer"):
        next(run(make_engine(Task.ENCODER, tokenizer=False), ["A fine day."]))
