"""The commands that measure: ``bench``, ``profile`` and ``report``."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import click

from convbert_deploy.command_line import (
    PATH,
    PEERS_HELP,
    load_checkpoint,
    progress,
    write_report,
)


@click.command()
@click.argument("engines", nargs=-1, required=True, type=PATH)
@click.option(
    "--baseline",
    "--against",
    type=PATH,
    help="checkpoint: the eager model that ratios refer to, and what peers run",
)
@click.option("--peer", "peers", multiple=True, help=PEERS_HELP)
@click.option("--install-peers", is_flag=True, help="pip may make environments for absent peers")
@click.option("--graph", type=PATH, help="exported graph that openvino-graph runs")
@click.option("--batch", help="comma list  [default: 1,8]")
@click.option("--seq", help="comma list; every batch with every seq  [default: 32,128]")
@click.option("--shape", help="comma list of BATCHxSEQ, instead of every batch with every seq")
@click.option("--texts", type=PATH, help="lines of text or JSON: a workload of many lengths")
@click.option("--workload-batch", default=32, type=click.IntRange(min=1), help="texts a batch")
@click.option("--threads", type=int, help="CPU threads of each candidate, on the same cores")
@click.option("--precision", default=2.0, help="percent: run until intervals are as tight; 0: off")
@click.option("--min-time", default=2.0, help="seconds per candidate and shape at least")
@click.option("--max-time", default=20.0, help="seconds per candidate and shape at most")
@click.option("--max-runs", default=1000, help="rounds per shape at most")
@click.option("--warmup", default=3, help="runs left out of the statistics")
@click.option("--no-ceiling", is_flag=True, help="do not measure what the machine could do")
@click.option("--json", "json_file", type=PATH, help="write JSON here; - is stdout")
@click.option("--markdown", "markdown_file", type=PATH, help="write Markdown here; - is stdout")
@click.option("--html", "html_file", type=PATH, help="write a page with plots here")
def bench(
    engines: tuple[pathlib.Path, ...],
    baseline: pathlib.Path | None,
    json_file: pathlib.Path | None,
    markdown_file: pathlib.Path | None,
    html_file: pathlib.Path | None,
    **settings: Any,
) -> None:
    """Time ENGINES in interleaved runs, beside the eager model and other peers."""
    from convbert_deploy.benchmarking.bench import bench as run_bench
    from convbert_deploy.benchmarking.command import bench_request
    from convbert_deploy.report import to_json_text, to_markdown, to_text

    checkpoint = load_checkpoint(baseline) if baseline else None
    report = run_bench(bench_request(engines, checkpoint, **settings), progress)
    stdout_taken = write_report(json_file, to_json_text(report))
    stdout_taken |= write_report(markdown_file, to_markdown(report))
    if html_file is not None:
        from convbert_deploy.report_html import write_html

        write_html(report.to_json(), html_file)
    if not stdout_taken:
        click.echo(to_text(report))


@click.command()
@click.argument("engine", type=PATH)
@click.option("--batch", default=8, type=click.IntRange(min=1), help="rows of real tokens")
@click.option("--seq", default=128, type=click.IntRange(min=1), help="tokens a row")
@click.option("--threads", type=int, help="CPU threads")
@click.option("--runs", default=20, type=click.IntRange(min=1), help="timed passes")
@click.option("--top", default=12, type=click.IntRange(min=1), help="rows of each table")
@click.option("--json", "as_json", is_flag=True, help="everything, every kernel")
@click.option("--html", "html_file", type=PATH, help="write a page here")
def profile(
    engine: pathlib.Path,
    top: int,
    as_json: bool,
    html_file: pathlib.Path | None,
    **settings: Any,
) -> None:
    """Time by operator, layer and kernel inside ENGINE, and what is not fused."""
    from convbert_deploy.engine import Engine
    from convbert_deploy.profiling.profile_text import profile_text
    from convbert_deploy.profiling.profiling import ProfileOptions
    from convbert_deploy.profiling.profiling import profile as run_profile

    result = run_profile(Engine.load(engine), ProfileOptions(**settings), progress)
    if html_file is not None:
        from convbert_deploy.report_html import write_html

        write_html(result.to_json(), html_file)
    click.echo(json.dumps(result.to_json()) if as_json else profile_text(result, top))


@click.command()
@click.argument("result", metavar="JSON", type=PATH)
@click.option("-o", "--output", type=PATH, help="page to write  [default: NAME.html]")
@click.option("--profile", "profile_file", type=PATH, help="JSON of profile, shown beside bench's")
def report(
    result: pathlib.Path, output: pathlib.Path | None, profile_file: pathlib.Path | None
) -> None:
    """A page with plots from the JSON of bench or profile; readable offline."""
    from convbert_deploy.report_html import read_result, write_html

    target = output or result.with_suffix(".html")
    beside = read_result(profile_file) if profile_file else None
    write_html(read_result(result), target, beside)
    click.echo(f"wrote {target}")
