"""Tensors, the C struct, the routes and the comparison that every test of a kernel shares."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convbert_deploy.errors import PluginError

torch = pytest.importorskip("torch", reason="the reference is torch: pip install torch")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CPU_ROUTES = {"portable": 0, "avx2": 1, "avx512": 2}
#: The CUDA kernel's blocks and threads on the host, planned for 1 and for 132 multiprocessors.
EMULATED_ROUTES = ("emulated-1", "emulated-132")
ROUTES = (*CPU_ROUTES, *EMULATED_ROUTES)
GUARD = 64  # elements before and after the output
SENTINEL = 12345.0


class Params(ctypes.Structure):
    """SpanDynamicConvParams of plugins/span_dynamic_conv/span_dynamic_conv.h, field by field."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("value", "kernel_logits", "mask", "output")],
        *[(name, ctypes.c_int64) for name in ("batch", "seq")],
        *[
            (f"{tensor}_stride", ctypes.c_int64)
            for tensor in (
                *("value_batch", "value_row", "logits_batch", "logits_row"),
                *("mask_batch", "output_batch", "output_row"),
            )
        ],
        *[(name, ctypes.c_int32) for name in ("num_heads", "head_dim", "kernel_size", "dtype")],
    ]


def load_kernels(path: Path) -> ctypes.CDLL:
    """The C ABI of plugins/, with the argument types that ctypes cannot guess."""
    library = ctypes.CDLL(str(path))
    library.convbert_status_message.restype = ctypes.c_char_p
    library.convbert_span_dynamic_conv_cpu_rows.argtypes = [
        ctypes.POINTER(Params),
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int32,
    ]
    return library


def library_or_skip(find) -> Path:
    """For libraries that need nvcc; the CPU ones are always built, and missing is a failure."""
    try:
        return find()
    except PluginError as error:
        pytest.skip(f"{error}; {error.hint}")


def params_of(value, logits, output, num_heads: int, kernel_size: int, mask=None) -> Params:
    """``mask`` is int64 (batch, seq) with adjacent elements in a row, or None."""
    batch, seq, width = value.shape
    if mask is not None:
        assert mask.dtype == torch.int64 and (seq == 1 or mask.stride(1) == 1)
    return Params(
        value.data_ptr(),
        logits.data_ptr(),
        None if mask is None else mask.data_ptr(),
        output.data_ptr(),
        batch,
        seq,
        value.stride(0),
        value.stride(1),
        logits.stride(0),
        logits.stride(1),
        0 if mask is None else mask.stride(0),
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


def masks(batch: int, seq: int, seed: int = 0):
    """int64 (batch, seq). Sequence b is, in turn from a start that the seed sets: at random, all
    tokens, all pads, one token and then pads, or a prefix of random length. Tokens are not only 1:
    anything but 0 is one."""
    random = np.random.default_rng(seed)
    mask = np.zeros((batch, seq), np.int64)
    for b in range(batch):
        kind = (seed + b) % 5
        if kind == 0:
            mask[b] = random.integers(0, 2, seq)
        else:
            mask[b, : (seq, 0, 1, random.integers(0, seq + 1))[kind - 1]] = 1
    mask *= random.choice([1, 1, -1, 2**32], mask.shape)
    return torch.from_numpy(mask)


def poison_pads(mask, *tensors) -> None:
    """NaN and, at every second pad, infinity."""
    for tensor in tensors:
        rows = tensor[mask == 0]
        rows[::2], rows[1::2] = float("nan"), float("inf")
        tensor[mask == 0] = rows


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the reference gives in float64 for (batch, seq, channels), and what may be missed by."""

    truth: Any
    control_error: Any  # (batch,) largest error of plain torch in the same precision; None: fp32
    dtype: Any
    mask: Any

    @classmethod
    def of(cls, value, logits, num_heads, kernel_size, mask=None) -> Expected:
        from convbert_deploy.reference import span_dynamic_conv

        def reference(b, tensors):  # one sequence at a time: the reference's windows are large
            return span_dynamic_conv(
                *(tensor[b : b + 1] for tensor in tensors),
                num_heads=num_heads,
                kernel_size=kernel_size,
                upcast=False,
                mask=None if mask is None else mask[b : b + 1],
            )

        doubles = value.double(), logits.double()
        truth = torch.cat([reference(b, doubles) for b in range(len(value))])
        errors = None
        if value.dtype != torch.float32:
            controls = [reference(b, (value, logits)) for b in range(len(value))]
            errors = (torch.cat(controls).double() - truth).abs().amax((1, 2))
        return cls(truth, errors, value.dtype, mask)

    def first(self, batch: int) -> Expected:
        """Of the first sequences alone."""
        parts = [
            None if part is None else part[:batch]
            for part in (self.truth, self.control_error, self.mask)
        ]
        return Expected(parts[0], parts[1], self.dtype, parts[2])

    def check(self, got, label: str = "") -> None:
        """fp32: 1e-5 absolute. Half precision: no worse than twice plain torch in the same
        precision, plus one unit in the last place of the largest output. Pad rows: zero."""
        error = (got.double() - self.truth).abs().max().item()
        assert np.isfinite(error), f"error: NaN or infinity in the output {label}"
        limit = 1e-5
        if self.control_error is not None:
            ulp = torch.finfo(self.dtype).eps * self.truth.abs().max().item()
            limit = 2 * self.control_error.max().item() + ulp
        assert error <= limit, f"error {error:.3g} above {limit:.3g} {label}"
        if self.mask is not None:
            assert not got[self.mask == 0].any(), f"error: a pad row is not zero {label}"


def assert_close(got, value, logits, num_heads, kernel_size, mask=None) -> None:
    Expected.of(value, logits, num_heads, kernel_size, mask).check(got)


def run_route(kernels, route, params) -> int:
    """Status of one call; a route that this CPU lacks skips the test."""
    if route in CPU_ROUTES:
        if CPU_ROUTES[route] > kernels.convbert_best_instruction_set():
            pytest.skip(f"this CPU has no {route}")
        rows = params.batch * params.seq
        # Uneven parts, as an adapter's threads would take them.
        cuts = sorted({0, rows // 3, (2 * rows + 2) // 3, rows})
        for first, last in itertools.pairwise(cuts):
            status = kernels.convbert_span_dynamic_conv_cpu_rows(
                ctypes.byref(params), first, last, CPU_ROUTES[route]
            )
            if status:
                return status
        return 0
    multiprocessors = int(route.split("-")[1])
    return kernels.convbert_span_dynamic_conv_emulated(ctypes.byref(params), multiprocessors)


def run(kernels, route, value, logits, num_heads, kernel_size, mask=None):
    """Into a sentinel-filled buffer with guards; fails when a guard changes."""
    size = value.numel()
    store = torch.full((size + 2 * GUARD,), SENTINEL, dtype=value.dtype)
    output = store[GUARD : GUARD + size].view(value.shape)
    params = params_of(value, logits, output, num_heads, kernel_size, mask)
    status = run_route(kernels, route, params)
    assert status == 0, kernels.convbert_status_message(status)
    sentinel = torch.tensor(SENTINEL, dtype=value.dtype)
    assert (store[:GUARD] == sentinel).all(), "error: wrote before its output"
    assert (store[GUARD + size :] == sentinel).all(), "error: wrote past its output"
    return output


def surrounded(tensor, rows: int = 16, columns: int = 0):
    """The same numbers as a view into a larger tensor that is NaN all around: what is read outside
    of the sequence or of the row shows. ``columns`` before each row set its alignment."""
    batch, seq, width = tensor.shape
    wide = torch.full((batch, seq + 2 * rows, width + columns), float("nan"), dtype=tensor.dtype)
    view = wide[:, rows : rows + seq, columns:]
    view.copy_(tensor)
    return view


def check_extreme_logits(kernels, route) -> None:
    """Logits of any size give a softmax; NaN gives NaN in its own head and row only."""
    value, logits = inputs(1, 12, 2, 16, 9, torch.float32)
    logits[0, 3] = 1e4
    logits[0, 4, 2] = 3e38
    logits[0, 5] = -1e30
    logits[0, 6, :4] = float("-inf")
    assert_close(run(kernels, route, value, logits, 2, 9), value, logits, 2, 9)
    logits[0, 7, 3] = float("nan")
    output = run(kernels, route, value, logits, 2, 9)
    assert torch.isnan(output[0, 7, :16]).all(), "error: a NaN logit was hidden"
    assert torch.isfinite(output[0, 7, 16:]).all(), "error: a NaN logit reached another head"
    assert torch.isfinite(output[0, 6]).all(), "error: a NaN logit reached another row"
