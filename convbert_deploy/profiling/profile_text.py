"""A ProfileReport for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from convbert_deploy.profiling.profile_report import ProfileReport, Row
from convbert_deploy.report_table import share, short, text_table

_PLAN_FACTS = {
    "runtime": "runtime",
    "kernel_count": "kernels",
    "fused_attention": "attentions in one kernel",
    "scratch_bytes": "scratch, bytes at the largest shape",
}


def profile_text(report: ProfileReport, top: int = 12) -> str:
    """Totals, then ``top`` rows of each table, then what is not fused."""
    lines = [
        f"{report.engine}: {report.backend}, {report.batch}x{report.seq} real tokens, "
        f"{report.runs} runs",
        *(f"{name}: {value}" for name, value in report.header.items()),
        "",
        *_totals(report),
    ]
    lines += _section("By operator", _operators(report.operators, top))
    if report.sections:
        lines += _section("By part of the model", _sections(report.sections))
    if report.kernels_ms is not None:
        title = "Slowest kernels, the same one of all layers together"
        lines += _section(title, _groups(report.groups, top))
    if report.phases_ms:
        rows = [[phase, short(spent)] for phase, spent in report.phases_ms.items()]
        lines += _section("Inside the layers' kernels", text_table(("phase", "ms"), rows))
    if report.kernels_ms is not None and not report.plan:
        lines += ["", "Not fused:", *_findings(report)]
    lines += [f"\nNote: {note}" for note in report.notes]
    return "\n".join(lines)


def _totals(report: ProfileReport) -> list[str]:
    lines = [
        f"{name}: {short(value)} ms"
        for name, value in (
            ("one call, without the profiler (median)", report.wall_ms),
            ("one run of the session, under the profiler", report.profiled_ms),
            ("sum of its kernels", report.kernels_ms),
            ("outside the kernels, the profiler's own cost included", report.overhead_ms),
        )
        if value is not None
    ]
    plan = report.plan
    return lines + [f"{text}: {plan[key]}" for key, text in _PLAN_FACTS.items() if key in plan]


def _section(title: str, table: str) -> list[str]:
    return ["", f"{title}:", *(f"  {line}" for line in table.splitlines())]


def _operators(rows: Sequence[Row], top: int) -> str:
    cells = [
        [row.name, str(row.count), short(row.ms), share(row.share), short(row.gflop_per_s)]
        for row in rows[:top]
    ]
    cells += _others(rows[top:], blank=1)
    return text_table(("operator", "kernels", "ms", "share", "GFLOP/s"), cells)


def _sections(rows: Sequence[Row]) -> str:
    cells = [[row.name, str(row.count), short(row.ms), share(row.share)] for row in rows]
    return text_table(("part", "kernels", "ms", "share"), cells)


def _groups(rows: Sequence[Row], top: int) -> str:
    cells = [
        [
            f"{row.name} {row.operator}",
            str(row.count),
            short(row.ms),
            share(row.share),
            short(row.gflop_per_s),
            f"{row.shape} {row.type}".strip(),
        ]
        for row in rows[:top]
    ]
    cells += _others(rows[top:], blank=2)
    return text_table(("kernel", "count", "ms", "share", "GFLOP/s", "shape"), cells)


def _others(rows: Sequence[Row], blank: int) -> list[list[str]]:
    """One row for those not listed."""
    if not rows:
        return []
    spent = None if rows[0].ms is None else sum(row.ms or 0 for row in rows)
    part = None if rows[0].share is None else sum(row.share or 0 for row in rows)
    name, count = f"{len(rows)} others", sum(row.count for row in rows)
    return [[name, str(count), short(spent), share(part), *["-"] * blank]]


def _findings(report: ProfileReport) -> list[str]:
    if not report.findings:
        return ["  nothing above the threshold"]
    return [
        f"  {share(one.share)} ({short(one.ms)} ms, {one.count} kernels): {one.text}"
        for one in report.findings
    ]
