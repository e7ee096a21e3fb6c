"""A ParityReport for people."""

from __future__ import annotations

import dataclasses

from convbert_deploy.parity import Errors, ParityReport
from convbert_deploy.report_table import markdown_table, share, short, text_table

_OUTPUT_HEADERS = (
    "output",
    "positions",
    "max abs",
    "mean abs",
    "max rel",
    "max abs/std",
    "min cosine",
    "argmax",
    "NaN",
    "Inf",
)
_CASE_HEADERS = ("case", "output", "max abs", "mean abs", "min cosine", "argmax")


def parity_text(report: ParityReport, *, cases: bool = False) -> str:
    """For a terminal; ``cases`` adds a row for each case."""
    lines = [*_head(report), "", text_table(_OUTPUT_HEADERS, _output_rows(report), left=2)]
    if cases:
        lines += ["", text_table(_CASE_HEADERS, _case_rows(report), left=2)]
    return "\n".join([*lines, *_tail(report, "  ")])


def parity_markdown(report: ParityReport) -> str:
    """For a file: all cases included."""
    lines = [
        f"# Parity: {report.candidate} against {report.reference}",
        "",
        *_head(report),
        "",
        markdown_table(_OUTPUT_HEADERS, _output_rows(report), left=2),
        "",
        "max rel: error over max(|reference|, rms of the reference). max abs/std: error over the "
        "standard deviation of the reference over all cases.",
        "",
        "## Cases",
        "",
        markdown_table(_CASE_HEADERS, _case_rows(report), left=2),
        *_tail(report, "* "),
    ]
    return "\n".join(lines) + "\n"


def _head(report: ParityReport) -> list[str]:
    bounds = ", ".join(
        f"{name.replace('_', ' ')} {limit:g}"
        for name, limit in dataclasses.asdict(report.tolerance).items()
        if limit is not None
    )
    verdict = "PASSED" if report.passed else "FAILED"
    where = "real tokens only" if report.real_tokens_only else "every position, padded ones too"
    looked_at = len(report.intermediates_checked)
    return [
        f"{verdict}: {report.candidate} against {report.reference}, {len(report.cases)} cases",
        f"Tolerance: {bounds or 'none'}; judged at {where}",
        f"NaN or Inf inside the model: looked for in {looked_at} cases, "
        f"{len(report.bad_intermediates)} found"
        if looked_at
        else "NaN or Inf inside the model: not looked for",
    ]


def _tail(report: ParityReport, bullet: str) -> list[str]:
    lines: list[str] = []
    for title, items in (
        ("Not within tolerance:", report.reasons),
        ("Left out:", [f"{case.name}: {case.reason}" for case in report.left_out]),
    ):
        if items:
            lines += ["", title, *(f"{bullet}{item}" for item in items)]
    return lines


def _output_rows(report: ParityReport) -> list[list[str]]:
    rows = []
    for name, summary in report.outputs.items():
        for positions, errors in (("all", summary.errors), ("real", summary.real_tokens)):
            if errors is not None:
                rows.append(
                    [
                        name,
                        positions,
                        short(errors.max_abs),
                        short(errors.mean_abs),
                        short(errors.max_rel),
                        short(errors.max_abs / summary.scale),
                        _cosine(errors),
                        share(errors.argmax_agreement),
                        str(errors.nan_count),
                        str(errors.inf_count),
                    ]
                )
    return rows


def _case_rows(report: ParityReport) -> list[list[str]]:
    rows = []
    for case in report.cases:
        for output in case.outputs:
            errors = output.errors
            cells = (
                [output.problem or "", "", "", ""]
                if errors is None
                else [
                    short(errors.max_abs),
                    short(errors.mean_abs),
                    _cosine(errors),
                    share(errors.argmax_agreement),
                ]
            )
            rows.append([case.name, output.output, *cells])
    return rows


def _cosine(errors: Errors) -> str:
    return "-" if errors.min_cosine is None else f"{errors.min_cosine:.6f}"
