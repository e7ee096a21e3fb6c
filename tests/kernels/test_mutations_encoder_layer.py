"""Faults put into EncoderLayer's own source: the comparison of its tests must catch each."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.layer_cases import KINDS, Geometry, Shape, case_of, check, run
from kernels.mutants import Mutants

_SEQ = "conv.seq = length;\n    setContiguousStrides(conv);\n    conv."
#: By the file that they are put into.
MUTATIONS = {
    "matmul.h": {
        "surplus not subtracted": (
            "(Ints)values - a.surpluses[group * kMaxRows + r]",
            "(Ints)values",
        ),
        "surplus of the first group": ("a.surpluses[group * kMaxRows + r]", "a.surpluses[r]"),
        "scale of the block's first columns": ("w.scales + out + v", "w.scales + out"),
        "step of the first row": ("scale * a.steps[r]", "scale * a.steps[0]"),
        "bias of the first group": ("bias + out + v", "bias + column + v"),
        "last columns left out": ("column < w.outputs;", "column + kPanelColumns <= w.outputs;"),
        "inputs of the first group": ("a.units + group * unitsOf(w)", "a.units"),
        "sums of the last units alone": ("rows, first > 0);", "rows, false);"),
    },
    "activations.h": {
        "epsilon dropped": ("squareRoot(variance + epsilon)", "squareRoot(variance)"),
        "beta dropped": (" + loadSome(beta + i, some), some);", ", some);"),
        "variance without the last channels": (
            "rest += (from[i] - mean) * (from[i] - mean)",
            "rest += 0.0f",
        ),
        "multiplier left out of the step": (
            "largestMagnitude(row, w.multiplier,",
            "largestMagnitude(row, nullptr,",
        ),
        "multiplier of the first group": ("w.multiplier + group * w.inputs;", "w.multiplier;"),
        "quantized beyond 127": ("values < 127.0f ? values", "values < 1270.0f ? values"),
        "tail of the units not zeroed": ("if (count < units * 2) {", "if (false) {"),
        "not quite erf": ("errorFunction(x * 0.70710678f)", "errorFunction(x * 0.707f)"),
    },
    "attention.h": {
        "softmax without the maximum": ("load(scores + j) - shift", "load(scores + j)"),
        "keys beyond the last counted": ("j >= length ? -__builtin_inff()", "j >= length ? 0.0f"),
        "mask ignored": ("mask != nullptr && mask[j] == 0;", "false;"),
        "hidden keys as if there were none": ("hidden ? kLowest", "hidden ? -__builtin_inff()"),
        "tail of the queries not zeroed": ("to[units - 1] = 0;", ""),
        "queries of the first block": ("(first + r) * head.stride", "r * head.stride"),
        "sum of the first row": ("* inverse[r],", "* inverse[0],"),
    },
    "encoder_layer_phases.h": {
        "the layer's input added at its end": (
            "rows,\n         addTo(middle));",
            "rows,\n         addTo(residual));",
        ),
        "convolution in the attention's half": ("* 2 * width + width;", "* 2 * width;"),
        "mask of the first sequence for all": ("p.mask + start,", "p.mask,"),
        "keys of the first head": ("inputs + width,\n", "inputs + width - offset,\n"),
        "depthwise window beyond the sequence": (
            f"{_SEQ}input",
            f"{_SEQ}input".replace("length", "length + 1"),
        ),
        "dynamic window beyond the sequence": (
            f"{_SEQ}outputRowStride",
            f"{_SEQ}outputRowStride".replace("length", "length + 1"),
        ),
        "depthwise rows of the first chunk": (
            "conv.input = p.input + start",
            "conv.input = p.input + (start - chunk.firstRow)",
        ),
        "query left out of the generator": ("result * factor", "result"),
        "first rows of the first sequence": ("p.input[start * p.hidden + c]", "p.input[c]"),
        "first rows written where all would be": (
            "p.firstRowOnly != 0 ? chunk.firstSequence : chunk.firstRow",
            "chunk.firstRow",
        ),
        "convolution of one sequence for all": (
            "run(b, length, 0, 1)",
            "run(chunk.firstSequence, length, 0, 1)",
        ),
        "key in the convolution's value": (
            "storeSome(values + r * width - left",
            "storeSome(values + r * width",
        ),
    },
    "encoder_layer.cpp": {
        "chunk of the first rows": ("chunk.firstRow = p.rowStarts[b];", "chunk.firstRow = 0;"),
        "chunk without its last sequence": (
            "chunk.lastSequence = b;",
            "chunk.lastSequence = b - 1;",
        ),
        "last head left out": ("head < p.numHeads;", "head + 1 < p.numHeads;"),
    },
}
#: Groups and multipliers, every kind of mask; more rows than a task has and more inputs than are
#: taken at a time; more sequences than are taken at a time.
GEOMETRIES = [
    Geometry(Shape(34, 3, 5, 5, 150, 2), (3, 4, 50, 2), masked=True, multiplied=True),
    Geometry(Shape(21, 2, 8, 3, 400), (2, 150)),
    Geometry(Shape(9, 1, 4, 3, 8), (50,) * 45),
]


def comparison(kernels, route: str) -> None:
    """Behind a call that leaves NaN in the memory that the next one is given."""
    for geometry in GEOMETRIES:
        for kind in KINDS.values():
            case, truth = case_of(geometry, kind)
            run(kernels, route, case.replace(rows=np.full_like(case.inputs.rows, np.nan)), 2)
            check(run(kernels, route, case, 2), truth, kind)
            first = case.inputs.row_starts[:-1]
            check(run(kernels, route, case.of_first_rows(), 2), truth[first], kind)


@pytest.fixture(scope="module")
def mutants(tmp_path_factory) -> Mutants:
    return Mutants.of(
        "encoder_layer",
        tmp_path_factory.mktemp("objects"),
        comparison,
        parts=("", "_c"),
        others=("encoder_layer/scratch_pool.cpp", "depthwise_conv1d/depthwise_conv1d.cpp"),
        optimization="-O0",
    )


def test_the_kernel_as_it_is_passes(mutants, tmp_path) -> None:
    mutants.check_unmutated(tmp_path, ["portable"])


@pytest.mark.parametrize(
    ("source", "name"), [(source, name) for source, faults in MUTATIONS.items() for name in faults]
)
def test_a_fault_is_caught(mutants, tmp_path, source, name) -> None:
    mutants.check(
        tmp_path,
        f"encoder_layer/{source}",
        "encoder_layer/encoder_layer.cpp",
        MUTATIONS[source][name],
        ["portable"],
    )
