"""EncoderLayer, PackRows and UnpackRows: one node a layer, on rows without padding.

Operators of the CPU engine alone: no ONNX function stands for them, and ``export`` never writes
them. The pass ``EncoderLayers`` puts them into a graph. Kernels: plugins/encoder_layer.

* ``PackRows(hidden (B, S, H), attention_mask int64 (B, S); keep_pads)`` -> ``rows (T, H)``,
  ``row_starts`` int64 (B + 1). keep_pads 0 keeps real tokens alone (each row of the mask is ones
  and then zeros), keep_pads 1 all B * S rows.
* ``EncoderLayer`` (``LayerInputs``, ``LayerAttributes``) -> ``(T, H)``, or with first_row_only
  ``(B, H)``: of each sequence its first row, zeros for a sequence without rows.
* ``UnpackRows(rows (T, H), attention_mask int64 (B, S); keep_pads)`` -> ``(B, S, H)``, zeros where
  a pad was left out.

Floating-point tensors are float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Generic, TypeVar

import onnx

from convbert_deploy.operators.domain import DOMAIN

OP_TYPE = "EncoderLayer"
PACK_ROWS = "PackRows"
UNPACK_ROWS = "UnpackRows"

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class LayerInputs(Generic[T]):
    """EncoderLayer's inputs, in the node's order. H hidden, A all heads' width, I intermediate, K
    kernel size.

    Fields that end in ``_weight`` are packed weights (``packed_weight``), except the depthwise one,
    float32 (K, H), and the norms', float32 (H). Biases are float32 of the outputs' length.
    """

    rows: T
    row_starts: T
    #: H -> 4 A: query, key, value, the convolution's value
    projections_weight: T
    projections_bias: T
    depthwise_weight: T
    #: H -> A
    pointwise_weight: T
    pointwise_bias: T
    #: A -> num_heads * K, of query times key convolution
    generator_weight: T
    generator_bias: T
    #: 2 A -> H, of the attention's context beside the convolution
    attention_output_weight: T
    attention_output_bias: T
    attention_norm_weight: T
    attention_norm_bias: T
    #: H -> I
    up_weight: T
    up_bias: T
    #: I -> H
    down_weight: T
    down_bias: T
    output_norm_weight: T
    output_norm_bias: T
    #: pads may not be attended to; None where no row is a pad (keep_pads 0)
    attention_mask: T | None = None

    def in_order(self) -> list[T]:
        """Without a mask it ends before it."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return values if self.attention_mask is not None else values[:-1]

    @classmethod
    def from_order(cls, values: Sequence[T]) -> LayerInputs[T]:
        """Raises TypeError for another number of values than there are inputs."""
        return cls(*values)


@dataclasses.dataclass(frozen=True)
class LayerAttributes:
    """num_heads, kernel_size (odd): of the layer. epsilon: of both LayerNorms. attention: 0
    computes attention in float32, 1 in bfloat16, in which intermediate rows are then stored too.
    first_row_only: 1 computes what comes after keys and values for the first row of each sequence
    alone, 78 % of the layer's products in base."""

    num_heads: int
    kernel_size: int
    epsilon: float
    attention: int = 0
    first_row_only: int = 0

    @classmethod
    def of(cls, node: onnx.NodeProto) -> LayerAttributes:
        values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})


def layer_node(
    inputs: LayerInputs[str], attributes: LayerAttributes, output: str, name: str = ""
) -> onnx.NodeProto:
    """EncoderLayer as an ONNX node; ``inputs`` and ``output`` name tensors."""
    return onnx.helper.make_node(
        OP_TYPE,
        inputs.in_order(),
        [output],
        name=name,
        domain=DOMAIN,
        **dataclasses.asdict(attributes),
    )


def pack_node(hidden: str, mask: str, outputs: tuple[str, str], keep_pads: bool) -> onnx.NodeProto:
    """PackRows as an ONNX node; outputs: names of the rows and of their starts."""
    return onnx.helper.make_node(
        PACK_ROWS, [hidden, mask], list(outputs), domain=DOMAIN, keep_pads=int(keep_pads)
    )


def unpack_node(rows: str, mask: str, output: str, keep_pads: bool) -> onnx.NodeProto:
    """UnpackRows as an ONNX node."""
    return onnx.helper.make_node(
        UNPACK_ROWS, [rows, mask], [output], domain=DOMAIN, keep_pads=int(keep_pads)
    )
