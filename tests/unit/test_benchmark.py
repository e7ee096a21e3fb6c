"""Scheduling, statistics and warnings of the benchmark; nothing here is timed."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

from convbert_deploy.benchmarking import (
    BenchOptions,
    Candidate,
    Point,
    WallTimer,
    measure,
    turn,
)
from convbert_deploy.benchmarking.timing import median_interval, modified_z_scores, percentile

from factories import FakeTimer, fake_candidate_runner

_POINT = Point(batch=2, seq=5)
_EXACT = BenchOptions(min_time_s=0, min_runs=20, max_runs=20, warmup=2)


def _batch(point):
    mask = np.ones((point.batch, point.seq), np.int64)
    mask[-1, 3:] = 0
    return {"input_ids": mask, "attention_mask": mask, "token_type_ids": mask * 0}


def _measure(costs, options=_EXACT, points=(_POINT,), log=None):
    timer = FakeTimer()
    candidates = [
        Candidate(name, fake_candidate_runner(name, timer, iter(cost), log))
        for name, cost in costs.items()
    ]
    return measure(candidates, points, _batch, options, timer)


def _warnings(cost, options=_EXACT):
    return {one.code for one in _measure({"a": cost}, options).warnings}


def test_ratio_is_paired_so_a_machine_that_slows_down_cancels_out():
    slowing = [10.0 * (1 + index) for index in range(20)]
    report = _measure({"base": [10, 10, *slowing], "fast": [5, 5, *(ms / 2 for ms in slowing)]})
    fast = report.at("fast", _POINT)
    assert fast.speedup == pytest.approx(2)
    assert fast.speedup_interval.low == pytest.approx(2)
    assert fast.speedup_interval.high == pytest.approx(2)
    assert report.at("base", _POINT).speedup == 1
    codes = {(one.code, one.candidate) for one in report.warnings}
    assert ("throttling", "") in codes, "both slowed down: it is the machine"
    assert "drift" not in {code for code, _ in codes}


def test_candidates_take_turns_and_the_order_changes():
    log = []
    options = BenchOptions(min_time_s=0, min_runs=6, max_runs=6, warmup=1)
    costs = {name: itertools.repeat(1.0) for name in "abc"}
    _measure(costs, options, log=log)
    rounds = ["".join(log[start : start + 3]) for start in range(3, len(log), 3)]
    assert log[:3] == ["a", "b", "c"]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(rounds) == 6
    assert sorted(set(rounds)) == sorted("".join(one) for one in itertools.permutations("abc"))


def test_over_two_cycles_every_place_is_taken_equally_often():
    candidates = [Candidate(name, None) for name in "abcd"]
    orders = [[one.name for one in turn(candidates, index)] for index in range(8)]
    for place in range(4):
        assert sorted(order[place] for order in orders) == sorted("aabbccdd")


def test_every_time_is_kept_in_order_and_warm_up_is_not_among_them():
    measured = [float(ms) for ms in range(1, 21)]
    one = _measure({"a": [500, 400, *measured]}).at("a", _POINT)
    assert one.times_ms == tuple(measured)
    assert one.first_ms == 500
    assert (one.p50_ms, one.p90_ms) == (10.5, pytest.approx(18.1))
    assert one.p99_ms == pytest.approx(np.percentile(measured, 99))


def test_throughput_counts_real_tokens():
    one = _measure({"a": itertools.repeat(4.0)}).at("a", _POINT)
    assert one.tokens == 8, "two of ten positions are padding"
    assert one.sequences_per_s == pytest.approx(500)
    assert one.tokens_per_s == pytest.approx(2000)


@pytest.mark.parametrize(
    ("cost_ms", "runs"),
    [(1.0, 50), (10.0, 10), (0.1, 100)],
    ids=["until min_time", "at least min_runs", "at most max_runs"],
)
def test_run_count(cost_ms, runs):
    options = BenchOptions(min_time_s=0.05, min_runs=10, max_runs=100, warmup=0)
    report = _measure({name: itertools.repeat(cost_ms) for name in "ab"}, options)
    assert {len(one.times_ms) for one in report.measurements} == {runs}


def test_all_candidates_get_the_same_arrays_and_each_point_its_own():
    points = [Point(1, 4), Point(3, 4)]
    report = _measure({name: itertools.repeat(1.0) for name in "ab"}, points=points)
    assert [(str(one.point), one.candidate) for one in report.measurements] == [
        ("1x4", "a"),
        ("1x4", "b"),
        ("3x4", "a"),
        ("3x4", "b"),
    ]


def test_report_as_json_has_the_raw_times_and_is_strict():
    data = _measure({"a": itertools.repeat(2.0)}).to_json()
    json.dumps(data, allow_nan=False)
    assert data["measurements"][0]["times_ms"] == [2.0] * 20
    assert data["baseline"] == "a"


def test_steady_runs_warn_of_nothing_but_their_number():
    jitter = itertools.cycle([10.0, 10.1, 9.9, 10.05])
    assert _warnings(jitter) == {"few-runs"}
    many = BenchOptions(min_time_s=0, min_runs=100, max_runs=100, warmup=2)
    assert _warnings(itertools.cycle([10.0, 10.1, 9.9, 10.05]), many) == set()


@pytest.mark.parametrize(
    ("code", "cost"),
    [
        ("slow-first", [900, *itertools.repeat(10.0, 21)]),
        ("slow-first-round", [10, 10, 90, *itertools.islice(itertools.cycle([10, 11]), 19)]),
        ("outliers", [10, 10, *itertools.islice(itertools.cycle([10, 11]), 19), 200]),
        ("imprecise", [10, 10, *itertools.islice(itertools.cycle([10, 11]), 20)]),
        ("drift", [10, 10, *itertools.repeat(10, 10), *itertools.repeat(12, 10)]),
        ("short", itertools.repeat(0.01)),
    ],
)
def test_warning(code, cost):
    assert code in _warnings(iter(cost))


def test_noise_is_warned_of_where_no_precision_is_asked_for():
    options = dataclasses.replace(_EXACT, precision=None)
    cost = [10, 10, *itertools.islice(itertools.cycle([10, 16]), 20)]
    codes = _warnings(iter(cost), options)
    assert "noisy" in codes and "imprecise" not in codes


def test_one_candidate_that_drifts_alone_is_not_the_machine():
    costs = {"a": itertools.repeat(10.0), "b": [10, 10, *[10] * 10, *[13] * 10]}
    codes = {(one.code, one.candidate) for one in _measure(costs).warnings}
    assert ("drift", "b") in codes
    assert not {("drift", "a"), ("throttling", "")} & codes


_STOP = BenchOptions(min_time_s=0, min_runs=10, max_runs=400, warmup=0, max_time_s=1e9)


def test_a_point_ends_once_the_intervals_are_tight():
    noise = np.random.default_rng(0)
    costs = {"a": itertools.repeat(10.0), "b": iter(10 + noise.normal(0, 0.5, 500))}
    report = _measure(costs, _STOP)
    one = report.at("b", _POINT)
    assert one.precise and 10 < len(one.times_ms) < 400
    for interval, median in (
        (one.p50_interval_ms, one.p50_ms),
        (one.speedup_interval, one.speedup),
    ):
        assert max(interval.high - median, median - interval.low) <= 0.02 * median
    tighter = dataclasses.replace(_STOP, precision=0.01)
    costs = {
        "a": itertools.repeat(10.0),
        "b": iter(10 + np.random.default_rng(0).normal(0, 0.5, 500)),
    }
    assert len(_measure(costs, tighter).at("b", _POINT).times_ms) > len(one.times_ms)


def test_every_candidate_must_be_known_not_only_the_baseline():
    wild = itertools.cycle([10.0, 20.0])
    report = _measure({"a": itertools.repeat(10.0), "b": wild}, _STOP)
    assert len(report.at("a", _POINT).times_ms) == 400
    assert report.at("a", _POINT).precise
    assert not report.at("b", _POINT).precise


def test_max_time_ends_a_noisy_point():
    options = dataclasses.replace(_STOP, max_time_s=0.6)
    report = _measure({"a": itertools.cycle([10.0, 20.0])}, options)
    assert len(report.at("a", _POINT).times_ms) == 40


@pytest.mark.parametrize("wrong", [{"precision": 0.0}, {"min_runs": 0}, {"warmup": -1}])
def test_options_out_of_range(wrong):
    with pytest.raises(ValueError, match="expected"):
        BenchOptions(**wrong)


def test_no_warm_up_is_warned_of():
    options = BenchOptions(min_time_s=0, min_runs=20, max_runs=20, warmup=0)
    report = _measure({"a": itertools.repeat(1.0)}, options)
    assert "no-warmup" in {one.code for one in report.warnings}
    assert report.at("a", _POINT).first_ms is None


def test_names_must_be_unique_and_the_baseline_one_of_them():
    with pytest.raises(ValueError, match="baseline 'b'"):
        _measure({"a": itertools.repeat(1.0)}, BenchOptions(baseline="b"))
    twin = Candidate("a", fake_candidate_runner("a", FakeTimer(), itertools.repeat(1.0)))
    with pytest.raises(ValueError, match="unique"):
        measure([twin, twin], [_POINT], _batch)


def test_wall_timer_calls_once_and_returns_milliseconds():
    calls = []
    assert 0 <= WallTimer().time_ms(lambda: calls.append(1)) < 1000
    assert calls == [1]


def test_median_interval_is_the_binomial_one():
    # n = 10: P(Binomial(10, 1/2) <= 1) = 11/1024 <= 0.025 < P(<= 2) = 56/1024
    values = list(range(10, 0, -1))
    interval = median_interval(values)
    assert (interval.low, interval.high) == (2, 9)
    assert median_interval([3.0]).half_width == 0
    small = median_interval([1, 2, 3, 4])
    assert (small.low, small.high) == (1, 4)


def test_median_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(500):
        interval = median_interval(rng.exponential(size=31))
        hits += interval.low <= np.log(2) <= interval.high
    assert 0.93 <= hits / 500 <= 0.99


def test_scores_of_equal_values_are_zero():
    assert modified_z_scores([2.0, 2.0, 2.0, 9.0]) == [0, 0, 0, 0]
    assert percentile([1.0, 2.0], 50) == 1.5
