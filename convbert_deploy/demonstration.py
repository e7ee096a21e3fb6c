"""The main job on a sample: export, build, verify, bench, answer; one report at the end."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

from convbert_deploy.benchmark import BenchmarkReport, BenchOptions
from convbert_deploy.build import BuildOptions, build_engine
from convbert_deploy.checkpoint import Checkpoint
from convbert_deploy.engine import Engine
from convbert_deploy.engine_benchmark import BenchRequest, bench
from convbert_deploy.errors import ConvBertDeployError
from convbert_deploy.exporting import ExportOptions, export
from convbert_deploy.graph import Graph
from convbert_deploy.parity import ParityReport
from convbert_deploy.precision import Precision
from convbert_deploy.provenance import atomic_file
from convbert_deploy.report import to_markdown
from convbert_deploy.verification import VerifyOptions, verify

_ANSWERED_LINES = 200
_SHOWN_LINES = 3
_BENCH = BenchOptions(min_time_s=1.0, max_runs=200)


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
    sections += ["## Answers", _answers(engines[0][0].path, texts)]
    with atomic_file(folder / "report.md") as temporary:
        temporary.write_text("\n\n".join(sections) + "\n")
    passed = all(report.passed for report in reports)
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
    engines: list[tuple[Engine, bool]] = []
    skipped: list[str] = []
    for backend, precision in wanted:
        target = folder / f"{stem}.{backend}.{precision}.engine"
        options = BuildOptions(precision, backend, command="convbert-deploy demo")
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
