"""The attention branch of an encoder layer, from the projections to the heads' joined context."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir

from convbert_deploy.passes.matching import (
    check,
    integer,
    needed,
    produced,
    reshaped,
    transposed,
    with_constant,
)

_BY_HEAD = [0, 2, 1, 3]
_BY_HEAD_TURNED = [0, 2, 3, 1]
#: what is added to a padded key's score is at most this: exp of it is 0 beside any other score
_LARGEST_MASKED = -1e4


@dataclasses.dataclass(frozen=True)
class Attention:
    """query, key, value: (B, S, A). additive: (B, 1, 1, S), 0 or about -30000. mask: int64 (B, S),
    which the additive one is made of."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    additive: ir.Value
    mask: ir.Value
    num_heads: int
    width: int


def attention_into(context: ir.Value | None) -> Attention:
    """The attention whose joined heads are ``context`` (B, S, A):
    ``softmax(q k^T / sqrt(head_dim) + additive) v``.

    Raises:
        MismatchError: it is made in another way.
    """
    join = produced(context, "Reshape")
    width = int(needed(join.inputs[1])[-1])
    product = produced(transposed(reshaped(context, [0, 0, width]), _BY_HEAD), "MatMul")
    softmax = produced(product.inputs[0], "Softmax")
    check(integer(softmax, "axis", -1) in (-1, 3), softmax, "axis -1")
    masked = produced(softmax.inputs[0], "Add")
    scaled, additive = masked.inputs
    assert additive is not None
    divide = produced(scaled, "Div")
    scores = produced(divide.inputs[0], "MatMul")
    num_heads = int(needed(_reshape_target(product.inputs[1]))[2])
    head_dim = width // num_heads
    divisor = float(needed(divide.inputs[1]))
    check(math.isclose(divisor, math.sqrt(head_dim), rel_tol=1e-5), divide, "/ sqrt(head_dim)")
    target = [0, 0, num_heads, head_dim]
    return Attention(
        query=reshaped(transposed(scores.inputs[0], _BY_HEAD), target),
        key=reshaped(transposed(scores.inputs[1], _BY_HEAD_TURNED), target),
        value=reshaped(transposed(product.inputs[1], _BY_HEAD), target),
        additive=additive,
        mask=_mask_of(additive),
        num_heads=num_heads,
        width=width,
    )


def _reshape_target(value: ir.Value | None) -> ir.Value | None:
    return produced(produced(value, "Transpose").inputs[0], "Reshape").inputs[1]


def _mask_of(additive: ir.Value) -> ir.Value:
    """int64 (B, S), from ``(1 - mask) * constant`` with two axes put in."""
    unsqueeze = produced(additive, "Unsqueeze")
    check(sorted(needed(unsqueeze.inputs[1]).tolist()) == [1, 2], unsqueeze, "axes 1 and 2")
    multiply = produced(unsqueeze.inputs[0], "Mul")
    inverted, factor = with_constant(multiply)
    check(
        float(needed(factor)) <= _LARGEST_MASKED, multiply, f"at most {_LARGEST_MASKED:g} at pads"
    )
    subtract = produced(inverted, "Sub")
    check(np.all(needed(subtract.inputs[0]) == 1), subtract, "1 - mask")
    cast = produced(subtract.inputs[1], "Cast")
    check(integer(cast, "to", 0) == ir.DataType.FLOAT, cast, "a Cast to float32")
    assert cast.inputs[0] is not None
    return cast.inputs[0]
