"""Typed graphs with explicit quantization, as plans of TensorRT for RTX, with no GPU present."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from convbert_deploy.backends.tensorrt_plan import PlanOptions, build_plan
from convbert_deploy.calibration.typed import typed_graph
from convbert_deploy.errors import EngineError
from convbert_deploy.precision import Precision
from convbert_deploy.shapes import ShapeProfile

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

PROFILE = ShapeProfile.parse("batch=1:2:4,seq=8:32:64")
SM89 = PlanOptions(compute_capabilities=("SM89",))
SIZE = 512
HALF = [Precision.FP16, Precision.BF16]
QUANTIZED = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}


def _quantized(kind: str | None) -> onnx.ModelProto:
    """Two Linears of one quantized embedding, multiplied; ``kind`` None: nothing is quantized."""
    body = (
        """
        x = Gather (table, ids)
        q = QuantizeLinear (x, scale, zero)
        d = DequantizeLinear (q, scale, zero)
        w1 = DequantizeLinear <axis = 1> (weight1, scales, zeros)
        w2 = DequantizeLinear <axis = 1> (weight2, scales, zeros)
        """
        if kind
        else "d = Gather (table, ids)  w1 = Identity (weight1)  w2 = Identity (weight2)"
    )
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        g (int64[batch, seq] ids) => (float[batch, seq, {SIZE}] y) {{
          {body}
          m1 = MatMul (d, w1)  a = Add (m1, bias)  b = Gelu (a)
          m2 = MatMul (d, w2)  c = Add (m2, bias)
          y = Mul (b, c) }}"""
    )
    for node in model.graph.node:
        node.name = node.output[0]
    dtype = helper.tensor_dtype_to_np_dtype(QUANTIZED[kind]) if kind else np.dtype(np.float32)
    random = np.random.default_rng(0)
    arrays = {
        "table": random.standard_normal((100, SIZE)).astype(np.float32),
        "bias": random.standard_normal(SIZE).astype(np.float32),
        "weight1": random.integers(-120, 120, (SIZE, SIZE)).astype(dtype),
        "weight2": random.integers(-120, 120, (SIZE, SIZE)).astype(dtype),
    }
    if kind:
        arrays["scale"] = np.float32(2**-5)
        arrays["scales"] = np.full(SIZE, 2**-9, np.float32)
        arrays["zero"], arrays["zeros"] = np.zeros((), dtype), np.zeros(SIZE, dtype)
    model.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in arrays.items()
    )
    return model


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_half_graph_builds_and_its_gemms_are_quantized(kind, precision) -> None:
    quantized = build_plan(
        typed_graph(_quantized(kind), precision).SerializeToString(), PROFILE, SM89
    ).facts
    plain = build_plan(
        typed_graph(_quantized(None), precision).SerializeToString(), PROFILE, SM89
    ).facts
    # one byte a weight instead of two
    saved = plain.plan_bytes - quantized.plan_bytes
    assert saved > 0.9 * 2 * SIZE * SIZE
    # Q/DQ pairs are part of the GEMMs, but for the quantization of their input
    assert quantized.kernels["gemm"] <= 2
    assert quantized.kernel_count <= plain.kernel_count + 2


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("keep", [["m1", "m2"], ["m1"], ["q"], ["w1", "b"]])
def test_mixed_with_fp32_nodes_it_is_still_strongly_typed(kind, keep) -> None:
    graph = typed_graph(_quantized(kind), Precision.FP16, keep_fp32=keep)
    assert build_plan(graph.SerializeToString(), PROFILE, SM89).facts.plan_bytes


def test_scale_of_another_type_than_its_input_is_refused_by_the_builder() -> None:
    """What the typed graph's consistency protects from."""
    graph = typed_graph(_quantized("int8"), Precision.FP16)
    tensor = next(t for t in graph.graph.initializer if t.name == "scale")
    tensor.CopyFrom(numpy_helper.from_array(np.float32(2**-5), "scale"))
    with pytest.raises(EngineError):
        build_plan(graph.SerializeToString(), PROFILE, SM89)


def test_fp8_is_refused_below_sm89() -> None:
    graph = typed_graph(_quantized("fp8"), Precision.FP16).SerializeToString()
    with pytest.raises(EngineError):
        build_plan(graph, PROFILE, PlanOptions(compute_capabilities=("SM80",)))
