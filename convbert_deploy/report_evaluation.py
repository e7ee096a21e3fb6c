"""An EvaluationReport for people."""

from __future__ import annotations

import math

from convbert_deploy.evaluation.distance import Distance
from convbert_deploy.evaluation.evaluation_report import EvaluationReport, MetricValue
from convbert_deploy.report_table import short, text_table


def evaluation_text(report: EvaluationReport) -> str:
    """For a terminal: a row a metric, the distance of the logits, the verdict."""
    against = f" against {report.reference}" if report.reference else ""
    lines = [f"{report.candidate}{against}: {report.samples} samples of {report.data}"]
    if report.truncated:
        lines.append(f"{report.truncated} of them cut off at the longest sequence")
    if report.metrics:
        lines += ["", _metric_table(report)]
        if report.resamples:
            lines.append(
                f"Interval of the difference: paired bootstrap, {report.resamples} resamples"
            )
    else:
        lines += ["", "No labels: answers are compared, not judged"]
    if report.distance:
        lines += ["", *_distance_lines(report.distance)]
    return "\n".join([*lines, *_verdict(report)])


def _metric_table(report: EvaluationReport) -> str:
    if report.reference is None:
        rows = [[metric.name, _points(metric.candidate)] for metric in report.metrics]
        return text_table(("metric x 100", report.candidate), rows)
    headers = (
        "metric x 100",
        report.reference,
        report.candidate,
        "difference",
        f"{100 * report.confidence:g}% interval",
    )
    return text_table(headers, [_metric_row(metric) for metric in report.metrics])


def _metric_row(metric: MetricValue) -> list[str]:
    interval = "-"
    if metric.interval:
        low, high = metric.interval
        interval = f"{low:+.2f} to {high:+.2f}"
    return [
        metric.name,
        _points(metric.reference),
        _points(metric.candidate),
        _points(metric.difference, "+"),
        interval,
    ]


def _points(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.2f}"


def _distance_lines(distance: Distance) -> list[str]:
    lines = [
        f"logits: mean difference {short(distance.mean_error)}, max {short(distance.max_error)}"
    ]
    if distance.agreement is not None:
        lines.append(
            f"argmax agreement {_percent(distance.agreement)} of {distance.units} {distance.unit}, "
            f"KL {short(distance.kl)} nats"
        )
    return lines


def _percent(value: float) -> str:
    """100 % only when it is."""
    return "100 %" if value == 100 else f"{math.floor(value * 100) / 100:.2f} %"


def _verdict(report: EvaluationReport) -> list[str]:
    lines = []
    if report.failed:
        lines.append(f"FAILED: NaN or infinity in the outputs of {report.failed} samples")
    if report.budget and not report.violations:
        lines.append(f"within the budget: {report.budget}")
    elif report.violations:
        lines.append(f"OVER THE BUDGET: {report.budget}")
        lines += [f"  {violation}" for violation in report.violations]
    return ["", *lines] if lines else []
