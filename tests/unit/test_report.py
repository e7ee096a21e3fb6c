"""What people and programs read. Golden text lives here and nowhere else."""

from __future__ import annotations

import json

import numpy as np

from convbert_deploy.benchmarking import BenchOptions, Candidate, Point, measure
from convbert_deploy.diagnosis import Check, Status
from convbert_deploy.parity import CompareOptions, compare
from convbert_deploy.parity_cases import LeftOut, NamedBatch, ParityBatches
from convbert_deploy.report import checks_json, checks_text, to_json_text, to_markdown, to_text
from convbert_deploy.report_parity import parity_text
from convbert_deploy.report_table import markdown_table, share, short
from convbert_deploy.tolerances import Tolerance

from factories import FakeTimer, FixedRunner, fake_candidate_runner


def _parity(error, intermediates=None):
    batch = {"input_ids": np.ones((1, 4), np.int64), "attention_mask": np.ones((1, 4), np.int64)}
    logits = np.array([[-1.0, 1.0]], np.float32)
    cases = ParityBatches((NamedBatch("b1-s4", batch),), (LeftOut("b8-s512", "too long"),))
    return compare(
        FixedRunner("eager fp32", lambda _: {"logits": logits}),
        FixedRunner("fp16", lambda _: {"logits": logits + np.float32(error)}),
        cases,
        Tolerance(max_abs=0.1),
        options=CompareOptions(intermediates=intermediates),
    )


def _benchmark():
    timer = FakeTimer()
    costs = {"eager": [9.0, *[4.0] * 10], "engine": [3.0, *[2.0] * 10]}
    batch = {"attention_mask": np.ones((2, 8), np.int64), "input_ids": np.ones((2, 8), np.int64)}
    return measure(
        [Candidate(n, fake_candidate_runner(n, timer, iter(c))) for n, c in costs.items()],
        [Point(2, 8)],
        lambda point: batch,
        BenchOptions(min_time_s=0, min_runs=10, max_runs=10, warmup=1),
        timer,
        header={"cpu": "Test CPU", "threads": "2"},
    )


def test_parity_text_of_a_failure():
    assert parity_text(_parity(0.5), cases=True).splitlines() == [
        "FAILED: fp16 against eager fp32, 1 cases",
        "Tolerance: max abs 0.1; judged at every position, padded ones too",
        "NaN or Inf inside the model: not looked for",
        "",
        "output  positions  max abs  mean abs  max rel  max abs/std  min cosine  argmax  NaN  Inf",
        "------  ---------  -------  --------  -------  -----------  ----------  ------  ---  ---",
        "logits  all          0.500     0.500    0.500        0.500    0.894427    100%    0    0",
        "",
        "case   output  max abs  mean abs  min cosine  argmax",
        "-----  ------  -------  --------  ----------  ------",
        "b1-s4  logits    0.500     0.500    0.894427    100%",
        "",
        "Not within tolerance:",
        "  logits: max abs error 0.5 is over 0.1; largest error in b1-s4",
        "",
        "Left out:",
        "  b8-s512: too long",
    ]


def test_parity_says_whether_it_looked_inside():
    text = to_text(_parity(0.0, intermediates=lambda batch: [("scores", 2, 0)]))
    assert text.startswith("FAILED")
    assert "looked for in 1 cases, 1 found" in text
    assert "tensor scores holds 2 NaN and 0 Inf in b1-s4" in text


def test_parity_markdown_holds_every_case_and_the_definitions():
    text = to_markdown(_parity(0.0))
    assert text.startswith("# Parity: fp16 against eager fp32\n")
    assert "PASSED" in text
    assert "| b1-s4 | logits | 0 | 0 | 1.000000 | 100% |" in text
    assert "max rel: error over max(|reference|, rms of the reference)" in text
    assert "* b8-s512: too long" in text


def test_json_reads_back_and_says_which_kind_it_is():
    parity = json.loads(to_json_text(_parity(0.5)))
    assert (parity["kind"], parity["passed"]) == ("parity", False)
    assert parity["outputs"]["logits"]["errors"]["max_abs"] == 0.5
    assert parity["cases"][0]["outputs"][0]["shape"] == [1, 2]
    bench = json.loads(to_json_text(_benchmark()))
    assert bench["kind"] == "benchmark"
    assert bench["measurements"][1]["speedup"] == 2


def test_benchmark_text():
    lines = to_text(_benchmark()).splitlines()
    assert lines[:3] == ["cpu: Test CPU", "threads: 2", ""]
    assert [" ".join(line.split()) for line in lines[3:7]] == [
        "case candidate p50 ms 95% interval p90 ms p99 ms runs seq/s tok/s x baseline 95% interval",
        " ".join("-" * width for width in (4, 9, 6, 12, 6, 6, 4, 5, 5, 10, 12)),
        "2x8 eager 4.00 4.00..4.00 4.00 4.00 10 500 4000 1.00 1.00..1.00",
        "2x8 engine 2.00 2.00..2.00 2.00 2.00 10 1000 8000 2.00 2.00..2.00",
    ]
    assert any("tokenization excluded" in line for line in lines)
    assert any("p99 of 10 runs" in line for line in lines[9:])


def test_benchmark_markdown_is_a_table_below_what_it_depends_on():
    text = to_markdown(_benchmark())
    assert text.index("* cpu: Test CPU") < text.index("| case |") < text.index("## Warnings")
    assert text.count("p99 of 10 runs") == 2, "one line for each candidate"


class _Json:
    """A report that is its JSON."""

    def __init__(self, data):
        self.to_json = lambda: data


def _full():
    """A benchmark with every figure that a report may have."""
    data = _benchmark().to_json()
    texts = {"name": "texts.jsonl", "sequences": 3}
    data["measurements"][1] |= {"fraction_of_floor": 0.5, "floor_bound": "memory"}
    data["measurements"][1] |= {"max_abs_difference": 1e-6, "peak_bytes": 3e8}
    data["measurements"].append(
        data["measurements"][1]
        | {"case": "texts.jsonl", "workload": texts, "waste": 0.35, "fixed_length_ratio": 1.5}
        | {"fraction_of_floor": 1.2, "first_ms": 9e9}
    )
    data["candidates"]["engine"] |= {"weights_bytes": 2e8, "load_ms": 1500.0, "notes": ["packs"]}
    data["ceiling"] = {"gemm_fp32_gflops": 190.0, "gemm_fp32_by": "x", "formula": "F / R"}
    data["refused"] = [{"name": "optimum", "reason": "absent", "hint": "pip install it"}]
    data["warnings"] += [
        {"code": "load", "candidate": "", "point": "", "text": "was busy"},
        {"code": "throttling", "candidate": "", "point": "2x8", "text": "slowed down"},
        {"code": "noisy", "candidate": "engine", "point": "", "text": "noisy"},
    ]
    return data


def test_benchmark_figures_that_are_told_get_a_column():
    lines = [" ".join(line.split()) for line in to_text(_Json(_full())).splitlines()]
    header = next(line for line in lines if line.startswith("case candidate"))
    assert header.endswith("of floor bound waste x fixed max diff peak MB")
    (shape,) = (line for line in lines if line.startswith("2x8 engine"))
    assert shape.endswith("50.0% memory 0.0% - 1.00e-06 300")
    (texts,) = (line for line in lines if line.startswith("texts.jsonl engine"))
    assert texts.endswith("> 100% memory 35.0% 1.50 1.00e-06 300")
    assert "engine fp32 1.50 0.00300 200 300 1.50" in lines, "first run: that of shapes"
    for told in (
        "this machine: was busy",
        "2x8: slowed down",
        "engine: noisy",
        "optimum: absent (pip install it)",
    ):
        assert told in lines


def test_benchmark_markdown_tells_how_it_was_measured():
    text = to_markdown(_Json(_full()))
    for told in (
        "## Loading and memory",
        "(F / R): fp32 190 GFLOP/s (x).",
        "Interleaved, paired rounds",
        "share of the positions that a candidate computes that are padding",
        "* engine: packs",
        "## Not measured",
    ):
        assert told in text, told


def test_a_benchmark_of_an_older_version_is_shown():
    data = _benchmark().to_json()
    for key in ("candidates", "ceiling", "refused"):
        data.pop(key, None)
    data["options"] = {"min_time_s": 2.0, "min_runs": 10, "max_runs": 1000, "warmup": 3}
    data["measurements"] = [
        {key: value for key, value in one.items() if value is not None and key != "case"}
        for one in data["measurements"]
    ]
    text = to_markdown(_Json(data))
    assert "| 2x8 | engine |" in text
    assert "A case ends after 2 s a candidate, 10 to 1000 rounds." in text
    assert "Loading" not in text


def test_checks_name_the_command_that_helps():
    checks = [
        Check("onnx", Status.OK, "1.23"),
        Check("nvcc", Status.MISSING, "not found", "apt-get install nvcc"),
    ]
    assert checks_text(checks).splitlines() == [
        "what  status   detail",
        "----  -------  ---------",
        "onnx  ok       1.23",
        "nvcc  missing  not found",
        "",
        "To add what is missing:",
        "  nvcc: apt-get install nvcc",
    ]
    assert json.loads(checks_json(checks))["checks"][1]["status"] == "missing"


def test_short_numbers():
    shown = [short(x) for x in (0, 1.23456e-6, 0.0123456, 1.0, 12.345, 1234.5, None, float("nan"))]
    assert shown == ["0", "1.23e-06", "0.0123", "1.00", "12.3", "1234", "-", "nan"]


def test_a_share_is_only_100_percent_when_it_is():
    assert [share(x) for x in (1.0, 0.99999, 0.5, None)] == ["100%", "99.9%", "50.0%", "-"]


def test_a_bar_in_a_cell_does_not_split_it():
    assert markdown_table(["a"], [["x|y"]]).splitlines()[-1] == "| x\\|y |"
