"""Exported graphs, statistics and plans that the tests of 8-bit graphs share.

Exporting takes seconds, so each graph is made once a process; every caller gets its own copy.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from convbert_deploy.architecture import Task
from convbert_deploy.backends.base import Batch
from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner, session_config
from convbert_deploy.calibration.collect import collect, sample_rows
from convbert_deploy.calibration.linears import linears, split_groups
from convbert_deploy.calibration.samples import CalibrationSamples, SampleRow
from convbert_deploy.calibration.smoothing import (
    ActivationPlan,
    SmoothingOptions,
    by_activation,
    plan_activation,
)
from convbert_deploy.calibration.workspace import Workspace
from convbert_deploy.exporting import traced_graph
from convbert_deploy.precision import Precision

import factories

SAMPLE = pathlib.Path(__file__).resolve().parent.parent / "samples" / "convbert-pos-brown"
SHA256 = "0" * 64


def exported(
    size: str, task: Task = Task.SEQUENCE_CLASSIFICATION, padding: str = "hf", layers: int = 2
) -> onnx.ModelProto:
    """The graph of a factory model with realistic weights; grouped linears as traced."""
    return onnx.load_from_string(_exported(size, task, padding, layers))


@functools.cache
def _exported(size: str, task: Task, padding: str, layers: int) -> bytes:
    eager = factories.realistic_model(size, task, layers=layers)
    return traced_graph(eager, task, padding).SerializeToString()


def split(size: str, padding: str = "hf") -> onnx.ModelProto:
    """``exported`` with its grouped linears split."""
    model = exported(size, padding=padding)
    split_groups(model)
    return model


def random_samples(count: int = 24, longest: int = 40, seed: int = 0) -> CalibrationSamples:
    """Rows of random ids of the tiny factory models."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        ids = random.integers(1, 500, random.integers(longest // 4, longest + 1))
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "token_type_ids": np.zeros_like(ids),
        }
        rows.append(SampleRow(number, inputs))
    return CalibrationSamples("random.npz", "row", tuple(rows))


def padded_batch(batch: int = 3, seq: int = 24, seed: int = 1) -> Batch:
    """Random ids of the tiny factory models; all rows but the first are padded."""
    random = np.random.default_rng(seed)
    mask = np.ones((batch, seq), np.int64)
    for row in range(1, batch):
        mask[row, seq - 5 * row :] = 0
    ids = random.integers(1, 500, (batch, seq)) * mask
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": np.zeros((batch, seq), np.int64),
    }


def run(
    model: onnx.ModelProto,
    batch: Batch,
    precision: Precision = Precision.FP32,
    *,
    outputs: Sequence[str] = (),
    optimize: bool = True,
) -> dict[str, np.ndarray]:
    """The graph's outputs in ONNX Runtime, by the operators' functions; and inner ``outputs``."""
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    with runner_of(opened, precision, optimize=optimize) as runner:
        return runner.infer(batch)


def runner_of(
    model: onnx.ModelProto, precision: Precision = Precision.FP32, *, optimize: bool = True
) -> OnnxRuntimeRunner:
    """A runner, to be opened, for several batches."""
    return OnnxRuntimeRunner.from_model(model, config=session_config(precision), optimize=optimize)


def plans_of(
    workspace: Workspace,
    samples: CalibrationSamples,
    precision: Precision = Precision.INT8,
    smoothing: SmoothingOptions | None = None,
    **table_changes: Any,
) -> tuple[ActivationPlan, ...]:
    """A plan for every quantizable activation of the workspace's graph."""
    import dataclasses

    groups = by_activation(linears(workspace.model()))
    table = collect(workspace, tuple(groups), samples, SHA256)
    table = dataclasses.replace(table, **table_changes)
    rows = sample_rows(workspace, tuple(groups), samples, 256)
    return tuple(
        plan_activation(
            group,
            [workspace.weight(linear.weight) for linear in group],
            table,
            rows[activation],
            precision,
            smoothing or SmoothingOptions(None),
        )
        for activation, group in groups.items()
    )


@functools.cache
def _tagger() -> bytes:
    from convbert_deploy.checkpoint import Checkpoint

    checkpoint = Checkpoint.load(SAMPLE)
    return traced_graph(checkpoint.eager_model(), checkpoint.task).SerializeToString()


def tagger() -> onnx.ModelProto:
    """The graph of the trained part-of-speech tagger in samples/."""
    return onnx.load_from_string(_tagger())


def tagger_samples(count: int) -> CalibrationSamples:
    """Sentences of the tagger's labelled file, tokenized."""
    from convbert_deploy.calibration.samples import read_samples
    from convbert_deploy.serving.requests import InputLimits
    from convbert_deploy.serving.tokenizer import Tokenizer

    limits = InputLimits(
        task=Task.TOKEN_CLASSIFICATION, vocab_size=30522, max_positions=512, type_vocab_size=2
    )
    return read_samples(
        SAMPLE.parent / "brown-pos.jsonl",
        limits=limits,
        tokenizer=Tokenizer.load(SAMPLE),
        samples=count,
    )


def values(model: onnx.ModelProto, name: str) -> np.ndarray:
    """An initializer."""
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    return onnx.numpy_helper.to_array(tensor)


def node_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    (node,) = [node for node in model.graph.node if node.name == name]
    return node
