"""A GPU in host memory for the runners: the order of what they do, and numbers that pass through.

``FakeTensorRT`` and ``FakeOnnxRuntime`` compute, on whatever lies at the addresses they were given,
the same toy model: ``last_hidden_state[b, s, 0]`` is the sum of the row's unmasked ids, ``[b, s, 1]``
the id times its mask.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from convbert_deploy.backends.graph_cache import CaptureRefusedError


def toy_answer(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    real = ids * mask
    sums = np.broadcast_to(real.sum(-1, keepdims=True), ids.shape)
    return np.stack([sums, real], -1).astype(np.float32)


class FakeTensor:
    def __init__(self, device: FakeDevice, shape, dtype: str, kind: str) -> None:
        # no two tensors share an address while both live, as on a device
        self.array = np.full(shape, 99, dtype)
        self.device, self.kind = device, kind

    def data_ptr(self) -> int:
        return self.array.__array_interface__["data"][0]

    def numpy(self) -> np.ndarray:
        assert self.kind == "pinned", "device memory read from the host"
        return self.array

    def copy_(self, source: FakeTensor, *, non_blocking: bool) -> None:
        assert non_blocking and {self.kind, source.kind} == {"pinned", "device"}
        assert self.device.inside, "a copy outside the runner's stream"
        self.device.log.append("copy in" if self.kind == "device" else "copy out")
        self.array[:] = source.array


class FakeDevice:
    """``refuses``: what capture fails with."""

    index, stream, name = 0, 4711, "fake"

    def __init__(self, refuses: str | None = None) -> None:
        self.log: list[str] = []
        self.inside = False
        self.allocations = 0
        self._refuses = refuses
        self._tensors: dict[int, np.ndarray] = {}

    def pinned(self, shape, dtype: str) -> FakeTensor:
        return FakeTensor(self, shape, dtype, "pinned")

    def memory(self, shape, dtype: str) -> FakeTensor:
        self.allocations += 1
        tensor = FakeTensor(self, shape, dtype, "device")
        self._tensors[tensor.data_ptr()] = tensor.array
        return tensor

    def at(self, address: int) -> np.ndarray:
        """The device memory allocated at an address."""
        return self._tensors[address]

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before

    def synchronize(self) -> None:
        self.log.append("wait")

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.log.append("capture")
        if self._refuses:
            raise CaptureRefusedError(self._refuses)

        def replay() -> None:
            self.log.append("replay")
            work()

        return replay


class FakeTensorRT:
    """The module: as much of it as the runner uses. ``profiles``: (low, opt, high) of each."""

    __version__ = "11.0.0"
    float32 = "float32"
    ILogger = type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0, "__init__": lambda self: None})
    TensorIOMode = types.SimpleNamespace(INPUT="in", OUTPUT="out")
    ExecutionContextAllocationStrategy = types.SimpleNamespace(USER_MANAGED="ours")

    def __init__(self, device: FakeDevice, profiles, *, capturable: bool | None = None) -> None:
        self.device, self.profiles, self.capturable = device, profiles, capturable
        self.contexts: list[FakeContext] = []
        self.loads = True
        self.device_memory_size_v2 = 1000
        self.num_optimization_profiles = len(profiles)
        self.names = ("input_ids", "attention_mask", "token_type_ids", "last_hidden_state")
        self.num_io_tensors = len(self.names)

    # runtime
    def Runtime(self, logger: Any) -> FakeTensorRT:
        return self

    def deserialize_cuda_engine(self, plan: bytes) -> FakeTensorRT | None:
        return self if self.loads else None

    # engine
    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "out" if name == "last_hidden_state" else "in"

    def get_tensor_dtype(self, name: str) -> str:
        return self.float32

    def get_tensor_profile_shape(self, name: str, index: int):
        return self.profiles[index]

    def create_execution_context(self, strategy: str) -> FakeContext:
        assert strategy == "ours"
        context = FakeContext(self)
        if self.capturable is not None:
            context.is_stream_capturable = lambda stream: self.capturable
        self.contexts.append(context)
        return context


class FakeContext:
    def __init__(self, trt: FakeTensorRT) -> None:
        self._trt, self._device = trt, trt.device
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = ()
        self.profile: int | None = None
        self.scratch: tuple[int, int] | None = None

    def set_device_memory(self, address: int, size: int) -> None:
        self.scratch = (address, size)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == self._device.stream
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (*self.shape, 2)

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self._device.stream and self.scratch is not None
        self._device.log.append("run")
        tensors = {name: self._device.at(address) for name, address in self.addresses.items()}
        tensors["last_hidden_state"][:] = toy_answer(
            tensors["input_ids"], tensors["attention_mask"]
        )
        return True


class FakeOnnxRuntime:
    """The module. ``fails``: graph ids whose run fails; ``no_graphs``: why a session with CUDA
    graphs cannot be opened."""

    def __init__(self, device: FakeDevice, *, fails=(), no_graphs: str | None = None) -> None:
        self.device, self.fails, self.no_graphs = device, set(fails), no_graphs
        self.settings: list[dict[str, str]] = []
        self.graphs: list[str] = []

    class SessionOptions:
        log_severity_level = intra_op_num_threads = None

    class RunOptions:
        def __init__(self) -> None:
            self.entries: dict[str, str] = {}

        def add_run_config_entry(self, key: str, value: str) -> None:
            self.entries[key] = value

    def InferenceSession(self, model, options, *, providers) -> FakeOnnxRuntime:
        (_, settings), _ = providers
        self.settings.append(settings)
        if settings["enable_cuda_graph"] == "1" and self.no_graphs:
            raise RuntimeError(self.no_graphs)
        return self

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def get_inputs(self):
        names = ("input_ids", "attention_mask", "token_type_ids")
        return [types.SimpleNamespace(name=name) for name in names]

    def get_outputs(self):
        return [types.SimpleNamespace(name="last_hidden_state", shape=["batch", "seq", 2])]

    def io_binding(self) -> FakeBinding:
        return FakeBinding(self.device)

    def run_with_iobinding(self, binding: FakeBinding, options: RunOptions) -> None:
        graph = options.entries["gpu_graph_id"]
        assert options.entries["disable_synchronize_execution_providers"] == "1"
        self.graphs.append(graph)
        if graph in self.fails:
            raise RuntimeError("CUDA error 900: operation not permitted when stream is capturing")
        self.device.log.append("run")
        bound = binding.tensors
        bound["last_hidden_state"][:] = toy_answer(bound["input_ids"], bound["attention_mask"])


class FakeBinding:
    def __init__(self, device: FakeDevice) -> None:
        self._device, self.tensors = device, {}

    def _bind(self, name, kind, index, dtype, shape, address) -> None:
        tensor = self._device.at(address)
        assert (kind, index) == ("cuda", 0)
        assert (tensor.shape, tensor.dtype) == (tuple(shape), np.dtype(dtype))
        self.tensors[name] = tensor

    bind_input = bind_output = _bind
