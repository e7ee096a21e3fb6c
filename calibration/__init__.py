"""Graph in, graph of another number format out.

TensorRT 11 has no precision flags and no calibrators: precision is what the graph says.
"""

from __future__ import annotations

from ..errors import GraphError
from .stored import stored_graph
from .typed import typed_graph

__all__ = ["GraphError", "stored_graph", "typed_graph"]
