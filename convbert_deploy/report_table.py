"""A table as plain text or Markdown, and numbers short enough to stand in one."""

from __future__ import annotations

import math
from collections.abc import Sequence

Row = Sequence[str]


def text_table(headers: Row, rows: Sequence[Row], left: int = 1) -> str:
    """Columns padded with spaces; the first ``left`` columns flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    lines = [headers, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown_table(headers: Row, rows: Sequence[Row], left: int = 1) -> str:
    """A GitHub table; the first ``left`` columns flush left, the others right."""
    rule = ["---" if index < left else "---:" for index in range(len(headers))]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
        for line in (headers, rule, *rows)
    )


def short(value: float | None, digits: int = 3) -> str:
    """Significant digits, with an exponent only below 0.001: 0.0123, 12.3, 1234, 1.23e-06."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) >= 10**digits:
        return f"{value:.0f}"
    if abs(value) < 1e-3:
        return f"{value:.{digits - 1}e}"
    return f"{value:#.{digits}g}".rstrip(".")


def share(value: float | None) -> str:
    """A fraction as a percentage that says 100 % only when it is."""
    if value is None:
        return "-"
    return "100%" if value == 1 else f"{math.floor(value * 1000) / 10:.1f}%"
