"""Rewrites of the traced graph, each an onnx_ir pass with a contract: requires, call, ensures.

They run in this order after tracing (see ``exporting.tidy``).
"""

from convbert_deploy.passes.constant_reshape import ConstantReshape
from convbert_deploy.passes.readable_names import ReadableNames
from convbert_deploy.passes.shared_weights import SharedWeights

__all__ = ["ConstantReshape", "ReadableNames", "SharedWeights"]
