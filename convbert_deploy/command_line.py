"""What the commands share: errors on two lines, progress on stderr, results to a file or stdout."""

from __future__ import annotations

import pathlib
import shlex
import sys
from typing import Any

import click

from convbert_deploy.errors import ConvBertDeployError


class Cli(click.Group):
    """A user's error is two lines and exit 3; anything else is our bug and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConvBertDeployError as error:
            click.echo(f"error: {error}", err=True)
            if error.hint:
                click.echo(f"hint:  {error.hint}", err=True)
            ctx.exit(3)


def progress(text: str) -> None:
    click.echo(f"... {text}", err=True)


def command_line() -> str:
    """What was typed, for the artifact's record; paths without their folders."""
    words = [pathlib.PurePath(word).name if "/" in word else word for word in sys.argv[1:]]
    return shlex.join(["convbert-deploy", *words])


def integers(text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise click.BadParameter(f"{text!r} is not a comma list of positive numbers")
    return values


def write_report(target: pathlib.Path | None, text: str) -> bool:
    """True where it went to stdout."""
    from convbert_deploy.provenance import atomic_file

    if target is None:
        return False
    if str(target) == "-":
        click.echo(text)
        return True
    with atomic_file(target) as temporary:
        temporary.write_text(text + "\n")
    return False
