"""The commands that ask a server: ``probe`` and ``load``."""

from __future__ import annotations

import json
import pathlib

import click

from convbert_deploy.command_line import PATH, integers, progress

_MANIFEST = pathlib.Path("convbert_manifest.json")


@click.command()
@click.argument("url")
@click.option("--grpc", is_flag=True, help="URL is the gRPC port's; needs tritonclient")
@click.option("--model", metavar="NAME", help="the name in package  [default: the manifest's]")
@click.option("--manifest", type=PATH, help=f"of the repository  [default: ./{_MANIFEST}]")
@click.option("--engine", type=PATH, help="bundle whose golden request is sent, with --model")
@click.option(
    "--timeout", default=5.0, type=click.FloatRange(min=0, min_open=True), help="seconds in all"
)
@click.option("--text", is_flag=True, help="the golden request in words too, to the text model")
@click.option("--json", "as_json", is_flag=True, help="machine-readable result")
@click.pass_context
def probe(
    context: click.Context,
    url: str,
    grpc: bool,
    model: str | None,
    manifest: pathlib.Path | None,
    engine: pathlib.Path | None,
    timeout: float,
    text: bool,
    as_json: bool,
) -> None:
    """Send the golden request to the server at URL and compare the values of its answer.

    Exit code 0: they are right; 1: wrong, an error, or no answer in time. Fit for a liveness probe.
    """
    from convbert_deploy.serving.probe import Expectation, ProbeOptions
    from convbert_deploy.serving.probe import probe as run_probe

    if manifest is not None and engine is not None:
        raise click.UsageError("--manifest or --engine, not both")
    expectation = (
        Expectation.of_engine(engine)
        if engine is not None
        else Expectation.of_repository(manifest or _MANIFEST)
    )
    result = run_probe(url, expectation.named(model), ProbeOptions(grpc, timeout, text))
    click.echo(json.dumps(result.to_json()) if as_json else result.to_text())
    context.exit(0 if result.passed else 1)


@click.command()
@click.argument("url")
@click.option("--texts", required=True, type=PATH, help="lines of text, or of JSON as run takes")
@click.option("--model", required=True, metavar="NAME", help="the text model")
@click.option("--concurrency", default="1,4,8", help="comma list of client threads")
@click.option("--requests", default=1000, type=click.IntRange(min=1), help="of each concurrency")
@click.option("--grpc", is_flag=True, help="URL is the gRPC port's; needs tritonclient")
@click.option("--engine", type=PATH, help="bundle to compare with  [default: the text alone]")
@click.option("--tolerance", default=1e-6, type=click.FloatRange(min=0), help="of each number")
@click.option(
    "--timeout", default=30.0, type=click.FloatRange(min=0, min_open=True), help="seconds an answer"
)
@click.option("--metrics", metavar="URL", help="of the server  [default: its host, port 8002]")
@click.option("--json", "as_json", is_flag=True, help="machine-readable result")
@click.pass_context
def load(
    context: click.Context,
    url: str,
    texts: pathlib.Path,
    model: str,
    concurrency: str,
    requests: int,
    grpc: bool,
    engine: pathlib.Path | None,
    tolerance: float,
    timeout: float,
    metrics: str | None,
    as_json: bool,
) -> None:
    """Ask the server at URL from several threads; compare each answer with the text's alone.

    Exit code 1: a request failed or an answer differs.
    """
    from convbert_deploy.engine import Engine
    from convbert_deploy.serving.load import LoadOptions, read_requests
    from convbert_deploy.serving.load import load as run_load

    options = LoadOptions(integers(concurrency), requests, timeout, tolerance, grpc, metrics)
    here = Engine.load(engine) if engine is not None else None
    report = run_load(url, model, read_requests(texts), options, engine=here, progress=progress)
    click.echo(json.dumps(report.to_json()) if as_json else report.to_text())
    context.exit(0 if report.passed else 1)
