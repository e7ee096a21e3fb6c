"""The result of ``profile``: kernels, and what they add up to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from convbert_deploy.profiling.attribution import EMBEDDINGS, ENCODER, INPUTS
from convbert_deploy.profiling.findings import Finding
from convbert_deploy.profiling.kernels import Kernel


@dataclasses.dataclass(frozen=True)
class Row:
    """Kernels that share something, added up.

    ms, share: time and its part of all kernels; None where the kernels were not timed.
    gflop_per_s: arithmetic over time, None unless every kernel's arithmetic is known.
    shape, type: those of the kernels if they agree, else empty.
    """

    name: str
    operator: str
    count: int
    ms: float | None
    share: float | None
    shape: str
    type: str
    gflop_per_s: float | None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class ProfileReport:
    """Where one forward pass of ``batch`` x ``seq`` real tokens spends its time.

    wall_ms: median of a call from Python without the profiler, outputs on the host.
    profiled_ms: the same under the profiler, as the runtime saw it; None where not told.
    kernels: in the order of execution; their times were taken under the profiler.
    plan: facts of a TensorRT plan, empty for others.
    notes: what a reader should know before trusting the figures.
    """

    engine: str
    backend: str
    batch: int
    seq: int
    runs: int
    header: Mapping[str, str]
    kernels: tuple[Kernel, ...]
    findings: tuple[Finding, ...] = ()
    wall_ms: float | None = None
    profiled_ms: float | None = None
    plan: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def kernels_ms(self) -> float | None:
        """Sum of the kernels; None where they were not timed."""
        times = [kernel.ms for kernel in self.kernels if kernel.ms is not None]
        return sum(times) if times else None

    @property
    def overhead_ms(self) -> float | None:
        """Time of a profiled run outside the kernels: the session's own work and the profiler's.
        Where the runtime does not tell the run's time, the unprofiled wall time stands for it."""
        spent, whole = self.kernels_ms, self.profiled_ms or self.wall_ms
        return None if whole is None or spent is None else whole - spent

    @property
    def operators(self) -> list[Row]:
        """By type of operator, the slowest first."""
        return _rows(self.kernels, lambda one: (one.op_type, one.op_type), self.kernels_ms)

    @property
    def sections(self) -> list[Row]:
        """By part of the model, as the data flows."""
        known = [kernel for kernel in self.kernels if kernel.place is not None]
        rows = _rows(known, lambda one: (one.place.section, ""), self.kernels_ms)
        return sorted(rows, key=lambda row: _section_order(row.name))

    @property
    def groups(self) -> list[Row]:
        """The same kernel of all layers together, the slowest first."""
        return _rows(self.kernels, _group, self.kernels_ms)

    @property
    def phases_ms(self) -> dict[str, float]:
        """Time by phase, over all kernels that timed their own, the slowest first."""
        total: dict[str, float] = {}
        for kernel in self.kernels:
            for phase, spent in kernel.phases_ms.items():
                total[phase] = total.get(phase, 0.0) + spent
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "profile",
            "engine": self.engine,
            "backend": self.backend,
            "batch": self.batch,
            "seq": self.seq,
            "runs": self.runs,
            "header": dict(self.header),
            "wall_ms": self.wall_ms,
            "profiled_ms": self.profiled_ms,
            "kernels_ms": self.kernels_ms,
            "overhead_ms": self.overhead_ms,
            "operators": [row.to_json() for row in self.operators],
            "sections": [row.to_json() for row in self.sections],
            "groups": [row.to_json() for row in self.groups],
            "phases_ms": self.phases_ms,
            "not_fused": [finding.to_json() for finding in self.findings],
            "plan": dict(self.plan),
            "notes": list(self.notes),
            "kernels": [kernel.to_json() for kernel in self.kernels],
        }


def _group(kernel: Kernel) -> tuple[str, str]:
    if kernel.place is None:
        return kernel.name, kernel.op_type
    section = "layers" if kernel.place.layer is not None else kernel.place.section
    return " ".join(filter(None, (section, kernel.place.part))), kernel.op_type


def _section_order(section: str) -> tuple[int, int]:
    """As the data flows, whenever the mask was needed; layers by number."""
    before = (INPUTS, EMBEDDINGS, ENCODER)
    kind, _, index = section.partition(" ")
    if index:
        return 1, int(index)
    return (0, before.index(kind)) if kind in before else (2, 0)


def _rows(
    kernels: Iterable[Kernel], key: Callable[[Kernel], tuple[str, str]], total: float | None
) -> list[Row]:
    grouped: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        grouped.setdefault(key(kernel), []).append(kernel)
    rows = [_row(*names, members, total) for names, members in grouped.items()]
    return sorted(rows, key=lambda row: (-(row.ms or 0), -row.count, row.name))


def _row(name: str, operator: str, members: Sequence[Kernel], total: float | None) -> Row:
    times = [kernel.ms for kernel in members if kernel.ms is not None]
    spent = sum(times) if len(times) == len(members) else None
    gflops = [kernel.gflop for kernel in members]
    arithmetic = None if None in gflops else sum(gflops)
    return Row(
        name=name,
        operator=operator,
        count=len(members),
        ms=spent,
        share=spent / total if spent is not None and total else None,
        shape=_common(kernel.shape for kernel in members),
        type=_common(kernel.element_type for kernel in members),
        gflop_per_s=arithmetic / spent * 1e3 if arithmetic and spent else None,
    )


def _common(values: Iterable[str]) -> str:
    found = set(values)
    return found.pop() if len(found) == 1 else ""
