"""DepthwiseConv1D against its specification: CPU kernels, emulated CUDA kernel."""

from __future__ import annotations

import ctypes
import functools
import itertools

import numpy as np
import pytest

from kernels.cases import CPU_ROUTES, DTYPES, GUARD, ROUTES, SENTINEL, masks, poison_pads, torch

KERNEL_SIZES = [1, 3, 5, 9, 15]
CHANNELS = [1, 5, 8, 37, 128, 256, 384, 768]
BATCHES = [1, 3, 32]
MOST_ELEMENTS = 1_000_000  # of a case with more than one sequence: keeps the file fast


def seqs(kernel_size: int) -> list[int]:
    return [1, 2, max(kernel_size - 1, 1), kernel_size, 31, 33, 127, 128, 129, 384, 512]


class Params(ctypes.Structure):
    """DepthwiseConv1dParams of plugins/depthwise_conv1d/depthwise_conv1d.h, field by field."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("input", "weight", "mask", "output")],
        *[(name, ctypes.c_int64) for name in ("batch", "seq")],
        *[
            (f"{tensor}_stride", ctypes.c_int64)
            for tensor in ("input_batch", "input_row", "mask_batch", "output_batch", "output_row")
        ],
        *[(name, ctypes.c_int32) for name in ("channels", "kernel_size", "dtype")],
    ]


def params_of(input, weight, output, mask=None) -> Params:
    """``mask`` is int64 (batch, seq) with adjacent elements in a row, or None."""
    assert weight.is_contiguous()
    if mask is not None:
        assert mask.dtype == torch.int64 and (mask.shape[1] == 1 or mask.stride(1) == 1)
    return Params(
        input.data_ptr(),
        weight.data_ptr(),
        None if mask is None else mask.data_ptr(),
        output.data_ptr(),
        input.shape[0],
        input.shape[1],
        input.stride(0),
        input.stride(1),
        0 if mask is None else mask.stride(0),
        output.stride(0),
        output.stride(1),
        input.shape[2],
        weight.shape[0],
        list(DTYPES.values()).index(input.dtype),
    )


def call(kernels, entry: str, params: Params, *arguments) -> int:
    function = getattr(kernels, f"convbert_depthwise_conv1d_{entry}")
    return function(ctypes.byref(params), *arguments)


def run_route(kernels, route: str, params: Params) -> int:
    """Status of one call; a route that this CPU lacks skips the test."""
    if route not in CPU_ROUTES:
        return call(kernels, "emulated", params, ctypes.c_int32(int(route.split("-")[1])))
    instruction_set = CPU_ROUTES[route]
    if instruction_set > kernels.convbert_best_instruction_set():
        pytest.skip(f"this CPU has no {route}")
    rows = params.batch * params.seq
    # Uneven parts, as an adapter's threads would take them.
    for first, last in itertools.pairwise(sorted({0, rows // 3, (2 * rows + 2) // 3, rows})):
        bounds = ctypes.c_int64(first), ctypes.c_int64(last)
        if status := call(kernels, "cpu_rows", params, *bounds, ctypes.c_int32(instruction_set)):
            return status
    return 0


def run(kernels, route: str, input, weight, mask=None):
    """Into a sentinel-filled buffer with guards; fails when a guard changes."""
    size = input.numel()
    store = torch.full((size + 2 * GUARD,), SENTINEL, dtype=input.dtype)
    output = store[GUARD : GUARD + size].view(input.shape)
    status = run_route(kernels, route, params_of(input, weight, output, mask))
    assert status == 0, kernels.convbert_status_message(status)
    sentinel = torch.tensor(SENTINEL, dtype=input.dtype)
    assert (store[:GUARD] == sentinel).all(), "error: wrote before its output"
    assert (store[GUARD + size :] == sentinel).all(), "error: wrote past its output"
    return output


def inputs(batch, seq, channels, kernel_size, dtype, seed=0):
    """Random, so that a wrong tap, row or channel moves the output by about as much as it is."""
    generator = torch.Generator().manual_seed(seed)
    input = torch.randn(batch, seq, channels, generator=generator)
    weight = torch.randn(kernel_size, channels, generator=generator)
    return input.to(dtype), weight.to(dtype)


def expected(input, weight, mask=None):
    """The reference in float64 and the largest error that is accepted. fp32: 1e-5 of the largest
    output (of 1, where that is less). Half precision: twice the error of plain torch in the same
    precision, plus one unit in the last place of the largest output."""
    from convbert_deploy.reference import depthwise_conv1d

    truth = depthwise_conv1d(input.double(), weight.double(), mask=mask, upcast=False)
    scale = truth.abs().max().item()
    if input.dtype == torch.float32:
        return truth, 1e-5 * max(scale, 1.0)
    control = depthwise_conv1d(input, weight, mask=mask, upcast=False).double()
    ulp = torch.finfo(input.dtype).eps * scale
    return truth, 2 * (control - truth).abs().max().item() + ulp


def check(got, truth, limit: float, mask=None) -> None:
    error = (got.double() - truth).abs().max().item()
    assert np.isfinite(error), "error: NaN or infinity in the output"
    assert error <= limit, f"error {error:.3g} above {limit:.3g}"
    if mask is not None:
        assert not got[mask == 0].any(), "error: a pad row is not zero"


def assert_close(got, input, weight, mask=None) -> None:
    check(got, *expected(input, weight, mask), mask)


@functools.cache
def pair_case(dtype: str, seq_index: int, channels: int):
    """The case of one (seq, channels) pair: its kernel size, batch and mask go round, so that each
    of the pairs (kernel size, seq), (kernel size, channels) and (batch, channels) comes up too."""
    place = seq_index + CHANNELS.index(channels)
    kernel_size = KERNEL_SIZES[place % len(KERNEL_SIZES)]
    seq = seqs(kernel_size)[seq_index]
    batch = BATCHES[place % len(BATCHES)]
    while batch > 1 and batch * seq * channels > MOST_ELEMENTS:
        batch = BATCHES[BATCHES.index(batch) - 1]
    input, weight = inputs(batch, seq, channels, kernel_size, DTYPES[dtype], seed=place)
    mask = None
    if seq_index % 2 == CHANNELS.index(channels) // 2 % 2:
        mask = masks(batch, seq, seed=place)
        poison_pads(mask, input)
    return (input, weight, mask), expected(input, weight, mask)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ROUTES)
def test_matches_reference(kernels, route, dtype, channels) -> None:
    for seq_index in range(len(seqs(1))):
        (input, weight, mask), (truth, limit) = pair_case(dtype, seq_index, channels)
        check(run(kernels, route, input, weight, mask), truth, limit, mask)


def test_the_pairs_cover_what_they_say() -> None:
    cases = [(i, c, *pair_case("bf16", i, c)[0]) for i in range(11) for c in CHANNELS]
    sizes = {(weight.shape[0], i) for i, _, _, weight, _ in cases}
    assert sizes == set(itertools.product(KERNEL_SIZES, range(11)))
    widths = {(weight.shape[0], c) for _, c, _, weight, _ in cases}
    assert widths == set(itertools.product(KERNEL_SIZES, CHANNELS))
    batches = {(input.shape[0], c) for _, c, input, _, _ in cases}
    assert batches == set(itertools.product(BATCHES, CHANNELS))
    masked = {(mask is not None, c) for _, c, _, _, mask in cases}
    assert masked == set(itertools.product([True, False], CHANNELS))


@pytest.mark.parametrize("kernel_size", range(1, 16, 2))
@pytest.mark.parametrize("route", ROUTES)
def test_every_kernel_size(kernels, route, kernel_size) -> None:
    for dtype, channels in itertools.product(DTYPES.values(), [21, 64]):
        input, weight = inputs(5, 40, channels, kernel_size, dtype)
        assert_close(run(kernels, route, input, weight), input, weight)
        mask = masks(5, 40)
        poison_pads(mask, input)
        assert_close(run(kernels, route, input, weight, mask), input, weight, mask)


@pytest.mark.parametrize("kind", ["random", "prefix", "all pads", "first only"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ROUTES)
def test_masks(kernels, route, dtype, kind) -> None:
    """NaN and infinity at pads stay there."""
    input, weight = inputs(3, 70, 48, 9, DTYPES[dtype])
    mask = torch.zeros(3, 70, dtype=torch.int64)
    if kind == "random":
        mask = torch.randint(0, 2, (3, 70), generator=torch.Generator().manual_seed(1))
    elif kind == "prefix":
        mask[0, :37], mask[1, :], mask[2, :64] = 1, -1, 2**40  # anything but 0 is a token
    elif kind == "first only":
        mask[:, 0] = 1
    poison_pads(mask, input)
    output = run(kernels, route, input, weight, mask)
    assert_close(output, input, weight, mask)
    if kind == "all pads":
        assert not output.any()


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ROUTES)
def test_strided_and_misaligned_views(kernels, route, dtype, masked) -> None:
    """Views into a tensor that is NaN all around; what lies around the output keeps its value."""
    for seq, channels, offset in itertools.product([1, 9, 40], [37, 64], [0, 1, 3, 4, 8]):
        input, weight = inputs(3, seq, channels, 9, DTYPES[dtype], seed=offset)
        wide = torch.full((3, seq + 30, channels + 16), float("nan"), dtype=input.dtype)
        view = wide[:, 15 : 15 + seq, offset : offset + channels]
        view.copy_(input)
        shifted = torch.empty(weight.numel() + offset, dtype=input.dtype)[offset:]
        weight = shifted.view(weight.shape).copy_(weight)
        mask = None
        if masked:
            around = torch.full((3, seq + 7), 9)
            mask = around[:, 3 : 3 + seq]
            mask.copy_(masks(3, seq, seed=offset))
        store = torch.full((3, seq + 2, channels + 16), 7.0, dtype=input.dtype)
        output = store[:, 1 : 1 + seq, offset : offset + channels]
        assert run_route(kernels, route, params_of(view, weight, output, mask)) == 0
        assert_close(output, input, weight, mask)
        output.fill_(7.0)
        assert (store == 7.0).all(), "wrote outside its rows or columns"


@pytest.mark.parametrize("route", ROUTES)
def test_one_mask_for_the_whole_batch(kernels, route) -> None:
    input, weight = inputs(4, 30, 16, 5, torch.float32)
    mask = masks(1, 30).expand(4, 30)
    assert mask.stride(0) == 0
    assert_close(run(kernels, route, input, weight, mask), input, weight, mask)


@pytest.mark.parametrize("route", CPU_ROUTES)
def test_rows_do_not_depend_on_how_they_are_shared_out(kernels, route) -> None:
    """Threads must not change the numbers."""
    input, weight = inputs(2, 150, 50, 9, torch.float32)
    whole = torch.empty_like(input)
    parted = run(kernels, route, input, weight)
    params = params_of(input, weight, whole)
    rows = ctypes.c_int64(0), ctypes.c_int64(300), ctypes.c_int32(CPU_ROUTES[route])
    assert call(kernels, "cpu_rows", params, *rows) == 0
    assert torch.equal(whole, parted)


@pytest.mark.parametrize("route", ROUTES)
def test_a_nan_stays_in_its_window_and_channel(kernels, route) -> None:
    input, weight = inputs(1, 40, 20, 5, torch.float32)
    input[0, 17, 6] = float("nan")
    nan = run(kernels, route, input, weight).isnan()
    assert nan[0, 15:20, 6].all() and nan.sum() == 5


def test_the_reference_is_torchs_own_convolution() -> None:
    from convbert_deploy.reference import depthwise_conv1d

    input, weight = inputs(2, 30, 12, 9, torch.float64)
    convolved = torch.nn.functional.conv1d(
        input.transpose(1, 2), weight.t().unsqueeze(1), padding=4, groups=12
    ).transpose(1, 2)
    ours = depthwise_conv1d(input, weight, upcast=False)
    assert (ours - convolved).abs().max() < 1e-12


def _drop_last_tap(input, weight, mask):
    return input, torch.cat([weight[:-1], torch.zeros_like(weight[-1:])]), mask


def _shift_one(input, weight, mask):
    return torch.roll(input, 1, dims=1), weight, mask


def _reverse_taps(input, weight, mask):
    return input, weight.flip(0), mask


def _next_channel(input, weight, mask):
    return input, torch.roll(weight, 1, dims=1), mask


def _ignore_mask(input, weight, mask):
    return input, weight, None


@pytest.mark.parametrize(
    "fault", [_drop_last_tap, _shift_one, _reverse_taps, _next_channel, _ignore_mask]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_comparison_catches_a_wrong_convolution(kernels, fault, dtype) -> None:
    input, weight = inputs(2, 33, 32, 9, DTYPES[dtype])
    mask = torch.ones(2, 33, dtype=torch.int64)
    mask[1, 20:] = 0
    assert_close(run(kernels, "portable", input, weight, mask), input, weight, mask)
    *wrong, wrong_mask = fault(input, weight, mask)
    output = run(kernels, "portable", *[tensor.contiguous() for tensor in wrong], wrong_mask)
    with pytest.raises(AssertionError, match="error"):
        assert_close(output, input, weight, mask)


@pytest.mark.parametrize("entry", ["cpu", "emulated"])
def test_refusals(kernels, entry) -> None:
    input, weight = inputs(2, 4, 8, 3, torch.float32)
    output = torch.full_like(input, 5.0)
    good = params_of(input, weight, output, torch.ones(2, 4, dtype=torch.int64))
    changes = [
        ("kernel_size", 4, b"even"),
        ("kernel_size", 17, b"above 15"),
        ("kernel_size", 0, b"kernel_size is 0"),
        ("channels", 0, b"size"),
        ("seq", -1, b"negative"),
        ("dtype", 9, b"dtype"),
        ("input_row_stride", 7, b"stride"),
        ("output_row_stride", 7, b"stride"),
        ("output_batch_stride", 31, b"stride"),
        ("mask_batch_stride", -1, b"stride"),
        ("input", None, b"null"),
        ("weight", None, b"null"),
        ("output", None, b"null"),
    ]
    for field, bad, message in changes:
        params = Params.from_buffer_copy(good)
        setattr(params, field, bad)
        status = call(kernels, entry, params, *([4] if entry == "emulated" else []))
        assert status, field
        assert message in kernels.convbert_status_message(status), field
    assert (output == 5.0).all(), "a refused call wrote to its output"


@pytest.mark.parametrize("empty", ["batch", "seq"])
def test_an_empty_batch_needs_no_pointers(kernels, empty) -> None:
    input, weight = inputs(2, 4, 8, 3, torch.float32)
    params = params_of(input, weight, torch.empty_like(input))
    setattr(params, empty, 0)
    params.input = params.weight = params.output = None
    assert call(kernels, "cpu", params) == 0
    assert call(kernels, "emulated", params, 4) == 0
