"""A linear layer's weight in the order in which EncoderLayer's CPU kernel reads it.

The blob is made once, by ``build-engine``, and the kernel computes on it where it lies: loading an
engine copies no weight. Every instruction set reads the same blob. Its counterpart, with the same
layout, is plugins/encoder_layer/packed_weight.h.

Layout, little-endian, every section beginning at a multiple of 64 bytes:

* header: magic ``CVBTPKW1``, int32 element type, int32 groups, int64 inputs of a group, int64
  outputs of a group, float32 activation scale (0: dynamic), int32 has_multiplier;
* scales, int8 only: float32, one for each of all outputs;
* multiplier, if present: float32, one for each of all inputs;
* the weight: for each group, for each block of 64 outputs, for each unit of inputs, for each output
  of the block: 4 bytes, which hold 1 float32, 2 bfloat16 or 4 int8 weights of adjacent inputs. The
  last block has as many outputs as there are, rounded up to 16. int8 weights are stored with 128
  added, as the unsigned operand of the dot-product instructions.
"""

from __future__ import annotations

import dataclasses
import enum
import struct

import numpy as np

from convbert_deploy.errors import GraphError

MAGIC = b"CVBTPKW1"
BLOCK = 64
_PANEL = 16
_ALIGNMENT = 64
_HEADER = struct.Struct("<8siiqqfi")
# What the kernel accepts: sums of int8 products stay below 2^31, byte counts below 2^63.
_MOST, _MOST_INT8_INPUTS, _MOST_GROUPS = 1 << 24, 1 << 16, 1 << 16


class WeightType(enum.IntEnum):
    """Element type of a packed weight; the value stands in the header."""

    FP32 = 0
    BF16 = 1
    INT8 = 2

    @property
    def elements(self) -> int:
        """Weights in a unit of 4 bytes."""
        return {WeightType.FP32: 1, WeightType.BF16: 2, WeightType.INT8: 4}[self]


@dataclasses.dataclass(frozen=True)
class LinearWeight:
    """What a blob holds: ``y = x @ weight``, or that for each of ``groups`` equal parts of x.

    weight: (groups, inputs, outputs); float32, or int8 for ``WeightType.INT8``.
    scale: int8 only: float32 (groups * outputs), what each column is multiplied by.
    multiplier: float32 (groups * inputs) on the input channels before they are quantized
        (SmoothQuant), or None.
    activation_scale: int8 only: the step of the quantized input, 0 to take one for each token.
    """

    weight: np.ndarray
    type: WeightType
    scale: np.ndarray | None = None
    multiplier: np.ndarray | None = None
    activation_scale: float = 0.0


def quantized(weight: np.ndarray) -> LinearWeight:
    """Symmetric int8, one scale a column: the largest magnitude becomes 127.

    weight: float32 (groups, inputs, outputs).
    """
    amax = np.abs(weight).max(axis=1)
    scale = np.where(amax > 0, amax / 127, 1).astype(np.float32)
    integers = np.clip(np.rint(weight / scale[:, None, :]), -127, 127).astype(np.int8)
    return LinearWeight(integers, WeightType.INT8, scale.reshape(-1))


def packed(linear: LinearWeight) -> np.ndarray:
    """The blob: uint8, one axis.

    Raises:
        GraphError: shapes that do not fit each other, an int8 weight without scales, or what the
            kernel would refuse: too many inputs or outputs, an activation scale that is no step.
    """
    _check(linear)
    groups, inputs, outputs = linear.weight.shape
    header = _HEADER.pack(
        MAGIC,
        int(linear.type),
        groups,
        inputs,
        outputs,
        linear.activation_scale,
        int(linear.multiplier is not None),
    )
    sections = [header]
    if linear.scale is not None:
        sections.append(linear.scale.astype("<f4").tobytes())
    if linear.multiplier is not None:
        sections.append(linear.multiplier.astype("<f4").tobytes())
    sections += [
        block.tobytes() for group in linear.weight for block in _blocks(group, linear.type)
    ]
    return np.frombuffer(b"".join(_aligned(section) for section in sections), np.uint8)


def unpacked(blob: np.ndarray) -> LinearWeight:
    """What ``packed`` was given; a bfloat16 weight comes back as the float32 numbers it stands for.

    blob: uint8, one axis.

    Raises:
        GraphError: not a blob, or one of another length than its header says.
    """
    raw = np.ascontiguousarray(blob, np.uint8).reshape(-1)
    if raw.size < _ALIGNMENT or raw[: len(MAGIC)].tobytes() != MAGIC:
        raise GraphError(
            f"{raw.size} bytes that begin with {raw[: len(MAGIC)].tobytes()!r}, expected a packed "
            f"weight, which begins with {MAGIC!r}"
        )
    _, type_, groups, inputs, outputs, activation_scale, has_multiplier = _HEADER.unpack_from(raw)
    if type_ not in set(WeightType) or min(groups, inputs, outputs) < 1:
        raise GraphError(
            f"a packed weight of element type {type_}, {groups} groups of {inputs} inputs and "
            f"{outputs} outputs, expected type 0, 1 or 2 and sizes of 1 or more"
        )
    kind = WeightType(type_)
    lengths = [
        4 * groups * outputs * (kind is WeightType.INT8),
        4 * groups * inputs * has_multiplier,
    ]
    panels = -(-outputs // _PANEL) * _PANEL
    group_bytes = 4 * panels * -(-inputs // kind.elements)
    begins = _ALIGNMENT + sum(length + -length % _ALIGNMENT for length in lengths)
    if raw.size != begins + groups * group_bytes:
        raise GraphError(
            f"a packed weight of {raw.size} bytes, expected {begins + groups * group_bytes} for "
            f"{groups} groups of {inputs} inputs and {outputs} outputs as {kind.name}"
        )
    scale, multiplier = _floats(raw, lengths)
    parts = raw[begins:].reshape(groups, group_bytes)
    weight = np.stack([_from_blocks(part, kind, inputs, outputs) for part in parts])
    return LinearWeight(weight, kind, scale, multiplier, activation_scale)


def _floats(raw: np.ndarray, lengths: list[int]) -> list[np.ndarray | None]:
    """The float32 sections behind the header; None for those of length 0."""
    sections: list[np.ndarray | None] = []
    at = _ALIGNMENT
    for length in lengths:
        sections.append(raw[at : at + length].view("<f4").copy() if length else None)
        at += length + -length % _ALIGNMENT
    return sections


def _from_blocks(part: np.ndarray, kind: WeightType, inputs: int, outputs: int) -> np.ndarray:
    """One group's (inputs, outputs) weight from its blocks; the inverse of ``_blocks``."""
    elements = kind.elements
    units = -(-inputs // elements)
    stored = part.view({1: "<f4", 2: "<u2", 4: "u1"}[elements])
    columns, at = [], 0
    for first in range(0, outputs, BLOCK):
        width = min(BLOCK, -(-(outputs - first) // _PANEL) * _PANEL)
        block = stored[at : at + units * width * elements].reshape(units, width, elements)
        columns.append(block.transpose(0, 2, 1).reshape(units * elements, width))
        at += block.size
    weight = np.concatenate(columns, axis=1)[:inputs, :outputs]
    if kind is WeightType.INT8:
        return (weight.astype(np.int16) - 128).astype(np.int8)
    if kind is WeightType.BF16:
        return (weight.astype(np.uint32) << 16).view(np.float32)
    return weight.copy()


def _check(linear: LinearWeight) -> None:
    _check_arrays(linear)
    groups, inputs, outputs = linear.weight.shape
    most = _MOST_INT8_INPUTS if linear.type is WeightType.INT8 else _MOST
    if not (
        1 <= groups <= _MOST_GROUPS
        and 1 <= inputs <= most
        and outputs >= 1
        and groups * max(inputs, outputs) <= _MOST
    ):
        raise GraphError(
            f"{groups} groups of {inputs} inputs and {outputs} outputs, expected at most {most} inputs "
            f"of a group and {_MOST} of all"
        )
    if not 0 <= linear.activation_scale < float("inf"):
        raise GraphError(
            f"an activation scale of {linear.activation_scale}, expected a finite one of 0 or more"
        )


def _check_arrays(linear: LinearWeight) -> None:
    if linear.weight.ndim != 3:
        raise GraphError(f"a weight of shape {linear.weight.shape}, expected (groups, in, out)")
    groups, inputs, outputs = linear.weight.shape
    is_int8 = linear.type is WeightType.INT8
    if is_int8 != (linear.weight.dtype == np.int8) or is_int8 != (linear.scale is not None):
        raise GraphError(f"an {linear.type.name} weight of {linear.weight.dtype} and its scale")
    for name, array, size in (
        ("scale", linear.scale, groups * outputs),
        ("multiplier", linear.multiplier, groups * inputs),
    ):
        if array is not None and array.shape != (size,):
            raise GraphError(f"{name} of shape {array.shape}, expected ({size},)")


def _aligned(section: bytes) -> bytes:
    return section + bytes(-len(section) % _ALIGNMENT)


def _blocks(weight: np.ndarray, kind: WeightType) -> list[np.ndarray]:
    """Blocks of one group's (inputs, outputs) weight, each (units, columns, elements)."""
    elements = kind.elements
    inputs, outputs = weight.shape
    stored = _stored(weight, kind)
    padded = np.zeros(
        (-(-inputs // elements) * elements, -(-outputs // _PANEL) * _PANEL), stored.dtype
    )
    padded[:inputs, :outputs] = stored
    units = padded.reshape(-1, elements, padded.shape[1]).transpose(0, 2, 1)
    return [
        np.ascontiguousarray(units[:, first : first + BLOCK])
        for first in range(0, padded.shape[1], BLOCK)
    ]


def _stored(weight: np.ndarray, kind: WeightType) -> np.ndarray:
    if kind is WeightType.INT8:
        return (weight.astype(np.int16) + 128).astype(np.uint8)
    if kind is WeightType.BF16:
        return bfloat16_bits(weight)
    return weight.astype("<f4")


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bfloat16, ties to even, as uint16. Values are finite."""
    bits = np.ascontiguousarray(values, "<f4").view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
