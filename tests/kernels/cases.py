"""Tensors, the C struct and the comparison that every test of a kernel shares."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from convbert_deploy.errors import PluginError

torch = pytest.importorskip("torch", reason="the reference is torch: pip install torch")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Params(ctypes.Structure):
    """SpanDynamicConvParams of plugins/span_dynamic_conv/span_dynamic_conv.h, field by field."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("value", "kernel_logits", "output")],
        *[(name, ctypes.c_int64) for name in ("batch", "seq")],
        *[
            (f"{tensor}_{axis}_stride", ctypes.c_int64)
            for tensor in ("value", "logits", "output")
            for axis in ("batch", "row")
        ],
        *[(name, ctypes.c_int32) for name in ("num_heads", "head_dim", "kernel_size", "dtype")],
    ]


def library_or_skip(find) -> Path:
    """For libraries that need nvcc; the CPU ones are always built, and missing is a failure."""
    try:
        return find()
    except PluginError as error:
        pytest.skip(f"{error}; {error.hint}")


def params_of(value, logits, output, num_heads: int, kernel_size: int) -> Params:
    batch, seq, width = value.shape
    return Params(
        value.data_ptr(),
        logits.data_ptr(),
        output.data_ptr(),
        batch,
        seq,
        value.stride(0),
        value.stride(1),
        logits.stride(0),
        logits.stride(1),
        output.stride(0),
        output.stride(1),
        num_heads,
        width // num_heads,
        kernel_size,
        list(DTYPES.values()).index(value.dtype),
    )


def inputs(batch, seq, num_heads, head_dim, kernel_size, dtype, seed=0):
    """Value and logits with the spread of a trained layer: peaked kernels, so that a wrong tap,
    a reversed window or a shifted row moves the output by about as much as the output itself."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(batch, seq, num_heads * head_dim, generator=generator)
    logits = 2.0 * torch.randn(batch, seq, num_heads * kernel_size, generator=generator)
    return value.to(dtype), logits.to(dtype)


def assert_close(got, value, logits, num_heads, kernel_size) -> None:
    """fp32: 1e-5 absolute. Half precision: no worse than twice plain torch in the same precision,
    plus one unit in the last place of the largest output."""
    from convbert_deploy.reference import span_dynamic_conv

    args = {"num_heads": num_heads, "kernel_size": kernel_size}
    truth = span_dynamic_conv(value.double(), logits.double(), upcast=False, **args)
    error = (got.double() - truth).abs().max().item()
    assert np.isfinite(error), "the output has NaN or infinity"
    if value.dtype == torch.float32:
        limit = 1e-5
    else:
        control = span_dynamic_conv(value, logits, upcast=False, **args).double()
        ulp = torch.finfo(value.dtype).eps * truth.abs().max().item()
        limit = 2 * (control - truth).abs().max().item() + ulp
    assert error <= limit, f"error {error:.3g} above {limit:.3g}"
