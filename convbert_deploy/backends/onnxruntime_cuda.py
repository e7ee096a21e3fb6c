"""ONNX Runtime on an NVIDIA GPU: fixed buffers, IO binding, one CUDA graph for each shape.

Buffers and the stream are torch's, shared with the TensorRT runner. Written after ONNX Runtime's
documentation of its CUDA provider; tested on fakes, not run on a GPU yet.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from convbert_deploy.architecture import Task
from convbert_deploy.backends.base import Batch, RunnerOptions
from convbert_deploy.backends.buckets import Buckets, output_shape, shape_of
from convbert_deploy.backends.cuda_device import TorchCuda
from convbert_deploy.backends.device_buffers import DeviceBuffers
from convbert_deploy.backends.graph_cache import ShapeCache
from convbert_deploy.backends.onnxruntime import import_onnxruntime
from convbert_deploy.errors import EngineError, InputError
from convbert_deploy.shapes import ShapeProfile

_ERRORS_ONLY = 3
_PROVIDER = "CUDAExecutionProvider"
#: ``gpu_graph_id`` of a run that is neither captured nor replayed
_NO_GRAPH = -1


class OnnxRuntimeCudaRunner:
    """A graph on the CUDA provider with our operators.

    ONNX Runtime captures and replays by a number that the run brings, and cannot forget a graph: the
    first ``RunnerOptions.max_graphs`` shapes get one, later ones run without.

    Args:
        model: path or serialized graph.
        task: names the axes of the outputs.
        options: the GPU, and whether and how many shapes are captured.
        library: holds our operators; without it the graph's functions are inlined.
        profile: the engine's, from which the shapes that batches are padded up to are taken.
        padding: the graph's; only ``masked`` batches are padded.
        config: ONNX Runtime's session configuration entries.
        name: label for tables.
    """

    def __init__(
        self,
        model: pathlib.Path | bytes,
        *,
        task: Task,
        options: RunnerOptions | None = None,
        library: pathlib.Path | None = None,
        profile: ShapeProfile | None = None,
        padding: str = "hf",
        config: Mapping[str, str] | None = None,
        name: str = "onnxruntime-cuda",
    ) -> None:
        self.name = name
        #: why nothing is captured, though it was asked for; None where it is
        self.refused: str | None = None
        self._model = model if isinstance(model, bytes) else str(model)
        self._task, self._library, self._config = task, library, dict(config or {})
        self._options = options or RunnerOptions()
        self._buckets = Buckets.of(profile or ShapeProfile(), padding)
        self._onnxruntime: Any = None
        self._session: Any = None
        self._device: Any = None
        self._graphs = False
        self._numbers = itertools.count(1)
        self._captured: dict[tuple[int, ...], _BoundCall] = {}
        self._plain: ShapeCache[_BoundCall] = ShapeCache(
            self._options.max_graphs, lambda shape: _BoundCall(self, shape, _NO_GRAPH)
        )
        self.input_names: tuple[str, ...] = ()
        self.output_names: tuple[str, ...] = ()

    def __enter__(self) -> OnnxRuntimeCudaRunner:
        """Raises:
        MissingDependencyError: ONNX Runtime or torch is not installed.
        EngineError: no NVIDIA GPU, a graph ONNX Runtime cannot load, or a provider that did not
            start.
        """
        self._onnxruntime = import_onnxruntime()
        self._device = TorchCuda(
            self._options.device, needed_for="backend onnxruntime-cuda", extra="export"
        )
        self._graphs = self._options.cuda_graphs
        try:
            self._session = self._open(graphs=self._graphs)
        except EngineError as error:
            if not self._graphs:
                raise
            # a graph with nodes that only the CPU provider runs cannot be captured
            self._graphs, self.refused = False, str(error)
            self._session = self._open(graphs=False)
        if _PROVIDER not in self._session.get_providers():
            raise EngineError(
                "ONNX Runtime fell back to the CPU: its CUDA provider did not start",
                hint="convbert-deploy doctor",
            )
        self.input_names = tuple(value.name for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())
        return self

    def __exit__(self, *exception: object) -> None:
        self._captured.clear()
        self._plain.clear()
        self._session = self._device = None

    def infer(self, batch: Batch) -> dict[str, np.ndarray]:
        """Pad, copy in, run, copy out; returns once the outputs are on the host.

        Raises:
            InputError: an input is missing.
            ShapeError: a shape outside the engine's profile.
            EngineError: ONNX Runtime reported an error.
        """
        if "input_ids" not in batch:
            raise InputError(f"the batch lacks input_ids: it has {', '.join(sorted(batch))}")
        call = self._call_for(self._buckets.shape_for(shape_of(batch)))
        call.buffers.write(batch)
        call.run()
        return call.buffers.read(batch, self._task)

    def _open(self, *, graphs: bool) -> Any:
        options = self._onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        if self._options.threads is not None:
            options.intra_op_num_threads = self._options.threads
        for key, value in self._config.items():
            options.add_session_config_entry(key, value)
        if self._library is not None:
            options.register_custom_ops_library(str(self._library))
        settings = {
            "device_id": str(self._options.device),
            "user_compute_stream": str(self._device.stream),
            "enable_cuda_graph": str(int(graphs)),
        }
        providers = [(_PROVIDER, settings), "CPUExecutionProvider"]
        try:
            return self._onnxruntime.InferenceSession(self._model, options, providers=providers)
        except Exception as error:  # the binding raises its own unrelated types
            raise EngineError(f"ONNX Runtime cannot load the graph: {error}") from error

    def _call_for(self, shape: tuple[int, ...]) -> _BoundCall:
        if shape in self._captured:
            return self._captured[shape]
        if not self._graphs or len(self._captured) >= self._options.max_graphs:
            return self._plain.get(shape)
        self._captured[shape] = _BoundCall(self, shape, next(self._numbers))
        return self._captured[shape]


class _BoundCall:
    """One shape: its buffers, their binding, and the number of its CUDA graph.

    ``refused``: why ONNX Runtime could not capture it, else None.
    """

    def __init__(self, runner: OnnxRuntimeCudaRunner, shape: tuple[int, ...], graph: int) -> None:
        self._session, self._device = runner._session, runner._device
        self._onnxruntime, self._graph = runner._onnxruntime, graph
        self.refused: str | None = None
        outputs = {
            value.name: output_shape(value.shape, shape, runner._task)
            for value in self._session.get_outputs()
        }
        with self._device.working():
            self.buffers = DeviceBuffers(self._device, runner.input_names, shape, outputs)
        self._binding = self._session.io_binding()
        where = ("cuda", runner._options.device)
        for name in runner.input_names:
            address = self.buffers.address(name)
            self._binding.bind_input(name, *where, np.int64, shape, address)
        for name, sizes in outputs.items():
            address = self.buffers.address(name)
            self._binding.bind_output(name, *where, np.float32, sizes, address)
        self._run_options = self._options_for(graph)

    def run(self) -> None:
        """Returns when the work is done."""
        with self._device.working():
            self.buffers.copy_in()
            self._run()
            self.buffers.copy_out()
            self._device.synchronize()

    def _run(self) -> None:
        """The first run with a graph's number captures, later ones replay."""
        try:
            self._session.run_with_iobinding(self._binding, self._run_options)
        except Exception as error:  # the binding raises its own unrelated types
            if self._graph == _NO_GRAPH:
                raise EngineError(f"ONNX Runtime could not run the graph: {error}") from error
            self._graph, self.refused = _NO_GRAPH, str(error)
            self._run_options = self._options_for(_NO_GRAPH)
            self._run()

    def _options_for(self, graph: int) -> Any:
        options = self._onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        # the copy out follows on the same stream, which is waited for after that
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options
