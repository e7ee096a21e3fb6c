"""The passes over a graph that TensorRT or TensorRT-RTX builds, run by ``build-engine``.

There is one. TensorRT-RTX's compiler brings every other form that was tried to the same kernels or
to more (``benchmarks/plan_facts.py`` builds each and writes the table): ONNX ``Attention``, a
product for each projection, attention output without Concat, one Transpose for all heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from convbert_deploy.passes.pass_report import GraphPass, PassReport, run_passes
from convbert_deploy.passes.selected_rows import SelectedRows

if TYPE_CHECKING:
    import onnx


def tensorrt_passes(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[PassReport, ...]]:
    """(a rewritten copy of a typed graph, one report for each pass); the answers stay the same.

    A report may expect nothing: an encoder has no head that reads one row.

    Raises:
        GraphError: the graph is not in order, or a pass broke its contract.
    """
    passes: tuple[GraphPass, ...] = (SelectedRows(),)
    return run_passes(model, passes)
