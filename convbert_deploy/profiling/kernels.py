"""The kernels of one forward pass: each node of the graph with its time, place and arithmetic."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from convbert_deploy.architecture import Architecture
from convbert_deploy.profiling.attribution import Place, places
from convbert_deploy.profiling.products import layer_gflop, product_of
from convbert_deploy.profiling.recording import NodeRun, Run

#: Our operator that is a whole encoder layer in one kernel.
ENCODER_LAYER = "EncoderLayer"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a forward pass.

    ms: time of one run; None where it could not be measured.
    place: part of the model; None where its name does not tell and no order of execution is known.
    shape: ``m x k x n`` of a matrix product, else the shape of the first output.
    gflop: of the matrix products in it, None where it has none or its shapes are unknown.
    phases_ms: parts of ``ms`` that the kernel itself timed, by name.
    """

    name: str
    op_type: str
    ms: float | None
    place: Place | None = None
    shape: str = ""
    element_type: str = ""
    gflop: float | None = None
    phases_ms: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def named(self) -> bool:
        """Whether the node kept the name of a module (ONNX Runtime drops it when it inlines)."""
        return "/" in self.name

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "operator": self.op_type,
            "section": self.place.section if self.place else None,
            "part": self.place.part if self.place else None,
            "ms": self.ms,
            "shape": self.shape,
            "type": self.element_type,
            "gflop": self.gflop,
            "phases_ms": dict(self.phases_ms),
        }


@dataclasses.dataclass(frozen=True)
class Workload:
    """What ran: ``batch`` rows (of multiple choice: choices) of ``seq`` real tokens each."""

    architecture: Architecture
    batch: int
    seq: int


def kernels_of(
    runs: Sequence[Run],
    workload: Workload,
    phases: Mapping[str, Mapping[str, float]] | None = None,
) -> tuple[Kernel, ...]:
    """One Kernel for each node, in the order of execution, with its typical time over ``runs``.

    Args:
        runs: of one shape, warm; nodes that do not take part in every run are left out.
        phases: by node name, how the kernels that measure themselves spend their time: numbers by
            phase, in any unit.
    """
    first = runs[0].nodes
    times: dict[tuple[str, int], list[int]] = collections.defaultdict(list)
    for run in runs:
        for key, node in zip(_keys(run.nodes), run.nodes, strict=True):
            times[key].append(node.duration_us)
    phases = phases or {}
    return tuple(
        _kernel(node, place, middle_mean(times[key]) / 1e3, workload, phases.get(node.name, {}))
        for key, node, place in zip(_keys(first), first, places(first), strict=True)
        if len(times[key]) == len(runs)
    )


def middle_mean(values: Sequence[float]) -> float:
    """Mean of the middle half: as robust as a median, but finer than the profiler's microsecond."""
    ordered = np.sort(np.asarray(values, np.float64))
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def _keys(nodes: Sequence[NodeRun]) -> list[tuple[str, int]]:
    """(name, how often it came before): names repeat only where a body runs more than once."""
    seen: collections.Counter[str] = collections.Counter()
    keys = []
    for node in nodes:
        keys.append((node.name, seen[node.name]))
        seen[node.name] += 1
    return keys


def _kernel(
    node: NodeRun, place: Place, ms: float, workload: Workload, phases: Mapping[str, float]
) -> Kernel:
    product = product_of(node)
    gflop = product.gflop if product else None
    if node.op_type == ENCODER_LAYER:
        gflop = layer_gflop(workload.architecture, workload.batch, workload.seq)
    whole = sum(phases.values()) or 1.0
    output = "x".join(map(str, node.outputs[0].shape)) if node.outputs else ""
    return Kernel(
        name=node.name,
        op_type=node.op_type,
        ms=ms,
        place=place,
        shape=str(product) if product else output,
        element_type=product.type if product else "",
        gflop=gflop,
        phases_ms={phase: ms * spent / whole for phase, spent in phases.items()},
    )
