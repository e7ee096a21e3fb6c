"""The specification of our operators, in plain torch.

Every kernel, plugin and ONNX function is tested against these functions, and these against
transformers' own module.
"""

from __future__ import annotations

import torch


def span_dynamic_conv(
    value: torch.Tensor,
    kernel_logits: torch.Tensor,
    *,
    num_heads: int,
    kernel_size: int,
    upcast: bool = True,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Span-based dynamic convolution (ConvBERT, arXiv 2008.02496, section 3.2, equations 3-5).

    ``out[b,s,h,d] = sum_k softmax_k(kernel_logits[b,s,h,:])[k] * value[b, s+k-(K-1)//2, h, d]``,
    with ``value`` zero outside the sequence and, given a mask, at pads; pad rows of the output are
    zero then, whatever ``value`` and ``kernel_logits`` hold there.

    Args:
        value: (batch, seq, num_heads * head_dim), float32, float16 or bfloat16.
        kernel_logits: (batch, seq, num_heads * kernel_size), same dtype.
        num_heads: heads of the convolution branch.
        kernel_size: odd number of taps K.
        upcast: True computes in float32 and rounds once (the truth for half-precision kernels);
            False computes in the dtype given (the control: how far plain torch itself is off).
        mask: (batch, seq), 0 at pads; None takes every position for a token.

    Returns:
        (batch, seq, num_heads * head_dim), dtype of ``value``.

    Raises:
        ValueError: even kernel_size, sizes that do not divide, or a mask of another shape.
    """
    batch, seq, width = value.shape
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size {kernel_size} is even: the window has no centre")
    if width % num_heads or tuple(kernel_logits.shape) != (batch, seq, num_heads * kernel_size):
        raise ValueError(
            f"value {tuple(value.shape)} and kernel_logits {tuple(kernel_logits.shape)} do not fit "
            f"num_heads {num_heads}, kernel_size {kernel_size}"
        )
    if mask is not None and tuple(mask.shape) != (batch, seq):
        raise ValueError(f"mask {tuple(mask.shape)} does not fit, expected {(batch, seq)}")
    dtype = value.dtype
    if upcast:
        value, kernel_logits = value.float(), kernel_logits.float()
    pads = None if mask is None else (mask == 0).unsqueeze(-1)
    if pads is not None:
        value = value.masked_fill(pads, 0)
    half = (kernel_size - 1) // 2
    weights = torch.softmax(kernel_logits.reshape(batch, seq, num_heads, kernel_size), dim=-1)
    padded = torch.nn.functional.pad(value, (0, 0, half, half))
    windows = padded.unfold(1, kernel_size, 1).reshape(
        batch, seq, num_heads, width // num_heads, kernel_size
    )
    out = (windows * weights.unsqueeze(3)).sum(-1).reshape(batch, seq, width)
    return (out if pads is None else out.masked_fill(pads, 0)).to(dtype)


def depthwise_conv1d(
    input: torch.Tensor,
    weight: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    upcast: bool = True,
) -> torch.Tensor:
    """Channels-last depthwise convolution: the first half of ConvBERT's separable key convolution.

    ``out[b,s,c] = sum_k weight[k,c] * input[b, s+k-(K-1)//2, c]``, with ``input`` zero outside the
    sequence and, given a mask, at pads; pad rows of the output are zero then.

    Args:
        input: (batch, seq, channels), float32, float16 or bfloat16.
        weight: (K, channels), same dtype; K is odd.
        mask: (batch, seq), 0 at pads; None takes every position for a token.
        upcast: as in ``span_dynamic_conv``.

    Returns:
        (batch, seq, channels), dtype of ``input``.

    Raises:
        ValueError: even K, another number of channels, or a mask of another shape.
    """
    kernel_size, channels = weight.shape
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size {kernel_size} is even: the window has no centre")
    if input.shape[-1] != channels:
        raise ValueError(f"input {tuple(input.shape)} does not fit weight {tuple(weight.shape)}")
    if mask is not None and mask.shape != input.shape[:2]:
        raise ValueError(
            f"mask {tuple(mask.shape)} does not fit, expected {tuple(input.shape[:2])}"
        )
    dtype = input.dtype
    if upcast:
        input, weight = input.float(), weight.float()
    pads = None if mask is None else (mask == 0).unsqueeze(-1)
    if pads is not None:
        input = input.masked_fill(pads, 0)
    half = (kernel_size - 1) // 2
    padded = torch.nn.functional.pad(input, (0, 0, half, half))
    out = (padded.unfold(1, kernel_size, 1) * weight.t()).sum(-1)
    return (out if pads is None else out.masked_fill(pads, 0)).to(dtype)


def fused_span_dynamic_conv(
    key_conv: torch.Tensor,
    projections: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    num_heads: int,
    kernel_size: int,
    query_offset: int,
    value_offset: int,
    mask: torch.Tensor | None = None,
    upcast: bool = True,
) -> torch.Tensor:
    """The kernel generator and ``span_dynamic_conv``: SDConv(Q, K_s, V; W_f) of arXiv 2008.02496,
    equation 4, with ``kernel_logits = (query * key_conv) @ weight + bias``.

    Args:
        key_conv: (batch, seq, channels), float32, float16 or bfloat16.
        projections: (batch, seq, width), same dtype; query and value are its ``channels`` channels
            from query_offset and from value_offset on.
        weight: (channels, num_heads * kernel_size). bias: (num_heads * kernel_size).
        mask, upcast: as in ``span_dynamic_conv``.

    Returns:
        (batch, seq, channels), dtype of ``key_conv``.

    Raises:
        ValueError: as ``span_dynamic_conv``.
    """
    dtype, channels = key_conv.dtype, key_conv.shape[-1]
    if upcast:
        key_conv, projections, weight, bias = (
            tensor.float() for tensor in (key_conv, projections, weight, bias)
        )
    query = projections[..., query_offset : query_offset + channels]
    value = projections[..., value_offset : value_offset + channels]
    convolved = span_dynamic_conv(
        value,
        (query * key_conv) @ weight + bias,
        num_heads=num_heads,
        kernel_size=kernel_size,
        upcast=upcast,
        mask=mask,
    )
    return convolved.to(dtype)
