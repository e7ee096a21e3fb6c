"""Graphs with EncoderLayer nodes without our native library: ONNX's evaluator and the reference."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from convbert_deploy.backends.base import Batch
from convbert_deploy.operators import encoder_layer_reference as reference
from convbert_deploy.operators.encoder_layer import LayerAttributes, LayerInputs
from convbert_deploy.passes import EncoderLayers, EncoderLayersOptions
from convbert_deploy.passes.pass_report import PassReport


class PackRows(OpRun):
    op_domain = "convbert"

    def _run(self, hidden, mask, keep_pads=None):
        return reference.pack_rows(hidden, mask, keep_pads=bool(keep_pads))


class UnpackRows(OpRun):
    op_domain = "convbert"

    def _run(self, rows, mask, keep_pads=None):
        return (reference.unpack_rows(rows, mask, keep_pads=bool(keep_pads)),)


class EncoderLayer(OpRun):
    op_domain = "convbert"

    def _run(
        self,
        *inputs,
        num_heads=None,
        kernel_size=None,
        epsilon=None,
        attention=None,
        first_row_only=None,
    ):
        attributes = LayerAttributes(num_heads, kernel_size, epsilon, attention, first_row_only)
        values = LayerInputs.from_order(inputs)
        return (reference.encoder_layer(values, attributes, torch.float64).astype(np.float32),)


def run_reference(model: onnx.ModelProto, batch: Batch) -> dict[str, np.ndarray]:
    """The outputs of a graph that has EncoderLayer nodes."""
    session = ReferenceEvaluator(model, new_ops=[PackRows, UnpackRows, EncoderLayer])
    names = [value.name for value in model.graph.output]
    feed = {value.name: batch[value.name] for value in model.graph.input}
    return dict(zip(names, session.run(None, feed), strict=True))


def with_encoder_layers(
    model: onnx.ModelProto, options: EncoderLayersOptions | None = None
) -> tuple[onnx.ModelProto, PassReport]:
    """``model`` after the pass, and what the pass reports."""
    result = EncoderLayers(options)(ir.from_proto(model))
    return ir.to_proto(result.model), result.report
