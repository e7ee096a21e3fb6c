"""TensorRT and TensorRT-RTX: run a plan on an NVIDIA GPU, and the door to building one.

One code path serves both. Device memory, the stream and CUDA graphs are torch's, which the package
needs anyway. Written after NVIDIA's documentation; tested on fakes, not run on a GPU yet.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from convbert_deploy.architecture import Task
from convbert_deploy.backends.base import Batch, RunnerOptions
from convbert_deploy.backends.buckets import Buckets, shape_of
from convbert_deploy.backends.cuda_device import TorchCuda
from convbert_deploy.backends.device_buffers import DeviceBuffers
from convbert_deploy.backends.graph_cache import GraphedCall, ShapeCache
from convbert_deploy.backends.tensorrt_loading import (
    Kind,
    capturing_logger,
    first_error,
    import_tensorrt,
    load_plugins,
)
from convbert_deploy.backends.tensorrt_plan import Plan, PlanFacts, PlanOptions, build_plan
from convbert_deploy.errors import EngineError, InputError, ShapeError
from convbert_deploy.shapes import ShapeProfile

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

    Each shape has an execution context of its own, since changing one would spoil the CUDA graph
    captured from it; all share one block of scratch memory, as they run one after the other.

    Args:
        plan: a serialized engine.
        kind: the runtime that built it.
        task: the plan must have this task's outputs.
        options: the GPU, and whether and how many shapes are captured.
        profile: the engine's, from which the shapes that batches are padded up to are taken.
        padding: the graph's; only ``masked`` batches are padded.
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
        task: Task,
        options: RunnerOptions | None = None,
        profile: ShapeProfile | None = None,
        padding: str = "hf",
        name: str | None = None,
        plugin_library: pathlib.Path | None = None,
        host_code_allowed: bool = False,
    ) -> None:
        self.name = name or kind
        self._plan, self._kind, self._task = plan, kind, task
        self._options = options or RunnerOptions()
        self._buckets = Buckets.of(profile or ShapeProfile(), padding)
        self._plugin_library, self._host_code_allowed = plugin_library, host_code_allowed
        self._trt: Any = None
        self._device: Any = None
        self._runtime: Any = None
        self._engine: Any = None
        self._scratch: Any = None
        self._calls: ShapeCache[_PlanCall] = ShapeCache(self._options.max_graphs, self._call_for)
        self.input_names: tuple[str, ...] = ()
        self.output_names: tuple[str, ...] = ()

    def __enter__(self) -> TensorRTRunner:
        """Raises:
        MissingDependencyError: TensorRT or torch is not installed.
        EngineError: no NVIDIA GPU, or a plan for another GPU or version.
        PluginError: the plugin library is missing or refused.
        """
        trt = import_tensorrt(self._kind)
        self._device = TorchCuda(
            self._options.device, needed_for=f"backend {self._kind}", extra=self._kind
        )
        logger = capturing_logger(trt)
        if self._plugin_library is not None:
            load_plugins(trt, self._kind, self._plugin_library)
        with self._device.working():
            self._trt, self._runtime = trt, trt.Runtime(logger)
            # before anything is deserialized: the flag is what makes the plan's own code run
            self._runtime.engine_host_code_allowed = self._host_code_allowed
            self._engine = self._runtime.deserialize_cuda_engine(self._plan)
            if self._engine is None:
                message = first_error(trt, logger)
                self.__exit__()
                raise EngineError(
                    f"{self._kind} {trt.__version__} cannot load the plan on this GPU: {message}",
                    hint=_REBUILD,
                )
            self._read_names()
            self._scratch = self._device.memory([self._engine.device_memory_size_v2], "uint8")
        return self

    def __exit__(self, *exception: object) -> None:
        # The order TensorRT wants: what was made last goes first.
        self._calls.clear()
        self._scratch = self._engine = self._runtime = self._device = None

    def infer(self, batch: Batch) -> dict[str, np.ndarray]:
        """Pad, copy in, run, copy out; returns once the outputs are on the host.

        Raises:
            InputError: an input is missing.
            ShapeError: a shape outside the plan's profiles.
            EngineError: the GPU reported an error.
        """
        if "input_ids" not in batch:
            raise InputError(f"the batch lacks input_ids: it has {', '.join(sorted(batch))}")
        call = self._calls.get(self._buckets.shape_for(shape_of(batch)))
        call.buffers.write(batch)
        call.run()
        return call.buffers.read(batch, self._task)

    def _call_for(self, shape: tuple[int, ...]) -> _PlanCall:
        with self._device.working():
            context = self._new_context()
            self._context_made(context)
            return _PlanCall(self, context, shape)

    def _context_made(self, context: Any) -> None:
        """For subclasses: each execution context before its first use."""

    def _new_context(self) -> Any:
        """A context whose scratch is ours."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        kernels = getattr(self._trt, "DynamicShapesKernelSpecializationStrategy", None)
        if kernels is None:
            context = self._engine.create_execution_context(strategy)
        else:
            # TensorRT-RTX compiles kernels for a shape on this machine. Done later, in the
            # background, they would miss a graph that is already captured.
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.dynamic_shapes_kernel_specialization_strategy = kernels.EAGER
            context = self._engine.create_execution_context(config)
        if context is None:
            raise EngineError(f"{self._kind} cannot start the plan", hint=_REBUILD)
        context.set_device_memory(self._scratch.data_ptr(), self._engine.device_memory_size_v2)
        return context

    def _profile_for(self, shape: tuple[int, ...]) -> int:
        """The first of the plan's profiles that holds an input of that shape."""
        bounds = []
        for index in range(self._engine.num_optimization_profiles):
            low, _, high = map(
                tuple, self._engine.get_tensor_profile_shape(self.input_names[0], index)
            )
            bounds.append(f"{low} to {high}")
            if len(shape) == len(low) and all(
                least <= size <= most for least, size, most in zip(low, shape, high, strict=True)
            ):
                return index
        raise ShapeError(
            f"the batch has shape {shape}, the plan takes {', '.join(bounds)}",
            hint="build-engine --shapes batch=MIN:OPT:MAX,seq=MIN:OPT:MAX sets the bounds",
        )

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
        if set(self.output_names) != set(self._task.output_names):
            found = ", ".join(self.output_names)
            self.__exit__()
            raise EngineError(
                f"the plan's outputs are {found}, {self._task} has "
                f"{', '.join(self._task.output_names)}"
            )


class _PlanCall:
    """One shape: its context, its buffers and, once captured, its CUDA graph."""

    def __init__(self, runner: TensorRTRunner, context: Any, shape: tuple[int, ...]) -> None:
        self._context, self._kind = context, runner._kind
        self._stream = runner._device.stream
        profile = runner._profile_for(shape)
        if not context.set_optimization_profile_async(profile, self._stream):
            raise EngineError(f"{self._kind} refuses its profile {profile}", hint=_REBUILD)
        for name in runner.input_names:
            if not context.set_input_shape(name, shape):
                raise ShapeError(f"{self._kind} refuses shape {shape} for {name}")
        self.buffers = DeviceBuffers(
            runner._device, runner.input_names, shape, self._output_shapes(runner.output_names)
        )
        for name in (*runner.input_names, *runner.output_names):
            context.set_tensor_address(name, self.buffers.address(name))
        capture = runner._options.cuda_graphs and self._can_be_captured()
        self.run = GraphedCall(runner._device, self._work, capture=capture)

    def _output_shapes(self, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
        shapes = {name: tuple(self._context.get_tensor_shape(name)) for name in names}
        for name, shape in shapes.items():
            if min(shape, default=0) < 0:
                raise EngineError(f"the shape of output {name} is unknown: {shape}")
        return shapes

    def _can_be_captured(self) -> bool:
        """TensorRT-RTX knows; TensorRT has to be tried."""
        asked = getattr(self._context, "is_stream_capturable", None)
        return asked is None or bool(asked(self._stream))

    def _work(self) -> None:
        self.buffers.copy_in()
        if not self._context.execute_async_v3(self._stream):
            raise EngineError(f"{self._kind} could not run the plan", hint=_REBUILD)
        self.buffers.copy_out()
