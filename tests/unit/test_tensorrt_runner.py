"""What of the TensorRT runner can be seen without a GPU, and the library that lends a name."""

from __future__ import annotations

import os
import sys
import types

import numpy as np
import pytest

from convbert_deploy.backends import tensorrt_loading as loading
from convbert_deploy.backends.tensorrt import TensorRTRunner
from convbert_deploy.backends.tensorrt_plan import profile_shapes
from convbert_deploy.errors import EngineError, InputError, MissingDependencyError, ShapeError
from convbert_deploy.shapes import ShapeProfile


def test_profile_shapes_follow_axis_names() -> None:
    profile = ShapeProfile.parse("batch=1:8:32,choices=2:3:4,seq=16:128:512")
    assert profile_shapes("input_ids", ("batch", "choices", "seq"), profile) == (
        (1, 2, 16),
        (8, 3, 128),
        (32, 4, 512),
    )
    assert profile_shapes("input_ids", (4, "seq"), profile) == ((4, 16), (4, 128), (4, 512))


def test_absent_module_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError) as raised:
        loading.import_tensorrt("tensorrt")
    assert "convbert-deploy[tensorrt]" in raised.value.hint


def test_old_tensorrt_is_refused(monkeypatch) -> None:
    old = types.SimpleNamespace(__version__="10.6.0")
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(EngineError, match=r"TensorRT is 10\.6\.0, expected 10\.7"):
        loading.import_tensorrt("tensorrt")


def test_runner_without_gpu_says_so(monkeypatch) -> None:
    import torch

    monkeypatch.setitem(sys.modules, "tensorrt", types.SimpleNamespace(__version__="11.0.0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="needs an NVIDIA GPU"):
        TensorRTRunner(b"", kind="tensorrt").__enter__()


class _Engine:
    def get_tensor_profile_shape(self, name: str, index: int):
        return (1, 16), (8, 128), (32, 512)


@pytest.mark.parametrize("shape", [(33, 16), (1, 15), (1, 2, 16)])
def test_shape_outside_the_profile_is_refused(shape) -> None:
    runner = TensorRTRunner(b"", kind="tensorrt")
    runner._engine = _Engine()
    with pytest.raises(ShapeError, match=r"the plan takes \(1, 16\) to \(32, 512\)"):
        runner._input("input_ids", {"input_ids": np.zeros(shape, np.int64)})
    with pytest.raises(InputError, match="lacks attention_mask"):
        runner._input("attention_mask", {"input_ids": np.zeros(shape, np.int64)})


@pytest.mark.skipif(sys.platform != "linux", reason="ELF is Linux")
def test_forwarding_library_loads_and_resolves_what_it_needs() -> None:
    import ctypes

    for number in range(2):  # two: the loader must not take the second for the first
        soname = f"libconvbert_forward_test_{number}.so"
        content = loading.forwarding_library(soname=soname, needed="libm.so.6")
        library = loading._load_from_memory(content, soname)
        library.cos.restype = ctypes.c_double
        assert library.cos(ctypes.c_double(0.0)) == 1.0
        # the loader finds it by its SONAME from now on, though no such file exists
        ctypes.CDLL(soname, mode=os.RTLD_NOLOAD)
        with pytest.raises(OSError, match="absent"):
            ctypes.CDLL("libconvbert_absent.so", mode=os.RTLD_NOLOAD)
