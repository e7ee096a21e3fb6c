"""Faults put into FusedSpanDynamicConv's own source: the comparison of its tests must catch each."""

from __future__ import annotations

import pytest

from kernels.cases import DTYPES, EMULATED_ROUTES
from kernels.mutants import Mutants
from kernels.test_fused_span_dynamic_conv import assert_close, make_case, run

CPU_MUTATIONS = {
    "bias left out": ("sums[i][n] + add", "sums[i][n]"),
    "bias of the first panel": ("p.bias) + firstColumn + n0", "p.bias) + firstColumn"),
    "weights of the first panel": ("<T const*>(p.weight) + column", "<T const*>(p.weight)"),
    "only the first channels": ("c0 < channels; c0 += kStep", "c0 < kStep; c0 += kStep"),
    "query of the first channels": ("* p.queryRowStride + c0", "* p.queryRowStride"),
    "last channels left out": ("for (; c < count; ++c)", "for (; c < count - 1; ++c)"),
    "rows of another item": ("b * p.keyConvBatchStride", "0 * p.keyConvBatchStride"),
    "taps and heads swapped": ("(n0 + n) / kernelSize", "(n0 + n) % heads"),
}
CUDA_MUTATIONS = {
    "bias left out": ("at[k] + toFloat(bias[head * K + k])", "at[k]"),
    "bias of the first heads": ("plan.bias) + int64_t(tile.firstHead) * K", "plan.bias)"),
    "key_conv left out": ("product[j] *= other[j]", "product[j] *= 1.0f"),
    "weights of the first channels": ("plan.weight) + channel * allColumns", "plan.weight)"),
    "query of the first row": ("tile.firstRow * plan.queryRowStride", "0 * plan.queryRowStride"),
    "rows of another item": ("tile.batch * plan.keyConvBatchStride", "0 * plan.keyConvBatchStride"),
    "tiles of the first columns": (
        "weights + number % plan.columnTiles * kTile, weightStride",
        "weights, weightStride",
    ),
    "half of the columns of a tile": ("b += lane % 2 * LaneTile::kColumns", "b += 0"),
}
#: (batch, seq, heads, head_dim, K): several row tiles, column tiles, steps of channels, heads blocks
SHAPES = [(2, 40, 3, 24, 9), (3, 37, 2, 64, 9), (1, 50, 20, 8, 9), (2, 9, 1, 5, 3)]


def comparison(kernels, route: str) -> None:
    for shape in SHAPES:
        for dtype in DTYPES.values():
            for masked in (False, True):
                case = make_case(shape, dtype, masked=masked)
                assert_close(run(kernels, route, case), case)


@pytest.fixture(scope="module")
def mutants(tmp_path_factory) -> Mutants:
    return Mutants.of("fused_span_dynamic_conv", tmp_path_factory.mktemp("objects"), comparison)


def test_the_kernels_as_they_are_pass(mutants, tmp_path) -> None:
    mutants.check_unmutated(tmp_path, ["portable", *EMULATED_ROUTES])


@pytest.mark.parametrize("name", CPU_MUTATIONS)
def test_a_fault_in_the_cpu_kernel_is_caught(mutants, tmp_path, name) -> None:
    mutants.check_cpu(tmp_path, CPU_MUTATIONS[name])


@pytest.mark.parametrize("name", CUDA_MUTATIONS)
def test_a_fault_in_the_cuda_kernel_is_caught(mutants, tmp_path, name) -> None:
    mutants.check_cuda(tmp_path, CUDA_MUTATIONS[name], EMULATED_ROUTES)
