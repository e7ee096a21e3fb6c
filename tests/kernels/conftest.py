"""The native libraries, loaded; a test is skipped, with the command, where one is not built."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from convbert_deploy import plugin_library

from kernels.cases import library_or_skip, load_kernels, torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The references are many small steps: on a busy machine torch's threads, meeting after each,
    make them 30 times as slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def kernels() -> ctypes.CDLL:
    return load_kernels(plugin_library.kernels_library())


@pytest.fixture(scope="session")
def ort_library() -> Path:
    return plugin_library.ort_library()


@pytest.fixture(scope="session")
def tensorrt_library() -> Path:
    return library_or_skip(plugin_library.tensorrt_library)
