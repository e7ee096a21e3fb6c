"""What is this file? Checkpoints, graphs, engines and model repositories described as data."""

from __future__ import annotations

import collections
import pathlib
from typing import Any

from convbert_deploy.errors import CheckpointError, ConvBertDeployError
from convbert_deploy.serving.probe import REPOSITORY_MANIFEST

_LISTED_TENSORS = 20


def inspect(path: str | pathlib.Path) -> dict[str, Any]:
    """Kind, architecture, precision, shapes, operators and parent chain of an artifact.

    Raises:
        ConvBertDeployError: none of the four kinds, or damaged.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ConvBertDeployError(f"{path} does not exist")
    if path.suffix == ".onnx":
        return _graph(path)
    if path.is_dir() and (path / "manifest.json").is_file():
        return _engine(path)
    if path.is_dir() and (path / REPOSITORY_MANIFEST).is_file():
        return _repository(path)
    return _checkpoint(path)


def _engine(path: pathlib.Path) -> dict[str, Any]:
    from convbert_deploy.engine import Engine

    engine = Engine.load(path)
    return {"kind": "engine", "intact": True} | engine.manifest.to_json()


def _repository(path: pathlib.Path) -> dict[str, Any]:
    from convbert_deploy.triton.repository import Repository

    data = Repository.load(path).manifest
    left_out = ("files", "golden", "golden_text")
    return {"kind": "model repository", "intact": True} | {
        key: value for key, value in data.items() if key not in left_out
    }


def _graph(path: pathlib.Path) -> dict[str, Any]:
    from convbert_deploy.graph import Graph

    graph = Graph.load(path)
    data = {"kind": "graph", **graph.info.to_json()}
    del data["golden"]
    return data | {
        "nodes": len(graph.model.graph.node),
        "operators": dict(collections.Counter(n.op_type for n in graph.model.graph.node)),
        "functions": [f"{f.domain}::{f.name}" for f in graph.model.functions],
        "inputs": {v.name: _axes(v) for v in graph.model.graph.input},
        "outputs": {v.name: _axes(v) for v in graph.model.graph.output},
        "tokenizer": [file.name for file in graph.tokenizer_files],
        "bytes": path.stat().st_size,
    }


def _axes(value: Any) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _checkpoint(path: pathlib.Path) -> dict[str, Any]:
    from convbert_deploy.checkpoint import Checkpoint
    from convbert_deploy.weights import read_raw_tensors

    raw = read_raw_tensors(path)
    try:
        checkpoint = Checkpoint.load(path)
    except CheckpointError as error:
        shapes = {name: list(raw[name].shape) for name in sorted(raw)[:_LISTED_TENSORS]}
        return {
            "kind": "weights",
            "usable": False,
            "reason": str(error),
            "tensors": len(raw),
            "first_tensors": shapes,
        }
    tensors = checkpoint.tensors
    return {
        "kind": "checkpoint",
        "task": checkpoint.task.value,
        "architecture": checkpoint.architecture.to_json(),
        "labels": list(checkpoint.labels),
        "config": str(checkpoint.config_path) if checkpoint.config_path else None,
        "tokenizer": [file.name for file in checkpoint.tokenizer_files],
        "sha256": checkpoint.digest(),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
        "tensors": len(tensors),
        "first_tensors": sorted(tensors)[:_LISTED_TENSORS],
    }
