"""The GPU as the runners use it, on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from convbert_deploy.architecture import Task
from convbert_deploy.backends.cuda_device import TorchCuda
from convbert_deploy.backends.device_buffers import DeviceBuffers
from convbert_deploy.backends.graph_cache import CaptureRefusedError, GraphedCall
from convbert_deploy.errors import EngineError


@pytest.fixture
def device() -> TorchCuda:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU that torch can use")
    return TorchCuda(0, needed_for="this test", extra="export")


@pytest.mark.gpu
def test_captured_work_moves_a_batch_through_the_gpu(device) -> None:
    with device.working():
        buffers = DeviceBuffers(device, ("input_ids",), (4, 8), {"logits": (4, 8)})
    source, target = (buffers._inputs["input_ids"].device, buffers._outputs["logits"].device)

    def work() -> None:
        buffers.copy_in()
        target.copy_(source)
        target.mul_(2)
        buffers.copy_out()

    call = GraphedCall(device, work, capture=True)
    for first in range(4):
        ids = np.arange(first, first + 15).reshape(3, 5)
        buffers.write({"input_ids": ids})
        call()
        answer = buffers.read({"input_ids": ids}, Task.QUESTION_ANSWERING)["logits"]
        np.testing.assert_array_equal(answer, 2 * ids)
    assert call.captured, call.refused


@pytest.mark.gpu
def test_work_that_waits_cannot_be_captured(device) -> None:
    with pytest.raises(CaptureRefusedError, match="no CUDA graph"), device.working():
        device.capture(device.synchronize)
    with device.working():
        assert torch.ones(3, device="cuda").sum().item() == 3, "the device still works"


@pytest.mark.gpu
def test_a_gpu_that_is_not_there_is_refused(device) -> None:
    with pytest.raises(EngineError, match="there is no GPU 99"):
        TorchCuda(99, needed_for="this test", extra="export")
