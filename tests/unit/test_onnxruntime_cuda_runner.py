"""What of the ONNX Runtime CUDA runner can be seen without a GPU."""

from __future__ import annotations

import numpy as np
import pytest

from convbert_deploy.architecture import Task
from convbert_deploy.backends import onnxruntime_cuda
from convbert_deploy.backends.base import RunnerOptions
from convbert_deploy.backends.onnxruntime_cuda import OnnxRuntimeCudaRunner
from convbert_deploy.errors import EngineError, InputError
from convbert_deploy.shapes import ShapeProfile

from fake_gpu import FakeDevice, FakeOnnxRuntime, toy_answer


@pytest.fixture
def runner_on(monkeypatch):
    """An opened runner on a FakeOnnxRuntime; (runner, the fake, its device)."""

    def make(*, padding="masked", fails=(), no_graphs=None, **options):
        device = FakeDevice()
        module = FakeOnnxRuntime(device, fails=fails, no_graphs=no_graphs)
        monkeypatch.setattr(onnxruntime_cuda, "import_onnxruntime", lambda: module)
        monkeypatch.setattr(onnxruntime_cuda, "TorchCuda", lambda *args, **kwargs: device)
        runner = OnnxRuntimeCudaRunner(
            b"graph",
            task=Task.ENCODER,
            profile=ShapeProfile.parse("batch=1:8:32,seq=16:128:512"),
            padding=padding,
            options=RunnerOptions(**options),
        )
        return runner.__enter__(), module, device

    return make


def batch_of(rows: int, seq: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(rows * seq).integers(1, 99, (rows, seq))
    mask = (np.arange(seq) < np.arange(1, rows + 1)[:, None]).astype(np.int64)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def check(runner, *shape: int) -> None:
    batch = batch_of(*shape)
    expected = toy_answer(batch["input_ids"], batch["attention_mask"])
    np.testing.assert_array_equal(runner.infer(batch)["last_hidden_state"], expected)


def test_session_shares_the_stream_and_captures(runner_on) -> None:
    _, module, device = runner_on()
    assert module.settings == [
        {"device_id": "0", "user_compute_stream": str(device.stream), "enable_cuda_graph": "1"}
    ]


def test_each_bucket_has_a_graph_and_fixed_buffers(runner_on) -> None:
    runner, module, device = runner_on()
    check(runner, 5, 100)
    assert device.log == [*["copy in"] * 3, "run", "copy out", "wait"]
    allocations = device.allocations
    for shape in [(6, 128), (5, 120)]:
        check(runner, *shape)
    assert device.allocations == allocations, "one bucket, one set of buffers"
    check(runner, 1, 16)
    assert module.graphs == ["1", "1", "1", "2"]


def test_hf_graphs_run_every_shape_as_it_is(runner_on) -> None:
    runner, module, _ = runner_on(padding="hf")
    for shape in [(5, 100), (6, 100), (5, 100)]:
        check(runner, *shape)
    assert module.graphs == ["1", "2", "1"]


def test_no_more_graphs_than_the_bound(runner_on) -> None:
    """ONNX Runtime cannot drop one, so those that are there stay."""
    runner, module, _ = runner_on(max_graphs=2)
    for seq in (16, 32, 64, 128, 256, 64, 16):
        check(runner, 2, seq)
    assert module.graphs == ["1", "2", "-1", "-1", "-1", "-1", "1"]
    assert len(runner._plain) <= 2


def test_refused_capture_runs_plainly_and_only_there(runner_on) -> None:
    runner, module, _ = runner_on(fails={"1"})
    for seq in (16, 16, 32):
        check(runner, 2, seq)
    assert module.graphs == ["1", "-1", "-1", "2"]


def test_session_that_cannot_capture_is_opened_without(runner_on) -> None:
    runner, module, _ = runner_on(no_graphs="cannot use the graph capture feature")
    assert [settings["enable_cuda_graph"] for settings in module.settings] == ["1", "0"]
    assert "graph capture" in runner.refused
    check(runner, 2, 16)
    assert module.graphs == ["-1"]


def test_graphs_can_be_left_out(runner_on) -> None:
    runner, module, _ = runner_on(cuda_graphs=False)
    check(runner, 2, 16)
    assert module.settings[0]["enable_cuda_graph"] == "0" and module.graphs == ["-1"]
    assert runner.refused is None


def test_failed_runs_and_missing_inputs_are_errors(runner_on) -> None:
    runner, _, _ = runner_on(fails={"1", "-1"})
    with pytest.raises(EngineError, match="could not run the graph"):
        runner.infer(batch_of(2, 16))
    with pytest.raises(InputError, match="lacks input_ids"):
        runner.infer({})


def test_without_a_gpu_it_says_so(monkeypatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="onnxruntime-cuda needs an NVIDIA GPU"):
        OnnxRuntimeCudaRunner(b"", task=Task.ENCODER).__enter__()
