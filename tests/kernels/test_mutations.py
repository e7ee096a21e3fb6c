"""Faults put into the kernels' own source: the comparison of the other tests must catch each.

A mutant is a copy of plugins/ with one replacement, compiled without the wider instruction sets: the
CPU kernel runs as `portable`, the CUDA kernel through its emulation on the host.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kernels.cases import (
    DTYPES,
    Expected,
    check_extreme_logits,
    inputs,
    load_kernels,
    masks,
    poison_pads,
    run,
    surrounded,
    torch,
)

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
FOLDER = "span_dynamic_conv"
UNITS = [
    f"{FOLDER}/span_dynamic_conv.cpp",
    f"{FOLDER}/span_dynamic_conv_emulated.cpp",
    f"{FOLDER}/span_dynamic_conv_c.cpp",
    "runtime/instruction_set.cpp",
    "runtime/c_entry.cpp",
]
CPU_SOURCE = f"{FOLDER}/span_dynamic_conv_rows.h"
CUDA_SOURCE = f"{FOLDER}/span_dynamic_conv.cuh"
#: The one unit that each mutated file is compiled into.
UNIT_OF = {CPU_SOURCE: UNITS[0], CUDA_SOURCE: UNITS[1]}
FLAGS = ["-O1", "-std=c++17", "-fPIC", "-w"]

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


def compile_unit(compiler: str, source: Path, target: Path) -> None:
    done = subprocess.run(
        [compiler, *FLAGS, "-c", source, "-o", target], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def link(compiler: str, objects: list[Path], target: Path):
    done = subprocess.run(
        [compiler, "-shared", "-fPIC", *objects, "-o", target],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return load_kernels(target)


@pytest.fixture(scope="module")
def compiler() -> str:
    path = shutil.which("c++")
    if path is None:
        pytest.skip("no C++ compiler (c++)")
    return path


@pytest.fixture(scope="module")
def objects(compiler, tmp_path_factory) -> dict[str, Path]:
    """Every unit as it is; a mutant takes all but one from here."""
    folder = tmp_path_factory.mktemp("objects")
    made = {unit: folder / f"{Path(unit).stem}.o" for unit in UNITS}
    for unit, target in made.items():
        compile_unit(compiler, PLUGINS / unit, target)
    return made


def test_the_kernels_as_they_are_pass(compiler, objects, tmp_path) -> None:
    kernels = link(compiler, list(objects.values()), tmp_path / "kernels.so")
    for route in ("portable", "emulated-1", "emulated-132"):
        comparison(kernels, route)


def check_mutant(compiler, objects, folder: Path, source: str, mutation, routes) -> None:
    for name in (FOLDER, "runtime"):
        shutil.copytree(PLUGINS / name, folder / name)
    text = (folder / source).read_text()
    before, after = mutation
    assert text.count(before) == 1, f"{source} has {before!r} {text.count(before)} times, not once"
    (folder / source).write_text(text.replace(before, after))
    unit = UNIT_OF[source]
    compile_unit(compiler, folder / unit, folder / "mutant.o")
    others = [path for name, path in objects.items() if name != unit]
    kernels = link(compiler, [folder / "mutant.o", *others], folder / "kernels.so")
    for route in routes:
        with pytest.raises(AssertionError, match="error"):
            comparison(kernels, route)


@pytest.mark.parametrize("name", CPU_MUTATIONS)
def test_a_fault_in_the_cpu_kernel_is_caught(compiler, objects, tmp_path, name) -> None:
    mutation = CPU_MUTATIONS[name]
    check_mutant(compiler, objects, tmp_path, CPU_SOURCE, mutation, ["portable"])


@pytest.mark.parametrize("name", CUDA_MUTATIONS)
def test_a_fault_in_the_cuda_kernel_is_caught(compiler, objects, tmp_path, name) -> None:
    mutation = CUDA_MUTATIONS[name]
    check_mutant(compiler, objects, tmp_path, CUDA_SOURCE, mutation, ["emulated-1", "emulated-132"])


def test_the_comparison_fails_where_nothing_is_computed() -> None:
    value, logits = inputs(1, 4, 1, 8, 3, torch.float32)
    with pytest.raises(AssertionError, match="error"):
        Expected.of(value, logits, 1, 3).check(torch.zeros_like(value))


@pytest.mark.parametrize("name", CUDA_RUN_MUTATIONS)
def test_a_fault_in_the_runs_of_the_cuda_kernel_is_caught(
    compiler, objects, tmp_path, name
) -> None:
    mutation = CUDA_RUN_MUTATIONS[name]
    check_mutant(compiler, objects, tmp_path, CUDA_SOURCE, mutation, ["emulated-1"])
