"""The TensorRT plugin library through its ABI: our harness, and TensorRT-RTX's registry."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from convbert_deploy import plugin_library

from kernels.cases import library_or_skip

OPERATORS = ("SpanDynamicConv", "DepthwiseConv1D", "FusedSpanDynamicConv")


def run_harness(library) -> str:
    harness = library_or_skip(plugin_library.plugin_harness)
    done = subprocess.run(
        [str(harness), str(library)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout
    return done.stdout + done.stderr


def test_harness_walks_the_plugin(tensorrt_library) -> None:
    output = run_harness(tensorrt_library)
    assert len(re.findall(r"^ok ", output, re.MULTILINE)) >= 200
    for operator in OPERATORS:
        assert f"{operator}: a clone keeps its mask" in output
    for message in ("kernel_size is 8", "num_heads is 0", "385 channels do not divide"):
        assert message in output, f"no logged message: {message}"


@pytest.mark.gpu
def test_harness_on_the_gpu(tensorrt_library) -> None:
    output = run_harness(tensorrt_library)
    if "no GPU here" in output:
        pytest.skip("no NVIDIA GPU")
    assert "ran on the GPU; 0 failures" in output


def test_no_unresolved_tensorrt_symbol(tensorrt_library) -> None:
    binary = tensorrt_library.read_bytes()
    assert b"libnvinfer.so.1" not in binary
    assert b"libtensorrt_rtx.so.1" not in binary


_RTX = """
import sys, numpy as np, tensorrt_rtx as trt
registry = trt.get_plugin_registry()
assert registry.load_library(sys.argv[1]) is not None
assert all(registry.get_creator(name, "1", "") is not None for name in sys.argv[2:])
creator = registry.get_creator("SpanDynamicConv", "1", "")
int32 = trt.PluginFieldType.INT32
def create(heads, taps):
    fields = [trt.PluginField("num_heads", np.array([heads], np.int32), int32),
              trt.PluginField("kernel_size", np.array([taps], np.int32), int32)]
    collection = trt.PluginFieldCollection(fields)
    return creator.create_plugin("x", collection, trt.TensorRTPhase.BUILD)
assert create(6, 9) is not None
try:
    assert create(6, 8) is None
except Exception as error:
    print("refused:", error)
print("loaded")
"""


def test_loads_in_tensorrt_rtx(tensorrt_library) -> None:
    """In its own process: TensorRT-RTX aborts rather than raises when something is wrong."""
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")
    done = subprocess.run(
        [sys.executable, "-c", _RTX, str(tensorrt_library), *OPERATORS],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loaded" in done.stdout
