"""What the commands share: errors on two lines, progress on stderr, results to a file or stdout."""

from __future__ import annotations

import pathlib
import shlex
import sys
from collections.abc import Callable
from typing import Any

import click

from convbert_deploy.errors import ConvBertDeployError

PATH = click.Path(path_type=pathlib.Path)
TASKS = (
    "encoder",
    "masked-lm",
    "sequence-classification",
    "token-classification",
    "question-answering",
    "multiple-choice",
)
#: Kept here, as ``--help`` imports nothing but click; a test holds it to the table of peers.
PEERS_HELP = "eager, compile, ort, openvino, openvino-graph or optimum, with :bf16 or :int8; repeat"


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


def count(what: str, done: int, of: int) -> None:
    """A counter on stderr: one line that moves on a terminal, else a line each quarter."""
    text = f"... {what}: {done}" + (f" of {of}" if of else "")
    if sys.stderr.isatty():
        click.echo(f"\r{text}\x1b[K", err=True, nl=bool(of) and done >= of)
    elif not of or done == of or done * 4 // of > (done - 1) * 4 // of:
        click.echo(text, err=True)


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


def load_checkpoint(
    path: pathlib.Path,
    config: pathlib.Path | None = None,
    tokenizer: pathlib.Path | None = None,
    task: str | None = None,
) -> Any:
    from convbert_deploy.architecture import Task
    from convbert_deploy.checkpoint import Checkpoint, CheckpointOptions

    return Checkpoint.load(path, CheckpointOptions(config, tokenizer, Task(task) if task else None))


def precision_flags(*names: str) -> Callable[[Any], Any]:
    """A flag for each precision; the last one given is ``precision``, None where none was."""
    helps = {
        "fp32": "32-bit floats  [default]",
        "fp16": "16-bit floats",
        "bf16": "bfloat16",
        "int8": "8-bit integers in the linear layers",
        "fp8": "8-bit floats (E4M3) in the linear layers; GPUs from SM 89",
    }

    def decorate(command: Any) -> Any:
        for name in reversed(names):
            option = click.option(f"--{name}", "precision", flag_value=name, help=helps[name])
            command = option(command)
        return command

    return decorate


def run_calibration(
    graph: pathlib.Path,
    data: pathlib.Path,
    target: pathlib.Path,
    precision: str,
    *,
    smoothquant: str = "auto",
    budget: str | None = None,
    **settings: Any,
) -> Any:
    """``calibrate`` with what the command line gave, its progress on stderr."""
    from convbert_deploy.calibration.budget import Budget
    from convbert_deploy.calibration.calibrating import CalibrateOptions, Progress, calibrate
    from convbert_deploy.calibration.smoothing import SmoothingOptions
    from convbert_deploy.precision import Precision

    options = CalibrateOptions(
        precision=Precision(precision),
        smoothing=SmoothingOptions.parse(smoothquant),
        budget=Budget.parse(budget) if budget else None,
        command=command_line(),
        **settings,
    )
    return calibrate(graph, data, target, options, Progress(progress, count))


def calibrated_first(
    graph: pathlib.Path,
    data: pathlib.Path,
    folder: pathlib.Path,
    precision: str | None,
    backend: str,
    tokenizer: tuple[pathlib.Path, ...],
    budget: str | None,
) -> pathlib.Path:
    """``build-engine --data``: the calibrated graph, written to ``folder``."""
    from convbert_deploy.build import resolve_backend
    from convbert_deploy.build_precision import CPU

    if precision in (None, "fp32"):
        raise click.UsageError("--data calibrates: say --int8, --fp8, --fp16 or --bf16")
    if precision != "int8" and resolve_backend(backend) == CPU:
        raise click.UsageError(
            "no CPU computes in fp8: --int8, or --backend tensorrt-rtx"
            if precision == "fp8"
            else f"a CPU engine needs no ranges for {precision}: leave out --data"
        )
    target = folder / f"{graph.stem}.{precision}.onnx"
    return run_calibration(graph, data, target, precision, tokenizer=tokenizer, budget=budget).path
