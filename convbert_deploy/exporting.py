"""Checkpoint in, one proven ONNX graph out."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import logging
import pathlib
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from convbert_deploy.architecture import Task
from convbert_deploy.checkpoint import Checkpoint
from convbert_deploy.errors import GraphError, MissingDependencyError
from convbert_deploy.golden import GoldenRequest
from convbert_deploy.graph import GraphInfo, set_info, write_graph
from convbert_deploy.precision import Precision

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from convbert_deploy.parity import ParityReport

#: GELU became a standard operator in opset 20; nothing newer is used
OPSET = 20
_VERSIONED = ("convbert-deploy", "torch", "transformers", "onnx", "onnxscript", "onnx-ir")

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """padding: ``hf`` or ``masked`` (see ``traceable.Padding``). check: compare the written file
    with the eager model before it gets its name. command: recorded in the file."""

    padding: str = "hf"
    check: bool = True
    command: str = ""


@dataclasses.dataclass(frozen=True)
class ExportResult:
    path: pathlib.Path
    info: GraphInfo
    nodes: int
    parity: ParityReport | None


def export(
    checkpoint: Checkpoint,
    target: pathlib.Path,
    options: ExportOptions | None = None,
    progress: Progress = lambda _: None,
) -> ExportResult:
    """Trace, tidy, check against eager, and only then write ``target`` (and STEM.tokenizer).

    Raises:
        CheckpointError: the tensors do not make the task's model.
        GraphError: the graph computes something else than the eager model.
        OutputError: ``target`` cannot be written.
    """
    options = options or ExportOptions()
    progress("loading the eager model")
    eager = checkpoint.eager_model()
    progress("tracing")
    model = traced_graph(eager, checkpoint.task, options.padding)
    info = GraphInfo(
        architecture=checkpoint.architecture,
        task=checkpoint.task,
        labels=checkpoint.labels,
        problem_type=checkpoint.problem_type,
        padding=options.padding,
        precision=Precision.FP32,
        opset=OPSET,
        golden=golden_request(checkpoint, eager, options.padding),
        chain=(checkpoint.origin(),),
        versions=_versions(),
        command=options.command,
    )
    set_info(model, info)
    report = None
    if options.check:
        progress("checking against the eager model")
        report = _self_check(model, checkpoint, eager, options)
    progress("writing")
    write_graph(model, target, checkpoint.tokenizer_files)
    return ExportResult(target, info, len(model.graph.node), report)


def traced_graph(eager: Any, task: Task, padding: str = "hf") -> onnx.ModelProto:
    """Trace ``eager`` and tidy the result; metadata is not set.

    The graph's inputs are ``input_ids``, ``attention_mask``, ``token_type_ids``: int64 of shape
    (batch, seq), or (batch, choices, seq) for multiple choice. Its outputs are float32.
    """
    import onnx_ir as ir

    from convbert_deploy.operators import functions_of

    proto = ir.to_proto(tidy(_trace(eager, task, padding), task))
    proto.functions.extend(functions_of(proto, OPSET))
    # shapes of intermediates go stale with the next rewrite, and quantizers trip over stale ones
    del proto.graph.value_info[:]
    return proto


def golden_request(checkpoint: Checkpoint, eager: Any, padding: str) -> GoldenRequest:
    """Two rows of random ids (``parity_cases.golden_batch``), answered by the eager model."""
    from convbert_deploy.backends.eager import EagerRunner
    from convbert_deploy.parity_cases import golden_batch

    seq = min(16, checkpoint.architecture.max_position_embeddings)
    batch = golden_batch(checkpoint.architecture, checkpoint.task, padding, seq)
    with EagerRunner(eager, checkpoint.task, padding=padding) as runner:
        return GoldenRequest.of(batch, runner.infer(batch))


def _trace(eager: Any, task: Task, padding: str) -> ir.Model:
    try:
        import onnxscript  # noqa: F401  torch's exporter needs it
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            error.name or "onnxscript", needed_for="export", extra="export"
        ) from error
    from convbert_deploy.operators import translation_table
    from convbert_deploy.traceable import Padding, TraceableModel

    traceable = TraceableModel(eager, task, Padding(padding)).eval()
    sizes = {"batch": 2, "choices": 3, "seq": 16}
    shape = [sizes[axis] for axis in task.input_axes]
    # three tensors, not one thrice: the tracer would take equal objects for one input
    inputs = tuple(torch.ones(shape, dtype=torch.int64) for _ in range(3))
    limit = eager.config.max_position_embeddings
    dims = {
        "batch": torch.export.Dim("batch", min=1),
        "choices": torch.export.Dim("choices", min=1),
        "seq": torch.export.Dim("seq", min=1, max=limit),
    }
    axes = {index: dims[axis] for index, axis in enumerate(task.input_axes)}
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            torch.export.export(traceable, inputs, dynamic_shapes=(axes,) * 3, strict=False),
            (),
            input_names=["input_ids", "attention_mask", "token_type_ids"],
            output_names=list(task.output_names),
            opset_version=OPSET,
            custom_translation_table=translation_table(),
            dynamo=True,
            verbose=False,
        )
    return program.model


def tidy(model: ir.Model, task: Task) -> ir.Model:
    """Run the passes and name the axes."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

    from convbert_deploy import passes
    from convbert_deploy.operators import DOMAIN, DOMAIN_VERSION

    sequence = ir.passes.Sequential(
        passes.ConstantReshape(),
        RemoveUnusedNodesPass(),
        passes.SharedWeights(),
        passes.ReadableNames(),
        RemoveUnusedOpsetsPass(),
    )
    model = sequence(model).model
    for value in model.graph.inputs:
        value.shape = ir.Shape(task.input_axes)
    for value in model.graph.outputs:
        value.shape = _output_shape(task, value)
    model.opset_imports[DOMAIN] = DOMAIN_VERSION
    model.producer_name, model.producer_version = "convbert-deploy", _own_version()
    model.graph.name = f"convbert-{task}"
    model.metadata_props.clear()
    return model


def _output_shape(task: Task, value: ir.Value) -> ir.Shape:
    import onnx_ir as ir

    axes = {
        Task.SEQUENCE_CLASSIFICATION: ("batch",),
        Task.MULTIPLE_CHOICE: ("batch", "choices"),
        Task.QUESTION_ANSWERING: ("batch", "seq"),
    }.get(task, ("batch", "seq"))
    if task in (Task.MULTIPLE_CHOICE, Task.QUESTION_ANSWERING):
        return ir.Shape(axes)
    assert value.shape is not None  # the tracer always knows its outputs
    return ir.Shape((*axes, value.shape[-1]))


def _self_check(
    model: onnx.ModelProto, checkpoint: Checkpoint, eager: Any, options: ExportOptions
) -> ParityReport:
    from convbert_deploy.backends.eager import EagerRunner
    from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner
    from convbert_deploy.parity import CompareOptions, compare
    from convbert_deploy.parity_cases import ParityShapes, parity_batches
    from convbert_deploy.tolerances import tolerance_for

    # the longest sequence runs with one row: eight would cost more than the rest of the export
    shapes = ParityShapes(max_tokens=2048)
    reference = EagerRunner(eager, checkpoint.task, padding=options.padding)
    candidate = OnnxRuntimeRunner.from_model(model, name="onnx fp32")
    with reference, candidate:
        report = compare(
            reference,
            candidate,
            parity_batches(checkpoint.architecture, checkpoint.task, shapes),
            tolerance_for("onnx", Precision.FP32),
            # a masked graph leaves padded positions undefined; at real tokens it is exact
            options=CompareOptions(real_tokens_only=options.padding == "masked"),
        )
    if not report.passed:
        raise GraphError(
            "the exported graph differs from the eager model; nothing was written: "
            + "; ".join(report.reasons[:3])
        )
    return report


def _versions() -> dict[str, str]:
    found = {}
    for package in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _own_version() -> str:
    from convbert_deploy import __version__

    return __version__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter logs about packages we do not use; its errors still get through."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
