"""The native libraries, loaded; a test is skipped, with the command, where one is not built."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from convbert_deploy import plugin_library

from kernels.cases import Params, library_or_skip


@pytest.fixture(scope="session")
def kernels() -> ctypes.CDLL:
    library = ctypes.CDLL(str(plugin_library.kernels_library()))
    library.convbert_status_message.restype = ctypes.c_char_p
    library.convbert_span_dynamic_conv_cpu_rows.argtypes = [
        ctypes.POINTER(Params),
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int32,
    ]
    return library


@pytest.fixture(scope="session")
def ort_library() -> Path:
    return plugin_library.ort_library()


@pytest.fixture(scope="session")
def tensorrt_library() -> Path:
    return library_or_skip(plugin_library.tensorrt_library)
