"""An engine bundle: a directory with everything that serving one model takes.

``NAME.engine/`` holds ``manifest.json``, ``golden.json``, the model (``model.onnx`` or
``model.plan``, with ``model.onnx`` beside it as the typed graph the plan was built from), and
``tokenizer/``. Every file's sha256 is in the manifest.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import platform
from typing import Any

from convbert_deploy.architecture import Architecture, Task
from convbert_deploy.backends.base import Batch, Runner, RunnerOptions
from convbert_deploy.errors import EngineError
from convbert_deploy.golden import GoldenRequest
from convbert_deploy.precision import Precision
from convbert_deploy.provenance import Origin, sha256_of_file
from convbert_deploy.shapes import ShapeProfile

MANIFEST = "manifest.json"
GOLDEN = "golden.json"
GRAPH = "model.onnx"
PLAN = "model.plan"
TOKENIZER = "tokenizer"
_SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What an engine is, where it comes from and where it runs.

    chain: checkpoint first, the graph it was built from last. calibration: what ``calibrate``
    decided and measured for that graph, None for an exported one. target: the machine it was built for
    (``platform``, and for plans ``compute_capabilities``). plugin_nodes: our operators
    that run as our kernels, 0 under ``--no-plugin``. golden_max_abs: what the self-check measured,
    None where the plan cannot run on the machine that built it. files: sha256 by relative path.
    """

    name: str
    backend: str
    precision: Precision
    task: Task
    architecture: Architecture
    labels: tuple[str, ...]
    problem_type: str | None
    padding: str
    profile: ShapeProfile
    plugin_nodes: int
    plugin_sha256: str | None
    target: dict[str, Any]
    plan: dict[str, Any]
    chain: tuple[Origin, ...]
    calibration: dict[str, Any] | None
    versions: dict[str, str]
    command: str
    golden_max_abs: float | None
    files: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        data = {"schema": _SCHEMA}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if hasattr(value, "to_json"):
                value = value.to_json()
            elif field.name == "chain":
                value = [origin.to_json() for origin in value]
            elif isinstance(value, tuple):
                value = list(value)
            data[field.name] = value
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Manifest:
        fields = {field.name: data[field.name] for field in dataclasses.fields(cls)}
        return cls(
            **fields
            | {
                "precision": Precision(data["precision"]),
                "task": Task(data["task"]),
                "architecture": Architecture.from_json(data["architecture"]),
                "labels": tuple(data["labels"]),
                "profile": ShapeProfile.from_json(data["profile"]),
                "chain": tuple(Origin.from_json(link) for link in data["chain"]),
            }
        )


@dataclasses.dataclass(frozen=True)
class Engine:
    """An intact bundle on disk."""

    path: pathlib.Path
    manifest: Manifest
    golden: GoldenRequest

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Engine:
        """Read the manifest and check every file's hash.

        Raises:
            EngineError: not a bundle, another schema, or a file that is missing or was changed.
        """
        path = pathlib.Path(path)
        if not (path / MANIFEST).is_file():
            raise EngineError(
                f"{path} is not an engine: it has no {MANIFEST}",
                hint="convbert-deploy build-engine GRAPH writes one",
            )
        try:
            data = json.loads((path / MANIFEST).read_text())
            if data["schema"] != _SCHEMA:
                raise EngineError(
                    f"{path} has manifest schema {data['schema']}, this version reads {_SCHEMA}",
                    hint="build the engine again",
                )
            manifest = Manifest.from_json(data)
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError(f"{path / MANIFEST} is damaged: {error}") from error
        _check_files(path, manifest.files)
        golden = GoldenRequest.from_json(json.loads((path / GOLDEN).read_text()))
        return cls(path, manifest, golden)

    @property
    def tokenizer_folder(self) -> pathlib.Path | None:
        folder = self.path / TOKENIZER
        return folder if folder.is_dir() else None

    @property
    def label(self) -> str:
        """For tables: ``onnxruntime-cpu fp32``."""
        return f"{self.manifest.backend} {self.manifest.precision}"

    def limits(self) -> Any:
        """What a request may hold (``serving.requests.InputLimits``)."""
        from convbert_deploy.serving.requests import InputLimits

        manifest = self.manifest
        return InputLimits(
            task=manifest.task,
            vocab_size=manifest.architecture.vocab_size,
            max_positions=min(
                manifest.architecture.max_position_embeddings, manifest.profile.seq.max
            ),
            type_vocab_size=manifest.architecture.type_vocab_size,
        )

    def runner(self, options: RunnerOptions | None = None) -> Runner:
        """A runner that validates every batch before it computes.

        Raises:
            EngineError: built for another machine, or its runtime cannot load it here.
            MissingDependencyError: the runtime is not installed.
            PluginError: the bundle needs our library and it is not built.
        """
        self._check_machine()
        return CheckedRunner(self._backend_runner(options), self)

    def _check_machine(self) -> None:
        built_for = self.manifest.target.get("platform")
        here = platform_name()
        if built_for != here:
            raise EngineError(
                f"{self.path} was built for {built_for}, this machine is {here}",
                hint="build the engine again on this machine: convbert-deploy build-engine GRAPH",
            )

    def _backend_runner(self, options: RunnerOptions | None) -> Runner:
        manifest = self.manifest
        if manifest.backend == "onnxruntime-cuda":
            return self._cuda_runner(options)
        if manifest.backend.startswith("onnxruntime"):
            from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner, session_config
            from convbert_deploy.plugin_library import ort_library

            return OnnxRuntimeRunner(
                self.path / GRAPH,
                options,
                library=ort_library() if manifest.plugin_nodes else None,
                config=session_config(manifest.precision),
                name=self.label,
            )
        from convbert_deploy.backends.tensorrt import TensorRTRunner
        from convbert_deploy.plugin_library import tensorrt_library

        return TensorRTRunner(
            (self.path / PLAN).read_bytes(),
            kind=manifest.backend,
            task=manifest.task,
            options=options,
            profile=manifest.profile,
            padding=manifest.padding,
            plugin_library=tensorrt_library() if manifest.plugin_nodes else None,
            name=self.label,
        )

    def _cuda_runner(self, options: RunnerOptions | None) -> Runner:
        from convbert_deploy.backends.onnxruntime import session_config
        from convbert_deploy.backends.onnxruntime_cuda import OnnxRuntimeCudaRunner
        from convbert_deploy.plugin_library import ort_library

        manifest = self.manifest
        return OnnxRuntimeCudaRunner(
            self.path / GRAPH,
            task=manifest.task,
            options=options,
            library=ort_library() if manifest.plugin_nodes else None,
            profile=manifest.profile,
            padding=manifest.padding,
            config=session_config(manifest.precision),
            name=self.label,
        )


class CheckedRunner:
    """Refuses ids, masks, dtypes and shapes the model cannot take before they reach the runtime:
    an out-of-range id is no error to a GPU gather, only a wrong answer."""

    def __init__(self, inner: Runner, engine: Engine) -> None:
        self._inner, self._engine = inner, engine
        self._limits = engine.limits()
        self.name = inner.name
        self.input_names = ("input_ids", "attention_mask", "token_type_ids")
        self.output_names = engine.manifest.task.output_names

    def __enter__(self) -> CheckedRunner:
        self._inner.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._inner.__exit__(*exception)

    def infer(self, batch: Batch) -> dict[str, Any]:
        """Raises InputError for a bad batch, ShapeError outside the engine's profile."""
        from convbert_deploy.serving.requests import validated_batch

        checked = validated_batch(batch, self._limits)
        self._engine.manifest.profile.check(
            dict(
                zip(self._engine.manifest.task.input_axes, checked["input_ids"].shape, strict=True)
            )
        )
        return self._inner.infer(checked)


def platform_name() -> str:
    return f"{platform.system().lower()}-{platform.machine()}"


def _check_files(path: pathlib.Path, files: dict[str, str]) -> None:
    for name, expected in files.items():
        file = path / name
        if pathlib.PurePath(name).is_absolute() or ".." in pathlib.PurePath(name).parts:
            raise EngineError(f"{path / MANIFEST} names {name!r}, which is outside the bundle")
        if not file.is_file():
            raise EngineError(
                f"{path} is damaged: {name} is missing", hint="build the engine again"
            )
        if sha256_of_file(file) != expected:
            raise EngineError(
                f"{path} is damaged: {name} is not the file it was built with (sha256 differs)",
                hint="build the engine again",
            )
