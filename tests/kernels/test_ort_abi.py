"""Our declaration of ONNX Runtime's C ABI against the real header, where one is at hand."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

RUNTIME = Path(__file__).resolve().parents[2] / "plugins" / "runtime"


def test_slots_and_fields_match_the_real_header() -> None:
    folder = os.environ.get("ONNXRUNTIME_INCLUDE_DIR", "/usr/include/onnxruntime")
    if not Path(folder, "onnxruntime_c_api.h").is_file():
        pytest.skip("no onnxruntime_c_api.h: set ONNXRUNTIME_INCLUDE_DIR to its folder")
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler (c++)")
    done = subprocess.run(
        [compiler, "-std=c++17", "-fsyntax-only", "-I", folder, RUNTIME / "check_ort_abi.cpp"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_only_the_entry_points_are_exported(kernels, ort_library) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm (binutils)")
    for library, prefix in ((ort_library, "RegisterCustomOps"), (kernels._name, "convbert_")):
        done = subprocess.run(
            [nm, "-D", "--defined-only", library], capture_output=True, text=True, check=True
        )
        names = [line.split()[-1] for line in done.stdout.splitlines()]
        assert names, library
        assert all(name.startswith(prefix) for name in names), names
