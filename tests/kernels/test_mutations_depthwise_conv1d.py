"""Faults put into DepthwiseConv1D's own source: the comparison of its tests must catch each."""

from __future__ import annotations

import pytest

from kernels.cases import DTYPES, EMULATED_ROUTES, masks, poison_pads, surrounded
from kernels.mutants import Mutants
from kernels.test_depthwise_conv1d import assert_close, inputs, run

CPU_MUTATIONS = {
    "first tap dropped": ("if (k >= 0 && k < kernelSize)", "if (k >= 1 && k < kernelSize)"),
    "last tap dropped": ("if (k >= 0 && k < kernelSize)", "if (k >= 0 && k < kernelSize - 1)"),
    "left edge: row -1 read": ("row < half ? half - row : 0", "row < half ? half - row - 1 : 0"),
    "left edge: row 0 left out": ("row < half ? half - row : 0", "row < half ? half - row + 1 : 0"),
    "right edge: row seq read": (
        "row + kRows + half - run.seq",
        "row + kRows + half - run.seq - 1",
    ),
    "mask ignored for inputs": ("run.mask[at] == 0", "false"),
    "pad rows not zeroed": ("run.mask[row + r] == 0", "false"),
    "mask of the first sequence for all": ("b * p.maskBatchStride", "0 * p.maskBatchStride"),
    "weights of the first strip": ("weight + k * channels + channel", "weight + k * channels"),
    "channels beyond the last vector left out": ("if (c < p.channels) {", "if (false) {"),
}
CUDA_MUTATIONS = {
    "left edge: row -1 read": (
        "first < 0 ? static_cast<int32_t>(-first) : 0",
        "first < 0 ? static_cast<int32_t>(-first) - 1 : 0",
    ),
    "left edge: row 0 left out": (
        "first < 0 ? static_cast<int32_t>(-first) : 0",
        "first < 0 ? static_cast<int32_t>(-first) + 1 : 0",
    ),
    "right edge: row seq read": (
        "left < count ? static_cast<int32_t>(left) : count",
        "left < count ? static_cast<int32_t>(left) + 1 : count",
    ),
    "mask ignored": ("static_cast<uint32_t>(mask[t] == 0) << t", "0u << t"),
    "mask of the first sequence for all": ("batch * p.maskBatchStride", "0 * p.maskBatchStride"),
    "pad rows not zeroed": ("run.present >> (r + K / 2) & 1u", "true"),
    "window turned by one": ("window[(j + k) % K][i]", "window[(j + k + 1) % K][i]"),
    "weights of the first channels": (
        "int64_t(k) * p.channels + channel",
        "int64_t(k) * p.channels",
    ),
}
#: Seen only where a thread takes more than one row: with few multiprocessors.
CUDA_RUN_MUTATIONS = {
    "row asked for ahead one late": ("r + K - 1 + kAhead)", "r + K + kAhead)"),
}


def comparison(kernels, route: str) -> None:
    """Few shapes, what lies around the sequences NaN."""
    shapes = [(1, 2, 5, 3), (3, 75, 40, 9), (2, 40, 20, 5), (4, 150, 96, 9)]
    for batch, seq, channels, taps in shapes:
        for dtype in DTYPES.values():
            source, weight = inputs(batch, seq, channels, taps, dtype)
            source = surrounded(source)
            assert_close(run(kernels, route, source, weight), source, weight)
            mask = masks(batch, seq)
            poison_pads(mask, source)
            assert_close(run(kernels, route, source, weight, mask), source, weight, mask)


@pytest.fixture(scope="module")
def mutants(tmp_path_factory) -> Mutants:
    return Mutants.of("depthwise_conv1d", tmp_path_factory.mktemp("objects"), comparison)


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
