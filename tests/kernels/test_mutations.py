"""Faults put into SpanDynamicConv's own source: the comparison of its tests must catch each."""

from __future__ import annotations

import pytest

from kernels.cases import (
    DTYPES,
    EMULATED_ROUTES,
    Expected,
    check_extreme_logits,
    inputs,
    masks,
    poison_pads,
    run,
    surrounded,
)
from kernels.mutants import Mutants

CPU_MUTATIONS = {
    "middle tap dropped": (
        "broadcast(taps[k][group",
        "broadcast(k == kernelSize / 2 ? 0.0f : taps[k][group",
    ),
    "left edge: row -1 read": (
        "before > 0 ? static_cast<int>(before) : 0",
        "before > 0 ? static_cast<int>(before) - 1 : 0",
    ),
    "left edge: row 0 left out": (
        "before > 0 ? static_cast<int>(before) : 0",
        "before > 0 ? static_cast<int>(before) + 1 : 0",
    ),
    "right edge: row seq read": (
        "after > 0 ? static_cast<int>(after) : 0",
        "after > 0 ? static_cast<int>(after) - 1 : 0",
    ),
    "right edge: last row left out": (
        "after > 0 ? static_cast<int>(after) : 0",
        "after > 0 ? static_cast<int>(after) + 1 : 0",
    ),
    "mask ignored for values": ("window.mask == nullptr || window.mask[i] != 0", "true"),
    "mask of the wrong rows": ("mask + s - half", "mask + s"),
    "mask of the first sequence for all": ("b * p.maskBatchStride", "0 * p.maskBatchStride"),
    "pad rows not zeroed": ("mask[s + r] == 0", "false"),
    "halo of the block's first row": (
        "value + (s - half) * p.valueRowStride",
        "value + (s0 - half) * p.valueRowStride",
    ),
    "rows together past the block": ("i + kRowsTogether <= rows", "i + 1 <= rows"),
    "softmax without the maximum": ("load(&taps[k][g]) - top", "load(&taps[k][g])"),
    "weights of the wrong head": (
        "from[h * p.kernelSize + k]",
        "from[(heads - 1 - h) * p.kernelSize + k]",
    ),
    "weights of the first slice of heads": ("int64_t(h0) * p.kernelSize", "int64_t(0)"),
    "channels beyond the last vector left out": ("if (d < headDim) {", "if (false) {"),
}
CUDA_MUTATIONS = {
    "first tap dropped": ("w = weight[k];", "w = k == 0 ? 0.0f : weight[k];"),
    "left edge: row -1 read": ("row >= 0 &&", "row >= -1 &&"),
    "left edge: row 0 left out": ("row >= 0 &&", "row >= 1 &&"),
    "right edge: row seq read": ("row < p.seq &&", "row < p.seq + 1 &&"),
    "right edge: last row left out": ("row < p.seq &&", "row < p.seq - 1 &&"),
    "mask ignored for values": ("(mask == nullptr || mask[row] != 0)", "true"),
    "mask of the first sequence for all": (
        "tile.batch * p.maskBatchStride",
        "0 * p.maskBatchStride",
    ),
    "pad rows not zeroed": ("mask[tile.firstRow + r] == 0", "false"),
    "halo of the tile's first row": ("tile.firstRow + begin - kHalf", "tile.firstRow - kHalf"),
    "halo one row late": ("tile.firstRow + begin - kHalf", "tile.firstRow + begin - kHalf + 1"),
    "window turned by one": ("window[(j + k) % K][i]", "window[(j + k + 1) % K][i]"),
    "softmax without the maximum": ("expf(tap[k] - top)", "expf(tap[k])"),
    "weights of the wrong head": (
        "row * p.logitsRowStride + head * K",
        "row * p.logitsRowStride + (tile.heads - 1 - head) * K",
    ),
    "weights of the first block of heads": ("int64_t(tile.firstHead) * K", "int64_t(0)"),
}
#: Seen only where a thread takes more than one row: with few multiprocessors.
CUDA_RUN_MUTATIONS = {
    "row asked for ahead one late": ("r + kHalf + kAhead,", "r + kHalf + kAhead + 1,"),
    "rows ahead not asked for": ("r + kAhead < end", "r + kAhead + 1 < end"),
}


def comparison(kernels, route: str) -> None:
    """The comparison of test_span_dynamic_conv.py on few shapes. What lies around the sequences is
    NaN, far enough for every mutant to read only memory that is its own."""
    shapes = [  # batch, seq, heads, head_dim, kernel_size
        (1, 2, 1, 5, 3),
        (3, 75, 2, 8, 9),
        (2, 40, 3, 20, 5),
        (2, 5, 300, 4, 3),
        (4, 150, 6, 32, 9),  # large enough for a CUDA thread to take runs of many rows
    ]
    for batch, seq, heads, head_dim, taps in shapes:
        for dtype in DTYPES.values():
            value, logits = inputs(batch, seq, heads, head_dim, taps, dtype)
            value, logits = surrounded(value), surrounded(logits)
            Expected.of(value, logits, heads, taps).check(
                run(kernels, route, value, logits, heads, taps)
            )
            mask = masks(batch, seq)
            masked = Expected.of(value, logits, heads, taps, mask)
            poison_pads(mask, value, logits)
            masked.check(run(kernels, route, value, logits, heads, taps, mask))
    check_extreme_logits(kernels, route)


@pytest.fixture(scope="module")
def mutants(tmp_path_factory) -> Mutants:
    return Mutants.of("span_dynamic_conv", tmp_path_factory.mktemp("objects"), comparison)


def test_the_kernels_as_they_are_pass(mutants, tmp_path) -> None:
    mutants.check_unmutated(tmp_path, ["portable", *EMULATED_ROUTES])


@pytest.mark.parametrize("name", CPU_MUTATIONS)
def test_a_fault_in_the_cpu_kernel_is_caught(mutants, tmp_path, name) -> None:
    mutants.check_cpu(tmp_path, CPU_MUTATIONS[name])


@pytest.mark.parametrize("name", CUDA_MUTATIONS)
def test_a_fault_in_the_cuda_kernel_is_caught(mutants, tmp_path, name) -> None:
    mutants.check_cuda(tmp_path, CUDA_MUTATIONS[name], EMULATED_ROUTES)


@pytest.mark.parametrize("name", CUDA_RUN_MUTATIONS)
def test_a_fault_in_the_runs_of_the_cuda_kernel_is_caught(mutants, tmp_path, name) -> None:
    mutants.check_cuda(tmp_path, CUDA_RUN_MUTATIONS[name], ["emulated-1"])
