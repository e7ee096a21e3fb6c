"""ONNX Runtime's profile as data: which node ran when, for how long, on which shapes."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from convbert_deploy.errors import EngineError

_NODE_SUFFIX = "_kernel_time"
_RUN = "model_run"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Element type as ONNX Runtime writes it (``float``, ``int8``) and shape."""

    type: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class NodeRun:
    """One node in one run. Times in microseconds, ``start_us`` on the profiler's own clock.

    inputs: without weights that ONNX Runtime packed when it loaded the graph.
    """

    name: str
    op_type: str
    provider: str
    start_us: int
    duration_us: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Run:
    """One call of the session: its wall time as ONNX Runtime saw it, its nodes as they ran."""

    wall_us: int
    nodes: tuple[NodeRun, ...]


def read_recording(path: pathlib.Path) -> tuple[Run, ...]:
    """Every run in a profile written by ONNX Runtime, in order.

    Raises:
        EngineError: no such profile, or one without runs.
    """
    try:
        events = json.loads(path.read_text())
        runs = tuple(_runs(events))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"{path.name} is not a profile of ONNX Runtime: {error}") from error
    if not runs:
        raise EngineError(
            f"{path.name} holds no run of a model",
            hint="run the engine inside backends.onnxruntime.profiled",
        )
    return runs


def read_layer_times(path: pathlib.Path) -> dict[str, dict[str, int]]:
    """Nanoseconds by part, by node, as EncoderLayer's kernels wrote them; empty without a file."""
    times: dict[str, dict[str, int]] = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            node, part, nanoseconds = line.split("\t")
            times.setdefault(node, {})[part] = int(nanoseconds)
    return times


def _runs(events: Sequence[Mapping[str, Any]]) -> Iterable[Run]:
    """Nodes belong to the run whose time span they begin in."""
    spans = sorted(
        (event["ts"], event["ts"] + event["dur"]) for event in events if event["name"] == _RUN
    )
    nodes = sorted(map(_node_run, filter(_is_node, events)), key=lambda node: node.start_us)
    for start, end in spans:
        inside = tuple(node for node in nodes if start <= node.start_us <= end)
        yield Run(end - start, inside)


def _is_node(event: Mapping[str, Any]) -> bool:
    # up to ONNX Runtime 1.16 "fence" events stood around each node: they are no kernels
    return event.get("cat") == "Node" and event["name"].endswith(_NODE_SUFFIX)


def _node_run(event: Mapping[str, Any]) -> NodeRun:
    told = event["args"]
    return NodeRun(
        name=event["name"].removesuffix(_NODE_SUFFIX).rstrip("/"),
        op_type=told["op_name"],
        provider=told.get("provider", ""),
        start_us=event["ts"],
        duration_us=event["dur"],
        inputs=_tensors(told.get("input_type_shape", ())),
        outputs=_tensors(told.get("output_type_shape", ())),
    )


def _tensors(told: Sequence[Mapping[str, Sequence[int]]]) -> tuple[Tensor, ...]:
    return tuple(Tensor(kind, tuple(shape)) for one in told for kind, shape in one.items())
