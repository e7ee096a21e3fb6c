"""Linear layers of a graph, as ``export`` and ``calibrate`` write them, and what they compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from convbert_deploy.operators.packed_weight import LinearWeight, WeightType, quantized
from convbert_deploy.passes.matching import (
    MismatchError,
    check,
    constant,
    integer,
    needed,
    produced,
    reshaped,
    transposed,
    with_constant,
)

#: operators between a linear layer's input and the Add of its bias
_INSIDE = frozenset(
    [
        "Mul",
        "QuantizeLinear",
        "DequantizeLinear",
        "Split",
        "MatMul",
        "Concat",
        "Reshape",
        "Transpose",
    ]
)


@dataclasses.dataclass(frozen=True)
class Part:
    """One group's product, ``x @ weight``; a linear without groups has one.

    weight: (in, out), float32 or int8. Only int8 ones have the rest: scale, float32 (out); step, the
    static one of the quantized input; multiplier, float32 (in), on the input before that, or None.
    """

    weight: np.ndarray
    scale: np.ndarray | None = None
    step: float = 0.0
    multiplier: np.ndarray | None = None

    def dequantized(self) -> np.ndarray:
        """float32 (in, out): the product at high precision, what scales the input included."""
        if self.scale is None:
            return self.weight
        weight = self.weight.astype(np.float32) * self.scale
        return weight if self.multiplier is None else weight * self.multiplier[:, None]


@dataclasses.dataclass(frozen=True)
class Linear:
    """``source`` (..., in) times the parts, side by side, plus ``bias`` float32 (out)."""

    source: ir.Value
    parts: tuple[Part, ...]
    bias: np.ndarray

    @property
    def quantized(self) -> bool:
        """Stored in 8 bits as a whole. A linear with a group kept high is computed high."""
        return all(part.scale is not None for part in self.parts)

    @property
    def shape(self) -> tuple[int, int]:
        """All inputs and all outputs."""
        rows, columns = self.parts[0].weight.shape
        return len(self.parts) * rows, len(self.parts) * columns


def linear_into(output: ir.Value | None) -> Linear:
    """The linear layer whose result is ``output``.

    Raises:
        MismatchError: it is made in another way.
    """
    add = produced(output, "Add")
    product, bias = with_constant(add)
    kind = getattr(product.producer(), "op_type", None)
    if kind == "Reshape":
        source, parts = _batched_groups(product)
    elif kind == "Concat":
        source, parts = _split_groups(product)
    else:
        source, part = _product(product)
        parts = (part,)
    linear = Linear(source, parts, needed(bias))
    shapes = {part.weight.shape for part in parts}
    check(len(shapes) == 1, add, f"groups of one shape, found {sorted(shapes)}")
    check(linear.bias.shape == linear.shape[1:], add, f"a bias of {linear.shape[1]} values")
    return linear


def linear_after(source: ir.Value) -> tuple[Linear, ir.Value]:
    """The linear layer that reads ``source``, and its result.

    Raises:
        MismatchError: none does.
    """
    for node, _ in source.uses():
        last = _end_of_product(node)
        if last is None:
            continue
        output = last.outputs[0]
        linear = linear_into(output)
        if linear.source is source:
            return linear, output
    raise MismatchError(f"no linear layer reads {source.name}")


def _end_of_product(node: ir.Node) -> ir.Node | None:
    """The Add of a constant that a chain of a linear's operators, from ``node`` on, ends in."""
    while node.op_type in _INSIDE:
        readers = [reader for reader, _ in node.outputs[0].uses()]
        if not readers:
            return None
        node = readers[0]
    is_bias = node.op_type == "Add" and any(constant(value) is not None for value in node.inputs)
    return node if is_bias else None


def _product(output: ir.Value | None) -> tuple[ir.Value, Part]:
    matmul = produced(output, "MatMul")
    source, weight = matmul.inputs
    assert source is not None
    assert weight is not None
    values = constant(weight)
    if values is not None:
        check(values.ndim == 2 and values.dtype == np.float32, matmul, "a float32 matrix")
        return source, Part(values)
    values, scale = _stored_weight(weight)
    source, step, multiplier = _quantized_source(source)
    if multiplier is not None:
        check(multiplier.shape == values.shape[:1], matmul, f"{len(values)} smoothing factors")
    return source, Part(values, scale, step, multiplier)


def _stored_weight(value: ir.Value) -> tuple[np.ndarray, np.ndarray]:
    """int8 (in, out) and its float32 scales (out)."""
    node = produced(value, "DequantizeLinear")
    values, scale = needed(node.inputs[0]), needed(node.inputs[1])
    check(values.dtype == np.int8, node, f"int8 weights, found {values.dtype}")
    check(values.ndim == 2 and integer(node, "axis", 1) in (1, -1), node, "a scale a column")
    check(scale.shape == values.shape[1:], node, f"{values.shape[1]} scales")
    _check_symmetric(node)
    return values, scale


def _quantized_source(value: ir.Value) -> tuple[ir.Value, float, np.ndarray | None]:
    """(activation, step, multiplier or None) of a quantized input."""
    back = produced(value, "DequantizeLinear")
    quantize = produced(back.inputs[0], "QuantizeLinear")
    scale = needed(quantize.inputs[1])
    same = np.array_equal(scale, needed(back.inputs[1]))
    check(scale.size == 1 and same, quantize, "one scale, the same in both nodes of the pair")
    _check_symmetric(quantize)
    _check_symmetric(back)
    source = quantize.inputs[0]
    assert source is not None
    step = float(scale.reshape(()))
    multiply = source.producer()
    if multiply is None or multiply.op_type != "Mul":
        return source, step, None
    factors = [constant(factor) for factor in multiply.inputs]
    if not any(factor is not None and factor.ndim == 1 for factor in factors):
        return source, step, None
    activation, multiplier = with_constant(multiply)
    return activation, step, needed(multiplier)


def _check_symmetric(node: ir.Node) -> None:
    zero_point = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    is_zero = zero_point is not None and zero_point.dtype == np.int8 and not zero_point.any()
    check(is_zero, node, "an int8 zero point of 0")


def _batched_groups(output: ir.Value) -> tuple[ir.Value, tuple[Part, ...]]:
    """As traced: one product with a weight of shape (groups, in, out)."""
    matmul = produced(transposed(_input(output, "Reshape"), [0, 2, 1, 3]), "MatMul")
    weight = needed(matmul.inputs[1])
    check(weight.ndim == 3 and weight.dtype == np.float32, matmul, "a weight (groups, in, out)")
    groups, rows, columns = weight.shape
    reshaped(output, [0, 0, groups * columns])
    source = reshaped(transposed(matmul.inputs[0], [0, 2, 1, 3]), [0, 0, groups, rows])
    return source, tuple(Part(group) for group in weight)


def _split_groups(output: ir.Value) -> tuple[ir.Value, tuple[Part, ...]]:
    """As ``calibrate`` writes them: a product a group between Split and Concat."""
    concat = produced(output, "Concat")
    check(integer(concat, "axis", 0) in (-1, 2), concat, "axis -1")
    products = [_product(value) for value in concat.inputs]
    split = produced(products[0][0], "Split")
    sources = [source for source, _ in products]
    check(
        list(split.outputs) == sources, concat, "the products of all parts of one Split, in order"
    )
    check(integer(split, "axis", 0) in (-1, 2), split, "axis -1")
    check(len(split.inputs) == 1, split, "equal parts")
    assert split.inputs[0] is not None
    return split.inputs[0], tuple(part for _, part in products)


def _input(value: ir.Value, op_type: str) -> ir.Value | None:
    return produced(value, op_type).inputs[0]


def linear_weight(linear: Linear, kind: WeightType, *, static: bool = False) -> LinearWeight:
    """The weight to pack.

    An 8-bit linear stays as it is stored, whatever ``kind``; its input gets the calibrated step
    where ``static``, else one for each token. Another becomes ``kind``.
    """
    if linear.quantized:
        return _int8(linear.parts, static)
    weight = np.stack([part.dequantized() for part in linear.parts])
    if kind is WeightType.INT8:
        return quantized(weight)
    return LinearWeight(weight, kind)


def _int8(parts: Sequence[Part], static: bool) -> LinearWeight:
    """Groups were calibrated one by one, and a packed weight has one step. So a group's step moves
    into its multiplier, and back out of its scales: the same integers, the same products."""
    step = max(part.step for part in parts) if static else 0.0
    scales, multipliers = [], []
    for part in parts:
        ratio = np.float32(step / part.step if static else 1.0)
        rows = part.weight.shape[0]
        factors = np.ones(rows, np.float32) if part.multiplier is None else part.multiplier
        multipliers.append(factors * ratio)
        scales.append(part.scale / ratio)
    multiplier = np.concatenate(multipliers)
    return LinearWeight(
        np.stack([part.weight for part in parts]),
        WeightType.INT8,
        np.concatenate(scales),
        None if (multiplier == 1).all() else multiplier,
        step,
    )
