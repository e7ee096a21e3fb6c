"""The page of a profile, and the part of it that a benchmark's page shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from convbert_deploy.report_benchmark import Json
from convbert_deploy.report_html.charts import Bar, bar_chart
from convbert_deploy.report_html.page import (
    Cell,
    Markup,
    Section,
    bullets,
    charts,
    definitions,
    joined,
    page,
    paragraph,
    table,
)
from convbert_deploy.report_table import share, short

#: Bars of the operator chart; the rest are added up.
_BARS = 10
#: Rows of the table of kernels; the JSON has them all.
_KERNELS = 40


def profile_page(data: Json) -> str:
    """The whole document, from ``ProfileReport.to_json()``."""
    title = f"Profile of {data['engine']}"
    lead = f"{data['backend']}, {data['batch']}x{data['seq']} real tokens, {data['runs']} runs"
    return page(title, lead, operator_sections(data))


def operator_sections(
    data: Json, prefix: str = "", header: Mapping[str, str] | None = None
) -> list[Section]:
    """Where the time goes, what is not fused, and the kernels.

    Args:
        prefix: of the sections' anchors.
        header: facts that the page tells already; only what differs is told again.
    """
    timed = data.get("kernels_ms") is not None
    sections = [
        Section(f"{prefix}operators", "Time by operator", _operators(data, timed, header or {})),
    ]
    if timed and not data.get("plan"):
        sections.append(Section(f"{prefix}fused", "Not fused", _findings(data)))
    if timed:
        sections.append(Section(f"{prefix}kernels", "Kernels", _kernels(data)))
    return sections


def _operators(data: Json, timed: bool, header: Mapping[str, str]) -> Markup:
    about = (
        f"{data['engine']} ({data['backend']}) at {data['batch']}x{data['seq']} real tokens. Times "
        "were taken under the runtime's profiler."
    )
    parts: list[object] = [paragraph(about)]
    parts += [paragraph(note) for note in data.get("notes") or ()]
    facts = {name: str(value) for name, value in data["header"].items()}
    new = {name: value for name, value in facts.items() if header.get(name) != value}
    parts.append(definitions({**new, **_totals(data)}))
    if timed:
        drawn = [_bars(data["operators"], "By operator", "operators")]
        if data["sections"]:
            drawn.append(_bars(data["sections"], "By part of the model", "sections"))
        if data.get("phases_ms"):
            drawn.append(_phases(data["phases_ms"]))
        parts.append(charts(drawn))
    rows = [
        (
            row["name"],
            str(row["count"]),
            short(row["ms"]),
            share(row["share"]),
            short(row["gflop_per_s"]),
        )
        for row in data["operators"]
    ]
    caption = "Kernels by operator: milliseconds of one pass, share of all kernels"
    parts.append(table(caption, ("operator", "kernels", "ms", "share", "GFLOP/s"), rows))
    return joined(parts)


def _totals(data: Json) -> dict[str, str]:
    told = {
        "one call, not profiled": data.get("wall_ms"),
        "one run of the session, profiled": data.get("profiled_ms"),
        "sum of its kernels": data.get("kernels_ms"),
        "outside the kernels": data.get("overhead_ms"),
    }
    facts = {name: f"{short(value)} ms" for name, value in told.items() if value is not None}
    for key, value in (data.get("plan") or {}).items():
        shown = value
        if isinstance(value, dict):
            shown = ", ".join(f"{name} {count}" for name, count in value.items())
        facts[key.replace("_", " ")] = str(shown)
    return facts


def _bars(rows: Sequence[Json], title: str, chart_id: str) -> str:
    shown = [(row["name"], row["ms"], row["share"]) for row in rows]
    if len(shown) > _BARS and chart_id == "operators":
        rest = shown[_BARS:]
        others = (f"{len(rest)} others", sum(r[1] for r in rest), sum(r[2] for r in rest))
        shown = [*shown[:_BARS], others]
    bars = [Bar(name, spent, f"{short(spent)} ms, {share(part)}", 1) for name, spent, part in shown]
    return bar_chart(bars, title, f"profile-{chart_id}", unit="milliseconds and share")


def _phases(phases_ms: dict[str, float]) -> str:
    total = sum(phases_ms.values())
    bars = [
        Bar(name, spent, f"{short(spent)} ms, {share(spent / total)}", 1)
        for name, spent in phases_ms.items()
    ]
    return bar_chart(bars, "Inside the layers' kernels", "profile-phases", unit="milliseconds")


def _findings(data: Json) -> Markup:
    found = data["not_fused"]
    if not found:
        return paragraph("Nothing above the threshold.")
    rows = [
        (Cell(one["text"]), str(one["count"]), short(one["ms"]), share(one["share"]))
        for one in found
    ]
    caption = "Kernels of their own that could be part of another"
    return table(caption, ("what", "kernels", "ms", "share"), rows, wrapped=(0,))


def _kernels(data: Json) -> Markup:
    rows = [
        (
            row["name"],
            row["operator"],
            str(row["count"]),
            short(row["ms"]),
            share(row["share"]),
            short(row["gflop_per_s"]),
            f"{row['shape']} {row['type']}".strip() or "-",
        )
        for row in data["groups"][:_KERNELS]
    ]
    rest = len(data["groups"]) - len(rows)
    caption = "The same kernel of all layers added up, the slowest first" + (
        f"; {rest} more are in the JSON" if rest > 0 else ""
    )
    headers = ("kernel", "operator", "count", "ms", "share", "GFLOP/s", "shape")
    return joined((table(caption, headers, rows, left=(0, 1)), _notes_on_shapes()))


def _notes_on_shapes() -> Markup:
    return bullets(
        (
            "Shape: m x k x n of a matrix product and the type of its left side; for others the "
            "output's.",
            "GFLOP/s: two operations for each of m k n, over the kernel's time.",
        )
    )
