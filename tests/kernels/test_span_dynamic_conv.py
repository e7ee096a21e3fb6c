"""SpanDynamicConv against its specification: the CPU kernels and the emulated CUDA kernel."""

from __future__ import annotations

import ctypes
import functools
import itertools

import pytest

from kernels.cases import (
    DTYPES,
    ROUTES,
    Expected,
    assert_close,
    check_extreme_logits,
    inputs,
    masks,
    params_of,
    poison_pads,
    run,
    run_route,
    surrounded,
    torch,
)

KERNEL_SIZES = [1, 3, 5, 9, 15]
HEAD_DIMS = [8, 32, 48, 64, 80, 128]
BATCHES = [1, 3, 32]
HEADS = 2


def seqs(kernel_size: int) -> list[int]:
    named = {1, 2, kernel_size - 1, kernel_size, 31, 33, 127, 128, 129, 384, 512}
    return sorted(named - {0})


@functools.lru_cache(maxsize=1)
def matrix_cases(dtype: str, kernel_size: int, seq: int) -> list[tuple]:
    """For every head dim: value and logits, what they should give, and the same with a mask.

    The largest batch only: a smaller one is its first sequences. Made once for all routes."""
    cases = []
    for index, head_dim in enumerate(HEAD_DIMS):
        batch = max(BATCHES)
        value, logits = inputs(batch, seq, HEADS, head_dim, kernel_size, DTYPES[dtype], seed=index)
        plain = Expected.of(value, logits, HEADS, kernel_size)
        cases.append((f"head_dim {head_dim}", value, logits, plain))
        # Batch 1 is one kind of mask: the seed takes another one for each head dim.
        mask = masks(batch, seq, seed=index)
        masked = Expected.of(value, logits, HEADS, kernel_size, mask)
        value, logits = value.clone(), logits.clone()
        poison_pads(mask, value, logits)
        cases.append((f"head_dim {head_dim}, masked", value, logits, masked))
    return cases


# The whole product of the axes, on every route. The route comes first to vary fastest.
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("kernel_size", "seq"), [(k, s) for k in KERNEL_SIZES for s in seqs(k)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(kernels, route, dtype, kernel_size, seq) -> None:
    for label, value, logits, expected in matrix_cases(dtype, kernel_size, seq):
        for batch in BATCHES:
            part = expected.first(batch)
            output = run(
                kernels, route, value[:batch], logits[:batch], HEADS, kernel_size, part.mask
            )
            part.check(output, f"({label}, batch {batch})")


@pytest.mark.parametrize("head_dim", [1, 5, 12, 20, 24, 100, 300])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ROUTES)
def test_unusual_head_dims(kernels, route, dtype, head_dim) -> None:
    value, logits = inputs(5, 21, 3, head_dim, 9, DTYPES[dtype])
    assert_close(run(kernels, route, value, logits, 3, 9), value, logits, 3, 9)
    mask = masks(5, 21)
    poison_pads(mask, value, logits)
    output = run(kernels, route, value, logits, 3, 9, mask)
    assert_close(output, value, logits, 3, 9, mask)


@pytest.mark.parametrize("kernel_size", [7, 11, 13])
@pytest.mark.parametrize("route", ROUTES)
def test_other_kernel_sizes(kernels, route, kernel_size) -> None:
    for dtype in DTYPES.values():
        value, logits = inputs(2, 40, 3, 16, kernel_size, dtype)
        output = run(kernels, route, value, logits, 3, kernel_size)
        assert_close(output, value, logits, 3, kernel_size)


@pytest.mark.parametrize("route", ROUTES)
def test_more_heads_than_a_block_holds(kernels, route) -> None:
    value, logits = inputs(2, 20, 300, 8, 7, torch.float32)
    for mask in (None, masks(2, 20, seed=4)):
        output = run(kernels, route, value, logits, 300, 7, mask)
        assert_close(output, value, logits, 300, 7, mask)


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ROUTES)
def test_slices_and_misaligned_views(kernels, route, dtype, masked) -> None:
    heads, head_dim, taps, rows = 6, 64, 9, 2
    wide, wide_logits = inputs(3, 40, heads, head_dim * 4, taps * 3, DTYPES[dtype])
    width = heads * head_dim
    # Of a wider mask too; what lies around it is not 0.
    mask = surrounded_mask(masks(3, 33)) if masked else None
    for offset in (0, 1, 3, width):  # the last is how a merged Q/K/V/conv_out product is cut
        value = wide[:, 2:35, offset : offset + width]
        logits = wide_logits[:, 2:35, offset % 7 : offset % 7 + heads * taps]
        output = torch.full((3, 33 + 2 * rows, 2 * width + 1), 7.0, dtype=value.dtype)
        target = output[:, rows:-rows, width + 1 :]  # the right half of a concatenation
        assert run_route(kernels, route, params_of(value, logits, target, heads, taps, mask)) == 0
        assert_close(target, value, logits, heads, taps, mask)
        assert (output[:, rows:-rows, : width + 1] == 7.0).all(), "wrote outside its columns"
        assert (output[:, :rows] == 7.0).all() and (output[:, -rows:] == 7.0).all(), "wrong rows"


def surrounded_mask(mask):
    batch, seq = mask.shape
    wide = torch.full((batch, seq + 7), 9)
    wide[:, 3 : 3 + seq] = mask
    return wide[:, 3 : 3 + seq]


@pytest.mark.parametrize("columns", [0, 1, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ROUTES)
def test_reads_nothing_outside_of_the_sequence(kernels, route, dtype, columns) -> None:
    for seq, kernel_size in itertools.product([1, 2, 9, 70], [1, 9, 15]):
        tensors = inputs(3, seq, 3, 24, kernel_size, DTYPES[dtype])
        value, logits = (surrounded(tensor, columns=columns) for tensor in tensors)
        for mask in (None, masks(3, seq, seed=2)):
            output = run(kernels, route, value, logits, 3, kernel_size, mask)
            assert_close(output, value, logits, 3, kernel_size, mask)


@pytest.mark.parametrize("route", ROUTES)
def test_one_mask_for_the_whole_batch(kernels, route) -> None:
    value, logits = inputs(4, 30, 2, 16, 5, torch.float32)
    mask = masks(1, 30).expand(4, 30)
    assert mask.stride(0) == 0
    output = run(kernels, route, value, logits, 2, 5, mask)
    assert_close(output, value, logits, 2, 5, mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ROUTES)
def test_a_mask_without_pads_changes_nothing(kernels, route, dtype) -> None:
    value, logits = inputs(2, 45, 3, 40, 9, DTYPES[dtype])
    plain = run(kernels, route, value, logits, 3, 9)
    masked = run(kernels, route, value, logits, 3, 9, torch.ones(2, 45, dtype=torch.int64))
    assert torch.equal(plain, masked)


@pytest.mark.parametrize("route", ROUTES)
def test_a_padded_sequence_gives_what_it_gives_alone(kernels, route) -> None:
    value, logits = inputs(1, 50, 2, 32, 9, torch.float32)
    mask = torch.zeros(1, 50, dtype=torch.int64)
    mask[:, :37] = 1
    alone = run(kernels, route, value[:, :37], logits[:, :37], 2, 9)
    padded = run(kernels, route, value, logits, 2, 9, mask)
    assert (padded[:, :37] - alone).abs().max() <= 1e-6


@pytest.mark.parametrize("route", ROUTES)
def test_extreme_logits(kernels, route) -> None:
    check_extreme_logits(kernels, route)


def _drop_last_tap(value, logits, heads, taps):
    return value, torch.where(torch.arange(heads * taps) % taps == taps - 1, -1e30, logits)


def _reverse_taps(value, logits, heads, taps):
    shape = (*logits.shape[:2], heads, taps)
    return value, logits.reshape(shape).flip(-1).reshape(logits.shape)


def _shift_one(value, logits, heads, taps):
    return torch.roll(value, 1, dims=1), logits


def _roll_heads(value, logits, heads, taps):
    return value, torch.roll(logits, taps, dims=-1)


@pytest.mark.parametrize("fault", [_drop_last_tap, _reverse_taps, _shift_one, _roll_heads])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_comparison_catches_wrong_inputs(kernels, fault, dtype) -> None:
    value, logits = inputs(1, 33, 4, 32, 9, DTYPES[dtype])
    wrong = [t.to(value.dtype).contiguous() for t in fault(value, logits, 4, 9)]
    output = run(kernels, "portable", *wrong, 4, 9)
    with pytest.raises(AssertionError, match="error"):
        assert_close(output, value, logits, 4, 9)


def call(kernels, entry: str, params) -> int:
    arguments = [ctypes.byref(params)] + ([4] if entry == "emulated" else [])
    return getattr(kernels, f"convbert_span_dynamic_conv_{entry}")(*arguments)


@pytest.mark.parametrize("entry", ["cpu", "emulated"])
def test_refusals(kernels, entry) -> None:
    value, logits = inputs(2, 4, 2, 8, 3, torch.float32)
    output = torch.full_like(value, 5.0)
    mask = torch.ones(2, 4, dtype=torch.int64)
    good = params_of(value, logits, output, 2, 3, mask)
    changes = [
        ("kernel_size", 4, b"even"),
        ("kernel_size", 17, b"above 15"),
        ("num_heads", 0, b"size"),
        ("dtype", 9, b"dtype"),
        ("value_row_stride", 3, b"stride"),
        ("logits_row_stride", 3, b"stride"),
        ("output_row_stride", 3, b"stride"),
        ("output_batch_stride", 16, b"stride"),
        ("mask_batch_stride", -1, b"stride"),
        ("value", None, b"null"),
        ("seq", -1, b"negative"),
    ]
    for field, bad, message in changes:
        params = type(good).from_buffer_copy(good)
        setattr(params, field, bad)
        status = call(kernels, entry, params)
        assert status, field
        assert message in kernels.convbert_status_message(status), field
    assert (output == 5.0).all(), "a refused call wrote to its output"


@pytest.mark.parametrize("entry", ["cpu", "emulated"])
@pytest.mark.parametrize("empty", ["batch", "seq"])
def test_an_empty_batch_needs_no_pointers(kernels, entry, empty) -> None:
    value, logits = inputs(2, 4, 2, 8, 3, torch.float32)
    params = params_of(value, logits, torch.empty_like(value), 2, 3)
    setattr(params, empty, 0)
    params.value = params.kernel_logits = params.output = None
    assert call(kernels, entry, params) == 0
