"""Scales that every type holds exactly, and rounding that is the runtime's own."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from convbert_deploy.calibration.formats import (
    activation_scale,
    fake_quantized,
    largest_quantized,
    quantized_weight,
    storable_scales,
    weight_scales,
)
from convbert_deploy.errors import GraphError
from convbert_deploy.precision import Precision

BOTH = pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP8])
_TYPES = {Precision.INT8: TensorProto.INT8, Precision.FP8: TensorProto.FLOAT8E4M3FN}


def many_scales() -> np.ndarray:
    """1e-7 to 1e3, every binade, powers of two and their neighbours."""
    random = np.random.default_rng(0)
    spread = 10 ** random.uniform(-7, 3, 200_000)
    powers = 2.0 ** np.arange(-23, 10)
    neighbours = [np.nextafter(powers, 0), powers, np.nextafter(powers, np.inf)]
    return np.concatenate([spread, *neighbours]).clip(1e-7, 1e3)


def test_scales_are_exact_in_both_half_types():
    stored = storable_scales(many_scales())

    assert stored.dtype == np.float32
    for kind in (np.float16, ml_dtypes.bfloat16):
        assert np.array_equal(stored.astype(kind).astype(np.float32), stored)


def test_scales_never_shrink_and_grow_by_a_128th_at_most():
    scales = many_scales()
    stored = storable_scales(scales).astype(np.float64)

    assert (stored >= scales).all()
    normal = scales >= 2.0**-16
    assert (stored[normal] <= scales[normal] * (1 + 2.0**-7)).all()
    # below that a step of float16's subnormals
    assert (stored[~normal] <= scales[~normal] + 2.0**-24).all()


def test_storable_scales_are_kept():
    stored = storable_scales(many_scales())

    assert np.array_equal(storable_scales(stored), stored)


def test_scales_of_nothing_are_float16s_least():
    assert np.array_equal(storable_scales(np.array([0.0, 1e-30])), np.full(2, 2.0**-24, np.float32))


def test_the_largest_scale_float16_holds():
    assert storable_scales(np.array([65280.0]))[0] == 65280


@pytest.mark.parametrize("scale", [65281.0, np.inf, np.nan])
def test_scales_that_float16_cannot_hold_are_refused(scale):
    with pytest.raises(GraphError, match=f"scale is {scale:.6g}, expected at most 65280"):
        storable_scales(np.array([1.0, scale]))


@BOTH
def test_activation_scales_cover_the_range_and_waste_a_128th(precision):
    largest = largest_quantized(precision)
    for amax in (1e-9, 0.03, 1.0, 11.7, 4e4):
        scale = activation_scale(amax, precision)
        assert scale.shape == () and scale.dtype == np.float32
        assert scale * largest >= amax
        # float16 holds the reciprocal, which runtimes multiply by
        assert np.isfinite(np.float16(1) / scale.astype(np.float16))
        if amax / largest > 2.0**-15:
            assert scale * largest <= amax * (1 + 2.0**-7)


def test_largest_numbers_are_those_of_the_types():
    assert largest_quantized(Precision.FP8) == float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)
    assert largest_quantized(Precision.INT8) == 127


@BOTH
def test_weights_reach_the_end_of_their_type_in_every_column(precision):
    random = np.random.default_rng(1)
    weight = (random.normal(size=(64, 40)) * 10 ** random.uniform(-3, 1, 40)).astype(np.float32)
    weight[:, 7] = 0
    weight[3, 8] = -50 * np.abs(weight[:, 8]).max()

    scales = weight_scales(weight, precision)
    stored = quantized_weight(weight, scales, precision).astype(np.float32)

    largest = largest_quantized(precision)
    assert scales.shape == (40,)
    reach = np.abs(stored).max(axis=0)
    assert reach.max() <= largest
    assert reach[7] == 0
    assert (np.delete(reach, 7) >= largest - (1 if precision is Precision.INT8 else 0)).all()
    error = np.abs(stored * scales - weight)
    step = scales / 2 if precision is Precision.INT8 else np.maximum(np.abs(weight) / 16, scales)
    assert (error <= step * (1 + 1e-6)).all()


def test_int8_weights_never_use_minus_128():
    weight = np.array([[-1.0], [1.0]], np.float32)

    assert quantized_weight(weight, np.float32([1 / 200]), Precision.INT8).tolist() == [
        [-127],
        [127],
    ]


@BOTH
def test_a_column_has_its_own_scale(precision):
    weight = np.array([[1.0, 100.0], [0.5, -3.0]], np.float32)

    scales = weight_scales(weight, precision)

    assert np.array_equal(
        scales, storable_scales(np.array([1, 100]) / largest_quantized(precision))
    )


def round_trip(values: np.ndarray, scale: np.ndarray, precision: Precision) -> np.ndarray:
    """QuantizeLinear and DequantizeLinear as ONNX Runtime computes them, unfused."""
    kind = _TYPES[precision]
    zero_point = np.zeros((), helper.tensor_dtype_to_np_dtype(kind))
    pair = ["scale", "zero"]
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", *pair], ["q"]),
            helper.make_node("DequantizeLinear", ["q", *pair], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None])],
        [
            helper.make_tensor("scale", TensorProto.FLOAT, [], scale.tobytes(), raw=True),
            helper.make_tensor("zero", kind, [], zero_point.tobytes(), raw=True),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": values})[0]


def awkward_values(scale: float, precision: Precision) -> np.ndarray:
    """Random ones of all sizes, ties, both ends, what saturates, what overflows in the division."""
    random = np.random.default_rng(2)
    grid = np.arange(-130, 131) / 1.0
    if precision is Precision.FP8:
        every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        grid = np.sort(every[np.isfinite(every)]).astype(np.float64)
    ties = (grid[:-1] + grid[1:]) / 2
    largest = largest_quantized(precision)
    ends = largest * np.array([0.99, 1, 1.004, 1.03, 1.07, 2, 1e6])
    chosen = np.concatenate(
        [grid, ties, np.nextafter(ties, 0), np.nextafter(ties, 1e9), ends, -ends]
    )
    sizes = random.normal(size=20_000) * 10 ** random.uniform(-6, 4, 20_000)
    huge = [3.4e38, -3.4e38, 1e-45, 0.0, -0.0]
    return np.concatenate([chosen * scale, sizes, huge]).astype(np.float32)


@BOTH
@pytest.mark.parametrize("scale", [1.0, 0.0078125, 0.0107421875, 37.0, 2.0**-15])
def test_fake_quantization_is_onnxruntimes_bit_for_bit(precision, scale):
    stored = storable_scales(np.asarray(scale)).reshape(())
    values = awkward_values(scale, precision)

    ours = fake_quantized(values, stored, precision)

    assert ours.dtype == np.float32
    # numbers, not bytes: the sign of a zero is lost in int8
    assert np.array_equal(ours, round_trip(values, stored, precision))


def test_ties_go_to_the_even_neighbour():
    values = np.float32([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, -128.5, 200])

    rounded = fake_quantized(values, np.float32(1), Precision.INT8)

    assert rounded.tolist() == [0, 2, 2, 0, -2, 126, 127, -128, 127]
