"""An exported ConvBERT: one .onnx file that carries its own description and origin."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import TYPE_CHECKING, Any

from convbert_deploy.architecture import Architecture, Task
from convbert_deploy.errors import GraphError, OutputError
from convbert_deploy.golden import GoldenRequest
from convbert_deploy.precision import Precision
from convbert_deploy.provenance import Origin, atomic_directory, atomic_file, sha256_of_files

if TYPE_CHECKING:
    import onnx

_METADATA_KEY = "convbert_deploy"
_SCHEMA = 1
#: protobuf's limit is 2 GiB; weights go to a .data file well before it
_EXTERNAL_DATA_BYTES = 1_500_000_000


@dataclasses.dataclass(frozen=True)
class GraphInfo:
    """What a graph says about itself; stored as JSON in the file's metadata.

    chain: from the checkpoint to the graph's parent, oldest first. calibration: what ``calibrate``
    decided and measured, None for an exported graph.
    """

    architecture: Architecture
    task: Task
    labels: tuple[str, ...]
    problem_type: str | None
    padding: str
    precision: Precision
    opset: int
    golden: GoldenRequest
    chain: tuple[Origin, ...]
    versions: dict[str, str]
    command: str
    calibration: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": _SCHEMA,
            "architecture": self.architecture.to_json(),
            "task": self.task.value,
            "labels": list(self.labels),
            "problem_type": self.problem_type,
            "padding": self.padding,
            "precision": self.precision.value,
            "opset": self.opset,
            "golden": self.golden.to_json(),
            "chain": [origin.to_json() for origin in self.chain],
            "versions": self.versions,
            "command": self.command,
            "calibration": self.calibration,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> GraphInfo:
        return cls(
            architecture=Architecture.from_json(data["architecture"]),
            task=Task(data["task"]),
            labels=tuple(data["labels"]),
            problem_type=data["problem_type"],
            padding=data["padding"],
            precision=Precision(data["precision"]),
            opset=data["opset"],
            golden=GoldenRequest.from_json(data["golden"]),
            chain=tuple(Origin.from_json(link) for link in data["chain"]),
            versions=dict(data["versions"]),
            command=data["command"],
            calibration=data.get("calibration"),
        )


@dataclasses.dataclass(frozen=True)
class Graph:
    """A loaded graph. ``tokenizer_files`` lie in the folder STEM.tokenizer beside the file."""

    path: pathlib.Path
    model: onnx.ModelProto
    info: GraphInfo
    tokenizer_files: tuple[pathlib.Path, ...]

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Graph:
        """Raises GraphError: missing, unreadable, truncated, or not written by ``export``."""
        from onnx import external_data_helper

        path = pathlib.Path(path)
        info = read_info(path)
        try:
            model = _parsed(path)
            external_data_helper.load_external_data_for_model(model, str(path.parent))
        except Exception as error:  # protobuf and onnx raise unrelated types for damaged files
            raise GraphError(f"{path} is unreadable or truncated: {error}") from error
        return cls(path, model, info, tokenizer_files(path))

    def origin(self) -> Origin:
        return Origin("graph", self.path.name, sha256_of_graph(self.path))


def tokenizer_folder(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".tokenizer")


def tokenizer_files(path: pathlib.Path) -> tuple[pathlib.Path, ...]:
    folder = tokenizer_folder(path)
    return tuple(sorted(folder.iterdir())) if folder.is_dir() else ()


def sha256_of_graph(path: pathlib.Path) -> str:
    """Digest of the .onnx file and, when there is one, of its external data after it."""
    return sha256_of_files([path, pathlib.Path(f"{path}.data")])


def read_info(path: pathlib.Path) -> GraphInfo:
    """Metadata alone, without the weights of external data.

    Raises:
        GraphError: missing, unreadable, or not written by ``export``.
    """
    import google.protobuf.message

    if not path.is_file():
        raise GraphError(
            f"graph {path} does not exist", hint="convbert-deploy export --ckpt CHECKPOINT"
        )
    try:
        model = _parsed(path)
    except (ValueError, google.protobuf.message.DecodeError, OSError) as error:
        raise GraphError(f"{path} is unreadable, truncated or no ONNX file") from error
    texts = {entry.key: entry.value for entry in model.metadata_props}
    if _METADATA_KEY not in texts:
        raise GraphError(
            f"{path} was not written by convbert-deploy: its metadata has no {_METADATA_KEY} entry",
            hint="convbert-deploy export --ckpt CHECKPOINT",
        )
    try:
        data = json.loads(texts[_METADATA_KEY])
        if data["schema"] != _SCHEMA:
            raise GraphError(
                f"{path} has metadata schema {data['schema']}, this version reads {_SCHEMA}",
                hint="export the checkpoint again",
            )
        return GraphInfo.from_json(data)
    except (ValueError, KeyError, TypeError) as error:
        raise GraphError(f"{path} has damaged convbert-deploy metadata: {error}") from error


def _parsed(path: pathlib.Path) -> onnx.ModelProto:
    """The message, read from a mapping of the file: its bytes beside it would double the memory."""
    import mmap

    import onnx

    model = onnx.ModelProto()
    with (
        path.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as bytes_,
    ):
        view = memoryview(bytes_)
        try:
            model.ParseFromString(view)
        finally:
            view.release()
    return model


def set_info(model: onnx.ModelProto, info: GraphInfo) -> None:
    """Write ``info`` into the model's metadata, replacing what was there."""
    del model.metadata_props[:]
    entry = model.metadata_props.add()
    entry.key, entry.value = _METADATA_KEY, json.dumps(info.to_json(), sort_keys=True)


def write_model(model: onnx.ModelProto, target: pathlib.Path) -> None:
    """Serialise atomically; beyond protobuf's reach the weights go to ``TARGET.data``.

    Raises:
        OutputError: the file cannot be written; nothing partial is left.
    """
    import onnx

    if model.ByteSize() < _EXTERNAL_DATA_BYTES:
        with atomic_file(target) as temporary:
            temporary.write_bytes(model.SerializeToString(deterministic=True))
        pathlib.Path(f"{target}.data").unlink(missing_ok=True)
        return
    from onnx import external_data_helper

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    data = pathlib.Path(f"{target}.data")
    with atomic_file(data) as temporary:
        external_data_helper.convert_model_to_external_data(copy, location=temporary.name)
        external_data_helper.write_external_data_tensors(copy, str(temporary.parent))
    for tensor in copy.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = data.name
    with atomic_file(target) as temporary:
        temporary.write_bytes(copy.SerializeToString(deterministic=True))


def write_graph(
    model: onnx.ModelProto, target: pathlib.Path, tokenizer: tuple[pathlib.Path, ...] = ()
) -> None:
    """The .onnx and, beside it, the folder STEM.tokenizer: both or neither."""
    beside = tokenizer_folder(target)
    new = not beside.exists()
    if tokenizer:
        with atomic_directory(beside) as folder:
            for file in tokenizer:
                shutil.copyfile(file, folder / file.name)
    try:
        write_model(model, target)
    except OutputError:
        if new:
            shutil.rmtree(beside, ignore_errors=True)
        raise


def latest_graph(folder: pathlib.Path) -> pathlib.Path:
    """The newest export in ``folder``; what was calibrated from one does not count.

    Raises:
        GraphError: none there.
    """
    by_age = sorted(folder.glob("*.onnx"), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in by_age:
        try:
            info = read_info(path)
        except GraphError:
            continue
        if info.precision is Precision.FP32:
            return path
    raise GraphError(
        f"no exported graph in {folder}", hint="convbert-deploy export --ckpt CHECKPOINT"
    )
