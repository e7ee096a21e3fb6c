"""Engine bundles without a model: what packaging and the served models read of one."""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np

from convbert_deploy.architecture import Architecture, Task
from convbert_deploy.engine import GOLDEN, GRAPH, MANIFEST, PLAN, TOKENIZER, Engine, Manifest
from convbert_deploy.golden import GoldenOutput, GoldenRequest
from convbert_deploy.precision import Precision
from convbert_deploy.provenance import Origin, sha256_of_file
from convbert_deploy.shapes import ShapeProfile

SAMPLE = pathlib.Path(__file__).parent.parent / "samples" / "convbert-pos-brown"

TINY = Architecture(
    vocab_size=500,
    embedding_size=32,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_ratio=2,
    intermediate_size=128,
    num_groups=1,
    conv_kernel_size=9,
    max_position_embeddings=128,
    type_vocab_size=2,
)
_LABELS = ("bad", "fair", "good")


def described(
    task: Task = Task.SEQUENCE_CLASSIFICATION,
    *,
    backend: str = "onnxruntime-cpu",
    padding: str = "hf",
    profile: ShapeProfile | None = None,
    path: pathlib.Path = pathlib.Path("tiny.fp32.engine"),
    vocabulary: int = 500,
) -> Engine:
    """An engine of two tiny layers that is nowhere on disk."""
    architecture = Architecture(**TINY.to_json() | {"vocab_size": vocabulary})
    labelled = task in (Task.SEQUENCE_CLASSIFICATION, Task.TOKEN_CLASSIFICATION)
    manifest = Manifest(
        name=path.name,
        backend=backend,
        precision=Precision.FP32,
        task=task,
        architecture=architecture,
        labels=_LABELS if labelled else (),
        problem_type=None,
        padding=padding,
        profile=(profile or ShapeProfile()).limited_to(architecture.max_position_embeddings),
        plugin_nodes=2,
        plugin_sha256=None,
        target={},
        plan={},
        chain=(Origin("checkpoint", "tiny.pt", "ab" * 32),),
        calibration=None,
        versions={},
        command="",
        golden_max_abs=None,
        files={},
    )
    return Engine(path, manifest, _golden(task, vocabulary))


def on_disk(folder: pathlib.Path, task: Task = Task.SEQUENCE_CLASSIFICATION, **changes) -> Engine:
    """The same as a bundle with a file in the place of its model and the sample's tokenizer."""
    path = folder / "tiny.fp32.engine"
    engine = described(task, path=path, vocabulary=9000, **changes)
    (path / TOKENIZER).mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SAMPLE / name, path / TOKENIZER / name)
    (path / GRAPH).write_text("a graph")
    if engine.manifest.backend.startswith("tensorrt"):
        (path / PLAN).write_text("a plan")
    (path / GOLDEN).write_text(json.dumps(engine.golden.to_json()))
    data = engine.manifest.to_json()
    files = [file for file in path.rglob("*") if file.is_file()]
    data["files"] = {str(file.relative_to(path)): sha256_of_file(file) for file in files}
    (path / MANIFEST).write_text(json.dumps(data))
    return Engine.load(path)


def _golden(task: Task, vocabulary: int) -> GoldenRequest:
    between = (3,) if task is Task.MULTIPLE_CHOICE else ()
    ids = np.random.default_rng(0).integers(5, 500, (2, *between, 16))
    shapes = {
        Task.ENCODER: (2, 16, 64),
        Task.MASKED_LM: (2, 16, vocabulary),
        Task.SEQUENCE_CLASSIFICATION: (2, 3),
        Task.TOKEN_CLASSIFICATION: (2, 16, 3),
        Task.QUESTION_ANSWERING: (2, 16),
        Task.MULTIPLE_CHOICE: (2, 3),
    }
    logits = np.random.default_rng(1).standard_normal(shapes[task]).astype(np.float32)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": ids * 0}
    return GoldenRequest(
        inputs={name: array.tolist() for name, array in inputs.items()},
        outputs={name: GoldenOutput.of(logits) for name in task.output_names},
    )
