"""Reports in the three forms that leave the program: JSON, Markdown and plain text."""

from __future__ import annotations

import json
from collections.abc import Sequence

from convbert_deploy.benchmarking import BenchmarkReport
from convbert_deploy.diagnosis import Check
from convbert_deploy.parity import ParityReport
from convbert_deploy.report_benchmark import benchmark_markdown, benchmark_text
from convbert_deploy.report_parity import parity_markdown, parity_text
from convbert_deploy.report_table import text_table

Report = ParityReport | BenchmarkReport

__all__ = [
    "Report",
    "benchmark_markdown",
    "benchmark_text",
    "checks_json",
    "checks_text",
    "parity_markdown",
    "parity_text",
    "to_json_text",
    "to_markdown",
    "to_text",
]


def to_json_text(report: Report) -> str:
    """Everything, every raw number included; strict JSON (no NaN), ends in a newline."""
    return json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n"


def to_markdown(report: Report) -> str:
    """For a file or a pull request."""
    if isinstance(report, ParityReport):
        return parity_markdown(report)
    return benchmark_markdown(report)


def to_text(report: Report) -> str:
    """For a terminal."""
    return parity_text(report) if isinstance(report, ParityReport) else benchmark_text(report)


def checks_text(checks: Sequence[Check]) -> str:
    """``doctor`` for a terminal: one row a check, then the command that fixes each failure."""
    rows = [[check.name, check.status.value, check.detail] for check in checks]
    lines = [text_table(("what", "status", "detail"), rows, left=3)]
    fixes = [f"  {check.name}: {check.fix}" for check in checks if check.fix]
    if fixes:
        lines += ["", "To add what is missing:", *fixes]
    return "\n".join(lines)


def checks_json(checks: Sequence[Check]) -> str:
    """``doctor`` for programs."""
    return json.dumps({"kind": "doctor", "checks": [check.to_json() for check in checks]}, indent=1)
