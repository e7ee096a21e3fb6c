"""The 8-bit formats: symmetric int8 and FP8 E4M3, their scales and their rounding."""

from __future__ import annotations

import numpy as np

from ..errors import GraphError
from ..precision import Precision

#: int8 uses -127..127, so that the grid is symmetric; E4M3's largest finite number is 448
_LARGEST = {Precision.INT8: 127.0, Precision.FP8: 448.0}
#: fp16's smallest number, for weights; for activations one whose reciprocal fp16 holds too
_LEAST_SCALE = 2.0**-24
_LEAST_ACTIVATION_SCALE = 2.0**-15
#: float16's largest number of 8 significant bits
_MOST_SCALE = 65280.0
#: significant bits of bfloat16; a number of so few bits in fp16's range is exact in all three types
_BITS = 8


def largest_quantized(precision: Precision) -> float:
    """The quantized number that ``amax`` maps to."""
    return _LARGEST[precision]


def storable_scales(scales: np.ndarray) -> np.ndarray:
    """The next larger float32 numbers that float16 and bfloat16 hold exactly.

    A graph's scales take the type of its activations; so one file means the same numbers in every
    type. Costs at most 2^-7 of the range (above 2^-16): one of 127 integer steps at its end.

    Raises:
        GraphError: a scale that is not finite, or larger than float16 holds.
    """
    values = np.maximum(np.asarray(scales, np.float64), _LEAST_SCALE)
    # written so that a NaN is refused
    if not (values <= _MOST_SCALE).all():
        raise GraphError(
            f"a quantization scale is {np.max(values):.6g}, expected at most {_MOST_SCALE:g}",
            hint="leave the layer unquantized: values of this size fit no float16 graph either",
        )
    _, exponent = np.frexp(values)
    # below 2^-14 float16's steps are 2^-24, whatever the number
    step = np.maximum(np.ldexp(1.0, exponent - _BITS), _LEAST_SCALE)
    return (np.ceil(values / step) * step).astype(np.float32)


def activation_scale(amax: float, precision: Precision) -> np.ndarray:
    """The float32 scalar that maps ``amax`` to the largest quantized number, or to one step less.

    Raises:
        GraphError: as ``storable_scales``.
    """
    scale = max(amax / largest_quantized(precision), _LEAST_ACTIVATION_SCALE)
    return storable_scales(np.asarray(scale)).reshape(())


def weight_scales(weight: np.ndarray, precision: Precision) -> np.ndarray:
    """float32 (columns,): one scale a column of a (rows, columns) weight; zeros get the least.

    Raises:
        GraphError: as ``storable_scales``.
    """
    amax = np.abs(weight).max(axis=0)
    return storable_scales(amax / largest_quantized(precision))


def quantized_weight(weight: np.ndarray, scales: np.ndarray, precision: Precision) -> np.ndarray:
    """``weight`` over ``scales`` in the 8-bit type: int8 in -127..127, or float8_e4m3fn."""
    scaled = weight / scales
    largest = largest_quantized(precision)
    if precision is Precision.INT8:
        return np.clip(np.rint(scaled), -largest, largest).astype(np.int8)
    import ml_dtypes

    return np.clip(scaled, -largest, largest).astype(ml_dtypes.float8_e4m3fn)


def fake_quantized(values: np.ndarray, scale: np.ndarray, precision: Precision) -> np.ndarray:
    """QuantizeLinear and DequantizeLinear of an activation, in float32 of the same shape.

    int8 saturates to -128..127 (ONNX's QuantizeLinear), E4M3 to +-448.
    """
    # what overflows saturates
    with np.errstate(over="ignore"):
        scaled = values / scale
    if precision is Precision.INT8:
        return np.clip(np.rint(scaled), -128, 127) * scale
    import ml_dtypes

    largest = largest_quantized(precision)
    rounded = np.clip(scaled, -largest, largest).astype(ml_dtypes.float8_e4m3fn)
    return rounded.astype(np.float32) * scale
