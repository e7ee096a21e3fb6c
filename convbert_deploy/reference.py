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
) -> torch.Tensor:
    """Span-based dynamic convolution (ConvBERT, arXiv 2008.02496, section 3.2, equations 3-5).

    ``out[b,s,h,d] = sum_k softmax_k(kernel_logits[b,s,h,:])[k] * value[b, s+k-(K-1)//2, h, d]``,
    with ``value`` zero outside the sequence.

    Args:
        value: (batch, seq, num_heads * head_dim), float32, float16 or bfloat16.
        kernel_logits: (batch, seq, num_heads * kernel_size), same dtype.
        num_heads: heads of the convolution branch.
        kernel_size: odd number of taps K.
        upcast: True computes in float32 and rounds once (the truth for half-precision kernels);
            False computes in the dtype given (the control: how far plain torch itself is off).

    Returns:
        (batch, seq, num_heads * head_dim), dtype of ``value``.

    Raises:
        ValueError: even kernel_size, or sizes that do not divide.
    """
    batch, seq, width = value.shape
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size {kernel_size} is even: the window has no centre")
    if width % num_heads or tuple(kernel_logits.shape) != (batch, seq, num_heads * kernel_size):
        raise ValueError(
            f"value {tuple(value.shape)} and kernel_logits {tuple(kernel_logits.shape)} do not fit "
            f"num_heads {num_heads}, kernel_size {kernel_size}"
        )
    dtype = value.dtype
    if upcast:
        value, kernel_logits = value.float(), kernel_logits.float()
    half = (kernel_size - 1) // 2
    weights = torch.softmax(kernel_logits.reshape(batch, seq, num_heads, kernel_size), dim=-1)
    padded = torch.nn.functional.pad(value, (0, 0, half, half))
    windows = padded.unfold(1, kernel_size, 1).reshape(
        batch, seq, num_heads, width // num_heads, kernel_size
    )
    out = (windows * weights.unsqueeze(3)).sum(-1)
    return out.reshape(batch, seq, width).to(dtype)
