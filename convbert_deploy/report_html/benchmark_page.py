"""The page of a benchmark: who is fastest, the plots, every figure, how it was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from convbert_deploy.report_benchmark import (
    Json,
    Table,
    candidate_costs,
    candidate_texts,
    case_of,
    ceiling_texts,
    figures,
    how_measured,
    interval,
    refusals,
    warning_texts,
)
from convbert_deploy.report_html.benchmark_charts import (
    ceiling_charts,
    latency_charts,
    throughput_charts,
    waste_charts,
)
from convbert_deploy.report_html.charts import marker_svg
from convbert_deploy.report_html.page import (
    Cell,
    Markup,
    Section,
    bullets,
    charts,
    definitions,
    element,
    joined,
    page,
    paragraph,
    table,
)
from convbert_deploy.report_html.profile_page import operator_sections
from convbert_deploy.report_table import share, short


def benchmark_page(data: Json, profile: Json | None) -> str:
    """The whole document, from ``BenchmarkReport.to_json()`` and perhaps a profile's."""
    sections = [*_sections(data)]
    if profile is not None:
        sections += operator_sections(profile, "profile-", data["header"])
    sections += [*_tables(data)]
    device = data["header"].get("cpu") or data["header"].get("device", "")
    names = list(candidate_indices(data))
    lead = (
        f"{len(names)} candidates, {len(_cases(data))} cases, beside {data['baseline']}; {device}"
    )
    return page("ConvBERT benchmark", lead, sections)


def candidate_indices(data: Json) -> dict[str, int]:
    """Colour and marker of each candidate: the baseline first, the others in their order."""
    names = list(dict.fromkeys(one["candidate"] for one in data["measurements"]))
    ordered = sorted(names, key=lambda name: name != data["baseline"])
    return {name: index for index, name in enumerate(ordered)}


def _sections(data: Json) -> Iterator[Section]:
    indices = candidate_indices(data)
    yield Section("summary", "Speed-up", _summary(data))
    for anchor, title, text, drawn in (
        ("latency", "Latency", _LATENCY, latency_charts(data, indices)),
        ("throughput", "Throughput", _THROUGHPUT, throughput_charts(data, indices)),
    ):
        if drawn:
            body = joined((paragraph(text), _legend(indices), charts(drawn)))
            yield Section(anchor, title, body)
    drawn = ceiling_charts(data, indices)
    if drawn:
        yield Section("ceiling", "Fraction of the ceiling", _ceiling(data, indices, drawn))
    drawn = waste_charts(data, indices)
    if drawn:
        yield Section("texts", "Texts of different lengths", _waste(data, drawn))


_LATENCY = (
    "Median time of one call; the band is its 95 % interval (often narrower than the line). Both "
    "axes are logarithmic: a straight line that rises one step with each step is time in "
    "proportion to work."
)
_THROUGHPUT = "Real tokens a second at the median time: higher is better."
_CEILING = (
    "Shortest time that this machine allows for the same arithmetic, over the median time: 100 % "
    "is the machine's limit, as its rates were measured in the same run. The measured rate of a "
    "library's matrix product can be beaten: then the line passes 100 %."
)


def _summary(data: Json) -> Markup:
    """Ratios to the baseline, a row a case, and who leads."""
    cases, ratios = _cases(data), _by_candidate(data)
    kinds = {name: _arithmetic(data, name) for name in candidate_indices(data)}
    leaders = _leaders(ratios, kinds, cases)
    rows = [
        [case, *(_ratio_cell(ratios[name].get(case), (case, name) in leaders) for name in kinds)]
        for case in cases
    ]
    text = (
        f"Times as fast as {data['baseline']}: the median of paired ratios, its 95 % interval "
        "below; 2 is twice as fast. Shaded: the fastest of its arithmetic."
    )
    headers = ["batch x seq", *(Cell(name, kind) for name, kind in kinds.items())]
    count = len(warning_texts(data))
    warned = element("a", f"{count} warning{'s' * (count > 1)}", href="#warnings")
    return joined(
        (
            paragraph(_verdict(ratios, cases)),
            *((element("p", "Before you trust a figure: ", warned, "."),) if count else ()),
            table(text, headers, rows),
            element("h3", "The machine"),
            definitions(data["header"]),
        )
    )


def _verdict(ratios: Mapping[str, Mapping[str, Json]], cases: list[str]) -> str:
    """One sentence: who had the lowest median, and where."""
    wins: dict[str, list[str]] = {}
    for case in cases:
        measured = {name: own[case]["p50_ms"] for name, own in ratios.items() if case in own}
        wins.setdefault(min(measured, key=measured.__getitem__), []).append(case)
    told = sorted(wins.items(), key=lambda item: -len(item[1]))
    if len(told) == 1:
        return f"{told[0][0]} has the lowest median in all {len(cases)} cases."
    return (
        "Lowest median: "
        + "; ".join(f"{name} in {len(won)} ({', '.join(won)})" for name, won in told)
        + "."
    )


def _leaders(
    ratios: Mapping[str, Mapping[str, Json]], kinds: Mapping[str, str], cases: list[str]
) -> set[tuple[str, str]]:
    """(case, candidate) of the highest ratio where at least two compete."""
    found = set()
    for kind in set(kinds.values()):
        names = [name for name in kinds if kinds[name] == kind]
        for case in cases:
            running = [name for name in names if case in ratios[name]]
            if len(running) > 1:
                best = max(running, key=lambda name: ratios[name][case]["speedup"])
                found.add((case, best))
    return found


def _ratio_cell(one: Json | None, best: bool) -> Cell:
    if one is None:
        return Cell("-")
    note = interval(one["speedup_interval"], lambda value: f"{value:.2f}")
    return Cell(f"{one['speedup']:.2f}x", note, best)


def _ceiling(data: Json, indices: Mapping[str, int], drawn: list[str]) -> Markup:
    ceiling = data.get("ceiling")
    rates = paragraph("")
    if ceiling:
        rates = joined(
            (element("h3", "Rates of this machine"), bullets(ceiling_texts(ceiling)))
            + ((paragraph(ceiling["formula"]),) if ceiling.get("formula") else ())
        )
    return joined((paragraph(_CEILING), _legend(indices), charts(drawn), rates))


def _waste(data: Json, drawn: list[str]) -> Markup:
    text = (
        "Texts as they come, in batches. A candidate that pads computes positions that mean "
        "nothing (hatched); one that packs its rows computes the real tokens alone."
    )
    rows = [
        (
            one["candidate"],
            case_of(one),
            short(one["tokens_per_s"]),
            f"{one['speedup']:.2f}x",
            share(one.get("waste")),
            short(one.get("fixed_length_ratio")),
        )
        for one in data["measurements"]
        if one.get("workload")
    ]
    headers = ("candidate", "texts", "real tok/s", "x baseline", "padding", "x fixed length")
    caption = (
        "x fixed length: time for a real token here over time for a token of full batches of one "
        "length; 1 is no loss"
    )
    return joined((paragraph(text), charts(drawn), table(caption, headers, rows, left=(0, 1))))


def _tables(data: Json) -> Iterator[Section]:
    costs = candidate_costs(data)
    if costs:
        yield Section("memory", "Loading and memory", _table(_COSTS, costs))
    yield Section("figures", "All figures", _table("Every candidate at every case", figures(data)))
    for anchor, title, texts in (
        ("warnings", "Warnings", warning_texts(data)),
        ("refused", "Not measured", refusals(data)),
        ("method", "How it was measured", how_measured(data)),
        ("candidates", "Candidates, and how to get them", candidate_texts(data)),
    ):
        if texts:
            yield Section(anchor, title, bullets(texts))


_COSTS = (
    "ready: from the start of the process; load: reading and compiling the model alone; loaded and "
    "peak: resident memory after loading and after the largest case, MB of 10^6 bytes"
)


def _table(caption: str, content: Table) -> Markup:
    return table(caption, content.headers, content.rows, left=range(content.left))


def _legend(indices: Mapping[str, int]) -> Markup:
    return element(
        "ul",
        *(element("li", Markup(marker_svg(index)), name) for name, index in indices.items()),
        class_="legend",
    )


def _cases(data: Json) -> list[str]:
    return list(dict.fromkeys(map(case_of, data["measurements"])))


def _by_candidate(data: Json) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for one in data["measurements"]:
        found.setdefault(one["candidate"], {})[case_of(one)] = one
    return found


def _arithmetic(data: Json, name: str) -> str:
    facts = (data.get("candidates") or {}).get(name) or {}
    return facts.get("arithmetic") or ""
