"""What a build-time pass did, and where it did not fire."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import onnx


@dataclasses.dataclass(frozen=True)
class PassReport:
    """expected: places in the graph where the pass should apply. fired: those where it did.
    reasons: one line for each of the others, beginning with the name of its node."""

    name: str
    expected: int
    fired: int
    reasons: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """True where it fired at every expected place."""
        return self.fired == self.expected

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "reasons": list(self.reasons)}


class GraphPass(Protocol):
    """A rewrite of a graph in place, with a contract."""

    name: str

    def requires(self, model: onnx.ModelProto) -> None:
        """Raises GraphError where ``call`` could not work on the graph."""
        ...

    def call(self, model: onnx.ModelProto) -> PassReport:
        """Rewrite ``model``."""
        ...

    def ensures(self, model: onnx.ModelProto, report: PassReport) -> None:
        """Raises GraphError where ``call`` did not do what it reports."""
        ...


def run_passes(
    model: onnx.ModelProto, passes: Iterable[GraphPass]
) -> tuple[onnx.ModelProto, tuple[PassReport, ...]]:
    """(a rewritten copy, one report for each pass).

    Raises:
        GraphError: a contract is broken.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    reports = []
    for graph_pass in passes:
        graph_pass.requires(copy)
        report = graph_pass.call(copy)
        graph_pass.ensures(copy, report)
        reports.append(report)
    return copy, tuple(reports)
