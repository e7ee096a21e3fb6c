"""Where the native libraries are: built by CMake, installed to ``convbert_deploy/lib``."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from convbert_deploy.errors import PluginError

_ORT = "libconvbert_ort_ops.so"
_TENSORRT = "libconvbert_trt_plugins.so"
_KERNELS = "libconvbert_kernels.so"
_HARNESS = "convbert_plugin_harness"

_BUILD = "build it with `make native` in a checkout, or `pip install .`"
_BUILD_TENSORRT = (
    "it is built where nvcc and NvInfer.h are found: `make native` in a checkout, or "
    "`pip install . -C cmake.define.TensorRT_ROOT=/path/to/TensorRT`"
)


def _candidate(name: str) -> Path:
    return Path(str(importlib.resources.files("convbert_deploy") / "lib" / name))


def _find(name: str, purpose: str, hint: str) -> Path:
    path = _candidate(name)
    if not path.is_file():
        raise PluginError(f"{purpose} ({name}) is not built: {path} does not exist", hint=hint)
    return path


def ort_library() -> Path:
    """The ONNX Runtime custom-op library. Raises PluginError when it is not built."""
    return _find(_ORT, "the ONNX Runtime operator library", _BUILD)


def tensorrt_library() -> Path:
    """The TensorRT and TensorRT-RTX plugin library. Raises PluginError when it is not built."""
    return _find(_TENSORRT, "the TensorRT plugin library", _BUILD_TENSORRT)


def kernels_library() -> Path:
    """The kernels behind a C ABI, for ctypes. Raises PluginError when it is not built."""
    return _find(_KERNELS, "the kernel library", _BUILD)


def plugin_harness() -> Path:
    """The program that drives the TensorRT library without TensorRT. Raises PluginError."""
    return _find(_HARNESS, "the plugin harness", _BUILD_TENSORRT)


def available() -> dict[str, Path | None]:
    """Each library's short name and its path, None where it is not built."""
    names = {"onnxruntime": _ORT, "tensorrt": _TENSORRT, "kernels": _KERNELS}
    paths = {short: _candidate(name) for short, name in names.items()}
    return {short: path if path.is_file() else None for short, path in paths.items()}
