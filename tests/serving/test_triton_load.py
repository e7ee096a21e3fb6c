"""Many clients at a time on a real server: each answer is that of its text alone."""

from __future__ import annotations

import json
import pathlib

import pytest
from click.testing import CliRunner

from convbert_deploy.architecture import Task
from convbert_deploy.serving.command import load as load_command
from convbert_deploy.serving.load import LoadOptions, load

from serving.conftest import model_name
from serving.triton_server import TritonServer

pytestmark = pytest.mark.serving

TASK = Task.SEQUENCE_CLASSIFICATION
NAME = model_name(TASK)


@pytest.fixture(scope="module")
def server(repository_of):
    with TritonServer(repository_of(TASK)) as server:
        yield server


@pytest.fixture(scope="module")
def texts(sample_texts: pathlib.Path) -> list[str]:
    """150 requests of 1 to more than 128 words, a third of them with a second text."""
    sentences = [
        " ".join(json.loads(line)["words"]) for line in sample_texts.read_text().splitlines()[:150]
    ]
    made = []
    for number, sentence in enumerate(sentences):
        if number % 10 == 0:
            sentence = " ".join(sentences[number : number + 8])  # longer than the model reads
        elif number % 10 == 1:
            sentence = sentence.split()[0]
        pair = {"text_pair": sentences[-number]} if number % 3 == 0 else {}
        made.append(json.dumps({"text": sentence} | pair))
    return made


def test_3000_requests_are_answered_as_alone_and_share_batches(server, engine_of, texts):
    options = LoadOptions(concurrency=(1, 4, 8), requests=1000, metrics=server.metrics_url)
    # compared with this process' engine, which the server has no part in
    report = load(server.http_url, NAME, texts, options, engine=engine_of(TASK))
    assert report.passed, report.to_text()
    assert not report.refused and report.texts == len(texts)
    assert [level.concurrency for level in report.levels] == [1, 4, 8]
    for level in report.levels:
        assert level.requests == 1000 and not level.errors
        assert level.max_abs <= 1e-6
    assert report.levels[-1].mean_batch > 2, report.to_text()


def test_the_metrics_of_the_report_are_the_servers(server, texts):
    model = f"{NAME}_engine"
    before = server.metric("nv_inference_exec_count", model=model)
    options = LoadOptions((2,), 40, metrics=server.metrics_url)
    report = load(server.http_url, NAME, texts[1:3], options)
    executions = server.metric("nv_inference_exec_count", model=model) - before - 2  # two alone
    assert report.levels[0].mean_batch == pytest.approx(40 / executions)


def test_the_command_over_grpc(server, texts, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(texts[:30]))
    arguments = [server.grpc_url, "--grpc", "--texts", str(file), "--model", NAME, "--json"]
    arguments += ["--concurrency", "1,4", "--requests", "60", "--metrics", server.metrics_url]
    result = CliRunner().invoke(load_command, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["passed"] and report["texts"] == 30
    assert [level["requests"] for level in report["levels"]] == [60, 60]
    assert all(level["p50_ms"] <= level["p90_ms"] <= level["p99_ms"] for level in report["levels"])


def test_another_engine_than_the_one_served_is_found_out(server, engine_of, texts):
    """The comparison can fail: the engine of another model answers differently."""
    options = LoadOptions((1,), 20)
    report = load(
        server.http_url, NAME, texts[:10], options, engine=engine_of(Task.TOKEN_CLASSIFICATION)
    )
    assert not report.passed
