"""The layout that EncoderLayer's kernel reads, byte by byte, and what is refused."""

from __future__ import annotations

import struct

import ml_dtypes
import numpy as np
import pytest

from convbert_deploy.errors import GraphError
from convbert_deploy.operators.packed_weight import (
    LinearWeight,
    WeightType,
    bfloat16_bits,
    packed,
    quantized,
    unpacked,
)

FP32, BF16, INT8 = WeightType.FP32, WeightType.BF16, WeightType.INT8
#: (groups, in, out): one panel, units cut short, several blocks, a last one that is not full
SHAPES = [(1, 1, 1), (1, 3, 5), (2, 7, 16), (1, 8, 64), (3, 5, 65), (1, 37, 150), (2, 6, 192)]


def random_weight(shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_header_and_float_blocks_by_hand():
    """3 inputs, 2 outputs: a panel of 16 columns, of which 14 are zeros."""
    weight = np.array([[[1, 2], [3, 4], [5, 6]]], np.float32)
    blob = packed(LinearWeight(weight, FP32))
    header = struct.unpack_from("<8siiqqfi", blob)
    assert header == (b"CVBTPKW1", 0, 1, 3, 2, 0.0, 0)
    assert not blob[struct.calcsize("<8siiqqfi") : 64].any()
    assert blob.dtype == np.uint8 and blob.shape == (64 + 3 * 16 * 4,)
    panel = blob[64:].view("<f4").reshape(3, 16)
    assert panel[:, :2].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert not panel[:, 2:].any()


def test_a_unit_holds_two_bfloat16_of_adjacent_inputs():
    weight = np.array([[[1.0], [-2.0], [3.0]]], np.float32)
    units = packed(LinearWeight(weight, BF16))[64:].view("<u2").reshape(2, 16, 2)
    assert units[:, 0].tolist() == [[0x3F80, 0xC000], [0x4040, 0]]


def test_a_unit_holds_four_int8_with_128_added():
    weight = np.array([[[-127], [-1], [0], [1], [127]]], np.int8)
    scale, multiplier = np.float32([0.5]), np.float32([1, 2, 3, 4, 5])
    blob = packed(LinearWeight(weight, INT8, scale, multiplier, 0.25))
    assert struct.unpack_from("<8siiqqfi", blob)[1:] == (2, 1, 5, 1, 0.25, 1)
    assert blob[64:128].view("<f4")[0] == 0.5
    assert blob[128:192].view("<f4")[:5].tolist() == [1, 2, 3, 4, 5]
    assert blob[192:].reshape(2, 16, 4)[:, 0].tolist() == [[1, 127, 128, 129], [255, 0, 0, 0]]


def test_blocks_of_64_columns_follow_each_other_and_groups_after_them():
    weight = random_weight((2, 2, 80))
    floats = packed(LinearWeight(weight, FP32))[64:].view("<f4")
    one_group = 2 * 80
    assert np.array_equal(floats[:128].reshape(2, 64), weight[0, :, :64])
    assert np.array_equal(floats[128:one_group].reshape(2, 16), weight[0, :, 64:])
    assert np.array_equal(floats[one_group : one_group + 64], weight[1, 0, :64])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(shape):
    groups, inputs, _ = shape
    weight = random_weight(shape)
    assert np.array_equal(unpacked(packed(LinearWeight(weight, FP32))).weight, weight)
    half = unpacked(packed(LinearWeight(weight, BF16)))
    assert np.array_equal(half.weight, weight.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert (half.type, half.scale, half.multiplier) == (BF16, None, None)
    multiplier = random_weight(groups * inputs, 1)
    stored = quantized(weight)
    eight = LinearWeight(stored.weight, INT8, stored.scale, multiplier, 0.03125)
    back = unpacked(packed(eight))
    assert np.array_equal(back.weight, stored.weight) and back.weight.dtype == np.int8
    assert np.array_equal(back.scale, stored.scale)
    assert np.array_equal(back.multiplier, multiplier)
    assert back.activation_scale == 0.03125


def test_every_section_begins_at_a_cache_line():
    for shape in SHAPES:
        assert packed(quantized(random_weight(shape))).size % 64 == 0


def test_quantized_is_symmetric_with_a_scale_a_column():
    weight = random_weight((2, 9, 4))
    weight[0, :, 1] = 0
    linear = quantized(weight)
    scale = linear.scale.reshape(2, 1, 4)
    assert linear.scale[1] == 1 and not linear.weight[0, :, 1].any()
    used = np.abs(linear.weight).max(axis=1)
    assert set(used.reshape(-1).tolist()) == {0, 127}
    assert (np.abs(linear.weight * scale - weight) <= scale / 2 * (1 + 1e-5)).all()


def test_bfloat16_rounds_to_even():
    values = np.float32([1.00390625, 1.01171875, -1.00390625, 3.0e38, 0.0])
    assert np.array_equal(bfloat16_bits(values), values.astype(ml_dtypes.bfloat16).view(np.uint16))


@pytest.mark.parametrize(
    ("linear", "message"),
    [
        (LinearWeight(np.zeros((2, 3), np.float32), FP32), r"expected \(groups, in, out\)"),
        (LinearWeight(np.zeros((1, 2, 3), np.int8), INT8), "int8 and its scale"),
        (LinearWeight(np.zeros((1, 2, 3), np.float32), INT8, np.ones(3)), "INT8 weight of float32"),
        (LinearWeight(np.zeros((1, 2, 3), np.float32), FP32, np.ones(3)), "FP32 weight"),
        (LinearWeight(np.zeros((1, 2, 3), np.int8), INT8, np.ones(2)), r"scale.*expected \(3,\)"),
        (
            LinearWeight(np.zeros((2, 2, 3), np.float32), FP32, None, np.ones(2)),
            r"multiplier.*expected \(4,\)",
        ),
        (LinearWeight(np.zeros((1, 65537, 1), np.int8), INT8, np.ones(1)), "at most 65536 inputs"),
        (LinearWeight(np.zeros((1, 0, 3), np.float32), FP32), "1 groups of 0 inputs"),
        (LinearWeight(np.zeros((65537, 1, 1), np.float32), FP32), "65537 groups"),
        (LinearWeight(np.zeros((1, 2, 3), np.int8), INT8, np.ones(3), None, -1.0), "scale of -1"),
        (LinearWeight(np.zeros((1, 2, 3), np.int8), INT8, np.ones(3), None, np.inf), "of inf"),
    ],
)
def test_what_does_not_fit_is_not_packed(linear, message):
    with pytest.raises(GraphError, match=message):
        packed(linear)


def test_what_is_no_blob_is_not_unpacked():
    blob = packed(quantized(random_weight((1, 4, 20))))
    with pytest.raises(GraphError, match="begins with"):
        unpacked(np.frombuffer(b"x" * 128, np.uint8))
    with pytest.raises(GraphError, match="begins with"):
        unpacked(blob[:32])
    with pytest.raises(GraphError, match=f"expected {blob.size}"):
        unpacked(blob[:-64])
    wrong = blob.copy()
    wrong[8] = 3
    with pytest.raises(GraphError, match="element type 3"):
        unpacked(wrong)
