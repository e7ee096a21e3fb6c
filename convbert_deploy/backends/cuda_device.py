"""A GPU as torch offers it: one stream, memory, CUDA graphs.

Written after torch's documentation of ``torch.cuda``; not run yet, for want of a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from convbert_deploy.backends.graph_cache import CaptureRefusedError
from convbert_deploy.errors import EngineError, MissingDependencyError


class TorchCuda:
    """One GPU with a stream of its own."""

    def __init__(self, index: int, *, needed_for: str, extra: str) -> None:
        """Raises:
        MissingDependencyError: torch is not installed.
        EngineError: torch sees no NVIDIA GPU of that index.
        """
        self._torch = torch_with_gpu(needed_for, extra)
        count = self._torch.cuda.device_count()
        if not 0 <= index < count:
            raise EngineError(f"there is no GPU {index}: torch sees {count}", hint="nvidia-smi -L")
        self.index = index
        self.name: str = self._torch.cuda.get_device_name(index)
        self._stream = self._torch.cuda.Stream(index)

    @property
    def stream(self) -> int:
        """The stream's handle (``cudaStream_t``)."""
        return self._stream.cuda_stream

    def pinned(self, shape: Sequence[int], dtype: str) -> Any:
        """A host tensor that the GPU can copy from and to while the CPU goes on."""
        return self._torch.empty(tuple(shape), dtype=getattr(self._torch, dtype), pin_memory=True)

    def memory(self, shape: Sequence[int], dtype: str) -> Any:
        """A tensor on the GPU, aligned to 512 bytes."""
        return self._torch.empty(
            tuple(shape), dtype=getattr(self._torch, dtype), device=f"cuda:{self.index}"
        )

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        with self._torch.cuda.device(self.index), self._torch.cuda.stream(self._stream):
            yield

    def synchronize(self) -> None:
        self._stream.synchronize()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """See ``graph_cache.Device``."""
        graph = self._torch.cuda.CUDAGraph()
        # Only this thread is held to the rules of capture: another may allocate meanwhile.
        captured = self._torch.cuda.graph(
            graph, stream=self._stream, capture_error_mode="thread_local"
        )
        try:
            with captured:
                work()
        except (RuntimeError, EngineError) as error:
            raise CaptureRefusedError(f"no CUDA graph: {error}") from error
        return graph.replay


def torch_with_gpu(needed_for: str, extra: str) -> Any:
    """torch, once it has seen an NVIDIA GPU.

    Raises:
        MissingDependencyError: torch is not installed.
        EngineError: torch sees no NVIDIA GPU.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError("torch", needed_for=needed_for, extra=extra) from error
    if not torch.cuda.is_available():
        reason = (
            "this torch is a CPU build" if torch.version.cuda is None else "torch finds none here"
        )
        raise EngineError(
            f"{needed_for} needs an NVIDIA GPU with its driver; {reason}",
            hint="build-engine --backend onnxruntime makes an engine for the CPU",
        )
    return torch
