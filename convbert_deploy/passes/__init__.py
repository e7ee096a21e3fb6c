"""Rewrites of graphs, each with a contract: requires, call, ensures.

After tracing (see ``exporting.tidy``), in this order: ConstantReshape, SharedWeights,
ReadableNames. When an engine is built: EncoderLayers on CPUs (see ``build_cpu``), those of
``tensorrt`` for plans; these report what they did in a ``PassReport``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convbert_deploy.passes.constant_reshape import ConstantReshape
    from convbert_deploy.passes.encoder_layers import EncoderLayers, EncoderLayersOptions
    from convbert_deploy.passes.readable_names import ReadableNames
    from convbert_deploy.passes.shared_weights import SharedWeights

__all__ = [
    "ConstantReshape",
    "EncoderLayers",
    "EncoderLayersOptions",
    "ReadableNames",
    "SharedWeights",
]

_MODULES = {
    "ConstantReshape": "constant_reshape",
    "EncoderLayers": "encoder_layers",
    "EncoderLayersOptions": "encoder_layers",
    "ReadableNames": "readable_names",
    "SharedWeights": "shared_weights",
}


def __getattr__(name: str) -> Any:
    """Passes are imported when they are asked for: those of plans do without onnx_ir."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
