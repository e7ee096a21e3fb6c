"""The command ``bulk``."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import click

from convbert_deploy.command_line import PATH, progress


@click.command()
@click.argument("source", metavar="INPUT", type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="folder of parts to write")
@click.option("--engine", required=True, type=PATH, help="bundle that build-engine wrote")
@click.option(
    "--format",
    type=click.Choice(["jsonl", "csv", "tsv", "parquet", "text"]),
    help="of the input  [default: by suffix]",
)
@click.option("--output-format", default="parquet", type=click.Choice(["parquet", "jsonl"]))
@click.option("--text-column", help="input column to score  [default: those of the task's form]")
@click.option("--keep", help="comma list of input columns to write again  [default: all]")
@click.option(
    "--shard-rows", default=10_000, type=click.IntRange(min=1), help="rows of a part at most"
)
@click.option("--workers", type=click.IntRange(min=1), help="[default: by the CPUs there are]")
@click.option(
    "--threads-per-worker",
    "threads",
    type=click.IntRange(min=1),
    help="CPU threads  [default: 1 on Ray, else the CPUs shared out]",
)
@click.option("--address", help="Ray cluster, such as auto or ray://HOST:10001")
@click.option("--local", is_flag=True, help="processes here, without Ray  [default: if not there]")
@click.option("--json", "as_json", is_flag=True, help="the summary as a JSON object")
def bulk(
    source: pathlib.Path,
    output: pathlib.Path,
    engine: pathlib.Path,
    keep: str | None,
    local: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Score INPUT, a file or folder of JSONL, CSV, TSV, Parquet or lines of text.

    Each input row comes out once, with its answer or an error. The same command goes on after an
    interruption. Exit 3 where no row could be scored.
    """
    from convbert_deploy.bulk_scoring.job import bulk as run_bulk
    from convbert_deploy.bulk_scoring.options import BulkOptions

    options = BulkOptions(
        keep=None if keep is None else tuple(name for name in keep.split(",") if name),
        local=True if local else None,
        **settings,
    )
    summary = run_bulk(source, output, engine, options, progress)
    if as_json:
        click.echo(json.dumps(summary.to_json()))
    else:
        click.echo(summary_text(summary))
    sys.exit(3 if summary.errors == summary.rows else 0)


def summary_text(summary: Any) -> str:
    text = f"wrote {summary.output}: {summary.rows} rows in {summary.shards} parts"
    if summary.errors:
        text += f", {summary.errors} with an error instead of an answer"
    if summary.earlier_shards:
        text += f"; {summary.earlier_shards} parts were there already"
    if summary.workers:
        kind = "processes" if summary.runs_on == "processes" else "Ray actors"
        text += (
            f"; {summary.rows_per_second:.0f} rows a second on {summary.workers} {kind} of "
            f"{summary.threads} threads"
        )
    return text
