"""What of the TensorRT runner can be seen without a GPU, and the library that lends a name."""

from __future__ import annotations

import os
import sys
import types

import numpy as np
import pytest

from convbert_deploy.architecture import Task
from convbert_deploy.backends import tensorrt
from convbert_deploy.backends import tensorrt_loading as loading
from convbert_deploy.backends.base import RunnerOptions
from convbert_deploy.backends.tensorrt import TensorRTRunner
from convbert_deploy.backends.tensorrt_plan import profile_shapes
from convbert_deploy.errors import EngineError, InputError, MissingDependencyError, ShapeError
from convbert_deploy.shapes import ShapeProfile

from fake_gpu import FakeDevice, FakeTensorRT, toy_answer


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
        TensorRTRunner(b"", kind="tensorrt", task=Task.ENCODER).__enter__()


LOW, HIGH = (1, 16), (32, 512)
ONE_PROFILE = [(LOW, (8, 128), HIGH)]


@pytest.fixture
def runner_on(monkeypatch):
    """An opened TensorRTRunner on a FakeTensorRT; (runner, the fake, its device)."""
    opened = []

    def make(profiles=ONE_PROFILE, *, padding="masked", capturable=None, refuses=None, **options):
        device = FakeDevice(refuses)
        trt = FakeTensorRT(device, profiles, capturable=capturable)
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        monkeypatch.setattr(tensorrt, "TorchCuda", lambda *args, **kwargs: device)
        runner = TensorRTRunner(
            b"plan",
            kind="tensorrt",
            task=Task.ENCODER,
            profile=ShapeProfile.parse("batch=1:8:32,seq=16:128:512"),
            padding=padding,
            options=RunnerOptions(**options),
        )
        opened.append(runner.__enter__())
        return runner, trt, device

    yield make
    for runner in opened:
        runner.__exit__()


def batch_of(rows: int, seq: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, seq + 1, (rows, 1))
    return {
        "input_ids": random.integers(1, 99, (rows, seq)),
        "attention_mask": (np.arange(seq) < lengths).astype(np.int64),
        "token_type_ids": np.zeros((rows, seq), np.int64),
    }


def check(runner, batch) -> None:
    expected = toy_answer(batch["input_ids"], batch["attention_mask"])
    np.testing.assert_array_equal(runner.infer(batch)["last_hidden_state"], expected)


COPIES = ["copy in"] * 3


def test_a_shape_is_run_then_captured_then_replayed(runner_on) -> None:
    runner, trt, device = runner_on()
    check(runner, batch_of(3, 20))
    assert device.log == [*COPIES, "run", "copy out", "wait", "capture"]
    allocations = device.allocations
    for seed in (1, 2):
        device.log.clear()
        check(runner, batch_of(3, 20, seed))
        assert device.log == ["replay", *COPIES, "run", "copy out", "wait"]
    assert device.allocations == allocations and len(trt.contexts) == 1


def test_shapes_of_one_bucket_share_a_graph(runner_on) -> None:
    runner, trt, _ = runner_on()
    for shape in [(5, 100), (6, 96), (6, 65), (5, 128)]:
        check(runner, batch_of(*shape))
    assert [context.shape for context in trt.contexts] == [(6, 128), (6, 96)]


def test_hf_plans_run_every_shape_as_it_is(runner_on) -> None:
    runner, trt, device = runner_on(padding="hf")
    for shape in [(5, 100), (6, 96), (5, 100)]:
        check(runner, batch_of(*shape))
    assert [context.shape for context in trt.contexts] == [(5, 100), (6, 96)]
    assert device.log.count("capture") == 2 and device.log.count("replay") == 1


def test_contexts_share_scratch_and_are_bounded(runner_on) -> None:
    runner, trt, device = runner_on(max_graphs=2)
    for seq in (16, 32, 64, 16):
        check(runner, batch_of(2, seq))
    assert [context.shape[1] for context in trt.contexts] == [16, 32, 64, 16], "16 was dropped"
    assert len({context.scratch for context in trt.contexts}) == 1
    assert device.at(trt.contexts[0].scratch[0]).nbytes == trt.device_memory_size_v2


def test_the_first_profile_that_holds_the_shape_is_taken(runner_on) -> None:
    profiles = [((1, 16), (8, 64), (32, 64)), ((1, 65), (8, 128), (32, 512))]
    runner, trt, _ = runner_on(profiles)
    for seq in (64, 70, 16):
        check(runner, batch_of(2, seq))
    assert [context.profile for context in trt.contexts] == [0, 1, 0]


@pytest.mark.parametrize(
    "settings",
    [{"cuda_graphs": False}, {"capturable": False}],
    ids=["not asked for", "the runtime says no"],
)
def test_without_capture_the_same_work_runs_plainly(runner_on, settings) -> None:
    runner, _, device = runner_on(**settings)
    for seed in range(3):
        device.log.clear()
        check(runner, batch_of(3, 20, seed))
        assert device.log == [*COPIES, "run", "copy out", "wait"]


def test_refused_capture_falls_back(runner_on) -> None:
    runner, _, device = runner_on(refuses="operation not permitted when stream is capturing")
    for seed in range(3):
        check(runner, batch_of(3, 20, seed))
    assert device.log.count("capture") == 1 and "replay" not in device.log


def test_rtx_compiles_kernels_for_a_shape_before_it_is_captured(runner_on) -> None:
    runner, trt, _ = runner_on()
    asked = types.SimpleNamespace()
    asked.set_execution_context_allocation_strategy = lambda given: setattr(asked, "ours", given)
    trt.DynamicShapesKernelSpecializationStrategy = types.SimpleNamespace(EAGER="eager")
    trt.create_runtime_config = lambda: asked
    make = trt.create_execution_context
    trt.create_execution_context = lambda config: make(config.ours)
    check(runner, batch_of(3, 20))
    assert asked.dynamic_shapes_kernel_specialization_strategy == "eager"


def test_subclasses_see_every_context_before_it_runs(runner_on) -> None:
    """As the profiling runner does."""
    runner, trt, device = runner_on(padding="hf", cuda_graphs=False)
    seen = []
    runner._context_made = lambda context: seen.append((context, "run" in device.log))
    check(runner, batch_of(2, 20))
    assert seen == [(trt.contexts[0], False)]


def test_the_fakes_have_no_method_that_tensorrt_lacks() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    used = {
        trt.ICudaEngine: (
            *("device_memory_size_v2", "num_optimization_profiles", "num_io_tensors"),
            *("get_tensor_name", "get_tensor_mode", "get_tensor_dtype"),
            *("get_tensor_profile_shape", "create_execution_context", "create_runtime_config"),
        ),
        trt.IExecutionContext: (
            *("set_device_memory", "set_optimization_profile_async", "set_input_shape"),
            *("get_tensor_shape", "set_tensor_address", "execute_async_v3", "is_stream_capturable"),
        ),
        trt.IRuntimeConfig: (
            "set_execution_context_allocation_strategy",
            "dynamic_shapes_kernel_specialization_strategy",
        ),
        trt.ExecutionContextAllocationStrategy: ("USER_MANAGED",),
        trt.DynamicShapesKernelSpecializationStrategy: ("EAGER",),
    }
    for kind, names in used.items():
        assert not [name for name in names if not hasattr(kind, name)], kind


@pytest.mark.parametrize("shape", [(33, 16), (1, 15), (1, 2, 16)])
def test_shape_outside_the_profile_is_refused(runner_on, shape) -> None:
    runner, _, _ = runner_on(padding="hf")
    batch = {name: np.ones(shape, np.int64) for name in runner.input_names}
    with pytest.raises(ShapeError, match=r"the plan takes \(1, 16\) to \(32, 512\)"):
        runner.infer(batch)


def test_missing_input_is_named(runner_on) -> None:
    runner, _, _ = runner_on()
    with pytest.raises(InputError, match="lacks attention_mask"):
        runner.infer({"input_ids": np.ones((1, 16), np.int64)})


def test_plan_of_another_machine_or_task_is_refused(runner_on) -> None:
    runner, trt, _ = runner_on()
    trt.loads = False
    with pytest.raises(EngineError, match="cannot load the plan"):
        runner.__enter__()
    trt.loads = True
    runner._task = Task.QUESTION_ANSWERING
    with pytest.raises(EngineError, match="outputs are last_hidden_state, question-answering has"):
        runner.__enter__()


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
