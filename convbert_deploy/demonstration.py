"""The main job on a sample: export, calibrate, build, verify, evaluate, bench, answer, package, score
a file; one report at the end."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

from convbert_deploy.benchmarking import BenchmarkReport, BenchOptions
from convbert_deploy.benchmarking.bench import BenchRequest, bench
from convbert_deploy.build import BuildOptions, build_engine
from convbert_deploy.bulk_scoring.folder import JOB
from convbert_deploy.bulk_scoring.job import bulk
from convbert_deploy.bulk_scoring.options import BulkOptions
from convbert_deploy.calibration.calibrating import CalibrateOptions, Progress, calibrate
from convbert_deploy.checkpoint import Checkpoint
from convbert_deploy.engine import Engine
from convbert_deploy.errors import ConvBertDeployError
from convbert_deploy.evaluation.evaluating import evaluate
from convbert_deploy.exporting import ExportOptions, export
from convbert_deploy.graph import Graph
from convbert_deploy.parity import ParityReport
from convbert_deploy.precision import Precision
from convbert_deploy.provenance import atomic_file
from convbert_deploy.report import to_markdown
from convbert_deploy.report_calibration import calibration_text
from convbert_deploy.report_evaluation import evaluation_text
from convbert_deploy.triton.deployment import facts_of, write_deployment
from convbert_deploy.triton.repository import TritonOptions, package_triton
from convbert_deploy.verification import VerifyOptions, verify

_ANSWERED_LINES = 200
_SHOWN_LINES = 3
_CALIBRATION_LINES = 128
_BENCH = BenchOptions(min_time_s=0.5, max_runs=60, max_time_s=2.0, precision=0.05)


@dataclasses.dataclass(frozen=True)
class DemoResult:
    report: pathlib.Path
    passed: bool


def demo(
    checkpoint: Checkpoint,
    texts: pathlib.Path,
    folder: pathlib.Path,
    progress: Callable[[str], None] = lambda _: None,
) -> DemoResult:
    """Everything lands in ``folder``; ``report.md`` in it holds every table.

    Raises:
        ConvBertDeployError: a stage failed; the message names it.
    """
    name = checkpoint.path.resolve().stem
    graph_path = folder / f"{name}.onnx"
    progress("export")
    exported = export(
        checkpoint, graph_path, ExportOptions(command="convbert-deploy demo"), progress
    )
    graph = Graph.load(graph_path)
    sections = [
        f"# convbert-deploy demo: {name}",
        f"{checkpoint.task}: {checkpoint.architecture.describe()}",
        f"## Export\n\n{graph_path.name}: {exported.nodes} nodes, opset {exported.info.opset}",
    ]
    if exported.parity:
        sections.append(_section(exported.parity))
    engines, skipped = _build(graph, folder, progress)
    answered, calibration = _split(texts, folder)
    progress("calibrate")
    quantized, losses = _quantized(graph_path, calibration, progress)
    more, also_skipped = _build(quantized, folder, progress)
    engines, skipped = engines + more, skipped + also_skipped
    sections += ["## INT8", losses]
    reports: list[ParityReport] = []
    sections.append("## Engines")
    for engine, in_graph in engines:
        progress(f"verify {engine.path.name}")
        report = verify(engine, checkpoint, VerifyOptions(graph=in_graph))
        reports.append(report)
        sections += [f"### {engine.path.name}", _facts(engine), _section(report)]
    sections += [f"Not built: {reason}" for reason in skipped]
    progress("bench")
    runnable = tuple(engine.path for engine, in_graph in engines if not in_graph)
    request = BenchRequest(runnable, baseline=checkpoint, options=_BENCH)
    sections += ["## Latency and throughput", _section(bench(request, progress))]
    progress("evaluate")
    evaluated = evaluate(more[0][0], answered, checkpoint)
    sections += ["## INT8 on labelled texts", f"```\n{evaluation_text(evaluated)}\n```"]
    sections += ["## Answers", _answers(engines[0][0].path, answered)]
    progress("service")
    sections += ["## Service", _service(checkpoint, answered, folder, progress)]
    with atomic_file(folder / "report.md") as temporary:
        temporary.write_text("\n\n".join(sections) + "\n")
    passed = all(report.passed for report in (*reports, evaluated))
    return DemoResult(folder / "report.md", passed)


def _build(
    graph: Graph, folder: pathlib.Path, progress: Callable[[str], None]
) -> tuple[list[tuple[Engine, bool]], list[str]]:
    """(engine, verified through its graph) for what this machine can build, and why not the rest."""
    stem = graph.path.stem
    wanted = [
        ("onnxruntime", Precision.FP32),
        ("onnxruntime", Precision.FP16),
        ("tensorrt-rtx", Precision.FP16),
    ]
    if graph.info.precision is not Precision.FP32:
        wanted = [(backend, graph.info.precision) for backend in ("onnxruntime", "tensorrt-rtx")]
        stem = stem.removesuffix(f".{graph.info.precision}")
    engines: list[tuple[Engine, bool]] = []
    skipped: list[str] = []
    for backend, precision in wanted:
        target = folder / f"{stem}.{backend}.{precision}.engine"
        options = BuildOptions(precision=precision, backend=backend, command="convbert-deploy demo")
        progress(f"build {target.name}")
        try:
            engine = build_engine(graph, target, options, progress)
        except ConvBertDeployError as error:
            if backend == "onnxruntime":
                raise
            skipped.append(f"{target.name}: {error}" + (f" ({error.hint})" if error.hint else ""))
            progress(f"left out: {skipped[-1]}")
            continue
        engines.append((engine, engine.manifest.golden_max_abs is None))
    return engines, skipped


def _split(texts: pathlib.Path, folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Lines to answer and to be judged by, and other lines to calibrate with."""
    lines = texts.read_text().splitlines(keepends=True)
    parts = lines[:_ANSWERED_LINES], lines[_ANSWERED_LINES:] or lines
    paths = folder / "answered.jsonl", folder / "calibration.jsonl"
    for path, part in zip(paths, parts, strict=True):
        with atomic_file(path) as temporary:
            temporary.write_text("".join(part))
    return paths


def _quantized(
    graph: pathlib.Path, data: pathlib.Path, progress: Callable[[str], None]
) -> tuple[Graph, str]:
    """The INT8 graph, and what calibration found as text."""
    target = graph.with_suffix(".int8.onnx")
    options = CalibrateOptions(samples=_CALIBRATION_LINES, command="convbert-deploy demo")
    result = calibrate(graph, data, target, options, Progress(note=progress))
    return Graph.load(target), f"```\n{calibration_text(result)}\n```"


def _section(report: ParityReport | BenchmarkReport) -> str:
    """The report's Markdown with its headings below ours."""
    lines = to_markdown(report).splitlines()
    return "\n".join(f"###{line}" if line.startswith("#") else line for line in lines)


def _facts(engine: Engine) -> str:
    manifest = engine.manifest
    facts = {"nodes run by our kernels": manifest.plugin_nodes, "profile": manifest.profile}
    facts |= manifest.plan
    lines = [f"- {key}: {value}" for key, value in facts.items()]
    if manifest.golden_max_abs is None:
        lines.append("- no GPU here for this plan: the graph it was built from is compared instead")
    return "\n".join(lines)


def _answers(engine: pathlib.Path, texts: pathlib.Path) -> str:
    from convbert_deploy.serving.answering import run

    lines = texts.read_text().splitlines()[:_ANSWERED_LINES]
    answers = list(run(engine, lines))
    shown = [
        f"{line}\n{json.dumps(answer, ensure_ascii=False)}"
        for line, answer in zip(lines[:_SHOWN_LINES], answers, strict=False)
    ]
    parts = ["```\n" + "\n\n".join(shown) + "\n```"]
    agreed, words = _agreement(lines, answers)
    if words:
        parts.append(
            f"The answers agree with the annotators on {agreed} of {words} words "
            f"({agreed / words:.1%}) in {len(lines)} sentences."
        )
    return "\n\n".join(parts)


def _service(
    checkpoint: Checkpoint,
    texts: pathlib.Path,
    folder: pathlib.Path,
    progress: Callable[[str], None],
) -> str:
    """An engine whose answers do not depend on their batch, packaged for Triton, and a scored file."""
    name = f"{checkpoint.path.resolve().stem}.masked"
    graph = folder / f"{name}.onnx"
    command = "convbert-deploy demo"
    export(checkpoint, graph, ExportOptions(padding="masked", command=command), progress)
    options = BuildOptions(backend="onnxruntime", command=command)
    engine = build_engine(Graph.load(graph), folder / f"{name}.engine", options, progress)
    repository = package_triton(
        engine,
        folder / "service" / "models",
        TritonOptions(replace=True, command=command),
        progress,
    )
    write_deployment(folder / "service", facts_of(repository, engine))
    scored = bulk(
        texts,
        _emptied(folder / "scored"),
        engine.path,
        BulkOptions(output_format="jsonl", workers=1, local=True),
        progress,
    )
    return (
        f"{folder / 'service'}: Triton models {repository.name} (text) and "
        f"{repository.engine_name} (token ids); run.sh, Dockerfile, docker-compose.yaml, helm/ and "
        f"kserve/ beside them.\n\n{scored.output}: {scored.rows} rows of {texts.name} scored by "
        f"`bulk`, {scored.errors} errors."
    )


def _emptied(folder: pathlib.Path) -> pathlib.Path:
    """The demo starts anew each time; a bulk job would go on where its folder stands."""
    if (folder / JOB).is_file():
        shutil.rmtree(folder)
    return folder


def _agreement(lines: list[str], answers: list[dict[str, Any]]) -> tuple[int, int]:
    """Words labelled as in the ``tags`` of the same line, and words that have a tag."""
    agreed = words = 0
    for line, answer in zip(lines, answers, strict=True):
        tags = json.loads(line).get("tags") if line.startswith("{") else None
        if tags and "words" in answer:
            labels = [word["label"] for word in answer["words"]]
            agreed += sum(a == b for a, b in zip(labels, tags, strict=False))
            words += len(tags)
    return agreed, words
