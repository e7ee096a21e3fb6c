"""EncoderLayer against its specification, on all instruction sets."""

from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest

from convbert_deploy.operators.packed_weight import LinearWeight, WeightType, packed

from kernels.cases import SENTINEL, torch
from kernels.layer_cases import (
    KINDS,
    LINEARS,
    ROUTES,
    VECTORS,
    Case,
    Geometry,
    Params,
    Shape,
    call,
    case_of,
    check,
    expected,
    make_case,
    params_of,
    run,
)

_FEW = (1, 2, 0, 2, 33)
#: Shape: hidden, heads, head_dim, kernel_size, intermediate, groups. The lengths of the sequences.
GEOMETRIES = {
    "tiny": Geometry(Shape(20, 1, 5, 3, 31), _FEW),
    "tiny, hidden keys": Geometry(Shape(20, 1, 5, 3, 31), _FEW, masked=True, multiplied=True),
    "groups": Geometry(Shape(72, 3, 12, 9, 146, 2), (0, 8, 33, 1, 5), masked=True),
    "many taps": Geometry(Shape(64, 6, 16, 15, 129), (14, 145), multiplied=True),
    "one tap": Geometry(Shape(100, 3, 64, 1, 66, 2), (144, 2), masked=True, multiplied=True),
    "long": Geometry(Shape(48, 1, 80, 9, 100), (300,)),
    "long, hidden keys": Geometry(Shape(48, 1, 80, 9, 100), (300, 0, 7, 7), masked=True),
    "odd hidden": Geometry(Shape(33, 6, 5, 15, 77), (33, 14, 1), masked=True),
    # more inputs than are taken at a time
    "wide": Geometry(Shape(64, 2, 16, 3, 3072), (7, 17)),
    "wide and odd": Geometry(Shape(24, 3, 12, 9, 3101), (5,)),
    # more rows than are taken at a time, and a sequence that alone has more
    "chunks": Geometry(Shape(16, 1, 5, 3, 17), (*range(60, 1, -1), 2100, 3, 0, 50), masked=True),
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ROUTES)
def test_matches_reference(kernels, route, kind, geometry) -> None:
    case, truth = case_of(GEOMETRIES[geometry], KINDS[kind])
    check(run(kernels, route, case), truth, KINDS[kind])


@pytest.mark.parametrize("geometry", ["groups", "many taps", "long, hidden keys", "chunks"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ROUTES)
def test_threads_do_not_change_a_bit(kernels, route, kind, geometry) -> None:
    case, _ = case_of(GEOMETRIES[geometry], KINDS[kind])
    one = run(kernels, route, case)
    for threads in (2, 3, 16):
        assert np.array_equal(run(kernels, route, case, threads), one), threads


@pytest.mark.parametrize("geometry", ["tiny", "groups", "many taps", "long, hidden keys"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ROUTES)
def test_neighbours_do_not_change_a_bit(kernels, route, kind, geometry) -> None:
    """A sequence gives the same whatever stands beside it in the batch."""
    case, _ = case_of(GEOMETRIES[geometry], KINDS[kind])
    together = run(kernels, route, case)
    for sequence, (first, last) in enumerate(itertools.pairwise(case.inputs.row_starts)):
        alone = run(kernels, route, case.alone(sequence))
        assert np.array_equal(together[first:last], alone), sequence


@pytest.mark.parametrize(
    "geometry", ["tiny", "groups", "many taps", "long, hidden keys", "odd hidden", "chunks"]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ROUTES)
def test_first_rows_alone_are_the_first_rows_of_all(kernels, route, kind, geometry) -> None:
    """To the bit, and zeros for a sequence without rows."""
    case, _ = case_of(GEOMETRIES[geometry], KINDS[kind])
    starts = case.inputs.row_starts
    rows = run(kernels, route, case)
    expected_rows = np.zeros((len(starts) - 1, rows.shape[1]), np.float32)
    filled = starts[:-1] < starts[1:]
    expected_rows[filled] = rows[starts[:-1][filled]]
    for threads in (1, 3):
        assert np.array_equal(run(kernels, route, case.of_first_rows(), threads), expected_rows)


@pytest.mark.parametrize("lengths", [(0, 0, 0, 1, 0), (0,) * 300, (3, *(0,) * 300)], ids=len)
def test_first_rows_of_more_sequences_than_rows(kernels, lengths) -> None:
    case = make_case(Shape(20, 1, 5, 3, 31), KINDS["fp32"], lengths)
    output = run(kernels, "portable", case.of_first_rows())
    filled = np.array(lengths) > 0
    assert not output[~filled].any() and output[filled].any(axis=1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ROUTES)
def test_nan_and_infinity_stay_in_their_sequence(kernels, route, kind) -> None:
    case = make_case(Shape(40, 2, 16, 5, 70), KINDS[kind], (9, 20, 9))
    clean = run(kernels, route, case)
    rows = case.inputs.rows.copy()
    rows[3, 7], rows[30, 0], rows[33, 1] = np.nan, np.inf, -np.inf
    output = run(kernels, route, case.replace(rows=rows))
    assert np.array_equal(output[9:29], clean[9:29])
    assert np.isnan(output[[3, 30, 33]]).all(), "a row that is not finite was hidden"
    if kind in ("fp32", "bf16"):  # quantizing has no NaN
        assert np.isnan(output[:9]).all() and np.isnan(output[29:]).all()


@pytest.mark.parametrize("geometry", ["tiny", "odd hidden", "groups"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ROUTES)
def test_what_an_earlier_call_left_in_memory_is_not_seen(kernels, route, kind, geometry) -> None:
    """Calls borrow memory and give it back as it is: here, full of NaN."""
    case, truth = case_of(GEOMETRIES[geometry], KINDS[kind])
    run(kernels, route, case.replace(rows=np.full_like(case.inputs.rows, np.nan)))
    check(run(kernels, route, case), truth, KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ROUTES)
def test_constant_and_extreme_rows(kernels, route, kind) -> None:
    """Rows of zeros (no step to quantize by, no variance); rows so large that the static step does
    not reach them and that their scores, of some hundreds, need softmax's maximum."""
    case = make_case(Shape(40, 2, 16, 5, 70), KINDS[kind], (9, 6))
    rows = case.inputs.rows.copy()
    rows[:9] = 0
    rows[9:] *= 30
    case = case.replace(rows=rows)
    check(run(kernels, route, case), expected(case), KINDS[kind])


@pytest.mark.parametrize("route", ROUTES)
def test_gelu_alone(kernels, route) -> None:
    """A layer whose up projection gives the numbers of a line whatever goes in, and whose output is
    their GELU, normalized: scaled back here. 1.1e-6 was seen; the tanh approximation is 5e-4 off."""
    count = 769
    line = np.linspace(-12, 12, count, dtype=np.float32)
    case = make_case(Shape(count, 1, 4, 1, count), KINDS["fp32"], (2,))
    zeros, ones = np.zeros(count, np.float32), np.ones(count, np.float32)
    case = case.replace(
        attention_norm_weight=zeros,
        attention_norm_bias=zeros,
        up_bias=line,
        down_weight=packed(LinearWeight(np.eye(count, dtype=np.float32)[None], WeightType.FP32)),
        down_bias=zeros,
        output_norm_weight=ones,
        output_norm_bias=zeros,
    )
    exact = torch.nn.functional.gelu(torch.from_numpy(line).double()).numpy()
    scale = np.sqrt(exact.var() + case.attributes.epsilon)
    got = run(kernels, route, case)[0].astype(np.float64) * scale + exact.mean()
    assert np.abs(got - exact).max() <= 2.5e-6


# ---- refusals ----------------------------------------------------------------------------------


@pytest.fixture
def refusal(kernels):
    """refusal(change, ...) -> the message for a sound call after ``change(params)``."""
    case = make_case(Shape(20, 1, 5, 3, 31), KINDS["int8"], (4, 3), masked=True)
    output = np.full_like(case.inputs.rows, SENTINEL)

    def refuse(change, threads: int = 1, instruction_set: int = 0) -> bytes:
        params = params_of(case, output)
        change(params)
        status = call(kernels, params, instruction_set, threads)
        assert status, "not refused"
        assert (output == SENTINEL).all(), "a refused call wrote to its output"
        return kernels.convbert_status_message(status)

    assert call(kernels, params_of(case, np.empty_like(output)), 0) == 0
    return refuse


def setting(field: str, value, index: int | None = None):
    def change(params: Params) -> None:
        if index is None:
            setattr(params, field, value)
        else:
            getattr(params, field)[index] = value

    return change


@pytest.mark.parametrize("field", ["input", "output", "row_starts", "depthwise", *VECTORS])
def test_a_null_pointer_is_refused(refusal, field) -> None:
    assert b"null" in refusal(setting(field, None))


@pytest.mark.parametrize("index", range(len(LINEARS)))
@pytest.mark.parametrize("field", ["weights", "biases"])
def test_a_null_weight_or_bias_is_refused(refusal, field, index) -> None:
    assert b"null" in refusal(setting(field, None, index))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kernel_size", 4, b"even"),
        ("kernel_size", 17, b"above 15"),
        ("kernel_size", 0, b"kernel_size is 0"),
        ("hidden", 0, b"size"),
        ("num_heads", -1, b"size"),
        ("head_dim", 0, b"size"),
        ("batch", -1, b"negative"),
        ("rows", -1, b"negative"),
        ("rows", 8, b"size"),
        ("batch", 1, b"size"),
        ("hidden", 21, b"packed weight"),
        ("head_dim", 6, b"packed weight"),
        ("num_heads", 2, b"packed weight"),
        ("kernel_size", 5, b"packed weight"),
    ],
)
def test_a_bad_size_is_refused(refusal, field, value, message) -> None:
    assert message in refusal(setting(field, value))


@pytest.mark.parametrize("starts", [(1, 4, 7), (0, 4, 6), (0, 8, 7), (0, -1, 7)], ids=str)
def test_bad_row_starts_are_refused(refusal, starts) -> None:
    array = np.array(starts, np.int64)
    assert b"size" in refusal(setting("row_starts", array.ctypes.data))


def test_bad_threads_and_instruction_sets_are_refused(refusal) -> None:
    def nothing(params: Params) -> None:
        pass

    assert b"size" in refusal(nothing, threads=0)
    for number in (-2, 7, 1000):
        assert b"instruction set" in refusal(nothing, instruction_set=number)


#: Format and place of each field of a packed weight's header, and values it must not have.
_DAMAGES = [
    ("<c", 0, [b"X"]),
    ("<c", 7, [b"2"]),
    ("<i", 8, [-1, 3]),
    ("<i", 12, [-1, 0, 2, 65537]),
    ("<q", 16, [-1, 0, 19, 24, 2**40]),
    ("<q", 24, [-1, 0, 3, 2**40]),
    ("<f", 32, [-0.5, float("nan"), float("inf")]),
    ("<i", 36, [1]),
]


@pytest.mark.parametrize(("form", "at", "values"), _DAMAGES, ids=str)
def test_a_damaged_header_is_refused(refusal, form, at, values) -> None:
    case = make_case(Shape(20, 1, 5, 3, 31), KINDS["int8"], (4, 3))
    for index, name in enumerate(LINEARS):
        for value in values:
            blob = getattr(case.inputs, f"{name}_weight").copy()
            if struct.unpack_from(form, blob, at) == (value,):
                continue
            struct.pack_into(form, blob, at, value)
            message = refusal(setting("weights", blob.ctypes.data, index))
            assert b"packed weight" in message, (name, value)


@pytest.mark.parametrize("index", range(len(LINEARS)))
def test_a_weight_of_another_length_is_refused(refusal, index) -> None:
    for length in (-64, 0, 1, 63, 64, 128, 2**62):
        assert b"packed weight" in refusal(setting("weight_bytes", length, index))


@pytest.mark.parametrize(
    ("type_", "groups", "inputs", "outputs", "size"),
    [
        (0, 65536, 2**24, 2**24, 64),  # 2^66 bytes, which is 0 in 64 bits
        (0, 65536, 2**9, 1, 64),
        (2, 1, 65537, 1, 64 + 64 + 64 * 16385),  # sums beyond int32
    ],
)
def test_sizes_that_overflow_are_refused(refusal, type_, groups, inputs, outputs, size) -> None:
    blob = np.zeros(size, np.uint8)
    struct.pack_into("<8siiqqfi", blob, 0, b"CVBTPKW1", type_, groups, inputs, outputs, 0.0, 0)

    def change(params: Params) -> None:
        params.weights[0], params.weight_bytes[0] = blob.ctypes.data, blob.nbytes
        params.hidden = min(inputs * groups, 2**31 - 1)

    assert b"packed weight" in refusal(change)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)], ids=str)
def test_no_rows_are_accepted(kernels, lengths) -> None:
    case = make_case(Shape(20, 1, 5, 3, 31), KINDS["fp32"], lengths)
    params = params_of(case, np.empty(0, np.float32))
    params.input = params.output = None
    assert call(kernels, params, -1) == 0


# ---- the comparison itself ---------------------------------------------------------------------


def _roll(field: str):
    def fault(case: Case) -> Case:
        return case.replace(**{field: np.roll(getattr(case.inputs, field), 1, axis=-1)})

    return fault


def _window_reversed(case: Case) -> Case:
    return case.replace(depthwise_weight=case.inputs.depthwise_weight[::-1].copy())


def _mask_ignored(case: Case) -> Case:
    return case.replace(attention_mask=None)


def _sequences_joined(case: Case) -> Case:
    return case.replace(row_starts=case.inputs.row_starts[[0, -1]])


@pytest.mark.parametrize(
    "fault",
    [
        *(_roll(field) for field in ("depthwise_weight", "up_bias", "output_norm_bias")),
        _window_reversed,
        _mask_ignored,
        _sequences_joined,
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_comparison_catches_a_wrong_layer(kernels, kind, fault) -> None:
    case, truth = case_of(GEOMETRIES["groups"], KINDS[kind])
    wrong = run(kernels, "portable", fault(case))
    with pytest.raises(AssertionError, match="error"):
        check(wrong, truth, KINDS[kind])
