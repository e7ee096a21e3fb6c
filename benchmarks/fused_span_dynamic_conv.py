"""Whether fusing the kernel generator into the convolution pays on a CPU.

``python benchmarks/fused_span_dynamic_conv.py --markdown benchmarks/results/FILE.md``. The
convolution branch after the projections, as in ConvBERT-base, in ONNX Runtime with our library: Mul,
MatMul, Add and SpanDynamicConv against FusedSpanDynamicConv, twelve times in a row a call. The Split
of the projections stays in both, once: the attention needs it. Interleaved runs, float32, one thread.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper
from operator_bench import ONE_THREAD, markdown_target, report

from convbert_deploy.backends.base import Batch
from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner
from convbert_deploy.benchmarking import Candidate, Point
from convbert_deploy.exporting import OPSET
from convbert_deploy.operators import DOMAIN
from convbert_deploy.operators.fused_span_dynamic_conv import fuse
from convbert_deploy.plugin_library import ort_library

HEADS, HEAD_DIM, TAPS, LAYERS = 6, 64, 9, 12
CHANNELS = HEADS * HEAD_DIM


def separate() -> onnx.ModelProto:
    """LAYERS branches on the same projections, each on the output of the one before."""
    random = np.random.default_rng(1)
    weight = random.standard_normal((CHANNELS, HEADS * TAPS), np.float32) / CHANNELS**0.5
    initializers = [
        onnx.numpy_helper.from_array(weight.astype(np.float32), "weight"),
        onnx.numpy_helper.from_array(random.standard_normal(HEADS * TAPS, np.float32), "bias"),
    ]
    parts = ["query", "key", "value", "conv_value"]
    nodes = [helper.make_node("Split", ["projections"], parts, axis=2, num_outputs=4)]
    previous = "key_conv"
    for layer in range(LAYERS):

        def name(part: str, layer: int = layer) -> str:
            return f"{part}_{layer}"

        made = "out" if layer == LAYERS - 1 else name("out")
        nodes += [
            helper.make_node("Mul", [previous, "query"], [name("product")]),
            helper.make_node("MatMul", [name("product"), "weight"], [name("generated")]),
            helper.make_node("Add", [name("generated"), "bias"], [name("logits")]),
            helper.make_node(
                "SpanDynamicConv",
                ["conv_value", name("logits")],
                [made],
                domain=DOMAIN,
                num_heads=HEADS,
                kernel_size=TAPS,
            ),
        ]
        previous = made
    infos = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", "seq", width])
        for name, width in (
            ("key_conv", CHANNELS),
            ("projections", 4 * CHANNELS),
            ("out", CHANNELS),
        )
    ]
    return helper.make_model(
        helper.make_graph(nodes, "branches", infos[:2], infos[2:], initializers),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )


def make_batch(point: Point) -> Batch:
    random = np.random.default_rng(0)
    shape = (point.batch, point.seq)
    return {
        "key_conv": random.standard_normal((*shape, CHANNELS), np.float32),
        "projections": random.standard_normal((*shape, 4 * CHANNELS), np.float32),
        "attention_mask": np.ones(shape, np.int64),
    }


def main() -> None:
    target = markdown_target(__doc__)
    model = separate()
    before = OnnxRuntimeRunner.from_model(model, options=ONE_THREAD, library=ort_library())
    after = OnnxRuntimeRunner.from_model(fuse(model), options=ONE_THREAD, library=ort_library())
    with before, after:
        batch = make_batch(Point(2, 37))
        error = np.abs(before.infer(batch)["out"] - after.infer(batch)["out"]).max()
        if not error <= 1e-4:
            raise SystemExit(f"the fused branch is off by {error:.3g}")
        report(
            [
                Candidate("Mul, MatMul, Add, SpanDynamicConv", before),
                Candidate("FusedSpanDynamicConv", after),
            ],
            [Point(1, 32), Point(1, 128), Point(8, 128), Point(1, 512)],
            make_batch,
            target,
        )


if __name__ == "__main__":
    main()
