"""What the other INT8 tools make of a trained checkpoint: the peers' side of the accuracy table.

ONNX Runtime's ``quantize_dynamic`` and ``quantize_static``, and ModelOpt, on the graph that torch
exports of transformers' own modules (``int8_peer_tools.py``). All models run in ONNX Runtime on the
CPU and are compared with the eager float32 model on the same texts, in the same batches, by the code
of ``convbert-deploy evaluate``. From a checkout:

    python benchmarks/int8_peers.py CHECKPOINT --calibration calib.jsonl \\
        --data eval1.jsonl --data eval2.jsonl --modelopt-python VENV/bin/python --threads 1

Texts of several ``--data`` files are judged together. ModelOpt pins other versions than ours, so it
has an environment of its own: ``python -m venv VENV; VENV/bin/pip install torch==2.13.0
'nvidia-modelopt[onnx]==0.47.0'`` (2 GB with a CPU-only torch).
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence

import int8_peer_tools as tools

from convbert_deploy.backends.base import RunnerOptions
from convbert_deploy.backends.eager import EagerRunner
from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner
from convbert_deploy.calibration.samples import read_samples
from convbert_deploy.checkpoint import Checkpoint
from convbert_deploy.environment import benchmark_header, environment
from convbert_deploy.errors import CheckpointError
from convbert_deploy.evaluation.compare import Evaluator
from convbert_deploy.evaluation.evaluation_report import EvaluationReport
from convbert_deploy.evaluation.labelled import LabelledData, read_labelled
from convbert_deploy.provenance import atomic_file
from convbert_deploy.report_table import markdown_table, short
from convbert_deploy.serving.requests import InputLimits
from convbert_deploy.serving.scorer import ScorerOptions
from convbert_deploy.serving.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; None where nothing could be measured, and ``note`` says why.

    samples: texts judged. metric: the task's own, times 100. drop: points below the eager model.
    agreement: percent of argmaxes that are the same (of texts; of a tagger's word pieces).
    mean_error, max_error: of the logits. bytes: the model file. note: what was left out to make it
    run, or the error.
    """

    name: str
    samples: int
    metric_name: str
    metric: float | None = None
    drop: float | None = None
    agreement: float | None = None
    mean_error: float | None = None
    max_error: float | None = None
    bytes: int | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class PeerOptions:
    """threads: of the evaluation; None is each runtime's default. samples: calibration texts at
    most. limit: evaluated texts of each file at most. modelopt_python: the interpreter of ModelOpt's
    environment; without one its rows say so. only: peers whose name contains this.
    """

    threads: int | None = None
    samples: int = 512
    limit: int | None = None
    modelopt_python: pathlib.Path | None = None
    only: str = ""


def rows(
    checkpoint_path: pathlib.Path,
    calibration: pathlib.Path,
    evaluations: Sequence[pathlib.Path],
    options: PeerOptions | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Measure every peer on the texts of ``evaluations`` together.

    The first two rows are the eager float32 model and the exported graph in ONNX Runtime.

    Raises:
        CheckpointError: no ConvBERT, or one for multiple choice (inputs of three axes).
        InputError: texts or calibration data that cannot be read.
    """
    options = options or PeerOptions()
    checkpoint = Checkpoint.load(checkpoint_path)
    if len(checkpoint.task.input_axes) != 2:
        raise CheckpointError(f"task is {checkpoint.task}, expected inputs of (batch, seq)")
    tokenizer, scoring = Tokenizer.load(checkpoint_path), scoring_of(checkpoint)
    samples = read_samples(
        calibration, limits=scoring.limits, tokenizer=tokenizer, samples=options.samples
    )
    data = together(
        [read_labelled(path, tokenizer, scoring, limit=options.limit) for path in evaluations]
    )
    runner_options = RunnerOptions(threads=options.threads)
    with EagerRunner(checkpoint.eager_model(), checkpoint.task, runner_options) as eager:
        evaluator = Evaluator(data, tokenizer, scoring, eager)
        table = [row_of(evaluator.report(eager), None)]
    with tempfile.TemporaryDirectory() as folder:
        job = tools.Job(
            graph=pathlib.Path(folder) / "stock.onnx",
            samples=samples,
            target=pathlib.Path(folder) / "peer.onnx",
            modelopt_python=options.modelopt_python,
        )
        tools.export_stock(checkpoint, job.graph)
        bench = _Bench(evaluator, job, runner_options, table[0])
        table.append(bench.measured("ORT fp32, as torch exports it", job.graph))
        for name, make in tools.PEERS.items():
            if options.only in name:
                if progress:
                    progress(name)
                table.append(bench.row(name, make))
    return table


@dataclasses.dataclass(frozen=True)
class _Bench:
    """Makes a model, runs it, and forgets it."""

    evaluator: Evaluator
    job: tools.Job
    options: RunnerOptions
    reference: Row

    def row(self, name: str, make: tools.Make) -> Row:
        first = self._attempt(name, make, self.job)
        grouped = tools.grouped_linears(self.job.graph)
        if first.metric is not None or first.note.startswith("not run") or not grouped:
            return first
        # ONNX Runtime writes per-channel scales for grouped linears that its kernels then refuse
        second = self._attempt(name, make, dataclasses.replace(self.job, exclude=grouped))
        if second.metric is None:
            return first
        note = f"{len(grouped)} grouped linears left float ({first.note})"
        return dataclasses.replace(second, note="; ".join(filter(None, [note, second.note])))

    def measured(self, name: str, model: pathlib.Path) -> Row:
        with OnnxRuntimeRunner(model, self.options, name=name) as runner:
            return row_of(self.evaluator.report(runner), model.stat().st_size)

    def _attempt(self, name: str, make: tools.Make, job: tools.Job) -> Row:
        job.target.unlink(missing_ok=True)
        try:
            with tools.quiet():
                make(job)
            return self.measured(name, job.target)
        except Exception as error:  # whatever a peer raises is its result
            known = self.reference
            return Row(name, known.samples, known.metric_name, note=_reason(error))


def _reason(error: Exception) -> str:
    """The last line, of which ONNX Runtime's failed condition and source path are left out."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].rpartition(" was false. ")[2][:160]


def row_of(report: EvaluationReport, size: int | None) -> Row:
    metric = report.metrics[0] if report.metrics else None
    return Row(
        name=report.candidate,
        samples=report.samples,
        metric_name=metric.name if metric else "no labels",
        metric=metric.candidate if metric else None,
        drop=report.metric_drop,
        agreement=report.agreement,
        mean_error=report.mean_error,
        max_error=report.max_error,
        bytes=size,
        note=f"NaN or infinity for {report.failed} texts" if report.failed else "",
    )


def scoring_of(checkpoint: Checkpoint) -> ScorerOptions:
    architecture = checkpoint.architecture
    return ScorerOptions(
        limits=InputLimits(
            task=checkpoint.task,
            vocab_size=architecture.vocab_size,
            max_positions=architecture.max_position_embeddings,
            type_vocab_size=architecture.type_vocab_size,
        ),
        labels=checkpoint.labels,
        problem_type=checkpoint.problem_type,
    )


def together(parts: Sequence[LabelledData]) -> LabelledData:
    samples = tuple(sample for part in parts for sample in part.samples)
    return LabelledData(" + ".join(part.name for part in parts), samples)


def table_of(found: Sequence[Row]) -> str:
    """Markdown; the metric's name is a heading. d: difference of the logits to eager float32."""
    metric = found[0].metric_name
    heads = ["model", metric, "drop", "agreement %", "mean d", "max d", "MB", "note"]
    return markdown_table(heads, [_cells(row) for row in found])


def _cells(row: Row) -> list[str]:
    def fixed(value: float | None) -> str:
        return "-" if value is None else f"{round(value, 2) + 0.0:.2f}"  # no -0.00

    return [
        row.name,
        fixed(row.metric),
        fixed(row.drop),
        fixed(row.agreement),
        short(row.mean_error, 2),
        short(row.max_error, 2),
        "-" if row.bytes is None else f"{row.bytes / 1e6:.1f}",
        row.note,
    ]


def modelopt_versions(python: pathlib.Path) -> str:
    """Of ModelOpt and what it calibrates with, or what went wrong."""
    program = (
        "from importlib.metadata import version, distributions\n"
        "names = {d.metadata['Name'] for d in distributions()}\n"
        "names = ['nvidia-modelopt', 'onnx', *sorted(n for n in names if 'onnxruntime' in n)]\n"
        "print(', '.join(f'{name} {version(name)}' for name in names))"
    )
    done = subprocess.run([str(python), "-c", program], capture_output=True, text=True)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def section(title: str, found: Sequence[Row], facts: Sequence[str]) -> str:
    """A table below its title and what it depends on."""
    return "\n".join([f"## {title}", "", *[f"- {fact}" for fact in facts], "", table_of(found), ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=pathlib.Path, help="a Hugging Face folder")
    parser.add_argument("--calibration", type=pathlib.Path, required=True, metavar="JSONL")
    parser.add_argument("--data", type=pathlib.Path, action="append", required=True)
    parser.add_argument("--modelopt-python", type=pathlib.Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--samples", type=int, default=512, help="texts of calibration")
    parser.add_argument("--limit", type=int, help="texts of each --data file at most")
    parser.add_argument("--only", default="", help="peers whose name contains this")
    parser.add_argument("--markdown", type=pathlib.Path)
    given = parser.parse_args()
    python = given.modelopt_python
    found = rows(
        given.checkpoint,
        given.calibration,
        given.data,
        PeerOptions(given.threads, given.samples, given.limit, python, given.only),
        progress=lambda text: print(text, file=sys.stderr, flush=True),
    )
    facts = [
        *(f"{k}: {v}" for k, v in benchmark_header(environment(), threads=given.threads).items()),
        *([f"ModelOpt's environment: {modelopt_versions(python)}"] if python else []),
        f"{found[0].samples} texts of {' + '.join(path.name for path in given.data)}; "
        f"at most {given.samples} texts of calibration, {given.calibration.name}",
        "d: difference of the logits to eager float32",
    ]
    text = section(f"INT8 by other tools: {given.checkpoint.name}", found, facts)
    print(text)
    if given.markdown:
        with atomic_file(given.markdown) as file:
            file.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
