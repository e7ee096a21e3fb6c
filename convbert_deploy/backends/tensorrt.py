"""TensorRT and TensorRT-RTX: run a plan on an NVIDIA GPU, and the door to building one.

One code path serves both. Device memory and the stream are torch's, which the package needs anyway.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from convbert_deploy.architecture import Task
from convbert_deploy.backends.base import Batch
from convbert_deploy.backends.tensorrt_loading import (
    Kind,
    capturing_logger,
    first_error,
    import_tensorrt,
    load_plugins,
)
from convbert_deploy.backends.tensorrt_plan import Plan, PlanFacts, PlanOptions, build_plan
from convbert_deploy.errors import EngineError, InputError, MissingDependencyError, ShapeError

__all__ = [
    "Kind",
    "Plan",
    "PlanFacts",
    "PlanOptions",
    "TensorRTRunner",
    "build_plan",
    "import_tensorrt",
]

_REBUILD = "build the engine again on this machine: convbert-deploy build-engine GRAPH"


class TensorRTRunner:
    """A plan as a Runner.

    Args:
        plan: a serialized engine.
        kind: the runtime that built it.
        task: if given, the plan must have this task's outputs.
        name: label for tables.
        plugin_library: needed by a plan with plugin layers and no library embedded.
        host_code_allowed: let a plan bring its own native code (``PlanOptions.embed_plugin``). Only
            for plans from a source you trust.
    """

    def __init__(
        self,
        plan: bytes,
        *,
        kind: Kind,
        task: Task | None = None,
        name: str | None = None,
        plugin_library: pathlib.Path | None = None,
        host_code_allowed: bool = False,
    ) -> None:
        self.name = name or kind
        self._plan, self._kind, self._task = plan, kind, task
        self._plugin_library, self._host_code_allowed = plugin_library, host_code_allowed
        self._trt: Any = None
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self._stream: Any = None
        self.input_names: tuple[str, ...] = ()
        self.output_names: tuple[str, ...] = ()

    def __enter__(self) -> TensorRTRunner:
        """Raises:
        MissingDependencyError: TensorRT or torch is not installed.
        EngineError: no NVIDIA GPU, or a plan for another GPU or version.
        PluginError: the plugin library is missing or refused.
        """
        trt = import_tensorrt(self._kind)
        torch = _torch_with_gpu(self._kind)
        logger = capturing_logger(trt)
        if self._plugin_library is not None:
            load_plugins(trt, self._kind, self._plugin_library)
        self._trt, self._runtime = trt, trt.Runtime(logger)
        # before anything is deserialized: the flag is what makes the plan's own code run
        self._runtime.engine_host_code_allowed = self._host_code_allowed
        self._engine = self._runtime.deserialize_cuda_engine(self._plan)
        if self._engine is None:
            message = first_error(trt, logger)
            self.__exit__()
            raise EngineError(
                f"{self._kind} {trt.__version__} cannot load the plan on "
                f"{torch.cuda.get_device_name()}: {message}",
                hint=_REBUILD,
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            message = first_error(trt, logger)
            self.__exit__()
            raise EngineError(f"{self._kind} cannot start the plan: {message}", hint=_REBUILD)
        self._stream = torch.cuda.Stream()
        self._read_names()
        return self

    def __exit__(self, *exception: object) -> None:
        # The order TensorRT wants: what was made last goes first.
        self._context = self._engine = self._runtime = self._stream = None

    def infer(self, batch: Batch) -> dict[str, np.ndarray]:
        """Copy in, run, copy out; returns once the outputs are on the host.

        Raises:
            ShapeError: a shape outside the plan's profile.
            EngineError: the GPU reported an error.
        """
        import torch

        with torch.cuda.stream(self._stream):
            held = {}
            for name in self.input_names:
                tensor = self._input(name, batch)
                held[name] = tensor
                self._context.set_tensor_address(name, tensor.data_ptr())
            for name in self.output_names:
                shape = tuple(self._context.get_tensor_shape(name))
                if min(shape, default=0) < 0:
                    raise EngineError(f"the shape of output {name} is unknown: {shape}")
                held[name] = torch.empty(shape, dtype=torch.float32, device="cuda")
                self._context.set_tensor_address(name, held[name].data_ptr())
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                raise EngineError(f"{self._kind} could not run the plan", hint=_REBUILD)
            self._stream.synchronize()
            return {name: held[name].cpu().numpy() for name in self.output_names}

    def _input(self, name: str, batch: Batch) -> Any:
        """The batch's array on the GPU, its shape told to the context."""
        import torch

        if name not in batch:
            raise InputError(f"the batch lacks {name}: it has {', '.join(sorted(batch))}")
        array = np.ascontiguousarray(batch[name], dtype=np.int64)
        low, _, high = (tuple(s) for s in self._engine.get_tensor_profile_shape(name, 0))
        fits = len(array.shape) == len(low) and all(
            least <= size <= most for least, size, most in zip(low, array.shape, high, strict=True)
        )
        if not fits or not self._context.set_input_shape(name, array.shape):
            raise ShapeError(
                f"{name} has shape {array.shape}, the plan takes {low} to {high}",
                hint="build-engine --shapes batch=MIN:OPT:MAX,seq=MIN:OPT:MAX sets the bounds",
            )
        return torch.from_numpy(array).to("cuda")

    def _read_names(self) -> None:
        engine, mode = self._engine, self._trt.TensorIOMode
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        kinds = {name: engine.get_tensor_mode(name) for name in names}
        self.input_names = tuple(name for name in names if kinds[name] == mode.INPUT)
        self.output_names = tuple(name for name in names if kinds[name] == mode.OUTPUT)
        for name in self.output_names:
            if engine.get_tensor_dtype(name) != self._trt.float32:
                self.__exit__()
                raise EngineError(f"output {name} of the plan is not float32", hint=_REBUILD)
        if self._task is not None and set(self.output_names) != set(self._task.output_names):
            found = ", ".join(self.output_names)
            self.__exit__()
            raise EngineError(
                f"the plan's outputs are {found}, {self._task} has "
                f"{', '.join(self._task.output_names)}"
            )


def _torch_with_gpu(kind: Kind) -> Any:
    """torch, once it has seen an NVIDIA GPU."""
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError("torch", needed_for=f"backend {kind}", extra=kind) from error
    if not torch.cuda.is_available():
        reason = (
            "this torch is a CPU build" if torch.version.cuda is None else "torch finds none here"
        )
        raise EngineError(
            f"a {kind} plan needs an NVIDIA GPU with its driver; {reason}",
            hint="build-engine --backend onnxruntime makes an engine for the CPU",
        )
    return torch
