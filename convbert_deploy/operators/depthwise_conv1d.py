"""DepthwiseConv1D in torch and in ONNX: the channels-last depthwise half of the separable key
convolution. Kernels: plugins/depthwise_conv1d."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import onnx

from convbert_deploy.operators.domain import (
    PLUGIN_ATTRIBUTES,
    Shapes,
    has_mask,
    make_function,
    onnxscript_operator,
)
from convbert_deploy.operators.functions import FunctionBody

if TYPE_CHECKING:
    import torch

OP_TYPE = "DepthwiseConv1D"
#: none: the kernel size is the first axis of the weight
ATTRIBUTES: tuple[str, ...] = ()


@functools.cache
def torch_operator() -> Any:
    """Register (once) and return ``torch.ops.convbert.depthwise_conv1d``.

    Signature: (input (batch, seq, channels), weight (K, channels), mask int64 (batch, seq) or None)
    -> (batch, seq, channels).
    """
    import torch

    from convbert_deploy.reference import depthwise_conv1d

    def compute(
        input: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        return depthwise_conv1d(input, weight, mask=mask)

    operator = torch.library.custom_op(
        "convbert::depthwise_conv1d",
        compute,
        mutates_args=(),
        schema="(Tensor input, Tensor weight, Tensor? mask) -> Tensor",
    )
    operator.register_fake(lambda input, weight, mask: input.new_empty(input.shape))
    return torch.ops.convbert.depthwise_conv1d.default


def translation() -> dict[Any, Any]:
    """Entry of ``torch.onnx.export``'s translation table."""
    operator = onnxscript_operator(OP_TYPE, ("input", "weight", "mask"), ATTRIBUTES)

    def translate(input: Any, weight: Any, mask: Any) -> Any:
        inputs = (input, weight) if mask is None else (input, weight, mask)
        return operator(*inputs, **PLUGIN_ATTRIBUTES)

    return {torch_operator(): translate}


def function_of(node: onnx.NodeProto, shapes: Shapes, opset: int) -> onnx.FunctionProto:
    """The function for a node like ``node`` with a weight of that shape."""
    kernel_size, channels = shapes[node.input[1]]
    return function_proto(channels, kernel_size, opset, masked=has_mask(node, required=2))


def function_proto(
    channels: int, kernel_size: int, opset: int, *, masked: bool = False
) -> onnx.FunctionProto:
    """The operator in standard ONNX: Transpose, Conv in ``channels`` groups, Transpose.

    Conv wants its number of groups as a number, so the body is specialised to it; it is generic in
    type, batch and sequence.
    """
    body = FunctionBody()
    half = (kernel_size - 1) // 2
    source = body.zero_at_pads("input", "mask", "real_input") if masked else "input"
    by_channel = body.node("Transpose", [source], ["by_channel"], perm=[0, 2, 1])
    turned = body.node("Transpose", ["weight"], ["weight_by_channel"], perm=[1, 0])
    kernels = body.node("Unsqueeze", [turned, body.constant("one", [1])], ["kernels"])
    convolved = body.node(
        "Conv",
        [by_channel, kernels],
        ["convolved"],
        group=channels,
        kernel_shape=[kernel_size],
        pads=[half, half],
    )
    body.node("Transpose", [convolved], ["last" if masked else "output"], perm=[0, 2, 1])
    if masked:
        body.zero_at_pads("last", "mask", "output")
    inputs = ["input", "weight"] + (["mask"] if masked else [])
    return make_function(OP_TYPE, inputs, body.nodes, opset, ATTRIBUTES)
