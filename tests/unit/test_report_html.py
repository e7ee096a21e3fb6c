"""The page of a benchmark or a profile: one file, nothing fetched, everything escaped and told."""

from __future__ import annotations

import html.parser
import itertools
import json
import re
import xml.etree.ElementTree

import pytest
from click.testing import CliRunner

from convbert_deploy.cli import main
from convbert_deploy.errors import ConvBertDeployError, MissingDependencyError, OutputError
from convbert_deploy.report_html import html_text, read_result, write_html
from convbert_deploy.report_html.charts import Axes, Bar, Series, bar_chart, line_chart, spread

pytest.importorskip("matplotlib")

HOSTILE = "<script>alert('x')</script>&\""
_COSTS = {"eager fp32": 8.0, "engine int8": 1.0, HOSTILE: 4.0}


def _measurement(candidate, batch, seq, **changes):
    cost = _COSTS[candidate] * batch * seq / 32
    tokens = batch * seq
    return {
        "candidate": candidate,
        "case": f"{batch}x{seq}",
        "batch": batch,
        "seq": seq,
        "tokens": tokens,
        "runs": 40,
        "p50_ms": cost,
        "p50_interval_ms": [cost * 0.99, cost * 1.01],
        "p90_ms": cost * 1.1,
        "p99_ms": cost * 1.2,
        "first_ms": cost * 3,
        "sequences_per_s": batch / cost * 1e3,
        "tokens_per_s": tokens / cost * 1e3,
        "speedup": 8 / _COSTS[candidate],
        "speedup_interval": [7.9 / _COSTS[candidate], 8.1 / _COSTS[candidate]],
        "fraction_of_floor": 0.5,
        "floor_bound": "compute",
        "extra": {},
        **changes,
    }


def _benchmark(points=((1, 32), (8, 32), (1, 128), (8, 128)), **changes):
    measured = [_measurement(name, *point) for point in points for name in _COSTS]
    return {
        "kind": "benchmark",
        "header": {"cpu": "Test CPU", "threads": "1"},
        "options": {"min_time_s": 2.0, "min_runs": 10, "max_runs": 1000, "warmup": 3},
        "baseline": "eager fp32",
        "candidates": {
            name: {"arithmetic": "int8", "versions": {"v": HOSTILE}, "weights_bytes": 10**8}
            for name in _COSTS
        },
        "ceiling": {"gemm_fp32_gflops": 190.0, "gemm_fp32_by": "x", "formula": "floor = F / R"},
        "measurements": measured,
        "warnings": [
            {"code": "noisy", "candidate": HOSTILE, "point": "1x32", "text": "is noisy"},
            {"code": "load", "candidate": "", "point": "", "text": "was busy"},
        ],
        "refused": [{"name": "optimum", "reason": "not installed", "hint": "pip install it"}],
        **changes,
    }


def _workload(waste):
    texts = {"name": "texts.jsonl", "sequences": 320}
    told = {"batch": None, "seq": None, "case": "texts.jsonl", "workload": texts}
    return [
        _measurement(name, 1, 640)
        | told
        | {"waste": waste if name == "eager fp32" else 0.0, "fixed_length_ratio": 1.5}
        for name in _COSTS
    ]


def _profile(**changes):
    row = {"name": "MatMul", "operator": "MatMul", "count": 12, "ms": 3.0, "share": 0.75}
    row |= {"shape": "8x4x4", "type": "float", "gflop_per_s": 180.0}
    other = {**row, "name": HOSTILE, "ms": 1.0, "share": 0.25, "gflop_per_s": None}
    return {
        "kind": "profile",
        "engine": "base.engine",
        "backend": "onnxruntime-cpu fp32",
        "batch": 8,
        "seq": 128,
        "runs": 20,
        "header": {"cpu": "Test CPU", "threads": "2"},
        "wall_ms": 4.5,
        "profiled_ms": 4.4,
        "kernels_ms": 4.0,
        "overhead_ms": 0.4,
        "operators": [row, other],
        "sections": [{**row, "name": "layer 0"}],
        "groups": [row, other],
        "phases_ms": {},
        "not_fused": [{"code": "gelu", "text": "GELU alone", "count": 4, "ms": 1, "share": 0.25}],
        "plan": {},
        "notes": [],
        **changes,
    }


class _Reader(html.parser.HTMLParser):
    """Elements, ids, references and text; complains about tags that do not match."""

    _VOID = ("meta", "path", "circle", "rect", "use", "br")

    def __init__(self, text):
        super().__init__()
        self.elements, self.ids, self.references, self.open = [], [], [], []
        self.words = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        told = dict(attrs)
        self.elements.append((tag, told))
        self.ids += [told["id"]] if "id" in told else []
        for name in ("href", "xlink:href", "src", "aria-labelledby"):
            self.references += [(tag, name, told[name])] if name in told else []
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self._VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self._VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def full():
    data = _benchmark()
    data["measurements"] += _workload(0.35)
    return html_text(data, _profile())


def test_a_page_asks_for_nothing_from_outside(full):
    page = _Reader(full)
    assert not [tag for tag, _ in page.elements if tag in ("script", "link", "img", "iframe")]
    outside = [one for one in page.references if one[1] != "aria-labelledby" and one[2][0] != "#"]
    assert outside == []
    assert not re.search(r"url\((?!#)|@import|\bon\w+=", full)
    assert "default-src 'none'" in full


def test_ids_are_unique_and_every_reference_has_its_target(full):
    page = _Reader(full)
    assert len(page.ids) == len(set(page.ids))
    wanted = {word.lstrip("#") for _, _, value in page.references for word in value.split()}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", full))
    assert wanted <= set(page.ids)


def test_text_from_files_is_escaped(full):
    assert "<script>alert" not in full
    assert "&lt;script&gt;" in full
    assert HOSTILE in "".join(_Reader(full).words)


def test_everything_is_in_the_page(full):
    page = _Reader(full)
    headings = re.findall(r"<h2>(.*?)</h2>", full)
    assert headings == [
        *("Speed-up", "Latency", "Throughput", "Fraction of the ceiling"),
        *("Texts of different lengths", "Time by operator", "Not fused", "Kernels"),
        *("Loading and memory", "All figures", "Warnings", "Not measured"),
        *("How it was measured", "Candidates, and how to get them"),
    ]
    words = " ".join(page.words)
    for told in (
        "engine int8 has the lowest median in all 5 cases",
        "2 warnings",
        "this machine: was busy",
        "optimum: not installed (pip install it)",
        "fp32 190 GFLOP/s (x)",
        "35.0% padding",
        "Interleaved, paired rounds",
        "GELU alone",
    ):
        assert told in words.replace("\xa0", " "), told
    titles = [word for word in page.words if word.startswith(("Latency,", "Throughput,"))]
    assert len(set(titles)) == 6, "two lengths, two batches; throughput of two lengths"


def test_charts_are_described_and_leave_their_colours_to_the_page(full):
    charts = re.findall(r'<svg class="chart".*?</svg>', full, flags=re.DOTALL)
    assert len(charts) == 11
    for chart in charts:
        assert re.search(r"<title [^>]+>.+</title><desc [^>]+>.+</desc>", chart)
        assert "var(--c0)" in chart or "var(--c1)" in chart
        assert not re.findall(r"#[0-9a-f]{6}\b", chart)
    assert "8.00 at 1, 64.0 at 8" in charts[0]


def test_the_fastest_of_an_arithmetic_is_set_off():
    data = _benchmark()
    data["candidates"]["eager fp32"]["arithmetic"] = "fp32"
    page = html_text(data)
    best = re.findall(r'<td class="best">(\d+\.\d+x)', page)
    assert best == ["8.00x"] * 4, "eager has no rival in fp32: nothing to set off"


def test_a_single_shape_gives_bars():
    page = html_text(_benchmark(points=((8, 128),)))
    assert "Latency at 8x128" in page
    assert "<h2>Throughput</h2>" not in page


def test_shapes_that_are_no_product_are_shown_along_both_axes():
    page = html_text(_benchmark(points=((1, 32), (1, 128), (8, 128), (1, 512))))
    titles = re.findall(r"<title [^>]+>(Throughput.*?)</title>", page)
    assert titles == ["Throughput, batch 1", "Throughput, 128 tokens a sequence"]


def test_a_report_of_an_older_version_is_shown():
    data = _benchmark()
    for key in ("candidates", "ceiling", "refused"):
        del data[key]
    for one in data["measurements"]:
        for key in ("case", "fraction_of_floor", "floor_bound"):
            del one[key]
    page = html_text(data)
    assert "1x128" in page
    assert "Fraction of the ceiling" not in page
    assert "Loading and memory" not in page


def test_more_candidates_than_colours():
    names = [f"candidate {index}" for index in range(11)]
    measured = [
        {**_measurement("eager fp32", batch, 32), "candidate": name}
        for batch in (1, 8)
        for name in names
    ]
    page = html_text(_benchmark(measurements=measured, baseline=names[0], candidates={}))
    assert all(name in page for name in names)


def test_only_what_differs_of_the_profiles_machine_is_told_again(full):
    section = full.split('id="profile-operators"')[1].split("</section>")[0]
    assert "<dt>threads</dt>" in section
    assert "<dt>cpu</dt>" not in section
    assert "<dt>cpu</dt>" in html_text(_profile())


def test_an_untimed_profile_lists_kernels():
    row = {"name": "gemm", "operator": "gemm", "count": 5, "ms": None, "share": None}
    row |= {"shape": "", "type": "", "gflop_per_s": None}
    plan = {"kernel_count": 5, "kernels": {"gemm": 5}}
    page = html_text(
        _profile(operators=[row], groups=[row], sections=[], kernels_ms=None, wall_ms=None,
                 profiled_ms=None, overhead_ms=None, plan=plan, notes=["no GPU"], not_fused=[])
    )  # fmt: skip
    assert "no GPU" in page
    assert "<h2>Not fused</h2>" not in page and "<svg" not in page


def test_phases_inside_a_kernel_have_a_chart():
    page = html_text(_profile(phases_ms={"attention": 1.0, "up": 3.0}))
    assert "3.00 ms, 75.0%" in page


def test_the_same_result_gives_the_same_page():
    assert html_text(_profile()) == html_text(_profile())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "parity"}, "its kind is 'parity'"),
        ([], "its kind is None"),
        ({"kind": "profile", "engine": "x"}, "profile without batch, groups"),
    ],
)
def test_another_result_is_refused(data, message, tmp_path):
    with pytest.raises(ConvBertDeployError, match=message) as raised:
        write_html(data, tmp_path / "page.html")
    assert "--json" in raised.value.hint
    assert not list(tmp_path.iterdir())


def test_a_benchmark_is_no_profile():
    with pytest.raises(ConvBertDeployError, match="expected a profile"):
        html_text(_benchmark(), _benchmark())


def test_files_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(ConvBertDeployError, match="cannot read"):
        read_result(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConvBertDeployError, match=r"bad\.json is not JSON"):
        read_result(tmp_path / "bad.json")
    with pytest.raises(OutputError):
        write_html(_profile(), tmp_path / "bad.json" / "page.html")


def test_without_matplotlib_the_command_that_helps_is_told(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError) as raised:
        html_text(_profile())
    assert "convbert-deploy[bench]" in raised.value.hint


def test_the_command(tmp_path):
    bench, profile = tmp_path / "bench.json", tmp_path / "profile.json"
    bench.write_text(json.dumps(_benchmark()))
    profile.write_text(json.dumps(_profile()))
    done = CliRunner().invoke(main, ["report", str(bench), "--profile", str(profile)])
    assert done.exit_code == 0, done.output
    assert "Time by operator" in (tmp_path / "bench.html").read_text()
    wrong = CliRunner().invoke(main, ["report", str(tmp_path / "absent.json")])
    assert wrong.exit_code == 3


def test_labels_are_moved_apart_in_order_and_stay_inside():
    placed = spread([0.5, 0.51, 0.52, 0.1], 0.1, 0.0, 1.0)
    ordered = sorted(placed)
    assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(ordered))
    assert placed.index(min(placed)) == 3 and placed[0] < placed[1] < placed[2]
    crowded = spread([1.0] * 30, 0.1, 0.0, 1.0)
    assert min(crowded) >= -1e-9 and max(crowded) <= 1.0
    assert spread([0.3], 0.1, 0, 1) == [0.3] and spread([], 0.1, 0, 1) == []


def test_charts_are_well_formed_whatever_the_values():
    series = [Series("one", 0, (1.0,), (5.0,)), Series("a & b", 9, (1.0, 8.0), (5.0, 0.001))]
    chart = line_chart(series, Axes("t < u", "batch", "ms"), "c")
    bars = bar_chart([Bar("none", 0.0, "0 ms")], "t", "d", unit="ms")
    for svg in (chart, bars):
        xml.etree.ElementTree.fromstring(svg)


def test_a_user_s_own_matplotlib_settings_do_not_change_the_page():
    import matplotlib

    before = html_text(_profile())
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path"}):
        assert html_text(_profile()) == before
