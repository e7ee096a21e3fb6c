"""An engine bundle in, a Triton model repository out.

::

    REPO/convbert_manifest.json     what is served, the golden request, sha256 of every file
    REPO/NAME/                      text in, answers out (python backend)
    REPO/NAME_engine/               token ids in, outputs out
    plugins/                        beside REPO, for engines that Triton's own backends run
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

from convbert_deploy.engine import MANIFEST, Engine
from convbert_deploy.errors import (
    EngineError,
    InputError,
    MissingDependencyError,
    OutputError,
    PluginError,
)
from convbert_deploy.plugin_library import ort_library, tensorrt_library
from convbert_deploy.provenance import atomic_directory, atomic_file, sha256_of_file
from convbert_deploy.serving.probe import REPOSITORY_MANIFEST
from convbert_deploy.tolerances import tolerance_for
from convbert_deploy.triton.config import ModelOptions, TritonBackend, output_dims, triton_backend
from convbert_deploy.triton.model_folders import write_engine_model, write_text_model
from convbert_deploy.triton.sample_requests import sample_request

PLUGINS = "plugins"
_SCHEMA = 1
#: what versions of a model share, as they share a config
_SHARED = ("text_model", "task", "triton_backend", "padding", "profile", "output_dims")

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class TritonOptions:
    """name: of the text model, by default the engine's; the tensor model is NAME_engine.
    instances: copies of the engine that compute at a time; text_instances: of the tokenizer.
    threads: CPU threads of each engine instance, None leaves the runtime's default.
    delay_us: microseconds that requests may wait for batch-mates, in each of the two models; with 0
        those that wait anyway, because the model is busy, are batched.
    own_runner: run a GPU's engine with our runner, which checks token ids, in the python backend.
    environment: path on the server of a Python environment that has convbert-deploy; None: the
        server's own python has it.
    plugin_folder: path on the server of what is written to ``plugins``.
    accept_batch_dependent_answers: package an engine whose answers depend on padding.
    add_version: keep what is at the target, and write the next version of its models. A server keeps
        the last two engines loaded, so that the older text model, while the new one is being
        loaded, still asks the engine that it was packaged with.
    replace: an older repository of ours may be at the target. command: recorded in the manifest.
    """

    name: str | None = None
    instances: int = 1
    text_instances: int = 1
    threads: int | None = None
    delay_us: int = 0
    own_runner: bool = False
    environment: str | None = None
    plugin_folder: str = "/plugins"
    accept_batch_dependent_answers: bool = False
    add_version: bool = False
    replace: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        for name, least in (("instances", 1), ("text_instances", 1), ("delay_us", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least {least}")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads is {self.threads}, expected at least 1")
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            raise InputError(
                f"{self.name!r} cannot be a model's name: expected letters, digits, _ . and -",
                hint="--name NAME",
            )


@dataclasses.dataclass(frozen=True)
class Repository:
    """An intact repository on disk.

    manifest: ``convbert_manifest.json``. ``golden`` in it holds ``inputs`` of the tensor model,
    the eager model's ``outputs`` (see ``golden``) and ``max_abs``, the largest difference allowed;
    ``golden_text`` holds a ``request`` (an object) and the engine's own ``answer``, or is None
    where the engine could not run when it was packaged.
    """

    path: pathlib.Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """The text model."""
        return self.manifest["text_model"]

    @property
    def engine_name(self) -> str:
        """The tensor model."""
        return self.manifest["engine_model"]

    @property
    def versions(self) -> tuple[int, ...]:
        """Ascending; the last one answers."""
        return tuple(self.manifest["versions"])

    @property
    def plugins(self) -> pathlib.Path | None:
        """Folder of libraries that the server needs; None where it needs none."""
        return self.path.parent / PLUGINS if self.manifest["plugins"] else None

    @property
    def server_arguments(self) -> tuple[str, ...]:
        """What ``tritonserver`` needs besides ``--model-repository``."""
        return tuple(self.manifest["server_arguments"])

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Repository:
        """Read the manifest and check every file's hash, those of the plugins too.

        Raises:
            EngineError: not a repository of ours, or a file that is missing or was changed.
        """
        path = pathlib.Path(path)
        try:
            manifest = json.loads((path / REPOSITORY_MANIFEST).read_text())
            schema, files, plugins = (manifest[key] for key in ("schema", "files", "plugins"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EngineError(
                f"{path} is not a model repository of convbert-deploy: no readable "
                f"{REPOSITORY_MANIFEST}",
                hint="convbert-deploy package triton ENGINE -o REPO writes one",
            ) from error
        if schema != _SCHEMA:
            raise EngineError(
                f"{path} has manifest schema {schema}, this version reads {_SCHEMA}",
                hint="package the engine again",
            )
        beside = {f"../{PLUGINS}/{name}": digest for name, digest in plugins.items()}
        for name, expected in (files | beside).items():
            if not (path / name).is_file() or sha256_of_file(path / name) != expected:
                raise EngineError(
                    f"{path} is damaged: {name} is missing or was changed",
                    hint="package the engine again",
                )
        return cls(path, manifest)


def package_triton(
    engine: Engine,
    target: pathlib.Path,
    options: TritonOptions | None = None,
    progress: Progress = lambda _: None,
) -> Repository:
    """Write ``target`` as a whole, and the libraries it needs to ``plugins`` beside it.

    Raises:
        EngineError: its answers depend on batch-mates, it has no tokenizer, or it cannot be another
            version of what is there.
        OutputError: ``target`` is there already, or cannot be written.
        PluginError: the engine needs our library and it is not built.
    """
    options = options or TritonOptions()
    target = pathlib.Path(target)
    _check_engine(engine, options)
    backend = triton_backend(engine.manifest, own_runner=options.own_runner)
    older = _older(target, options)
    libraries = _libraries(engine, backend)
    _check_plugins(target, libraries, options)
    manifest = _manifest(engine, backend, libraries, older, options)
    progress("asking the engine for its golden answer")
    manifest["golden_text"] = _golden_text(engine, progress)
    progress("copying the engine")
    with atomic_directory(target) as folder:
        if older is not None:
            _copy_versions(older, folder)
        _write_models(engine, folder, manifest, options)
        manifest["files"] = {
            str(file.relative_to(folder)): sha256_of_file(file)
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        (folder / REPOSITORY_MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for library in libraries:
            with atomic_file(target.parent / PLUGINS / library.name) as temporary:
                shutil.copyfile(library, temporary)
    return Repository(target, manifest)


def _check_engine(engine: Engine, options: TritonOptions) -> None:
    if engine.manifest.padding != "masked" and not options.accept_batch_dependent_answers:
        raise EngineError(
            f"{engine.path} has padding {engine.manifest.padding}: its answer to a text changes with "
            "the padding, so with the batch that a server puts the text into",
            hint="convbert-deploy export --padding masked, and build the engine again; or "
            "--accept-batch-dependent-answers",
        )
    if engine.tokenizer_folder is None:
        raise EngineError(
            f"{engine.path} has no tokenizer, so it cannot be served on text",
            hint="build-engine GRAPH --tokenizer FOLDER puts one in",
        )


def _older(target: pathlib.Path, options: TritonOptions) -> Repository | None:
    """What is at the target and stays; None where nothing is there or it is to be replaced."""
    if not target.exists():
        return None
    if not (target / REPOSITORY_MANIFEST).is_file():
        raise OutputError(
            f"{target} exists and is not a model repository of convbert-deploy",
            hint="choose another place with -o",
        )
    if options.add_version:
        return Repository.load(target)
    if not options.replace:
        raise OutputError(
            f"{target} exists",
            hint="--force replaces it, --add-version writes the next version of its models",
        )
    return None


def _check_plugins(
    target: pathlib.Path, libraries: tuple[pathlib.Path, ...], options: TritonOptions
) -> None:
    for library in libraries:
        there = target.parent / PLUGINS / library.name
        other = there.exists() and sha256_of_file(there) != sha256_of_file(library)
        if other and (options.add_version or not options.replace):
            raise OutputError(
                f"{there} is another build than the engine needs",
                hint="choose another place with -o, or --force to replace it",
            )


def _libraries(engine: Engine, backend: TritonBackend) -> tuple[pathlib.Path, ...]:
    """Libraries that Triton's own backends load; in the python backend our runner finds them.

    Raises:
        EngineError: the library built here is another one than the engine was built with.
        PluginError: not built.
    """
    manifest = engine.manifest
    if not manifest.plugin_nodes or backend == "python":
        return ()
    library = tensorrt_library() if backend == "tensorrt" else ort_library()
    found = sha256_of_file(library)
    if manifest.plugin_sha256 not in (None, found):
        raise EngineError(
            f"{library} is not the library that the engine was built with: sha256 {found[:12]}, "
            f"expected {str(manifest.plugin_sha256)[:12]}",
            hint="build the engine again: convbert-deploy build-engine GRAPH",
        )
    return (library,)


def _manifest(
    engine: Engine,
    backend: TritonBackend,
    libraries: tuple[pathlib.Path, ...],
    older: Repository | None,
    options: TritonOptions,
) -> dict[str, Any]:
    """All but the golden answer in words and the files.

    Raises:
        EngineError: the engine and ``older`` cannot share a config.
    """
    manifest, golden = engine.manifest, engine.golden
    name = options.name or (older.name if older else _default_name(manifest.name))
    versions = [*older.versions, older.versions[-1] + 1] if older else [1]
    tolerance = tolerance_for(manifest.backend, manifest.precision)
    arguments = [
        f"--backend-config=tensorrt,plugins={options.plugin_folder}/{library.name}"
        for library in libraries
        if backend == "tensorrt"
    ]
    made = {
        "schema": _SCHEMA,
        "text_model": name,
        "engine_model": f"{name}_engine",
        "versions": versions,
        "triton_backend": backend,
        "engine": manifest.name,
        "engine_manifest_sha256": sha256_of_file(engine.path / MANIFEST),
        "engine_backend": manifest.backend,
        "precision": str(manifest.precision),
        "task": str(manifest.task),
        "padding": manifest.padding,
        "accept_batch_dependent_answers": options.accept_batch_dependent_answers,
        "max_batch_size": manifest.profile.batch.max,
        "profile": manifest.profile.to_json(),
        "output_dims": output_dims(engine),
        "chain": [origin.to_json() for origin in manifest.chain],
        "golden": golden.to_json() | {"max_abs": tolerance.largest_abs(golden.scale())},
        "environment": options.environment,
        "plugins": {library.name: sha256_of_file(library) for library in libraries},
        "server_arguments": arguments,
        "command": options.command,
    }
    for key in _SHARED if older else ():
        if older.manifest[key] != made[key]:
            raise EngineError(
                f"{engine.path} cannot be a version of the models in {older.path}: {key} is "
                f"{made[key]}, theirs {older.manifest[key]}",
                hint="package it into a repository of its own",
            )
    return made


def _default_name(engine_name: str) -> str:
    """``base.fp32.engine`` is served as ``base_fp32``."""
    stem = engine_name.removesuffix(".engine")
    return re.sub(r"[^A-Za-z0-9]+", "_", stem).strip("_") or "convbert"


def _golden_text(engine: Engine, progress: Progress) -> dict[str, Any] | None:
    """Raises EngineError where the engine answers with an error."""
    from convbert_deploy.serving.answering import run

    request = sample_request(engine)
    try:
        answer = next(iter(run(engine, [json.dumps(request)])))
    except (EngineError, MissingDependencyError, PluginError) as error:
        progress(f"no golden answer in words: the engine cannot run here ({error})")
        return None
    if "error" in answer:
        raise EngineError(f"{engine.path} cannot answer {json.dumps(request)}: {answer['error']}")
    return {"request": request, "answer": answer}


def _copy_versions(older: Repository, folder: pathlib.Path) -> None:
    """The versions' folders; configs and warm-up rows are written anew."""
    for model in (older.name, older.engine_name):
        for version in map(str, older.versions):
            shutil.copytree(older.path / model / version, folder / model / version)


def _write_models(
    engine: Engine, folder: pathlib.Path, manifest: dict[str, Any], options: TritonOptions
) -> None:
    name, engine_name = manifest["text_model"], manifest["engine_model"]
    version = manifest["versions"][-1]
    operators = [
        f"{options.plugin_folder}/{library}"
        for library in manifest["plugins"]
        if manifest["triton_backend"] == "onnxruntime"
    ]
    write_engine_model(
        engine,
        folder / engine_name,
        version,
        ModelOptions(
            engine_name,
            options.instances,
            options.environment,
            options.delay_us,
            options.threads,
            own_runner=options.own_runner,
        ),
        operator_library=operators[0] if operators else None,
    )
    write_text_model(
        engine,
        folder / name,
        version,
        ModelOptions(name, options.text_instances, options.environment, options.delay_us),
        engine_name,
    )
