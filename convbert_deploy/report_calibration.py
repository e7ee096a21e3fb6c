"""A CalibrationResult for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convbert_deploy.report_table import short, text_table

if TYPE_CHECKING:
    from convbert_deploy.calibration.calibrating import CalibrationResult

#: the most sensitive layers that are listed
_LISTED = 8


def calibration_text(result: CalibrationResult) -> str:
    """For a terminal: what was written, what it loses, what stays high and why."""
    record = result.record
    lines = [
        f"wrote {result.path}: {result.precision}, {result.bytes / 1e6:.1f} MB, from "
        f"{record['samples']} samples, {record['tokens']} tokens of {record['data']}",
        f"statistics: {result.table} (--table reads them again)",
        f"against the fp32 graph: {_losses(record['losses'])}",
    ]
    if "quantized" in record:
        lines += _quantized(record)
    kept = record["kept_fp32"]
    if kept:
        lines.append(f"kept in fp32 for their range (in fp16 graphs): {len(kept)} nodes")
        lines += [
            f"  {node['node']}: {node['tensor']} reached {short(node['largest'])}" for node in kept
        ]
    return "\n".join(lines)


def _losses(losses: dict[str, float | None]) -> str:
    agreement = losses["agreement"]
    parts = [
        f"agreement {agreement:.2f} %" if agreement is not None else "no argmax",
        f"mean error {short(losses['mean_error'])}",
        f"max error {short(losses['max_error'])}",
    ]
    if losses["metric_drop"] is not None:
        parts.append(f"metric drop {losses['metric_drop']:.2f} points")
    return ", ".join(parts)


def _quantized(record: dict[str, Any]) -> list[str]:
    smoothed = sum(alpha is not None for alpha in record["smoothquant"].values())
    lines = [
        f"{len(record['quantized'])} linear layers in 8 bits, {smoothed} of them smoothed; "
        f"ranges by {record['method']}"
    ]
    if record["budget"] is None:
        return lines
    price = record["price"]
    high = record["high"]
    lines.append(f"budget {record['budget']}: met with {len(high)} layers kept high")
    lines += [f"  {name}" for name in high]
    if high:
        lines.append(
            f"their price: {price['arithmetic']:.1%} of the linear arithmetic (about as much more "
            f"time in the linear layers), {price['extra_bytes'] / 1e6:.1f} MB"
        )
    rows = [
        [
            ", ".join(one["linears"]),
            short(one["mean_error"]),
            short(one["max_error"]),
            "-" if one["agreement"] is None else f"{one['agreement']:.2f}",
        ]
        for one in record["sensitivities"][:_LISTED]
    ]
    headers = ("most sensitive, quantized alone", "mean error", "max error", "agreement %")
    return [*lines, "", text_table(headers, rows)]
