"""A graph and real data in, a graph in another number format out: what ``calibrate`` does."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..architecture import Task
from ..backends.base import RunnerOptions
from ..environment import versions
from ..errors import GraphError, InputError, OutputError
from ..graph import (
    Graph,
    GraphInfo,
    read_info,
    set_info,
    sha256_of_graph,
    tokenizer_files,
    write_graph,
)
from ..precision import Precision
from ..provenance import Origin, sha256_of_file
from .activations import CollectOptions
from .budget import Budget
from .collect import collect
from .judging import ArrayJudge, Judge, input_limits, judge_of_texts, labelled
from .linears import linears, split_groups
from .masks import repair_mask_constants
from .observers import check_method
from .ranges import KeptNode, keep_fp32, observed_tensors
from .samples import CalibrationSamples, read_samples
from .smoothing import SmoothingOptions, by_activation
from .table import CalibrationTable
from .workspace import Workspace

if TYPE_CHECKING:
    import onnx

    from ..backends.base import Runner
    from ..serving.tokenizer import Tokenizer

#: texts of the search (sensitivities; with or without smoothing); the budget itself is judged on all
_SCOUTED = 128
#: a batch of the search for NaN, with every tensor of it in memory
_CHECKED_POSITIONS = 512


@dataclasses.dataclass(frozen=True)
class CalibrateOptions:
    """What to write and by which rules.

    method, percentile: how ranges are read off the statistics (``observers.METHODS``). samples:
    texts at most. smoothing: of 8-bit graphs. budget: what an 8-bit graph may lose, judged on
    ``budget_data`` (JSONL; the calibration data where None). table: statistics collected before on
    this graph, instead of collecting them. fp8_attention: attention's products in FP8 too, which
    TensorRT fuses for a fixed sequence length only. tokenizer: files to use instead of the graph's.
    """

    precision: Precision = Precision.INT8
    method: str = "minmax"
    percentile: float = 99.99
    samples: int = 512
    smoothing: SmoothingOptions = dataclasses.field(default_factory=SmoothingOptions)
    budget: Budget | None = None
    budget_data: pathlib.Path | None = None
    fp8_attention: bool = False
    table: pathlib.Path | None = None
    tokenizer: tuple[pathlib.Path, ...] = ()
    threads: int | None = None
    command: str = ""

    def __post_init__(self) -> None:
        check_method(self.method, self.percentile)
        if self.precision is Precision.FP32:
            raise InputError("the graph is fp32 already: expected int8, fp8, fp16 or bf16")
        if self.fp8_attention and self.precision is not Precision.FP8:
            raise InputError(f"fp8 attention in an {self.precision} graph, expected --fp8")
        if self.budget is not None and not self.precision.quantized:
            raise InputError(f"a budget chooses layers to quantize, and {self.precision} has none")


@dataclasses.dataclass(frozen=True)
class Progress:
    """note: a sentence. count: what is counted, how many are done, and of how many (0: unknown)."""

    note: Callable[[str], None] = lambda sentence: None
    count: Callable[[str, int, int], None] = lambda what, done, of: None


@dataclasses.dataclass(frozen=True)
class CalibrationResult:
    """table: the statistics' file, beside the graph. record: as in the graph's metadata."""

    path: pathlib.Path
    table: pathlib.Path
    precision: Precision
    record: dict[str, Any]
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "calibration",
            "graph": str(self.path),
            "table": str(self.table),
            "precision": self.precision.value,
            "bytes": self.bytes,
            **self.record,
        }


def calibrate(
    graph: pathlib.Path,
    data: pathlib.Path,
    target: pathlib.Path,
    options: CalibrateOptions | None = None,
    progress: Progress | None = None,
) -> CalibrationResult:
    """Measure ``graph`` on ``data``, change its number format, check the result, write ``target``.

    Writes STEM.calibration.json (the statistics) and STEM.tokenizer beside ``target`` too. An
    interrupted collection goes on from STEM.calibration.partial.json when it is called again.

    Raises:
        GraphError: not an exported fp32 graph; NaN or infinity inside; a table of another graph; a
            budget that cannot be met.
        InputError: data that cannot be read.
        OutputError: ``target`` cannot be written.
    """
    options, progress = options or CalibrateOptions(), progress or Progress()
    info = read_info(graph)
    if info.precision is not Precision.FP32:
        raise GraphError(
            f"{graph} is {info.precision} already, expected an fp32 graph",
            hint="calibrate the graph that convbert-deploy export wrote",
        )
    _check_target(target, graph)
    tokenizer = _tokenizer(options.tokenizer or tokenizer_files(graph))
    samples = read_samples(
        data, limits=input_limits(info), tokenizer=tokenizer, samples=options.samples
    )
    _check_labels(options, data, info, tokenizer)
    progress.note(f"{samples.samples} samples, {samples.tokens} tokens of {data.name}")
    digest = sha256_of_graph(graph)
    with Workspace.open(_prepared(graph, options.precision, progress)) as workspace:
        job = _Job(workspace, samples, info, options, progress, digest, target)
        table = job.table()
        judges = _Judges(job, data, tokenizer)
        model, record = (
            _eight_bit(job, table, judges)
            if options.precision.quantized
            else (_half(job, table, judges))
        )
        workspace.complete(model)
    table_path = target.with_suffix(".calibration.json")
    table.save(table_path)
    record |= {
        "data": samples.source,
        "data_sha256": samples.sha256,
        "samples": samples.samples,
        "tokens": samples.tokens,
        "method": table.method,
        "table_sha256": sha256_of_file(table_path),
    }
    changed = dataclasses.replace(
        info,
        precision=options.precision,
        chain=(*info.chain, Origin("graph", graph.name, digest)),
        versions=info.versions | {k: v for k, v in versions().items() if v},
        command=options.command,
        calibration=record,
    )
    set_info(model, changed)
    try:
        write_graph(model, target, options.tokenizer or tokenizer_files(graph))
    except OutputError:
        table_path.unlink(missing_ok=True)
        raise
    size = sum(
        file.stat().st_size for file in (target, pathlib.Path(f"{target}.data")) if file.is_file()
    )
    return CalibrationResult(target, table_path, options.precision, record, size)


def _check_target(target: pathlib.Path, graph: pathlib.Path) -> None:
    """What would fail in the end is said before minutes of work."""
    if target.is_dir():
        raise OutputError(f"cannot write {target}: it is a directory")
    if target.resolve() == graph.resolve():
        raise OutputError(
            f"cannot write {target}: it is the graph that is calibrated",
            hint="another name with -o",
        )
    existing = next(folder for folder in target.absolute().parents if folder.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise OutputError(
            f"cannot write {target}: {existing} is no folder to write to",
            hint="another place with -o",
        )


def _check_labels(
    options: CalibrateOptions, data: pathlib.Path, info: GraphInfo, tokenizer: Tokenizer | None
) -> None:
    """Raises InputError where a metric is bounded and the texts to judge it by have no labels."""
    if options.budget is None or options.budget.metric_drop is None:
        return
    judged = options.budget_data or data
    if judged.suffix == ".npz" or not labelled(judged, info, tokenizer):
        raise InputError(
            f"budget {options.budget} bounds the metric, and {judged.name} has no labels",
            hint="label every line, or bound the agreement or the errors",
        )


@dataclasses.dataclass(frozen=True)
class _Job:
    """What every step of one calibration needs."""

    workspace: Workspace
    samples: CalibrationSamples
    info: GraphInfo
    options: CalibrateOptions
    progress: Progress
    graph_sha256: str
    target: pathlib.Path

    @property
    def runner_options(self) -> RunnerOptions:
        return RunnerOptions(threads=self.options.threads)

    def table(self) -> CalibrationTable:
        """The statistics, read or collected, under the method that was asked for."""
        options = self.options
        if options.table is not None:
            table = CalibrationTable.load(options.table)
            table.check_graph(self.graph_sha256)
        else:
            model = self.workspace.model()
            quantized = by_activation(linears(model)) if options.precision.quantized else ()
            table = collect(
                self.workspace,
                observed_tensors(model),
                self.samples,
                self.graph_sha256,
                CollectOptions(threads=options.threads, histograms=frozenset(quantized)),
                partial=self.target.with_suffix(".calibration.partial.json"),
                progress=lambda done, of: self.progress.count("collecting ranges", done, of),
                note=self.progress.note,
            )
        return dataclasses.replace(table, method=options.method, percentile=options.percentile)


class _Judges:
    """Made when they are needed: the fp32 graph is run once for each."""

    def __init__(self, job: _Job, data: pathlib.Path, tokenizer: Tokenizer | None) -> None:
        self._job, self._data, self._tokenizer = job, data, tokenizer

    def final(self) -> Judge:
        """By the budget's own texts, or all calibration samples."""
        other = self._job.options.budget_data
        return self._of_samples(1) if other is None else self._of_texts(other, None)

    def scout(self) -> Judge:
        """By some of the calibration samples, spread over the file."""
        return self._of_samples(max(1, len(self._job.samples.rows) // _SCOUTED))

    def _of_samples(self, step: int) -> Judge:
        job = self._job
        rows = job.samples.rows[::step]
        # a bare encoder's outputs, for each token of each text, would outgrow the model
        if self._data.suffix != ".npz" and job.info.task is not Task.ENCODER:
            return self._of_texts(self._data, tuple(row.number for row in rows))
        with self._reference() as reference:
            return ArrayJudge(dataclasses.replace(job.samples, rows=rows), job.info, reference)

    def _of_texts(self, path: pathlib.Path, lines: tuple[int, ...] | None) -> Judge:
        budget = self._job.options.budget
        with self._reference() as reference:
            return judge_of_texts(
                path,
                self._job.info,
                self._tokenizer,
                reference,
                lines=lines,
                metric_needed=budget is not None and budget.metric_drop is not None,
            )

    def _reference(self) -> contextlib.AbstractContextManager[Runner]:
        workspace = self._job.workspace
        return workspace.runner(workspace.model(), options=self._job.runner_options)


def _prepared(path: pathlib.Path, precision: Precision, progress: Progress) -> onnx.ModelProto:
    """The graph in the form that is measured: a finite mask, grouped linears as plain ones."""
    model = Graph.load(path).model
    repaired = repair_mask_constants(model)
    if repaired:
        progress.note(f"mask constants made finite: {', '.join(repaired)}")
    if precision.quantized:
        split_groups(model)
    return model


def _eight_bit(
    job: _Job, table: CalibrationTable, judges: _Judges
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    from .eight_bit import Quantizer

    options = job.options
    quantizer = Quantizer(
        workspace=job.workspace,
        table=table,
        samples=job.samples,
        precision=options.precision,
        attention=options.fp8_attention,
        judge=judges.final(),
        scout=judges.scout(),
        threads=options.threads,
        progress=job.progress.count,
    )
    result = quantizer.run(options.smoothing, options.budget)
    _require_finite(result.report.failed, options.precision)
    kept = _kept(job.workspace.model(), table, Precision.FP16)
    record = {
        "budget": str(options.budget) if options.budget else None,
        # on a GPU what is not quantized is fp16, unless told otherwise
        "kept_fp32": [dataclasses.asdict(node) for node in kept],
        "fp8_attention": options.fp8_attention,
        **result.to_json(),
    }
    return result.model, record


def _half(
    job: _Job, table: CalibrationTable, judges: _Judges
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    from .eight_bit import losses
    from .emulated import emulated_graph, non_finite
    from .typed import typed_graph

    workspace, precision = job.workspace, job.options.precision
    complete = workspace.complete(workspace.model())
    kept = _kept(complete, table, precision)
    names = tuple(dict.fromkeys(record.node for record in kept))
    typed = typed_graph(complete, precision, keep_fp32=names)
    # ONNX Runtime's CPU provider has no bf16 operators
    runnable = (
        typed
        if precision is Precision.FP16
        else emulated_graph(complete, precision, keep_fp32=names)
    )
    job.progress.note("looking for NaN and infinity inside")
    batches = (batch for _, batch in job.samples.batches(_CHECKED_POSITIONS))
    bad = non_finite(workspace, runnable, batches)
    if bad:
        raise GraphError(
            f"the {precision} graph computes what is not finite: {bad[0]}"
            + (f", and {len(bad) - 1} tensors more" if len(bad) > 1 else ""),
            hint="calibrate with more, or larger, texts, or use --bf16",
        )
    job.progress.note("comparing with the fp32 graph")
    with workspace.runner(runnable, options=job.runner_options) as runner:
        report = judges.final().report(runner)
    _require_finite(report.failed, precision)
    record = {
        "kept_fp32": [dataclasses.asdict(node) for node in kept],
        "losses": losses(report),
    }
    return typed, record


def _kept(
    model: onnx.ModelProto, table: CalibrationTable, precision: Precision
) -> tuple[KeptNode, ...]:
    largest = {name: summary.largest for name, summary in table.tensors.items()}
    return keep_fp32(model, largest, precision)


def _require_finite(failed: int, precision: Precision) -> None:
    if failed:
        raise GraphError(f"the {precision} graph answers {failed} samples with NaN or infinity")


def _tokenizer(files: tuple[pathlib.Path, ...]) -> Tokenizer | None:
    from ..serving.tokenizer import Tokenizer

    return Tokenizer.load(files[0].parent) if files else None
