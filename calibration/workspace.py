"""A graph laid out so that many variants of it can run without holding its weights many times."""

from __future__ import annotations

import contextlib
import itertools
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..backends.base import RunnerOptions
from ..errors import GraphError, OutputError, PluginError

if TYPE_CHECKING:
    import onnx

    from ..backends.onnxruntime import OnnxRuntimeRunner

_WEIGHTS = "weights.bin"
#: smaller tensors stay in the file: shape inference and constant folding want to read them
_MIN_BYTES = 1024
_PAGE = 4096
#: MLAS would copy every weight of every session that is open into its own layout
_NO_PREPACKING = {"session.disable_prepacking": "1"}


class Workspace:
    """A folder with one graph: nodes in memory, weights in one file that all sessions map.

    ``model`` is the graph with its large initializers as references into that file; copy it, change
    the copy, and hand it to ``runner``. Weights added to a copy may be held inline.
    """

    def __init__(self, folder: pathlib.Path, model: onnx.ModelProto) -> None:
        self._folder, self._base = folder, model
        self._numbers = itertools.count()
        self._references = {tensor.name: tensor for tensor in model.graph.initializer}

    @classmethod
    @contextlib.contextmanager
    def open(cls, model: onnx.ModelProto) -> Iterator[Workspace]:
        """Write the weights of ``model`` to a temporary folder that lives as long as the block.

        ``model`` is emptied of the weights that were written. Keep no reference to it: a protobuf
        message holds on to the memory of what was cleared until it is freed itself.

        Raises:
            OutputError: no room for a copy of the weights where temporary files go.
        """
        with tempfile.TemporaryDirectory(prefix="convbert-deploy-") as name:
            folder = pathlib.Path(name)
            with _room_for_temporary_files():
                light = _moved_out(model, folder / _WEIGHTS)
            del model
            _return_free_memory()
            yield cls(folder, light)

    def model(self) -> onnx.ModelProto:
        """A copy to change; a few hundred kilobytes."""
        import onnx

        copy = onnx.ModelProto()
        copy.CopyFrom(self._base)
        return copy

    def weight(self, name: str) -> np.ndarray:
        """An initializer of the graph; large ones are mapped, read-only.

        Raises:
            GraphError: there is none of that name.
        """
        from onnx import helper, numpy_helper

        tensor = self._references.get(name)
        if tensor is None:
            raise GraphError(f"the graph has no initializer {name}")
        if not tensor.external_data:
            return numpy_helper.to_array(tensor)
        place = {entry.key: entry.value for entry in tensor.external_data}
        return np.memmap(
            self._folder / _WEIGHTS,
            helper.tensor_dtype_to_np_dtype(tensor.data_type),
            "r",
            int(place["offset"]),
            tuple(tensor.dims),
        )

    def complete(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """``model``, changed in place: its references replaced by the weights themselves."""
        from onnx import external_data_helper

        moved = [tensor for tensor in model.graph.initializer if tensor.external_data]
        external_data_helper.load_external_data_for_model(model, str(self._folder))
        for tensor in moved:
            # set to its default, but written to the file
            tensor.ClearField("data_location")
        return model

    @contextlib.contextmanager
    def runner(
        self,
        model: onnx.ModelProto,
        *,
        outputs: Sequence[str] = (),
        options: RunnerOptions | None = None,
        optimize: bool = True,
    ) -> Iterator[OnnxRuntimeRunner]:
        """An open runner of ``model``, with ``outputs`` (tensors inside it) beside its own outputs.

        Our operators run as our kernels where the library is built, else by their functions.

        Raises:
            EngineError: ONNX Runtime cannot load the graph.
            OutputError: no room where temporary files go.
        """
        import onnx

        from ..backends.onnxruntime import NO_INTEGER_FUSION, OnnxRuntimeRunner

        fp8 = any(t.data_type == onnx.TensorProto.FLOAT8E4M3FN for t in model.graph.initializer)
        known = {value.name for value in model.graph.output}
        added = [name for name in dict.fromkeys(outputs) if name not in known]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in added)
        path = self._folder / f"model{next(self._numbers)}.onnx"
        try:
            with _room_for_temporary_files():
                path.write_bytes(model.SerializeToString())
        finally:
            del model.graph.output[len(model.graph.output) - len(added) :]
        try:
            with OnnxRuntimeRunner(
                path,
                options,
                library=_library(),
                optimize=optimize,
                config=_NO_PREPACKING | (NO_INTEGER_FUSION if fp8 else {}),
                name="calibration",
            ) as runner:
                yield runner
        finally:
            path.unlink()


class WeightEdits:
    """Changed weights of one variant of a workspace's graph, kept apart until all are known."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._changed: dict[str, np.ndarray] = {}

    def value(self, name: str) -> np.ndarray:
        """The weight as changed so far. Raises GraphError: no such initializer."""
        return self._changed[name] if name in self._changed else self._workspace.weight(name)

    def divide(self, name: str, divisor: np.ndarray) -> None:
        """Divide along the last axis; ``divisor`` is as long as that."""
        self._changed[name] = (self.value(name) / divisor).astype(np.float32)

    def write(self, model: onnx.ModelProto) -> None:
        """Put the changed weights that ``model`` still has into it."""
        from onnx import numpy_helper

        for tensor in model.graph.initializer:
            if tensor.name in self._changed:
                tensor.CopyFrom(numpy_helper.from_array(self._changed[tensor.name], tensor.name))


def _moved_out(model: onnx.ModelProto, path: pathlib.Path) -> onnx.ModelProto:
    """``model`` with references into the new file ``path`` for its large initializers."""
    import onnx
    from onnx import external_data_helper

    with path.open("wb") as stream:
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) < _MIN_BYTES:
                continue
            # ONNX Runtime maps the file at multiples of a page
            stream.seek(-(-stream.tell() // _PAGE) * _PAGE)
            offset, length = stream.tell(), len(tensor.raw_data)
            stream.write(tensor.raw_data)
            external_data_helper.set_external_data(tensor, path.name, offset, length)
            tensor.ClearField("raw_data")
    light = onnx.ModelProto()
    light.CopyFrom(model)
    return light


@contextlib.contextmanager
def _room_for_temporary_files() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write temporary files in {tempfile.gettempdir()}: {error.strerror or error}",
            hint="free space there, or set TMPDIR to a folder with room for the graph",
        ) from error


def _return_free_memory() -> None:
    """glibc keeps freed blocks to itself; a model's weights were hundreds of megabytes of them."""
    import ctypes

    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _library() -> pathlib.Path | None:
    from ..plugin_library import ort_library

    try:
        return ort_library()
    except PluginError:
        return None
