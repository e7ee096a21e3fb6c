"""Load: what is counted as different, as an error, and what the report says of it."""

from __future__ import annotations

import contextlib
import json
import math
import threading

import pytest
from click.testing import CliRunner

from convbert_deploy.errors import InputError
from convbert_deploy.serving import load as load_module
from convbert_deploy.serving.client import NoAnswerError, RefusedError, largest_difference, metric
from convbert_deploy.serving.command import load as load_command
from convbert_deploy.serving.load import LoadLevel, LoadOptions, LoadReport, load, read_requests

PAGE = """# HELP nv_inference_count Number of inferences performed
nv_inference_count{model="tiny_engine",version="1"} 12
nv_inference_count{model="tiny_engine",version="2"} 3
nv_inference_count{model="tiny",version="1"} 40
nv_energy 7.5
"""


class FakeServer:
    """Answers each text with its length; ``fault`` may alter the answer or raise."""

    def __init__(self):
        self.lock = threading.Lock()
        self.asked, self.open, self.most_open = [], 0, 0
        self.fault = lambda number, text, answer: answer

    @contextlib.contextmanager
    def connected(self, url, *, grpc, timeout):
        with self.lock:
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        try:
            yield self
        finally:
            with self.lock:
                self.open -= 1

    def ask(self, model, text):
        with self.lock:
            self.asked.append(text)
            number = len(self.asked)
        return self.fault(number, text, {"label": "A", "score": len(text) / 100})


@pytest.fixture
def server(monkeypatch):
    fake = FakeServer()
    monkeypatch.setattr(load_module, "connected", fake.connected)

    def no_metrics(url, timeout):
        raise NoAnswerError("no metrics")

    monkeypatch.setattr(load_module, "metrics_page", no_metrics)
    return fake


TEXTS = ["a", "bb", "ccc", "dddd"]


def test_every_text_alone_first_then_in_mixed_order(server):
    report = load("x:1", "tiny", [*TEXTS, "a"], LoadOptions((1, 3), 10))
    assert report.passed and report.texts == 4
    assert server.asked[:4] == TEXTS and server.open == 0
    for level, sent in zip(report.levels, (server.asked[4:14], server.asked[14:]), strict=True):
        assert level.requests == len(level.latencies_ms) == len(sent) == 10
        counts = [sent.count(text) for text in TEXTS]
        assert sorted(counts) == [2, 2, 3, 3]
        assert level.mean_batch is None
    assert server.most_open <= 3


@pytest.mark.parametrize(
    ("change", "largest"),
    [
        ({"score": 0.5}, 0.5 - 0.02),
        ({"label": "B"}, math.inf),
        ({"score": math.nan}, math.inf),
        ({"more": 1}, math.inf),
    ],
    ids=["number", "label", "nan", "key"],
)
def test_one_different_answer_fails(server, change, largest):
    def fault(number, text, answer):
        return answer | change if number > 4 and text == "bb" else answer

    server.fault = fault
    report = load("x:1", "tiny", TEXTS, LoadOptions((2,), 8))
    (level,) = report.levels
    assert not report.passed and level.different == 2 and not level.errors
    assert level.max_abs == pytest.approx(largest)
    assert "FAILED" in report.to_text()
    json.dumps(report.to_json(), allow_nan=False)


def test_the_tolerance_is_the_bound(server):
    server.fault = lambda number, text, answer: (
        answer | {"score": answer["score"] + (1e-4 if number % 12 > 4 else 0)}
    )
    assert load("x:1", "tiny", TEXTS, LoadOptions((1,), 8, tolerance=1e-3)).passed
    assert not load("x:1", "tiny", TEXTS, LoadOptions((1,), 8, tolerance=1e-5)).passed


def test_errors_are_counted_by_message(server):
    def fault(number, text, answer):
        if number > 4 and text == "a":
            raise RefusedError("500", "broken")
        if number > 4 and text == "bb":
            raise NoAnswerError("timed out")
        return answer

    server.fault = fault
    report = load("x:1", "tiny", TEXTS, LoadOptions((2,), 12))
    assert not report.passed
    assert report.levels[0].errors == {"500: broken": 3, "timed out": 3}
    assert report.levels[0].requests == 12 and len(report.levels[0].latencies_ms) == 6
    assert "3 x 500: broken" in report.to_text()


def test_a_text_that_is_refused_alone_fails_and_is_not_sent_again(server):
    def fault(number, text, answer):
        if text == "a":
            raise RefusedError("400", "no")
        return answer

    server.fault = fault
    report = load("x:1", "tiny", TEXTS, LoadOptions((1,), 6))
    assert not report.passed and report.refused == {"400: no": 1}
    assert server.asked.count("a") == 1
    server.asked.clear()
    assert load("x:1", "tiny", ["a"], LoadOptions((1,), 6)).levels == ()


def test_a_server_that_is_not_there_is_said_at_once(server):
    def fault(number, text, answer):
        raise NoAnswerError("gone")

    server.fault = fault
    with pytest.raises(NoAnswerError):
        load("x:1", "tiny", TEXTS)
    assert len(server.asked) == 1


def test_a_bug_in_a_thread_is_shown(server):
    def fault(number, text, answer):
        if number > 4:
            raise ZeroDivisionError
        return answer

    server.fault = fault
    with pytest.raises(ZeroDivisionError):
        load("x:1", "tiny", TEXTS, LoadOptions((2,), 8))


def test_rows_a_batch_are_those_of_the_level(server, monkeypatch):
    counts = iter([(100, 50), (130, 60)])

    def page(url, timeout):
        assert url == "host:9002"
        rows, runs = next(counts)
        series = 'model="tiny_engine",version="1"'
        return (
            f"nv_inference_count{{{series}}} {rows}\nnv_inference_exec_count{{{series}}} {runs}\n"
        )

    monkeypatch.setattr(load_module, "metrics_page", page)
    report = load("x:1", "tiny", TEXTS, LoadOptions((1,), 8, metrics="host:9002"))
    assert report.levels[0].mean_batch == 3.0


def test_metrics_that_were_asked_for_must_be_there(server, monkeypatch):
    options = LoadOptions((1,), 8, metrics="host:9002")
    with pytest.raises(NoAnswerError):
        load("x:1", "tiny", TEXTS, options)
    monkeypatch.setattr(load_module, "metrics_page", lambda url, timeout: PAGE)
    with pytest.raises(NoAnswerError, match="other_engine"):
        load("x:1", "other", TEXTS, options)


def test_metric_sums_the_series_with_the_labels():
    assert metric(PAGE, "nv_inference_count", model="tiny_engine") == 15
    assert metric(PAGE, "nv_inference_count", model="tiny_engine", version="2") == 3
    assert metric(PAGE, "nv_energy") == 7.5
    for name, labels in (("nv_inference", {}), ("nv_inference_count", {"model": "none"})):
        with pytest.raises(KeyError):
            metric(PAGE, name, **labels)


def test_largest_difference_of_answers():
    one = {"a": [1.0, {"b": "x"}], "n": 3, "t": True, "none": None}
    assert largest_difference(one, json.loads(json.dumps(one))) == 0
    assert largest_difference([1.0, 2.0], [1.5, 2.1]) == 0.5
    assert largest_difference(1.0, 1) == 0  # JSON has one kind of number
    for a, b in ((3, 4), (True, False), ("x", "y"), ([1], [1, 1]), (None, 0.0), (1.0, True)):
        assert largest_difference(a, b) == math.inf


def test_percentiles_and_throughput():
    level = LoadLevel(2, tuple(float(n) for n in range(1, 101)), 5.0, 0, 0.0, {"x": 1}, 1.5)
    assert level.percentile_ms(50) == 50.5 and level.per_second == 20 and level.requests == 101
    assert level.to_json()["p99_ms"] == pytest.approx(99.01)
    nothing = LoadLevel(2, (), 5.0, 0, 0.0, {"x": 1}, None)
    assert nothing.to_json()["p50_ms"] is None
    text = LoadReport("tiny", "the same text alone", 4, {}, (level, nothing)).to_text()
    assert "50.5" in text and "1.50" in text and "2 x x" in text


@pytest.mark.parametrize(
    "wrong",
    [
        {"concurrency": ()},
        {"concurrency": (0,)},
        {"requests": 0},
        {"timeout": 0},
        {"tolerance": -1},
        {"tolerance": math.nan},
    ],
    ids=str,
)
def test_options_are_checked(wrong):
    with pytest.raises(InputError):
        LoadOptions(**wrong)


def test_the_command(server, tmp_path):
    file = tmp_path / "texts"
    file.write_text("a\n\nbb\n")
    arguments = ["x:1", "--texts", str(file), "--model", "tiny", "--requests", "5"]
    right = CliRunner().invoke(load_command, [*arguments, "--concurrency", "1,2", "--json"])
    assert right.exit_code == 0
    assert [level["concurrency"] for level in json.loads(right.stdout)["levels"]] == [1, 2]
    server.asked.clear()
    server.fault = lambda number, text, answer: answer | ({"label": "B"} if number > 2 else {})
    assert CliRunner().invoke(load_command, arguments).exit_code == 1


def test_files_of_requests(tmp_path):
    (tmp_path / "broken").write_bytes(b"a\xff\n")
    for name in ("broken", "nowhere"):
        with pytest.raises(InputError, match=name):
            read_requests(tmp_path / name)
    with pytest.raises(InputError, match="no text"):
        load("x:1", "tiny", [])
