"""Plots as SVG text to stand inside a page: drawn by matplotlib, coloured by the page.

Colours are left to the page's style sheet (``var(--c0)``...), so that one file serves light, dark
and paper; text stays text. Each chart has its own marker for every series and names it beside its
line: nothing is told by colour alone.
"""

from __future__ import annotations

import dataclasses
import html
import io
import re
from collections.abc import Sequence
from typing import Any

from convbert_deploy.errors import MissingDependencyError
from convbert_deploy.report_table import short

_POINTS_PER_INCH = 72
_WIDTH, _HEIGHT = 5.0, 3.0
_BAR_HEIGHT = 0.27
#: of a wide font at 9.5 points: the page's own font is not known here
_INCH_PER_LETTER = 0.081
_MARKERS = "osD^vPX*"
#: Colours that matplotlib is told, and what the page reads in their place.
_INK, _MUTED, _GRID = "#010101", "#020202", "#030303"
_SERIES_COLORS = tuple(f"#0400{index:02x}" for index in range(len(_MARKERS)))
_VARIABLES = {_INK: "ink", _MUTED: "muted", _GRID: "grid"} | {
    color: f"c{index}" for index, color in enumerate(_SERIES_COLORS)
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "convbert-deploy",
    "font.size": 9.5,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
}
_LONGEST_LABEL = 26


@dataclasses.dataclass(frozen=True)
class Series:
    """A line: ``ys`` over ``xs``, with the ends of each value's interval if it has one.

    index: decides colour and marker, so that one candidate looks the same in every chart.
    """

    name: str
    index: int
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    lows: tuple[float, ...] | None = None
    highs: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Axes:
    """Titles and scales of a line chart. ``percent``: y is a fraction, shown from 0 as percent."""

    title: str
    x_label: str
    y_label: str
    log_y: bool = True
    percent: bool = False


@dataclasses.dataclass(frozen=True)
class Bar:
    """One bar: ``value``, what stands beside it, and the part of it that is drawn solid (the rest
    is hatched); None draws all of it solid."""

    name: str
    value: float
    label: str
    index: int = 0
    solid: float | None = None


def line_chart(series: Sequence[Series], axes: Axes, chart_id: str) -> str:
    """An SVG element: lines on a logarithmic x axis whose ticks are the values measured.

    Args:
        chart_id: unique in the page.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    with _style():
        figure = _figure(_HEIGHT)
        labels = [_shortened(one.name) for one in series]
        room = _INCH_PER_LETTER * max(map(len, labels)) + 0.3
        left = 0.74
        plot = figure.add_axes(
            (left / _WIDTH, 0.17, 1 - (left + room) / _WIDTH, 0.71), label=chart_id
        )
        for one in series:
            _line(plot, one)
        _scales(plot, series, axes)
        _title(figure, axes.title)
        plot.set_xlabel(axes.x_label)
        plot.set_ylabel(axes.y_label)
        plot.grid(True, axis="y")
        _direct_labels(plot, series, labels)
        return _svg(figure, chart_id, axes.title, _line_alt(series, axes))


def bar_chart(bars: Sequence[Bar], title: str, chart_id: str, *, unit: str) -> str:
    """An SVG element: horizontal bars from zero, the first on top, each with its value beside it.

    Args:
        unit: of the values, for the description.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    with _style():
        height = 0.5 + _BAR_HEIGHT * len(bars)
        figure = _figure(height)
        names = [_shortened(bar.name, 36) for bar in bars]
        left = (_INCH_PER_LETTER * max(map(len, names)) + 0.15) / _WIDTH
        right = (_INCH_PER_LETTER * max(len(bar.label) for bar in bars) + 0.15) / _WIDTH
        plot = figure.add_axes(
            (left, 0.06 / height, 1 - left - right, 1 - 0.42 / height), label=chart_id
        )
        for place, bar in enumerate(bars):
            _bar(plot, place, bar)
        plot.set_yticks(range(len(bars)), names)
        plot.set_ylim(len(bars) - 0.4, -0.6)
        plot.set_xlim(0, max(bar.value for bar in bars) or 1)
        plot.set_xticks([])
        plot.spines["bottom"].set_visible(False)
        plot.tick_params(axis="y", length=0)
        _title(figure, title)
        told = "; ".join(f"{bar.name} {bar.label}" for bar in bars)
        return _svg(figure, chart_id, title, f"Bars, {unit}: {told}.")


def marker_svg(index: int) -> str:
    """A small SVG of a series' line and marker, for a legend."""
    shapes = {
        "o": '<circle cx="14" cy="7" r="4"/>',
        "s": '<rect x="10" y="3" width="8" height="8"/>',
        "D": '<path d="M14 2 19 7 14 12 9 7z"/>',
        "^": '<path d="M14 2 19 11H9z"/>',
        "v": '<path d="M14 12 19 3H9z"/>',
        "P": '<path d="M12 2h4v3h3v4h-3v3h-4V9H9V5h3z"/>',
        "X": '<path d="M9 4l2-2 3 3 3-3 2 2-3 3 3 3-2 2-3-3-3 3-2-2 3-3z"/>',
        "*": '<path d="M14 1l2 4 4 .4-3 3 1 4.6-4-2.4-4 2.4 1-4.6-3-3 4-.4z"/>',
    }
    index %= len(_MARKERS)
    return (
        f'<svg class="key" viewBox="0 0 28 14" width="28" height="14" aria-hidden="true" '
        f'style="color: var(--c{index})"><path d="M0 7H28" stroke="currentColor" '
        f'stroke-width="1.6"/><g fill="currentColor">{shapes[_MARKERS[index]]}</g></svg>'
    )


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions as near as may be to ``wanted``, in its order, at least ``gap`` apart and within
    ``low`` to ``high`` (closer together where they cannot all fit)."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    gap = min(gap, (high - low) / max(1, len(order) - 1)) if len(order) > 1 else gap
    placed = [min(max(wanted[index], low), high) for index in order]
    for at in range(1, len(placed)):
        placed[at] = max(placed[at], placed[at - 1] + gap)
    if placed:
        placed[-1] = min(placed[-1], high)
    for at in range(len(placed) - 2, -1, -1):
        placed[at] = min(placed[at], placed[at + 1] - gap)
    found = [0.0] * len(wanted)
    for index, value in zip(order, placed, strict=True):
        found[index] = value
    return found


def _style() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError(
            "matplotlib", needed_for="a report with plots", extra="bench"
        ) from error
    # the user's own matplotlibrc must not change the report
    return matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": "svg", **_STYLE})


def _figure(height: float) -> Any:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), facecolor="none")
    FigureCanvasSVG(figure)
    return figure


def _title(figure: Any, title: str) -> None:
    top = 1 - 0.04 / figure.get_figheight()
    figure.text(0.0, top, _shortened(title, 62), va="top", fontsize=10.5, fontweight="bold")


def _line(plot: Any, one: Series) -> None:
    color = _SERIES_COLORS[one.index % len(_SERIES_COLORS)]
    marker = _MARKERS[one.index % len(_MARKERS)]
    if one.lows is not None and one.highs is not None:
        plot.fill_between(one.xs, one.lows, one.highs, color=color, alpha=0.2, linewidth=0)
    plot.plot(one.xs, one.ys, color=color, marker=marker, markersize=5, linewidth=1.6)


def _scales(plot: Any, series: Sequence[Series], axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    xs = sorted({x for one in series for x in one.xs})
    plot.set_xscale("log")
    plot.set_xticks(xs, [f"{x:g}" for x in xs])
    plot.xaxis.set_minor_locator(NullLocator())
    plot.patch.set_visible(False)
    if axes.percent:
        plot.axhline(1.0, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
    if axes.log_y:
        plot.set_yscale("log")
        low, high = plot.get_ylim()
        steps = (1.0, 2.0, 5.0) if high / low < 200 else (1.0, 3.0)
        plot.yaxis.set_major_locator(LogLocator(subs=steps))
        plot.yaxis.set_minor_formatter(NullFormatter())
        plot.yaxis.set_minor_locator(NullLocator())
    else:
        plot.set_ylim(0, max(1.0 if axes.percent else 0.0, plot.get_ylim()[1]))
        plot.yaxis.set_major_locator(MaxNLocator(6))
    show = (lambda y, _: f"{y:.0%}") if axes.percent else (lambda y, _: _thousands(y))
    plot.yaxis.set_major_formatter(FuncFormatter(show))


def _thousands(value: float) -> str:
    return f"{value / 1e3:g}k" if value >= 1e4 else f"{value:g}"


def _direct_labels(plot: Any, series: Sequence[Series], labels: Sequence[str]) -> None:
    """Names at the right end of the lines, moved apart where lines end close together."""
    ends = [(one.xs[-1], one.ys[-1]) for one in series]
    to_axes = plot.transAxes.inverted()
    places = [to_axes.transform(plot.transData.transform(end)) for end in ends]
    heights = spread([float(y) for _, y in places], 0.065, 0.0, 1.0)
    for one, label, (x, y), height in zip(series, labels, places, heights, strict=True):
        color = _SERIES_COLORS[one.index % len(_SERIES_COLORS)]
        plot.annotate(
            label,
            xy=(x, y),
            xytext=(1.045, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=color,
            va="center",
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.6, "alpha": 0.6, "shrinkB": 4},
            annotation_clip=False,
        )


def _bar(plot: Any, place: int, bar: Bar) -> None:
    color = _SERIES_COLORS[bar.index % len(_SERIES_COLORS)]
    solid = bar.value if bar.solid is None else bar.solid
    plot.barh(place, solid, color=color, height=0.66)
    if bar.value > solid:
        plot.barh(
            place, bar.value - solid, left=solid, height=0.66, color="none", edgecolor=color,
            hatch="////", linewidth=0.8,
        )  # fmt: skip
    plot.annotate(
        bar.label, xy=(bar.value, place), xytext=(4, 0), textcoords="offset points", va="center",
        annotation_clip=False,
    )  # fmt: skip


def _shortened(name: str, longest: int = _LONGEST_LABEL) -> str:
    """The ends of a long name: engines of one run tend to differ there."""
    if len(name) <= longest:
        return name
    half = (longest - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


def _line_alt(series: Sequence[Series], axes: Axes) -> str:
    def told(y: float) -> str:
        return f"{y:.0%}" if axes.percent else short(y)

    lines = (
        f"{one.name}: "
        + ", ".join(f"{told(y)} at {x:g}" for x, y in zip(one.xs, one.ys, strict=True))
        for one in series
    )
    return f"{axes.y_label} against {axes.x_label}. " + "; ".join(lines) + "."


def _svg(figure: Any, chart_id: str, title: str, alt: str) -> str:
    """The figure as an element to stand in HTML: ids of its own, the page's colours, described."""
    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{chart_id}-\1"', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\1{chart_id}-", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    height = figure.get_figheight() * _POINTS_PER_INCH
    opening = (
        f'<svg class="chart" viewBox="0 0 {_WIDTH * _POINTS_PER_INCH:g} {height:g}" role="img" '
        f'aria-labelledby="{chart_id}-title {chart_id}-desc" xmlns:xlink="http://www.w3.org/1999/xlink">'
        f'<title id="{chart_id}-title">{html.escape(title)}</title>'
        f'<desc id="{chart_id}-desc">{html.escape(alt)}</desc>'
    )
    return opening + text[text.index(">") + 1 :]
