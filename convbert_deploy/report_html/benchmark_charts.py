"""The plots of a benchmark's page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from convbert_deploy.report_benchmark import Json, case_of
from convbert_deploy.report_html.charts import Axes, Bar, Series, bar_chart, line_chart
from convbert_deploy.report_table import share, short

_Value = Callable[[Json], Any]


def latency_charts(data: Json, indices: Mapping[str, int]) -> list[str]:
    """Time against batch for each length, against length for each batch; for shapes that vary in
    neither, bars."""
    drawn = [
        *_panels(data, indices, _LATENCY, across="batch", within="seq", prefix="latency-batch"),
        *_panels(data, indices, _LATENCY, across="seq", within="batch", prefix="latency-seq"),
    ]
    return drawn or _latency_bars(data, indices)


def throughput_charts(data: Json, indices: Mapping[str, int]) -> list[str]:
    """Tokens a second, against whichever axis has more values (both if shapes are missing)."""
    return _along_the_longer(data, indices, _THROUGHPUT, "throughput")


def ceiling_charts(data: Json, indices: Mapping[str, int]) -> list[str]:
    """Fraction of the floor's time, against the same axes as throughput."""
    return _along_the_longer(data, indices, _CEILING, "ceiling")


def waste_charts(data: Json, indices: Mapping[str, int]) -> list[str]:
    """For each workload the positions that each candidate computes, real and padding."""
    drawn = []
    measured = [one for one in data["measurements"] if one.get("workload")]
    for number, case in enumerate(dict.fromkeys(map(case_of, measured))):
        own = [one for one in measured if case_of(one) == case and one.get("waste") is not None]
        if not own:
            continue
        bars = [
            Bar(
                one["candidate"],
                one["tokens"] / (1 - one["waste"]),
                f"{share(one['waste'])} padding" if one["waste"] else "no padding",
                indices[one["candidate"]],
                solid=one["tokens"],
            )
            for one in own
        ]
        title = f"Positions computed for {own[0]['tokens']:,} tokens of {case}"
        drawn.append(bar_chart(bars, title, f"waste-{number}", unit="positions"))
    return drawn


class _Quantity:
    """What a chart shows: its axis, its value and, if it has one, its interval."""

    def __init__(
        self, title: str, y_label: str, value: _Value, ends: _Value | None = None, **scale: bool
    ) -> None:
        self.title, self.y_label, self.value, self.ends, self.scale = (
            title, y_label, value, ends, scale,
        )  # fmt: skip


_LATENCY = _Quantity(
    "Latency", "ms, median", lambda one: one["p50_ms"], lambda one: one["p50_interval_ms"]
)
_THROUGHPUT = _Quantity(
    "Throughput", "real tokens / s", lambda one: one["tokens_per_s"], log_y=False
)
_CEILING = _Quantity(
    "Fraction of the ceiling",
    "floor / median",
    lambda one: one.get("fraction_of_floor"),
    log_y=False,
    percent=True,
)
_AXIS_LABELS = {"batch": "batch", "seq": "sequence, tokens"}


def _along_the_longer(
    data: Json, indices: Mapping[str, int], quantity: _Quantity, prefix: str
) -> list[str]:
    shapes = {(one["batch"], one["seq"]) for one in _shapes(data)}
    batches, seqs = ({shape[axis] for shape in shapes} for axis in (0, 1))
    across, within = ("batch", "seq") if len(batches) >= len(seqs) else ("seq", "batch")
    drawn = _panels(data, indices, quantity, across=across, within=within, prefix=prefix)
    if len(shapes) < len(batches) * len(seqs):
        # not every batch with every length: what stands alone on one axis may not on the other
        drawn += _panels(
            data, indices, quantity, across=within, within=across, prefix=f"{prefix}-{within}"
        )
    return drawn


def _panels(
    data: Json,
    indices: Mapping[str, int],
    quantity: _Quantity,
    *,
    across: str,
    within: str,
    prefix: str,
) -> list[str]:
    """A chart against ``across`` for each value of ``within`` that has at least two points."""
    shapes = [one for one in _shapes(data) if quantity.value(one) is not None]
    drawn = []
    for fixed in sorted({one[within] for one in shapes}):
        own = [one for one in shapes if one[within] == fixed]
        if len({one[across] for one in own}) < 2:
            continue
        series = [
            _series(name, index, [one for one in own if one["candidate"] == name], across, quantity)
            for name, index in indices.items()
            if any(one["candidate"] == name for one in own)
        ]
        held = f"batch {fixed}" if within == "batch" else f"{fixed} tokens a sequence"
        axes = Axes(
            f"{quantity.title}, {held}", _AXIS_LABELS[across], quantity.y_label, **quantity.scale
        )
        drawn.append(line_chart(series, axes, f"{prefix}-{fixed}"))
    return drawn


def _series(
    name: str, index: int, measured: list[Json], across: str, quantity: _Quantity
) -> Series:
    ordered = sorted(measured, key=lambda one: one[across])
    ends = [quantity.ends(one) for one in ordered] if quantity.ends else None
    return Series(
        name,
        index,
        tuple(one[across] for one in ordered),
        tuple(quantity.value(one) for one in ordered),
        lows=tuple(low for low, _ in ends) if ends else None,
        highs=tuple(high for _, high in ends) if ends else None,
    )


def _latency_bars(data: Json, indices: Mapping[str, int]) -> list[str]:
    drawn = []
    for number, case in enumerate(dict.fromkeys(map(case_of, data["measurements"]))):
        bars = [
            Bar(
                one["candidate"], one["p50_ms"], f"{short(one['p50_ms'])} ms",
                indices[one["candidate"]],
            )
            for one in data["measurements"]
            if case_of(one) == case
        ]  # fmt: skip
        drawn.append(bar_chart(bars, f"Latency at {case}", f"latency-{number}", unit="ms"))
    return drawn


def _shapes(data: Json) -> list[Json]:
    """Measurements of fixed shapes."""
    return [one for one in data["measurements"] if one.get("batch") and one.get("seq")]
