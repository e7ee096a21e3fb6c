"""The buffers of one shape: fixed on the device, as a CUDA graph wants them, and pinned here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from convbert_deploy.architecture import Task
from convbert_deploy.backends.base import Batch
from convbert_deploy.backends.buckets import cut, shape_of, write_padded
from convbert_deploy.errors import InputError

Shape = tuple[int, ...]


class Memory(Protocol):
    """Where buffers come from (``cuda_device.TorchCuda``; a fake in tests)."""

    def pinned(self, shape: Sequence[int], dtype: str) -> Any: ...

    def memory(self, shape: Sequence[int], dtype: str) -> Any: ...


class DeviceBuffers:
    """int64 inputs of one ``shape`` and float32 ``outputs`` (shape by name), allocated once.

    ``write`` and ``read`` touch host memory only, ``copy_in`` and ``copy_out`` only start copies on
    the current stream: between them nothing is allocated and nothing waits.
    """

    def __init__(
        self, memory: Memory, inputs: Sequence[str], shape: Shape, outputs: Mapping[str, Shape]
    ) -> None:
        self.shape = shape
        self._inputs = {name: _Pair(memory, shape, "int64") for name in inputs}
        self._outputs = {name: _Pair(memory, each, "float32") for name, each in outputs.items()}

    def address(self, name: str) -> int:
        """Device address of an input or output; it never changes."""
        return (self._inputs | self._outputs)[name].device.data_ptr()

    def write(self, batch: Batch) -> None:
        """Put the batch, padded up to ``shape``, where ``copy_in`` takes it from.

        Raises:
            InputError: an input is missing.
        """
        for name, pair in self._inputs.items():
            if name not in batch:
                raise InputError(f"the batch lacks {name}: it has {', '.join(sorted(batch))}")
            write_padded(pair.host_array, name, batch[name])

    def copy_in(self) -> None:
        for pair in self._inputs.values():
            pair.device.copy_(pair.host, non_blocking=True)

    def copy_out(self) -> None:
        for pair in self._outputs.values():
            pair.host.copy_(pair.device, non_blocking=True)

    def read(self, batch: Batch, task: Task) -> dict[str, np.ndarray]:
        """The answer to ``batch``, copied out of the pinned buffers and cut to its shape."""
        shape = shape_of(batch)
        return {name: cut(pair.host_array, shape, task) for name, pair in self._outputs.items()}


class _Pair:
    """One tensor here and there; ``host_array`` is ``host`` as numpy sees it."""

    def __init__(self, memory: Memory, shape: Shape, dtype: str) -> None:
        self.host, self.device = memory.pinned(shape, dtype), memory.memory(shape, dtype)
        self.host_array: np.ndarray = self.host.numpy()
