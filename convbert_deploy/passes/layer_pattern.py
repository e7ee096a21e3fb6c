"""One encoder layer of a graph: attention, span-based convolution and feed-forward block."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from convbert_deploy.operators.domain import DOMAIN
from convbert_deploy.operators.encoder_layer import LayerAttributes
from convbert_deploy.passes.attention_patterns import Attention, attention_into
from convbert_deploy.passes.linear_patterns import Linear, linear_after, linear_into
from convbert_deploy.passes.matching import (
    MismatchError,
    between,
    check,
    integer,
    needed,
    produced,
    reader,
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """hidden, output: (B, S, H). mask: int64 (B, S). masked: the convolutions take pads for zeros,
    and nothing of a pad's row reaches a token. linears, vectors: by the names of ``LayerInputs``,
    without ``_weight`` and ``_bias``, and in full. nodes: all that the layer is made of."""

    hidden: ir.Value
    output: ir.Value
    mask: ir.Value
    masked: bool
    attributes: LayerAttributes
    linears: Mapping[str, Linear]
    vectors: Mapping[str, np.ndarray]
    nodes: frozenset[ir.Node]


@dataclasses.dataclass(frozen=True)
class _Mixed:
    """The half of a layer before its first LayerNorm."""

    hidden: ir.Value
    attention: Attention
    mask: ir.Value | None
    linears: dict[str, Linear]
    taps: np.ndarray
    concat: ir.Node


def layer_around(convolution: ir.Node) -> Layer:
    """The layer whose SpanDynamicConv is ``convolution``.

    Raises:
        MismatchError: something else surrounds it; the text names node and expectation.
    """
    mixed = _mixed(convolution)
    attended, attended_norm = _residual(mixed.concat.outputs[0], mixed.hidden, "attention_output")
    up, raised = linear_after(attended_norm.output)
    gelu = reader(raised, "Gelu")
    approximate = gelu.attributes.get_string("approximate", "none")
    check(approximate == "none", gelu, f"the exact GELU, found approximate {approximate}")
    down, output_norm = _residual(gelu.outputs[0], attended_norm.output, "down")
    check(attended_norm.epsilon == output_norm.epsilon, gelu, "one epsilon in both LayerNorms")
    layer = Layer(
        hidden=mixed.hidden,
        output=output_norm.output,
        mask=mixed.attention.mask,
        masked=mixed.mask is not None,
        attributes=LayerAttributes(
            num_heads=integer(convolution, "num_heads", 0),
            kernel_size=integer(convolution, "kernel_size", 0),
            epsilon=output_norm.epsilon,
        ),
        linears=mixed.linears | {"attention_output": attended, "up": up, "down": down},
        vectors={
            "depthwise_weight": mixed.taps,
            "attention_norm_weight": attended_norm.weight,
            "attention_norm_bias": attended_norm.bias,
            "output_norm_weight": output_norm.weight,
            "output_norm_bias": output_norm.bias,
        },
        nodes=frozenset(
            between(
                [mixed.hidden, mixed.attention.additive, mixed.attention.mask], output_norm.output
            )
        ),
    )
    _check_sizes(layer, mixed.attention, convolution)
    _check_closed(layer)
    return layer


def _mixed(convolution: ir.Node) -> _Mixed:
    split = produced(convolution.inputs[0], "Split")
    equal = len(split.inputs) == 1 and len(split.outputs) == 4
    check(equal and integer(split, "axis", 0) in (-1, 2), split, "four equal parts along axis 2")
    query, key, value, conv_value = split.outputs
    check(convolution.inputs[0] is conv_value, convolution, "the last part of the projections")
    projections = linear_into(split.inputs[0])
    generator = linear_into(convolution.inputs[1])
    multiply = produced(generator.source, "Mul")
    keyed = [factor for factor in multiply.inputs if factor is not query]
    check(len(keyed) == 1, multiply, "query times key convolution")
    pointwise = linear_into(keyed[0])
    depthwise = produced(pointwise.source, "DepthwiseConv1D", DOMAIN)
    hidden = projections.source
    check(depthwise.inputs[0] is hidden, depthwise, f"to read {hidden.name}")
    concat = reader(convolution.outputs[0], "Concat")
    sides = len(concat.inputs) == 2 and concat.inputs[1] is convolution.outputs[0]
    check(sides and integer(concat, "axis", 0) in (-1, 2), concat, "attention beside convolution")
    attention = attention_into(concat.inputs[0])
    found = (attention.query, attention.key, attention.value)
    check(found == (query, key, value), concat, "attention on the projections' first three parts")
    masks = [node.inputs[2] if len(node.inputs) > 2 else None for node in (convolution, depthwise)]
    check(masks in ([None] * 2, [attention.mask] * 2), convolution, "the attention's mask, or none")
    linears = {"projections": projections, "pointwise": pointwise, "generator": generator}
    return _Mixed(hidden, attention, masks[0], linears, needed(depthwise.inputs[1]), concat)


@dataclasses.dataclass(frozen=True)
class _Norm:
    output: ir.Value
    weight: np.ndarray
    bias: np.ndarray
    epsilon: float


def _residual(source: ir.Value, skipped: ir.Value, name: str) -> tuple[Linear, _Norm]:
    """LayerNorm(linear(source) + skipped)."""
    linear, result = linear_after(source)
    add = reader(result, "Add")
    check(set(add.inputs) == {result, skipped}, add, f"{name} plus {skipped.name}")
    norm = reader(add.outputs[0], "LayerNormalization")
    check(integer(norm, "axis", -1) in (-1, 2), norm, "axis -1")
    check(len(norm.inputs) == 3 and len(norm.outputs) == 1, norm, "scale and bias")
    weight, bias = needed(norm.inputs[1]), needed(norm.inputs[2])
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    return linear, _Norm(norm.outputs[0], weight, bias, epsilon)


def _check_sizes(layer: Layer, attention: Attention, node: ir.Node) -> None:
    heads, taps = layer.attributes.num_heads, layer.attributes.kernel_size
    hidden, width = layer.vectors["output_norm_weight"].shape[0], attention.width
    check(heads == attention.num_heads, node, f"{attention.num_heads} heads, as the attention")
    expected = {
        "projections": (hidden, 4 * width),
        "pointwise": (hidden, width),
        "generator": (width, heads * taps),
        "attention_output": (2 * width, hidden),
        "up": (hidden, layer.linears["down"].shape[0]),
        "down": (layer.linears["up"].shape[1], hidden),
    }
    for name, shape in expected.items():
        found = layer.linears[name].shape
        check(found == shape, node, f"{name} of shape {shape}, found {found}")
    found = layer.vectors["depthwise_weight"].shape
    check(found == (taps, hidden), node, f"a depthwise weight of shape {(taps, hidden)}")


def _check_closed(layer: Layer) -> None:
    """Nothing inside is read by another node or by whoever runs the graph."""
    for node in layer.nodes:
        for value in node.outputs:
            if value is layer.output:
                continue
            others = [user for user, _ in value.uses() if user not in layer.nodes]
            if others or value.is_graph_output():
                raise MismatchError(f"{value.name} is read outside its layer")
