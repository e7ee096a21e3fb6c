"""EncoderLayer through the C ABI: the struct, layers to run it on, and what they must give."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools

import numpy as np
import pytest

from convbert_deploy.operators.encoder_layer import LayerAttributes, LayerInputs
from convbert_deploy.operators.packed_weight import (
    LinearWeight,
    WeightType,
    packed,
    quantized,
    unpacked,
)

from kernels.cases import GUARD, SENTINEL

#: Instruction sets by number, and the best one that a CPU must have to run it.
ROUTES = {
    "portable": (0, 0),
    "AVX2": (1, 1),
    "AVX-512": (2, 2),
    "VNNI": (3, 3),
    "BF16": (4, 4),
    "AMX": (5, 5),
    "emulated AMX": (6, 4),
}
LINEARS = ("projections", "pointwise", "generator", "attention_output", "up", "down")
VECTORS = ("attention_norm_weight", "attention_norm_bias", "output_norm_weight", "output_norm_bias")
EPSILON = 1e-3  # large enough for a layer without it to be seen


class Params(ctypes.Structure):
    """EncoderLayerParams of plugins/encoder_layer/encoder_layer.h, field by field."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("input", "output", "row_starts", "mask")],
        ("weights", ctypes.c_void_p * len(LINEARS)),
        ("weight_bytes", ctypes.c_int64 * len(LINEARS)),
        ("biases", ctypes.c_void_p * len(LINEARS)),
        *[(name, ctypes.c_void_p) for name in ("depthwise", *VECTORS)],
        *[(name, ctypes.c_int64) for name in ("batch", "rows")],
        *[(name, ctypes.c_int32) for name in ("hidden", "num_heads", "head_dim", "kernel_size")],
        ("epsilon", ctypes.c_float),
        ("half_attention", ctypes.c_int32),
        ("first_row_only", ctypes.c_int32),
    ]


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a layer computes in. static: the step of int8 inputs, 0 for one a row. most, mean: the
    largest and the mean error that are accepted, of outputs with a deviation of 1.

    They are about twice the largest seen over all routes and cases, which stand beside them. The
    reference rounds int8 inputs too, but not always to the same integer: one that lies close to the
    middle of two is a matter of the last bit of float32. In float32 few rows have such an input, so
    the mean stays small; after bfloat16 most have.
    """

    types: tuple[WeightType, ...]
    half: bool
    static: float
    most: float
    mean: float


_FP32 = (WeightType.FP32,) * 6
_BF16 = (WeightType.BF16,) * 6
_INT8 = (WeightType.INT8,) * 6
_MIXED = (*WeightType, *reversed(WeightType))
KINDS = {
    "fp32": Kind(_FP32, False, 0.0, 1e-5, 1e-6),  # 3.4e-6, 4.5e-7
    "bf16": Kind(_BF16, True, 0.0, 0.07, 0.004),  # 0.034, 0.0018
    "int8": Kind(_INT8, False, 0.0, 0.06, 1e-4),  # 0.026, 3.3e-5
    "int8 static": Kind(_INT8, False, 3 / 127, 0.06, 1e-4),  # 0.015, 1.7e-5
    "int8, bf16 attention": Kind(_INT8, True, 0.0, 0.12, 0.015),  # 0.055, 0.0077
    "each weight its own": Kind(_MIXED, False, 0.0, 0.12, 0.007),  # 0.054, 0.0035
}


@dataclasses.dataclass(frozen=True)
class Shape:
    hidden: int
    heads: int
    head_dim: int
    kernel_size: int
    intermediate: int
    groups: int = 1

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer and rows for it. ``inputs.rows`` (T, H), ``inputs.attention_mask`` (1, T) or None."""

    inputs: LayerInputs[np.ndarray]
    attributes: LayerAttributes
    kind: Kind

    def replace(self, **inputs) -> Case:
        return dataclasses.replace(self, inputs=dataclasses.replace(self.inputs, **inputs))

    def of_first_rows(self) -> Case:
        attributes = dataclasses.replace(self.attributes, first_row_only=1)
        return dataclasses.replace(self, attributes=attributes)

    def alone(self, sequence: int) -> Case:
        """One of the sequences without the others."""
        first, last = self.inputs.row_starts[sequence : sequence + 2]
        mask = self.inputs.attention_mask
        return self.replace(
            rows=self.inputs.rows[first:last].copy(),
            row_starts=np.array([0, last - first], np.int64),
            attention_mask=None if mask is None else mask[:, first:last].copy(),
        )


def random_weight(generator, kind: Kind, index: int, shape, multiplied: bool) -> np.ndarray:
    """A blob whose products have a deviation of about 1; 2 for the logits of the window, so that it
    is peaked. ``multiplied``: with a multiplier on its inputs, undone in the weight."""
    groups, inputs, _ = shape
    spread = (2 if LINEARS[index] == "generator" else 1) / np.sqrt(inputs)
    weight = generator.normal(0, spread, shape).astype(np.float32)
    multiplier = None
    if multiplied:
        multiplier = np.exp(generator.normal(0, 0.3, groups * inputs)).astype(np.float32)
        weight /= multiplier.reshape(groups, inputs, 1)
    linear = LinearWeight(weight, kind.types[index])
    if kind.types[index] is WeightType.INT8:
        linear = dataclasses.replace(quantized(weight), activation_scale=kind.static)
    return packed(dataclasses.replace(linear, multiplier=multiplier))


def make_case(
    shape: Shape,
    kind: Kind,
    lengths: tuple[int, ...],
    *,
    masked: bool = False,
    multiplied: bool = False,
    seed: int = 0,
) -> Case:
    """``masked``: of each third sequence every key is hidden, of the others some."""
    generator = np.random.default_rng(seed)

    def floats(mean: float, spread: float, *size: int) -> np.ndarray:
        return generator.normal(mean, spread, size).astype(np.float32)

    hidden, width, inner, groups = shape.hidden, shape.width, shape.intermediate, shape.groups
    sizes = [
        (1, hidden, 4 * width),
        (1, hidden, width),
        (1, width, shape.heads * shape.kernel_size),
        (1, 2 * width, hidden),
        (groups, hidden // groups, inner // groups),
        (groups, inner // groups, hidden // groups),
    ]
    linears = {}
    for index, (name, size) in enumerate(zip(LINEARS, sizes, strict=True)):
        linears[f"{name}_weight"] = random_weight(generator, kind, index, size, multiplied)
        linears[f"{name}_bias"] = floats(0, 0.3, size[0] * size[2])
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    inputs = LayerInputs(
        rows=floats(0, 1, starts[-1], hidden),
        row_starts=starts,
        attention_mask=random_mask(generator, starts) if masked else None,
        depthwise_weight=floats(0, 1 / np.sqrt(shape.kernel_size), shape.kernel_size, hidden),
        attention_norm_weight=floats(1, 0.2, hidden),
        attention_norm_bias=floats(0, 0.3, hidden),
        output_norm_weight=floats(1, 0.2, hidden),
        output_norm_bias=floats(0, 0.3, hidden),
        **linears,
    )
    attributes = LayerAttributes(shape.heads, shape.kernel_size, EPSILON, int(kind.half))
    return Case(inputs, attributes, kind)


def random_mask(generator, starts: np.ndarray) -> np.ndarray:
    """int64 (1, rows). Tokens are not only 1: anything but 0 is one."""
    mask = generator.choice([0, 1, 1, -1, 2**32], (1, starts[-1]))
    for sequence, (first, last) in enumerate(itertools.pairwise(starts)):
        if sequence % 3 == 1:
            mask[:, first:last] = 0
        elif first < last:
            mask[:, first] = 1
    return mask


def params_of(case: Case, output: np.ndarray) -> Params:
    inputs, params = case.inputs, Params()
    params.input, params.output = inputs.rows.ctypes.data, output.ctypes.data
    params.row_starts = inputs.row_starts.ctypes.data
    params.mask = None if inputs.attention_mask is None else inputs.attention_mask.ctypes.data
    for index, name in enumerate(LINEARS):
        blob = getattr(inputs, f"{name}_weight")
        params.weights[index], params.weight_bytes[index] = blob.ctypes.data, blob.nbytes
        params.biases[index] = getattr(inputs, f"{name}_bias").ctypes.data
    params.depthwise = inputs.depthwise_weight.ctypes.data
    for name in VECTORS:
        setattr(params, name, getattr(inputs, name).ctypes.data)
    params.batch, params.rows = len(inputs.row_starts) - 1, len(inputs.rows)
    params.hidden, params.num_heads = inputs.rows.shape[1], case.attributes.num_heads
    params.head_dim = unpacked(inputs.pointwise_weight).weight.shape[2] // params.num_heads
    params.kernel_size, params.epsilon = case.attributes.kernel_size, case.attributes.epsilon
    params.half_attention = case.attributes.attention
    params.first_row_only = case.attributes.first_row_only
    return params


def call(kernels, params: Params, instruction_set: int, threads: int = 1) -> int:
    return kernels.convbert_encoder_layer_cpu(
        ctypes.byref(params), ctypes.c_int32(threads), ctypes.c_int32(instruction_set)
    )


def run(kernels, route: str, case: Case, threads: int = 1) -> np.ndarray:
    """Into a sentinel-filled buffer with guards; fails when a guard changes. A route that this CPU
    lacks skips the test."""
    instruction_set, needed = ROUTES[route]
    if needed > kernels.convbert_best_instruction_set():
        pytest.skip(f"this CPU has no {route}")
    rows = case.inputs.rows
    count = len(case.inputs.row_starts) - 1 if case.attributes.first_row_only else len(rows)
    size = count * rows.shape[1]
    store = np.full(size + 2 * GUARD, SENTINEL, np.float32)
    output = store[GUARD : GUARD + size].reshape(count, rows.shape[1])
    status = call(kernels, params_of(case, output), instruction_set, threads)
    assert status == 0, kernels.convbert_status_message(status)
    assert (store[:GUARD] == SENTINEL).all(), "error: wrote before its output"
    assert (store[GUARD + size :] == SENTINEL).all(), "error: wrote past its output"
    return output


def expected(case: Case) -> np.ndarray:
    """What the reference gives in float64.

    A sequence whose keys are all hidden attends to all of them alike, as in transformers: the same
    as with keys that are zero, which no other part of the layer reads.
    """
    from convbert_deploy.operators.encoder_layer_reference import encoder_layer

    starts = np.unique(case.inputs.row_starts)  # the reference takes no empty sequence
    given = dataclasses.replace(case.inputs, row_starts=starts)
    truth = encoder_layer(given, case.attributes)
    mask = given.attention_mask
    if mask is not None:
        alike = encoder_layer(without_keys(given), case.attributes)
        for first, last in itertools.pairwise(starts):
            if not mask[:, first:last].any():
                truth[first:last] = alike[first:last]
    return truth


def without_keys(inputs: LayerInputs[np.ndarray]) -> LayerInputs[np.ndarray]:
    """The layer with keys that are zero, and without its mask."""
    linear = unpacked(inputs.projections_weight)
    width = linear.weight.shape[2] // 4
    weight, bias = linear.weight.copy(), inputs.projections_bias.copy()
    weight[:, :, width : 2 * width] = 0
    bias[width : 2 * width] = 0
    return dataclasses.replace(
        inputs,
        projections_weight=packed(dataclasses.replace(linear, weight=weight)),
        projections_bias=bias,
        attention_mask=None,
    )


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The sizes of a case without its kind."""

    shape: Shape
    lengths: tuple[int, ...]
    masked: bool = False
    multiplied: bool = False


@functools.cache
def case_of(geometry: Geometry, kind: Kind) -> tuple[Case, np.ndarray]:
    """The case and what it must give, once for all routes."""
    case = make_case(
        geometry.shape,
        kind,
        geometry.lengths,
        masked=geometry.masked,
        multiplied=geometry.multiplied,
    )
    return case, expected(case)


def check(got: np.ndarray, truth: np.ndarray, kind: Kind) -> None:
    error = np.abs(got - truth)
    assert np.isfinite(error).all(), "error: NaN or infinity in the output"
    assert error.max() <= kind.most, f"error {error.max():.3g} above {kind.most:.3g}"
    assert error.mean() <= kind.mean, f"mean error {error.mean():.3g} above {kind.mean:.3g}"
