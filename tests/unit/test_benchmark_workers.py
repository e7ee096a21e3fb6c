"""Candidates in processes of their own: what they say, and what becomes of those that fail."""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import sys

import numpy as np
import pytest
from benchmark_worker import SCRIPT

from convbert_deploy.benchmarking import process
from convbert_deploy.benchmarking.cases import Case, Point
from convbert_deploy.benchmarking.measurement import CandidateFacts
from convbert_deploy.benchmarking.options import BenchOptions
from convbert_deploy.benchmarking.process import Worker, WorkerCommand, WorkerSubject, cores_for
from convbert_deploy.benchmarking.rounds import CandidateFailed, measure_cases, runs_in_turn
from convbert_deploy.benchmarking.worker.frames import FrameError, read_frame, write_frame
from convbert_deploy.benchmarking.worker.refusal import CannotRun
from convbert_deploy.benchmarking.worker.serve import error_header, peak_bytes, unpacked
from convbert_deploy.errors import ConvBertDeployError

_POINTS = (Point(1, 4), Point(2, 4))
_OPTIONS = BenchOptions(min_time_s=0, min_runs=12, max_runs=12, warmup=1)


def _case(point):
    ids = np.arange(point.batch * point.seq, dtype=np.int64).reshape(point.batch, point.seq)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": ids * 0}
    return lambda: Case(point, (batch,))


def _command(costs=(), behaviour="ok", **more):
    settings = {"costs": list(costs), "behaviour": behaviour, "threads": 1, **more}
    return WorkerCommand(pathlib.Path(sys.executable), settings)


def _measure(monkeypatch, commands, points=_POINTS[:1], options=_OPTIONS):
    """Every worker but the first is a peer, so it may be left out."""
    monkeypatch.setattr(process, "WORKER", SCRIPT)
    with contextlib.ExitStack() as scope:
        subjects = []
        for name, command in commands.items():
            worker = scope.enter_context(Worker(name, command))
            subjects.append(WorkerSubject(worker, CandidateFacts("peer"), essential=not subjects))
        return measure_cases(subjects, [_case(point) for point in points], options)


def test_frames_hold_arrays_of_every_shape_and_type():
    arrays = {
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.float64(2.5).reshape(()),
        "strided": np.arange(12, dtype=np.int64).reshape(3, 4)[:, ::2],
    }
    stream = io.BytesIO()
    write_frame(stream, {"op": "run", "text": "ü"}, arrays)
    write_frame(stream, {"op": "next"})
    stream.seek(0)
    header, read = read_frame(stream)
    assert header == {"op": "run", "text": "ü"}
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)
    assert read_frame(stream)[0] == {"op": "next"}
    assert read_frame(stream) is None


@pytest.mark.parametrize("cut", [4, 9, -1])
def test_a_frame_that_ends_early_is_an_error(cut):
    stream = io.BytesIO()
    write_frame(stream, {"op": "run"}, {"a": np.ones(4)})
    with pytest.raises(FrameError):
        read_frame(io.BytesIO(stream.getvalue()[:cut]))


def test_other_bytes_are_not_a_frame():
    with pytest.raises(FrameError, match="expected a frame"):
        read_frame(io.BytesIO(b"Loading weights: 100%"))


def test_ratios_are_paired_across_processes(monkeypatch):
    slowing = [10.0 * (1 + index) for index in range(12)]
    report = _measure(
        monkeypatch,
        {"base": _command([99, *slowing]), "fast": _command([50, *(ms / 2 for ms in slowing)])},
    )
    fast = report.at("fast", _POINTS[0])
    assert fast.speedup_interval.low == fast.speedup_interval.high == pytest.approx(2)
    assert fast.times_ms == tuple(ms / 2 for ms in slowing)
    assert fast.first_ms == 50
    assert (fast.max_abs_difference, fast.peak_bytes, fast.prepare_ms) == (0, 2000, 3)
    assert report.at("base", _POINTS[0]).max_abs_difference is None
    facts = report.candidates["fast"]
    assert (facts.load_ms, facts.loaded_bytes, facts.versions) == (7, 1000, {"fake": "1.0"})
    assert (facts.weights_bytes, facts.notes) == (400, ("note",)), "as the case made them"
    assert facts.ready_ms > 0
    json.dumps(report.to_json(), allow_nan=False)


def test_short_runs_share_a_turn_and_each_is_kept(monkeypatch):
    asked = []
    ask = Worker.ask

    def listening(self, header, *arguments, **more):
        if header["op"] == "run":
            asked.append((self.name, header["count"]))
        return ask(self, header, *arguments, **more)

    monkeypatch.setattr(Worker, "ask", listening)
    slow, fast = [8.0 + number for number in range(12)], [2.0 + number for number in range(12)]
    report = _measure(monkeypatch, {"base": _command([9, *slow]), "fast": _command([2, *fast])})
    assert report.at("base", _POINTS[0]).times_ms == tuple(slow)
    assert report.at("fast", _POINTS[0]).times_ms == tuple(fast)
    # one run each to warm up; then 10 ms hold five of the faster; the last turn has what is left
    turns = [count for name, count in asked if name == "fast"]
    assert turns == [count for name, count in asked if name == "base"] == [1, 5, 5, 2]
    assert asked[2:6] == [("base", 5), ("fast", 5), ("fast", 5), ("base", 5)]


def test_a_run_longer_than_a_turn_is_a_turn(monkeypatch):
    monkeypatch.setattr(WorkerSubject, "turn_ms", 10.0)
    subject = WorkerSubject.__new__(WorkerSubject)
    subject.name = "a"
    assert [runs_in_turn([subject], {"a": ms}) for ms in (100.0, 10.0, 9.0, 1.0)] == [1, 1, 1, 10]
    assert runs_in_turn([subject], {}) == 1, "no warm-up run"


def test_a_peer_that_dies_is_left_out_for_good_and_the_others_go_on(monkeypatch):
    many = [10.0] * 40
    report = _measure(
        monkeypatch,
        {"base": _command(many), "dead": _command(many, "dies-running"), "c": _command(many)},
        _POINTS,
    )
    assert [(one.candidate, str(one.point)) for one in report.measurements] == [
        ("base", "1x4"),
        ("c", "1x4"),
        ("base", "2x4"),
        ("c", "2x4"),
    ]
    (gone,) = report.left_out
    assert (gone.name, gone.case) == ("dead", "1x4")
    assert "SIGABRT" in gone.reason
    assert len(report.at("c", _POINTS[0]).times_ms) == 12


def test_a_peer_that_refuses_a_shape_is_asked_again_at_the_next(monkeypatch):
    report = _measure(
        monkeypatch, {"base": _command([1.0] * 40), "no": _command([], "refuses")}, _POINTS
    )
    assert [(one.name, one.case) for one in report.left_out] == [("no", "1x4"), ("no", "2x4")]
    assert report.left_out[0].reason == "too long"
    assert report.left_out[0].hint == "cut it"


def test_the_baseline_must_not_fail(monkeypatch):
    with pytest.raises(CandidateFailed, match="base ended"):
        _measure(monkeypatch, {"base": _command([], "dies-running"), "b": _command([1.0] * 40)})


def test_a_worker_that_dies_loading_shows_what_it_wrote(monkeypatch):
    monkeypatch.setattr(process, "WORKER", SCRIPT)
    with pytest.raises(CandidateFailed, match="exit status 1.*no such model") as failure:
        Worker("x", _command(behaviour="dies-loading")).__enter__()
    assert failure.value.gone


def test_prints_between_frames_are_not_taken_for_an_answer(monkeypatch):
    report = _measure(
        monkeypatch, {"base": _command([1.0] * 40), "b": _command([1.0] * 40, "babbles")}
    )
    assert [one.name for one in report.left_out] == ["b"]


def test_answers_that_are_not_finite_are_seen(monkeypatch):
    report = _measure(
        monkeypatch, {"base": _command([1.0] * 40), "nan": _command([1.0] * 40, "not-finite")}
    )
    one = report.at("nan", _POINTS[0])
    assert one.finite is False and one.max_abs_difference is None
    assert ("not-finite", "nan") in {(w.code, w.candidate) for w in report.warnings}
    json.dumps(report.to_json(), allow_nan=False)


def test_workers_get_one_thread_count_for_every_library(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    command = WorkerCommand(pathlib.Path("python"), {"threads": 3}, isolated=True)
    environment = command.environment()
    assert {environment[f"{name}_NUM_THREADS"] for name in ("OMP", "MKL", "OPENBLAS")} == {"3"}
    assert "PYTHONPATH" not in environment
    shared = WorkerCommand(pathlib.Path("python"), {"threads": 3}).environment()
    assert shared["PYTHONPATH"] == "/elsewhere"


def test_cores_are_as_many_as_threads_and_none_twice():
    usable = cores_for(1)
    assert usable is None or len(usable) == 1
    assert cores_for(10_000) is None


def test_what_the_worker_tells_of_itself():
    assert peak_bytes() > 1 << 20
    batches = unpacked({f"{i}/input_ids": np.full(1, i) for i in (0, 10, 9, 1)})
    assert [int(one["input_ids"][0]) for one in batches] == [0, 1, 9, 10]
    told = error_header(ZeroDivisionError())
    assert (told["kind"], told["text"]) == ("ZeroDivisionError", "ZeroDivisionError")
    hinted = ConvBertDeployError("too long", hint="cut it")
    errors = (ZeroDivisionError("by 0"), hinted, CannotRun("no such product"))
    assert [error_header(error)["plain"] for error in errors] == [False, True, True]
