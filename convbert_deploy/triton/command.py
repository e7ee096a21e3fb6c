"""The command ``package``."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import click

from convbert_deploy.command_line import PATH, command_line, progress


@click.group()
def package() -> None:
    """Make what a server takes out of an engine."""


@package.command()
@click.argument("engine", type=PATH)
@click.option(
    "-o", "--output", required=True, type=PATH, help="folder to write: models/ and how to run them"
)
@click.option("--name", help="model name; its engine is NAME_engine  [default: the engine's]")
@click.option("--instances", default=1, type=click.IntRange(min=1), help="engines at a time")
@click.option(
    "--text-instances", default=1, type=click.IntRange(min=1), help="tokenizers at a time"
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of each engine")
@click.option(
    "--delay-us", default=0, type=click.IntRange(min=0), help="wait for others, microseconds"
)
@click.option(
    "--environment",
    metavar="PATH",
    help="on the server: Python environment with convbert-deploy  [default: the server's own]",
)
@click.option(
    "--plugin-folder", default="/plugins", help="on the server: where plugins/ is, for GPU engines"
)
@click.option(
    "--accept-batch-dependent-answers",
    is_flag=True,
    help="serve an engine with padding hf, whose answers change with their batch",
)
@click.option(
    "--own-runner",
    is_flag=True,
    help="GPU engines: our runner, which checks token ids, instead of Triton's own backend",
)
@click.option("--add-version", is_flag=True, help="keep what is there; its models' next version")
@click.option("--force", "replace", is_flag=True, help="replace an older repository")
@click.option("--json", "as_json", is_flag=True, help="machine-readable result")
def triton(engine: pathlib.Path, output: pathlib.Path, as_json: bool, **settings: Any) -> None:
    """Write a model repository of Triton Inference Server that serves ENGINE."""
    from convbert_deploy.engine import Engine
    from convbert_deploy.triton.deployment import facts_of, write_deployment
    from convbert_deploy.triton.repository import TritonOptions, package_triton

    options = TritonOptions(command=command_line(), **settings)
    loaded = Engine.load(engine)
    models = output / "models"
    repository = package_triton(loaded, models, options, progress)
    write_deployment(output, facts_of(repository, loaded, plugin_folder=options.plugin_folder))
    manifest = repository.manifest
    if as_json:
        facts = {key: value for key, value in manifest.items() if key not in ("golden", "files")}
        click.echo(json.dumps({"repository": str(models)} | facts))
        return
    for argument in repository.server_arguments:
        click.echo(f"start the server with {argument}, {repository.plugins} mounted there")
    click.echo(
        f"wrote {models}: {repository.name} (text in, answers out) and {repository.engine_name} "
        f"({manifest['triton_backend']} backend, batches up to {manifest['max_batch_size']}), "
        f"{len(manifest['files'])} files"
    )
