"""The specification of EncoderLayer, PackRows and UnpackRows, in plain torch on packed weights.

The kernels and the pass that makes their nodes are tested against these functions. Everything is
exact in the type asked for, except the int8 products, whose inputs are rounded as the kernel rounds
them.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from convbert_deploy.operators.encoder_layer import LayerAttributes, LayerInputs
from convbert_deploy.operators.packed_weight import LinearWeight, WeightType, unpacked
from convbert_deploy.reference import depthwise_conv1d, span_dynamic_conv


def pack_rows(
    hidden: np.ndarray, mask: np.ndarray, *, keep_pads: bool
) -> tuple[np.ndarray, np.ndarray]:
    """hidden (B, S, H), int64 mask (B, S) -> rows (T, H), int64 row_starts (B + 1).

    Raises:
        ValueError: pads that are left out are not at the end of their row of the mask.
    """
    batch, seq, width = hidden.shape
    if keep_pads:
        return hidden.reshape(-1, width), np.arange(batch + 1, dtype=np.int64) * seq
    lengths = mask.sum(axis=1)
    if ((np.arange(seq) < lengths[:, None]) != (mask != 0)).any():
        raise ValueError("a row of the mask is no ones followed by zeros")
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return hidden[mask != 0], starts


def unpack_rows(rows: np.ndarray, mask: np.ndarray, *, keep_pads: bool) -> np.ndarray:
    """rows (T, H), int64 mask (B, S) -> (B, S, H); zeros where a pad was left out."""
    hidden = np.zeros((*mask.shape, rows.shape[1]), rows.dtype)
    hidden[np.ones_like(mask, bool) if keep_pads else mask != 0] = rows
    return hidden


def encoder_layer(
    inputs: LayerInputs[np.ndarray],
    attributes: LayerAttributes,
    dtype: torch.dtype = torch.float64,
) -> np.ndarray:
    """One layer (arXiv 2008.02496, figure 3) of rows (T, H) -> (T, H), or (B, H) with
    first_row_only, in ``dtype``. No sequence is empty.

    ``attributes.attention`` is not looked at: attention is exact here.
    """
    values = {
        name: torch.as_tensor(np.array(array)).to(dtype)
        for name, array in vars(inputs).items()
        if array is not None and array.dtype == np.float32
    }

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        weight = unpacked(getattr(inputs, f"{name}_weight"))
        return product(x, weight) + values[f"{name}_bias"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        scale, shift = values[f"{name}_norm_weight"], values[f"{name}_norm_bias"]
        return torch.nn.functional.layer_norm(x, x.shape[-1:], scale, shift, attributes.epsilon)

    rows, taps = values["rows"], values["depthwise_weight"]
    query, key, value, conv_value = linear("projections", rows).chunk(4, dim=-1)
    texts = list(itertools.pairwise(inputs.row_starts.tolist()))
    spans = [depthwise_conv1d(rows[None, a:b], taps, upcast=False)[0] for a, b in texts]
    logits = linear("generator", linear("pointwise", torch.cat(spans)) * query)
    heads, size = attributes.num_heads, attributes.kernel_size
    convolved = [
        span_dynamic_conv(
            conv_value[None, a:b],
            logits[None, a:b],
            num_heads=heads,
            kernel_size=size,
            upcast=False,
        )[0]
        for a, b in texts
    ]
    mask = None if inputs.attention_mask is None else inputs.attention_mask.reshape(-1)
    context = [
        _attention(query[a:b], key[a:b], value[a:b], heads, None if mask is None else mask[a:b])
        for a, b in texts
    ]
    mixed = torch.cat([torch.cat(context), torch.cat(convolved)], dim=-1)
    attended = norm("attention", linear("attention_output", mixed) + rows)
    activated = torch.nn.functional.gelu(linear("up", attended))
    output = norm("output", linear("down", activated) + attended).numpy()
    return output[inputs.row_starts[:-1]] if attributes.first_row_only else output


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    mask: np.ndarray | None,
) -> torch.Tensor:
    """Softmax attention of one text, (S, A) each -> (S, A); no key where ``mask`` is 0."""
    seq, width = query.shape
    q, k, v = (x.reshape(seq, heads, -1).transpose(0, 1) for x in (query, key, value))
    scores = q @ k.transpose(-1, -2) / math.sqrt(width // heads)
    if mask is not None:
        # not -inf: where no key is seen all count alike, as in transformers
        lowest = torch.finfo(torch.float32).min
        scores = scores.masked_fill(torch.from_numpy(mask == 0), lowest)
    return (torch.softmax(scores, dim=-1) @ v).transpose(0, 1).reshape(seq, width)


def product(x: torch.Tensor, linear: LinearWeight) -> torch.Tensor:
    """``x`` (rows, groups * in) times the weight -> (rows, groups * out).

    int8: the input, times the multiplier, is divided by one step a row (its largest magnitude over
    127; 1 where all are 0) or by the static step, rounded half to even and clipped to -127..127.
    """
    groups, inputs, outputs = linear.weight.shape
    if linear.multiplier is not None:
        x = x * torch.from_numpy(linear.multiplier).to(x.dtype)
    step = None
    if linear.type is WeightType.INT8:
        step = _steps(x, linear.activation_scale)
        x = torch.round(x / step).clamp(-127, 127)
    weight = torch.from_numpy(linear.weight.astype(np.float32)).to(x.dtype)
    parts = x.reshape(-1, groups, inputs).transpose(0, 1) @ weight
    y = parts.transpose(0, 1).reshape(-1, groups * outputs)
    if step is None:
        return y
    return y * step * torch.from_numpy(linear.scale).to(x.dtype)


def _steps(x: torch.Tensor, static: float) -> torch.Tensor:
    """(rows, 1): what an integer of the input stands for."""
    if static:
        return torch.full_like(x[:, :1], static)
    largest = x.abs().amax(dim=1, keepdim=True)
    return torch.where(largest > 0, largest / 127, torch.ones_like(largest))
