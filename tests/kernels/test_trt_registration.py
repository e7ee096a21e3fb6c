"""The TensorRT plugin library registers itself where a host only opens it (Triton, LD_PRELOAD).

TensorRT is played by a small library that has its two entry points and counts calls of the registry's
virtual functions: no TensorRT is needed.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys

import pytest

OPERATORS = 3
_SLOTS = 64
_FAKE = """
#include <stdint.h>
int calls[%(slots)d];
%(functions)s
static void* const vtable[] = {%(names)s};
static struct { void* const* vtable; } registry = {vtable};
void* getPluginRegistry(void) { return &registry; }
int32_t getInferLibVersion(void) { return %(version)d; }
"""
_HOST = """
import ctypes, sys
fake = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_LOCAL) if sys.argv[1] else None
plugin = ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_LOCAL)
fake = fake or ctypes.CDLL(f"libnvinfer.so.{plugin.convbert_tensorrt_major()}")
def calls():
    return [c for c in (ctypes.c_int * 64).in_dll(fake, "calls") if c]
registered = calls()
count = ctypes.c_int32()
plugin.getCreators(ctypes.byref(count))
print(registered, calls(), count.value)
"""


@pytest.fixture
def major(tensorrt_library) -> int:
    """Of the TensorRT headers the library was built with."""
    return ctypes.CDLL(str(tensorrt_library)).convbert_tensorrt_major()


@pytest.fixture
def fake_tensorrt(tmp_path, major):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler (cc) for the stand-in of TensorRT")

    def build(version: int):
        source = tmp_path / "fake.c"
        names = [f"f{slot}" for slot in range(_SLOTS)]
        functions = "\n".join(
            f"static int f{slot}(void* self) {{ ++calls[{slot}]; return 1; }}"
            for slot in range(_SLOTS)
        )
        values = {"slots": _SLOTS, "functions": functions, "names": ",".join(names)}
        source.write_text(_FAKE % (values | {"version": version}))
        library = tmp_path / f"libnvinfer.so.{major}"
        command = [compiler, "-shared", "-fPIC", "-w", source, "-o", library]
        subprocess.run([*command, f"-Wl,-soname,{library.name}"], check=True)
        return library

    return build


def run_host(fake, plugin, **environment) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _HOST, str(fake), str(plugin)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_registers_itself_when_opened_locally(fake_tensorrt, tensorrt_library, major) -> None:
    """Triton's ``plugins=``: dlopen(RTLD_LOCAL) beside a TensorRT opened the same way. Whoever asks
    for the creators registers them himself, so they are taken back first."""
    done = run_host(fake_tensorrt(major * 10000 + 1401), tensorrt_library)
    assert done.stdout.split("\n")[0] == f"[{OPERATORS}] [{OPERATORS}, {OPERATORS}] {OPERATORS}", (
        done
    )


def test_registers_itself_under_ld_preload(fake_tensorrt, tensorrt_library, major) -> None:
    folder = str(fake_tensorrt(major * 10000 + 1401).parent)
    preload = {"LD_PRELOAD": str(tensorrt_library), "LD_LIBRARY_PATH": folder}
    asked = run_host("", tensorrt_library, **preload, CONVBERT_LOAD_TENSORRT="1")
    assert asked.stdout.startswith(f"[{OPERATORS}] "), asked
    not_asked = run_host("", tensorrt_library, **preload)
    assert not_asked.stdout.startswith("[] "), (
        "a preloaded library loads TensorRT only when told to"
    )


def test_a_missing_tensorrt_is_named(tensorrt_library, tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "print('alive')"],
        env={
            **os.environ,
            "LD_PRELOAD": str(tensorrt_library),
            "LD_LIBRARY_PATH": str(tmp_path),
            "CONVBERT_LOAD_TENSORRT": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "alive\n")
    assert "CONVBERT_LOAD_TENSORRT: libnvinfer.so." in done.stderr


def test_another_major_version_is_left_alone(fake_tensorrt, tensorrt_library, major) -> None:
    """Its registry is another table of functions: calling through ours would crash."""
    done = run_host(fake_tensorrt((major + 1) * 10000 + 400), tensorrt_library)
    assert done.stdout.startswith("[] [] "), done
    assert f"does not register itself in TensorRT {major + 1}" in done.stderr
