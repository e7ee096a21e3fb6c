"""Kernels compiled from a copy of plugins/ with one replacement in their source.

Without the wider instruction sets: the CPU kernel runs as `portable`, the CUDA kernel through its
emulation on the host.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from kernels.cases import load_kernels

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
_FLAGS = ["-std=c++17", "-fPIC", "-w"]
#: Other operators are built on it, and ``load_kernels`` looks for it.
_BASE = "span_dynamic_conv"
_PARTS = ("", "_emulated", "_c")


def find_compiler() -> str:
    path = shutil.which("c++")
    if path is None:
        pytest.skip("no C++ compiler (c++)")
    return path


@dataclasses.dataclass(frozen=True)
class Mutants:
    """One operator's units, compiled as they are, and the means to swap one of them.

    comparison(kernels, route) must raise AssertionError with "error" for a wrong kernel.
    """

    compiler: str
    operator: str
    objects: dict[str, Path]
    comparison: Callable[..., None]
    optimization: str

    @classmethod
    def of(
        cls,
        operator: str,
        folder: Path,
        comparison: Callable[..., None],
        *,
        parts: Iterable[str] = _PARTS,
        others: Iterable[str] = (),
        optimization: str = "-O1",
    ) -> Mutants:
        """parts: endings of the operator's units. others: units that it is linked with besides.
        optimization: the compiler's; -O0 where compiling takes longer than the comparison."""
        compiler = find_compiler()
        units = ["runtime/instruction_set.cpp", "runtime/c_entry.cpp", *others]
        for name, ends in {_BASE: _PARTS, operator: parts}.items():
            units += [f"{name}/{name}{end}.cpp" for end in ends]
        objects = {unit: folder / f"{Path(unit).stem}.o" for unit in units}
        for unit, target in objects.items():
            _compile(compiler, optimization, PLUGINS / unit, target)
        return cls(compiler, operator, objects, comparison, optimization)

    def check_unmutated(self, folder: Path, routes: Iterable[str]) -> None:
        kernels = self._link(list(self.objects.values()), folder / "kernels.so")
        for route in routes:
            self.comparison(kernels, route)

    def check_cpu(self, folder: Path, mutation: tuple[str, str]) -> None:
        """The mutant of the CPU kernel is caught."""
        source = f"{self.operator}/{self.operator}_rows.h"
        self.check(folder, source, f"{self.operator}/{self.operator}.cpp", mutation, ["portable"])

    def check_cuda(self, folder: Path, mutation: tuple[str, str], routes: Iterable[str]) -> None:
        """The mutant of the CUDA kernel is caught on each of the emulated routes."""
        source = f"{self.operator}/{self.operator}.cuh"
        unit = f"{self.operator}/{self.operator}_emulated.cpp"
        self.check(folder, source, unit, mutation, routes)

    def check(
        self,
        folder: Path,
        source: str,
        unit: str,
        mutation: tuple[str, str],
        routes: Iterable[str],
    ) -> None:
        """The mutant of ``unit``, which includes ``source`` or is it, is caught on each route."""
        for name in sorted({name.split("/")[0] for name in self.objects}):
            shutil.copytree(PLUGINS / name, folder / name)
        text = (folder / source).read_text()
        before, after = mutation
        count = text.count(before)
        assert count == 1, f"{source} has {before!r} {count} times, not once"
        (folder / source).write_text(text.replace(before, after))
        _compile(self.compiler, self.optimization, folder / unit, folder / "mutant.o")
        others = [path for name, path in self.objects.items() if name != unit]
        kernels = self._link([folder / "mutant.o", *others], folder / "kernels.so")
        for route in routes:
            with pytest.raises(AssertionError, match="error"):
                self.comparison(kernels, route)

    def _link(self, objects: list[Path], target: Path):
        _run([self.compiler, "-shared", "-fPIC", *objects, "-o", target])
        return load_kernels(target)


def _compile(compiler: str, optimization: str, source: Path, target: Path) -> None:
    _run([compiler, optimization, *_FLAGS, "-c", source, "-o", target])


def _run(command: list) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
