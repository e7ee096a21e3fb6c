"""A BenchmarkReport for people."""

from __future__ import annotations

from convbert_deploy.benchmark import BenchmarkReport, Measurement
from convbert_deploy.report_table import markdown_table, short, text_table

_HEADERS = (
    "batch x seq",
    "candidate",
    "p50 ms",
    "95% interval",
    "p90 ms",
    "p99 ms",
    "runs",
    "seq/s",
    "tok/s",
    "x baseline",
    "95% interval",
)


def benchmark_text(report: BenchmarkReport) -> str:
    """For a terminal: what the figures depend on, one row a candidate and point, warnings."""
    lines = [
        *_header_lines(report, ""),
        "",
        text_table(*_table(report), left=2),
        "",
        _legend(report),
    ]
    if report.warnings:
        lines += ["", "Warnings:", *(f"  {text}" for text in _warning_texts(report))]
    return "\n".join(lines)


def benchmark_markdown(report: BenchmarkReport) -> str:
    """For a file: the same as the terminal's."""
    lines = [
        "# Benchmark",
        "",
        *_header_lines(report, "* "),
        "",
        markdown_table(*_table(report), left=2),
    ]
    lines += ["", _legend(report)]
    if report.warnings:
        lines += ["", "## Warnings", "", *(f"* {text}" for text in _warning_texts(report))]
    return "\n".join(lines) + "\n"


def _header_lines(report: BenchmarkReport, bullet: str) -> list[str]:
    return [f"{bullet}{name}: {value}" for name, value in report.header.items()]


def _legend(report: BenchmarkReport) -> str:
    return (
        f"x baseline: median over paired rounds of {report.baseline} time / candidate time (2 is "
        f"twice as fast). Wall time of one call with inputs and outputs on the host; "
        f"{report.options.warmup} warm-up runs; tok/s counts real tokens; tokenization excluded."
    )


def _table(report: BenchmarkReport) -> tuple[list[str], list[list[str]]]:
    """Headers and rows; each figure in ``Measurement.extra`` gets a column at the end."""
    extras = sorted({name for one in report.measurements for name in one.extra})
    rows = [
        [*_row(one), *(short(one.extra.get(name)) for name in extras)]
        for one in report.measurements
    ]
    return [*_HEADERS, *extras], rows


def _row(one: Measurement) -> list[str]:
    interval, ratio = one.p50_interval_ms, one.speedup_interval
    return [
        str(one.point),
        one.candidate,
        short(one.p50_ms),
        f"{short(interval.low)}..{short(interval.high)}",
        short(one.p90_ms),
        short(one.p99_ms),
        str(len(one.times_ms)),
        short(one.sequences_per_s),
        short(one.tokens_per_s),
        f"{one.speedup:.2f}",
        f"{ratio.low:.2f}..{ratio.high:.2f}",
    ]


def _warning_texts(report: BenchmarkReport) -> list[str]:
    """One line for each warning; the same advice on several points is given once."""
    places: dict[tuple[str, str], list[str]] = {}
    for one in report.warnings:
        places.setdefault((one.candidate, one.text), []).append(one.point)
    return [
        f"{candidate} at {', '.join(points)}: {text}"
        for (candidate, text), points in places.items()
    ]
