"""The command line: each command parses, makes one library call and renders the result.

Results go to stdout, progress to stderr. Exit codes: 0 ok, 1 a check failed, 2 usage, 3 something
the user can fix. Only click is imported before a command runs.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import click

from convbert_deploy import __version__
from convbert_deploy.bulk_scoring.command import bulk
from convbert_deploy.command_line import (
    PATH,
    TASKS,
    Cli,
    calibrated_first,
    command_line,
    load_checkpoint,
    precision_flags,
    progress,
    run_calibration,
)
from convbert_deploy.command_line_measuring import bench, profile, report
from convbert_deploy.serving.command import load, probe
from convbert_deploy.triton.command import package


@click.group(
    cls=Cli, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="convbert-deploy")
def main() -> None:
    """Export ConvBERT checkpoints, build engines, prove them, time them, ask them."""


@main.command()
@click.option("--ckpt", required=True, type=PATH, help="state dict, .safetensors or HF directory")
@click.option("-o", "--output", type=PATH, help="graph to write  [default: ./NAME.onnx]")
@click.option("--config", type=PATH, help="config.json  [default: beside the weights]")
@click.option("--tokenizer", type=PATH, help="tokenizer.json, vocab.txt or folder")
@click.option("--task", type=click.Choice(TASKS), help="head to use  [default: from the weights]")
@click.option(
    "--padding",
    type=click.Choice(["hf", "masked"]),
    default="hf",
    help="hf: as transformers at the same padded shape; masked: pads change nothing",
)
@click.option("--no-check", is_flag=True, help="skip the comparison with the eager model")
@click.option("--json", "as_json", is_flag=True, help="machine-readable result")
def export(
    ckpt: pathlib.Path,
    output: pathlib.Path | None,
    config: pathlib.Path | None,
    tokenizer: pathlib.Path | None,
    task: str | None,
    padding: str,
    no_check: bool,
    as_json: bool,
) -> None:
    """Trace a checkpoint to one ONNX graph and check it against the eager model."""
    from convbert_deploy.exporting import ExportOptions
    from convbert_deploy.exporting import export as run_export
    from convbert_deploy.report import to_text

    checkpoint = load_checkpoint(ckpt, config, tokenizer, task)
    progress(f"{checkpoint.task}: {checkpoint.architecture.describe()}")
    if checkpoint.config_path:
        progress(f"activation, epsilon, pad id and labels from {checkpoint.config_path}")
    if checkpoint.dropped:
        progress(f"left out, not of this task: {', '.join(checkpoint.dropped)}")
    target = output or pathlib.Path(
        f"{ckpt.resolve().stem if ckpt.is_file() else ckpt.resolve().name}.onnx"
    )
    options = ExportOptions(padding=padding, check=not no_check, command=command_line())
    result = run_export(checkpoint, target, options, progress)
    if as_json:
        parity = result.parity.to_json() if result.parity else None
        click.echo(json.dumps({"graph": str(target), "nodes": result.nodes, "parity": parity}))
        return
    if result.parity:
        click.echo(to_text(result.parity))
    click.echo(
        f"wrote {target}: {result.nodes} nodes, opset {result.info.opset}, padding {padding}"
    )


@main.command()
@click.argument("graph", type=PATH)
@click.option("--data", required=True, type=PATH, help="JSONL of texts (labels are used), or npz")
@precision_flags("int8", "fp8", "fp16", "bf16")
@click.option("-o", "--output", type=PATH, help="[default: ./NAME.PRECISION.onnx]")
@click.option(
    "--method",
    default="minmax",
    type=click.Choice(["minmax", "moving-average", "percentile", "entropy", "mse"]),
    help="how a tensor's range is read off its values",
)
@click.option("--percentile", default=99.99, help="for --method percentile")
@click.option("--samples", default=512, type=click.IntRange(min=1), help="texts at most")
@click.option("--smoothquant", default="auto", help="auto (searched), off, or an alpha in 0.0-1.0")
@click.option("--budget", help='such as "metric drop <= 0.3, agreement >= 99%": else all in 8 bits')
@click.option("--budget-data", type=PATH, help="texts to judge the budget on  [default: --data]")
@click.option("--table", type=PATH, help="statistics of an earlier run, instead of collecting")
@click.option(
    "--fp8-attention", is_flag=True, help="attention in fp8 too; fixed length engines only"
)
@click.option("--tokenizer", type=PATH, help="tokenizer.json, vocab.txt or folder")
@click.option("--threads", type=int, help="CPU threads")
@click.option("--json", "as_json", is_flag=True, help="the whole record")
def calibrate(
    graph: pathlib.Path,
    data: pathlib.Path,
    precision: str | None,
    output: pathlib.Path | None,
    tokenizer: pathlib.Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure GRAPH on real data; write it in another precision that keeps its answers."""
    from convbert_deploy.checkpoint import tokenizer_files
    from convbert_deploy.report_calibration import calibration_text

    if precision is None:
        raise click.UsageError("which precision? --int8, --fp8, --fp16 or --bf16")
    target = output or pathlib.Path(f"{graph.stem}.{precision}.onnx")
    files = tokenizer_files(tokenizer) if tokenizer else ()
    result = run_calibration(graph, data, target, precision, tokenizer=files, **settings)
    click.echo(json.dumps(result.to_json()) if as_json else calibration_text(result))


@main.command("build-engine")
@click.argument("graph", required=False, type=PATH)
@click.option("-o", "--output", type=PATH, help="[default: ./NAME.PRECISION.engine]")
@precision_flags("fp32", "fp16", "bf16", "int8", "fp8")
@click.option("--data", type=PATH, help="JSONL or npz: calibrate the fp32 GRAPH first")
@click.option("--budget", help="what int8 may lose on --data, as in calibrate")
@click.option(
    "--backend",
    default="auto",
    type=click.Choice(["auto", "onnxruntime", "tensorrt", "tensorrt-rtx"]),
)
@click.option("--shapes", default="batch=1:8:32,seq=1:128:512", help="MIN:OPT:MAX of each axis")
@click.option(
    "--target",
    "capabilities",
    multiple=True,
    help="GPU of a tensorrt-rtx plan, such as SM89; repeat  [default: SM86 SM89 SM120]",
)
@click.option(
    "--high",
    default="fp16",
    type=click.Choice(["fp16", "bf16", "fp32"]),
    help="on a GPU, what an int8 or fp8 graph computes the rest in; on a CPU bf16 or fp32, for what "
    "--budget kept out of int8",
)
@click.option(
    "--static-activations",
    is_flag=True,
    help="on a CPU, an int8 graph's calibrated activation scales instead of one for each token",
)
@click.option("--tokenizer", type=PATH, help="tokenizer.json, vocab.txt or folder")
@click.option("--no-plugin", is_flag=True, help="leave the convolution to standard operators")
@click.option("--json", "as_json", is_flag=True, help="print the manifest")
def build_engine(
    graph: pathlib.Path | None,
    output: pathlib.Path | None,
    precision: str | None,
    data: pathlib.Path | None,
    budget: str | None,
    backend: str,
    shapes: str,
    capabilities: tuple[str, ...],
    high: str,
    static_activations: bool,
    tokenizer: pathlib.Path | None,
    no_plugin: bool,
    as_json: bool,
) -> None:
    """Build an engine bundle from GRAPH, or from the newest export in this folder."""
    from convbert_deploy.build import BuildOptions
    from convbert_deploy.build import build_engine as run_build
    from convbert_deploy.checkpoint import tokenizer_files
    from convbert_deploy.graph import Graph, latest_graph
    from convbert_deploy.precision import Precision
    from convbert_deploy.shapes import ShapeProfile

    files = tokenizer_files(tokenizer) if tokenizer else ()
    if graph is None:
        graph = latest_graph(pathlib.Path())
        progress(f"no GRAPH given: the newest export here is {graph}")
    if data is not None:
        folder = (output or graph).parent
        graph = calibrated_first(graph, data, folder, precision, backend, files, budget)
    elif budget is not None:
        raise click.UsageError("--budget is judged on --data")
    options = BuildOptions(
        precision=Precision(precision) if precision else None,
        high=Precision(high),
        backend=backend,
        profile=ShapeProfile.parse(shapes),
        plugin=not no_plugin,
        static_activations=static_activations,
        compute_capabilities=capabilities,
        tokenizer=files,
        command=command_line(),
    )
    loaded = Graph.load(graph)
    name = graph.stem.removesuffix(f".{loaded.info.precision}")
    target = output or pathlib.Path(f"{name}.{precision or loaded.info.precision}.engine")
    engine = run_build(loaded, target, options, progress)
    manifest = engine.manifest
    if as_json:
        click.echo(json.dumps(manifest.to_json()))
        return
    checked = "not run: no such GPU here"
    if manifest.golden_max_abs is not None:
        checked = f"max abs difference {manifest.golden_max_abs:.2g}"
    click.echo(
        f"wrote {target}: {engine.label}, {manifest.plugin_nodes} nodes run by our kernels, "
        f"{manifest.profile}; golden request {checked}"
    )
    for key, value in manifest.plan.items():
        click.echo(f"  {key}: {value}")


@main.command()
@click.argument("engine", type=PATH)
@click.option("--against", required=True, type=PATH, help="the checkpoint it came from")
@click.option("--config", type=PATH, help="config.json  [default: beside the weights]")
@click.option("--task", type=click.Choice(TASKS), help="head to use  [default: from the weights]")
@click.option("--graph", is_flag=True, help="the graph a plan was built from, on this CPU")
@click.option("--cases", is_flag=True, help="a line for every shape")
@click.option("--json", "as_json", is_flag=True, help="the whole report")
def verify(
    engine: pathlib.Path,
    against: pathlib.Path,
    config: pathlib.Path | None,
    task: str | None,
    graph: bool,
    cases: bool,
    as_json: bool,
) -> None:
    """Compare ENGINE with the eager model on many shapes; exit 1 outside the tolerance."""
    from convbert_deploy.engine import Engine
    from convbert_deploy.report import to_json_text, to_text
    from convbert_deploy.report_parity import parity_text
    from convbert_deploy.verification import VerifyOptions
    from convbert_deploy.verification import verify as run_verify

    report = run_verify(
        Engine.load(engine),
        load_checkpoint(against, config, task=task),
        VerifyOptions(graph=graph),
        progress,
    )
    if as_json:
        click.echo(to_json_text(report))
    else:
        click.echo(parity_text(report, cases=True) if cases else to_text(report))
    sys.exit(0 if report.passed else 1)


@main.command()
@click.argument("engine", type=PATH)
@click.option("--data", required=True, type=PATH, help="JSONL: text, words, question... and labels")
@click.option("--against", type=PATH, help="the checkpoint it came from, to compare with")
@click.option("--config", type=PATH, help="config.json  [default: beside the weights]")
@click.option("--budget", help='such as "metric drop <= 0.3, agreement >= 99%"; exit 1 over it')
@click.option("--graph", is_flag=True, help="the graph a plan was built from, on this CPU")
@click.option("--limit", type=click.IntRange(min=1), help="samples at most  [default: all]")
@click.option("--threads", type=int, help="CPU threads of each runtime")
@click.option("--json", "as_json", is_flag=True, help="the whole report")
def evaluate(
    engine: pathlib.Path,
    data: pathlib.Path,
    against: pathlib.Path | None,
    config: pathlib.Path | None,
    budget: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Judge ENGINE's answers by labels and beside the eager model; exit 1 over the budget."""
    from convbert_deploy.calibration.budget import Budget
    from convbert_deploy.engine import Engine
    from convbert_deploy.evaluation.evaluating import EvaluateOptions
    from convbert_deploy.evaluation.evaluating import evaluate as run_evaluate
    from convbert_deploy.report_evaluation import evaluation_text

    options = EvaluateOptions(budget=Budget.parse(budget) if budget else None, **settings)
    bundle = Engine.load(engine)
    task = bundle.manifest.task.value
    checkpoint = load_checkpoint(against, config, task=task) if against else None
    report = run_evaluate(bundle, data, checkpoint, options, progress)
    click.echo(json.dumps(report.to_json()) if as_json else evaluation_text(report))
    sys.exit(0 if report.passed else 1)


for command in (bench, profile, report, package, probe, load, bulk):
    main.add_command(command)


@main.command()
@click.argument("engine", type=PATH)
@click.option("--text", multiple=True, help="a text to answer; repeat  [default: lines of stdin]")
@click.option(
    "--input",
    "input_file",
    type=click.File(),
    default="-",
    help="lines of text, or JSON objects with text, question, choices, words...",
)
@click.option("--threads", type=int, help="CPU threads")
def run(engine: pathlib.Path, text: tuple[str, ...], input_file: Any, threads: int | None) -> None:
    """Answer texts: one JSON object a line on stdout; exit 3 where a request was refused."""
    from convbert_deploy.serving.answering import run as run_engine

    lines = list(text) or [line.rstrip("\n") for line in input_file]
    refused = 0
    for answer in run_engine(engine, lines, threads=threads):
        refused += "error" in answer
        click.echo(json.dumps(answer, ensure_ascii=False))
    sys.exit(3 if refused else 0)


@main.command()
@click.argument("file", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="one JSON object")
def inspect(file: pathlib.Path, as_json: bool) -> None:
    """Say what FILE is: checkpoint, graph, engine or model repository."""
    from convbert_deploy.inspection import inspect as run_inspect

    description = run_inspect(file)
    if as_json:
        click.echo(json.dumps(description))
        return
    for key, value in description.items():
        click.echo(f"{key}: {value if isinstance(value, str) else json.dumps(value)}")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="one JSON object")
def doctor(as_json: bool) -> None:
    """List what is installed, what is missing, and the command that fixes it."""
    from convbert_deploy.diagnosis import doctor as run_doctor
    from convbert_deploy.report import checks_json, checks_text

    checks = run_doctor()
    click.echo(checks_json(checks) if as_json else checks_text(checks))


@main.command()
@click.option("--ckpt", type=PATH, default="samples/convbert-pos-brown", help="checkpoint to show")
@click.option("--texts", type=PATH, default="samples/brown-pos.jsonl", help="JSONL to answer")
@click.option("-o", "--output", type=PATH, default="demo-output", help="folder for all artifacts")
def demo(ckpt: pathlib.Path, texts: pathlib.Path, output: pathlib.Path) -> None:
    """The whole way: export, build, verify, bench, answer and package; a report at the end."""
    from convbert_deploy.demonstration import demo as run_demo

    result = run_demo(load_checkpoint(ckpt), texts, output, progress)
    click.echo(f"report: {result.report}")
    sys.exit(0 if result.passed else 1)


if __name__ == "__main__":
    main()
