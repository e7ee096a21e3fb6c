"""The result of ``bench`` for people, as text and Markdown, and the tables that its page shares.

Everything is made from ``BenchmarkReport.to_json()``: a file written last year reads like a report
of this run. Figures that a report lacks leave their column out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from convbert_deploy.report_table import markdown_table, share, short, text_table

Json = Mapping[str, Any]


class _Report(Protocol):
    def to_json(self) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of figures: its header and the text of one measurement's cell."""

    name: str
    cell: Callable[[Json], str]


@dataclasses.dataclass(frozen=True)
class Table:
    """Headers and rows of text; the first ``left`` columns are words, the others numbers."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1


def benchmark_text(report: _Report) -> str:
    """For a terminal: what the figures depend on, one row a candidate and case, warnings."""
    data = report.to_json()
    lines = [*_facts(data, ""), "", _as_text(figures(data))]
    costs = candidate_costs(data)
    if costs:
        lines += ["", _as_text(costs)]
    lines += ["", *_legend(data)]
    for title, texts in (("Warnings", warning_texts(data)), ("Not measured", refusals(data))):
        if texts:
            lines += ["", f"{title}:", *(f"  {text}" for text in texts)]
    return "\n".join(lines)


def benchmark_markdown(report: _Report) -> str:
    """For a file: the terminal's, how it was measured, and how to get each peer."""
    data = report.to_json()
    lines = ["# Benchmark", "", *_facts(data, "* "), "", _as_markdown(figures(data))]
    costs = candidate_costs(data)
    if costs:
        lines += ["", "## Loading and memory", "", _as_markdown(costs)]
    lines += ["", "## How it was measured", "", *(f"* {text}" for text in how_measured(data))]
    for title, texts in (
        ("Candidates", candidate_texts(data)),
        ("Not measured", refusals(data)),
        ("Warnings", warning_texts(data)),
    ):
        if texts:
            lines += ["", f"## {title}", "", *(f"* {text}" for text in texts)]
    return "\n".join(lines) + "\n"


def figures(data: Json) -> Table:
    """Every measurement; each figure in its ``extra`` gets a column at the end."""
    measured = data["measurements"]
    extras = sorted({name for one in measured for name in one.get("extra") or {}})
    columns = [*_COLUMNS, *(column for key, column in _OPTIONAL if _told(measured, key))]
    columns += [
        Column(name, lambda one, name=name: short(one["extra"].get(name))) for name in extras
    ]
    return Table(
        tuple(column.name for column in columns),
        tuple(tuple(column.cell(one) for column in columns) for one in measured),
        left=2,
    )


def candidate_costs(data: Json) -> Table | None:
    """Loading and memory of every candidate; None where the report does not tell them."""
    facts = data.get("candidates") or {}
    costs = {name: _costs(data, name, one) for name, one in facts.items()}
    told = [column for column in _COST_COLUMNS if any(one[column] != "-" for one in costs.values())]
    if not told:
        return None
    rows = (
        (name, facts[name].get("arithmetic") or "-", *(one[column] for column in told))
        for name, one in costs.items()
    )
    return Table(("candidate", "arithmetic", *told), tuple(rows), left=2)


_COST_COLUMNS = (
    "ready s",
    "load s",
    "slowest first run s",
    "weights MB",
    "loaded MB",
    "peak MB",
    "peak / weights",
)


def _costs(data: Json, name: str, facts: Json) -> dict[str, str]:
    """A candidate's cells by the names of ``_COST_COLUMNS``."""
    own = [one for one in data["measurements"] if one["candidate"] == name]
    peak = max((one.get("peak_bytes") or 0 for one in own), default=0) or None
    # a workload's first run is its first batch or all of them: only shapes compare
    firsts = [one.get("first_ms") or 0 for one in own if not one.get("workload")]
    weights = facts.get("weights_bytes")
    cells = (
        seconds(facts.get("ready_ms")),
        seconds(facts.get("load_ms")),
        seconds(max(firsts, default=0) or None),
        megabytes(weights),
        megabytes(facts.get("loaded_bytes")),
        megabytes(peak),
        f"{peak / weights:.2f}" if peak and weights else "-",
    )
    return dict(zip(_COST_COLUMNS, cells, strict=True))


def how_measured(data: Json) -> list[str]:
    """In plain words, for a reader who was not there."""
    options, baseline = data["options"], data["baseline"]
    texts = [
        f"Interleaved, paired rounds: in every round each candidate runs once on the same input, "
        f"in an order that changes, after {options['warmup']} of warm-up. A machine that slows "
        "down slows all of them.",
        "A time is the wall time of one call with inputs and outputs on the host; tokenization is "
        "not part of it. p50 is the median; its interval holds the true median with 95 % "
        "confidence (order statistics, no assumption on the distribution).",
        f"x baseline: median over the rounds of {baseline} time / candidate time, with its 95 % "
        "interval: 2 is twice as fast. tok/s counts real tokens, not padding.",
        _stopping(options),
    ]
    ceiling = data.get("ceiling")
    if ceiling:
        texts.append(
            f"of floor: floor / p50, where the floor is the shortest time this machine allows by "
            f"rates measured in the same run ({ceiling['formula']}): "
            f"{', '.join(ceiling_texts(ceiling))}."
        )
    if _told(data["measurements"], "max_abs_difference"):
        texts.append(
            f"max diff: the largest difference of an output to {baseline} on the same input."
        )
    if _workloads(data):
        texts.append(
            "waste: share of the positions that a candidate computes that are padding. "
            "x fixed: its time for a real token of the variable-length texts over its time for a "
            "token of full batches of one length (1 is no loss)."
        )
    return texts


def ceiling_texts(ceiling: Json) -> list[str]:
    """The machine's rates, each with what measured it."""
    texts = []
    for kind in ("fp32", "bf16", "fp16", "int8"):
        rate = ceiling.get(f"gemm_{kind}_gflops")
        if rate:
            by = ceiling.get(f"gemm_{kind}_by")
            texts.append(f"{kind} {short(rate)} GFLOP/s" + (f" ({by})" if by else ""))
    for kind in ("read", "copy"):
        rate = ceiling.get(f"{kind}_gb_s")
        if rate:
            texts.append(f"memory {kind} {short(rate)} GB/s")
    return texts


def candidate_texts(data: Json) -> list[str]:
    """Versions of each candidate, how to get the same, and what is special about it."""
    texts = []
    for name, one in (data.get("candidates") or {}).items():
        parts = [", ".join(f"{key} {value}" for key, value in (one.get("versions") or {}).items())]
        parts += [one["command"]] if one.get("command") else []
        told = "; ".join(filter(None, [*parts, *(one.get("notes") or [])]))
        texts += [f"{name}: {told}"] if told else []
    return texts


def refusals(data: Json) -> list[str]:
    """Candidates that were asked for and could not run, with what helps."""
    return [
        f"{one['name']}: {one['reason']}" + (f" ({one['hint']})" if one.get("hint") else "")
        for one in data.get("refused") or ()
    ]


def warning_texts(data: Json) -> list[str]:
    """One line for each warning; the same advice on several cases is given once."""
    places: dict[tuple[str, str], list[str]] = {}
    for one in data["warnings"]:
        places.setdefault((one["candidate"], one["text"]), []).append(one["point"])
    return [
        _at(candidate, ", ".join(filter(None, points))) + text
        for (candidate, text), points in places.items()
    ]


def case_of(measurement: Json) -> str:
    """The name of a shape or workload: ``8x128``."""
    return measurement.get("case") or f"{measurement['batch']}x{measurement['seq']}"


def fraction(value: float | None) -> str:
    """A part of the machine's limit, as percent; above the measured limit it says only that."""
    if value is None:
        return "-"
    return "> 100%" if value > 1 else share(value)


def seconds(milliseconds: float | None) -> str:
    return short(None if milliseconds is None else milliseconds / 1e3)


def megabytes(size: float | None) -> str:
    """10^6 bytes."""
    return short(None if size is None else size / 1e6)


def interval(ends: Sequence[float], show: Callable[[float], str] = short) -> str:
    return f"{show(ends[0])}..{show(ends[1])}"


def _legend(data: Json) -> Iterator[str]:
    """What the columns mean, in the few lines that a terminal has."""
    yield (
        f"x baseline: median over paired rounds of {data['baseline']} time / candidate time (2 is "
        "twice as fast). Wall time of one call with inputs and outputs on the host; "
        f"{data['options']['warmup']} warm-up runs; tok/s counts real tokens; tokenization excluded."
    )
    if _told(data["measurements"], "fraction_of_floor"):
        yield "of floor: the shortest time this machine allows for that arithmetic / p50."
    if _workloads(data):
        yield (
            "waste: computed positions that are padding; x fixed: time for a real token over that "
            "in full batches of one length."
        )


def _at(candidate: str, points: str) -> str:
    if candidate and points:
        return f"{candidate} at {points}: "
    return f"{candidate or points or 'this machine'}: "


def _stopping(options: Json) -> str:
    bounds = f"{options['min_runs']} to {options['max_runs']} rounds"
    precision = options.get("precision")
    if precision:
        longest = options.get("max_time_s")
        return (
            f"A case ends when every interval is within {precision:.1%} of its median (after "
            f"{options['min_time_s']:g} s a candidate, {bounds}"
            + (f", at most {longest:g} s a candidate" if longest else "")
            + ")."
        )
    return f"A case ends after {options['min_time_s']:g} s a candidate, {bounds}."


def _workloads(data: Json) -> bool:
    return any(one.get("workload") for one in data["measurements"])


def _told(measured: Sequence[Json], key: str) -> bool:
    return any(one.get(key) is not None for one in measured)


def _facts(data: Json, bullet: str) -> Iterator[str]:
    for name, value in data["header"].items():
        yield f"{bullet}{name}: {value}"


def _ratio(value: float) -> str:
    return f"{value:.2f}"


def _as_text(table: Table) -> str:
    return text_table(table.headers, table.rows, left=table.left)


def _as_markdown(table: Table) -> str:
    return markdown_table(table.headers, table.rows, left=table.left)


_COLUMNS = (
    Column("case", case_of),
    Column("candidate", lambda one: one["candidate"]),
    Column("p50 ms", lambda one: short(one["p50_ms"])),
    Column("95% interval", lambda one: interval(one["p50_interval_ms"])),
    Column("p90 ms", lambda one: short(one["p90_ms"])),
    Column("p99 ms", lambda one: short(one["p99_ms"])),
    Column("runs", lambda one: str(one["runs"])),
    Column("seq/s", lambda one: short(one["sequences_per_s"])),
    Column("tok/s", lambda one: short(one["tokens_per_s"])),
    Column("x baseline", lambda one: _ratio(one["speedup"])),
    Column("95% interval", lambda one: interval(one["speedup_interval"], _ratio)),
)
#: Columns that stand only in reports that tell the figure.
_OPTIONAL = (
    ("fraction_of_floor", Column("of floor", lambda one: fraction(one.get("fraction_of_floor")))),
    ("fraction_of_floor", Column("bound", lambda one: one.get("floor_bound") or "-")),
    ("workload", Column("waste", lambda one: share(one.get("waste")))),
    ("fixed_length_ratio", Column("x fixed", lambda one: short(one.get("fixed_length_ratio")))),
    ("max_abs_difference", Column("max diff", lambda one: short(one.get("max_abs_difference")))),
    ("peak_bytes", Column("peak MB", lambda one: megabytes(one.get("peak_bytes")))),
)
