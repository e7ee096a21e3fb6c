"""ONNX Runtime on CPU and CUDA: the only file that imports it."""

from __future__ import annotations

import contextlib
import contextvars
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from convbert_deploy.backends.base import Batch, RunnerOptions
from convbert_deploy.errors import EngineError, MissingDependencyError
from convbert_deploy.precision import Precision

_ERRORS_ONLY = 3
#: The CPU provider's fused residual + LayerNorm is slow: 6 layers, hidden 384, 8x128, one thread,
#: 11 of them took 18.7 ms; unfused, every Add and LayerNormalization of the graph takes 6.6 ms.
_SLOWER_ON_CPU = ["SkipLayerNormFusion"]
#: Session entries for graphs in FP8: ONNX Runtime 1.31 would put their Q/DQ pairs into its integer
#: products, which refuse the type.
NO_INTEGER_FUSION = {"session.disable_quant_qdq": "1"}

#: Tells EncoderLayer how many threads its session has, which ONNX Runtime does not; read when the
#: library is registered. Unset, it counts the machine's.
LAYER_THREADS = "custom_op.EncoderLayer.threads"
#: Names the file to which each EncoderLayer adds, when its session is closed, a line for each part
#: of it: node, part, nanoseconds of all threads, with tabs between.
LAYER_TIMES = "custom_op.EncoderLayer.times"
LAYER_TIMES_FILE = "encoder_layers.tsv"

#: Where sessions opened now write ONNX Runtime's own profile; None: they do not.
_PROFILE_FOLDER: contextvars.ContextVar[pathlib.Path | None] = contextvars.ContextVar(
    "onnxruntime_profile_folder", default=None
)


@contextlib.contextmanager
def profiled(folder: pathlib.Path) -> Iterator[None]:
    """Sessions opened inside write ONNX Runtime's profile (a JSON file each) and ``LAYER_TIMES_FILE``
    into ``folder`` when they are closed. Each node then costs a few microseconds more."""
    token = _PROFILE_FOLDER.set(folder)
    try:
        yield
    finally:
        _PROFILE_FOLDER.reset(token)


def import_onnxruntime() -> Any:
    """Raises MissingDependencyError where the package is absent."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            "onnxruntime", needed_for="the onnxruntime backend", extra="ort"
        ) from error
    return onnxruntime


def cuda_available() -> bool:
    """True where ONNX Runtime was built for CUDA and a device answers."""
    try:
        onnxruntime = import_onnxruntime()
    except MissingDependencyError:
        return False
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return False
    from convbert_deploy.environment import environment

    return bool(environment().gpus)


def session_config(precision: Precision) -> Mapping[str, str]:
    """Entries that a graph of this precision needs."""
    return NO_INTEGER_FUSION if precision is Precision.FP8 else {}


class OnnxRuntimeRunner:
    """One session. ``library`` holds our operators; without it the graph's functions are inlined.
    ``config``: ONNX Runtime's session configuration entries."""

    def __init__(
        self,
        model: pathlib.Path | bytes,
        options: RunnerOptions | None = None,
        *,
        library: pathlib.Path | None = None,
        cuda: bool = False,
        optimize: bool = True,
        config: Mapping[str, str] | None = None,
        name: str = "onnxruntime-cpu",
    ) -> None:
        self.name = name
        self._config = dict(config or {})
        self._model = model if isinstance(model, bytes) else str(model)
        self._options = options or RunnerOptions()
        self._library, self._cuda, self._optimize = library, cuda, optimize
        self._session: Any = None
        self._profiling = False
        self.input_names: tuple[str, ...] = ()
        self.output_names: tuple[str, ...] = ()

    @classmethod
    def from_model(cls, model: Any, **kwargs: Any) -> OnnxRuntimeRunner:
        """A runner on an ``onnx.ModelProto`` in memory (below 2 GiB)."""
        return cls(model.SerializeToString(), **kwargs)

    def __enter__(self) -> OnnxRuntimeRunner:
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        if self._options.threads is not None:
            options.intra_op_num_threads = self._options.threads
            options.add_session_config_entry(LAYER_THREADS, str(self._options.threads))
        for key, value in self._config.items():
            options.add_session_config_entry(key, value)
        if not self._optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        folder = _PROFILE_FOLDER.get()
        if folder is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(folder / "onnxruntime")
            options.add_session_config_entry(LAYER_TIMES, str(folder / LAYER_TIMES_FILE))
        self._profiling = folder is not None
        if self._library is not None:
            options.register_custom_ops_library(str(self._library))
        providers = ["CUDAExecutionProvider"] if self._cuda else []
        try:
            self._session = onnxruntime.InferenceSession(
                self._model,
                options,
                providers=[*providers, "CPUExecutionProvider"],
                disabled_optimizers=[] if self._cuda else _SLOWER_ON_CPU,
            )
        except Exception as error:  # the binding raises its own unrelated types
            rebuild = "an engine of another version is built again: build-engine GRAPH"
            raise EngineError(
                f"ONNX Runtime cannot load the graph: {error}",
                hint=None if self._library is None else rebuild,
            ) from error
        if self._cuda and "CUDAExecutionProvider" not in self._session.get_providers():
            raise EngineError(
                "ONNX Runtime fell back to the CPU: its CUDA provider did not start",
                hint="convbert-deploy doctor",
            )
        self.input_names = tuple(value.name for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())
        return self

    def __exit__(self, *exception: object) -> None:
        if self._profiling and self._session is not None:
            self._session.end_profiling()
        self._session = None

    def infer(self, batch: Batch) -> dict[str, np.ndarray]:
        feed = {name: batch[name] for name in self.input_names}
        return dict(zip(self.output_names, self._session.run(None, feed), strict=True))


class Intermediates:
    """Counts NaN and infinity in every intermediate of ``model`` (onnx.ModelProto), batch by batch.

    The graph runs unoptimized with each tensor as an output; the session is made once.
    """

    def __init__(self, model: Any, *, library: pathlib.Path | None = None) -> None:
        import onnx

        opened = onnx.ModelProto()
        opened.CopyFrom(model)
        known = {value.name for value in opened.graph.output}
        for node in opened.graph.node:
            for output in node.output:
                if output and output not in known:
                    opened.graph.output.append(onnx.ValueInfoProto(name=output))
        self._runner = OnnxRuntimeRunner.from_model(opened, library=library, optimize=False)
        self._opened = False

    def __call__(self, batch: Batch) -> Iterator[tuple[str, int, int]]:
        """Yields (tensor name, NaN count, infinity count) for each floating-point tensor."""
        if not self._opened:
            self._runner.__enter__()
            self._opened = True
        for name, array in self._runner.infer(batch).items():
            if np.issubdtype(array.dtype, np.floating):
                yield name, int(np.isnan(array).sum()), int(np.isinf(array).sum())
