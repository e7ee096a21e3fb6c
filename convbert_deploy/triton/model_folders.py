"""The two folders of a model repository: the tensor model's and the text model's."""

from __future__ import annotations

import importlib.resources
import pathlib
import shutil
from collections.abc import Iterable

import numpy as np

from convbert_deploy.engine import GOLDEN, GRAPH, MANIFEST, PLAN, TOKENIZER, Engine
from convbert_deploy.triton.config import (
    ModelOptions,
    WarmUp,
    engine_config,
    text_config,
    triton_backend,
    warm_ups,
)

BUNDLE = "engine"


def write_engine_model(
    engine: Engine,
    folder: pathlib.Path,
    version: int,
    options: ModelOptions,
    *,
    operator_library: str | None = None,
) -> None:
    """The tensor model: config, warm-up rows, and the engine as the version.

    operator_library: see ``engine_config``.
    """
    manifest = engine.manifest
    backend = triton_backend(manifest, own_runner=options.own_runner)
    model = folder / str(version)
    model.mkdir(parents=True)
    if backend == "python":
        _copy(engine, [*manifest.files, MANIFEST], model / BUNDLE)
        _copy_template("engine_model.py", model)
    elif backend == "tensorrt":
        _copy(engine, [PLAN], model)
    else:
        _copy(engine, [name for name in manifest.files if name.startswith(GRAPH)], model)
    config = engine_config(engine, options, operator_library=operator_library)
    (folder / "config.pbtxt").write_text(config, encoding="utf-8")
    (folder / "warmup").mkdir(exist_ok=True)
    for warm in warm_ups(manifest, own_runner=options.own_runner):
        _write_warm_up(warm, folder / "warmup")


def write_text_model(
    engine: Engine, folder: pathlib.Path, version: int, options: ModelOptions, engine_name: str
) -> None:
    """The text model: config, and as the version all of the engine but what computes."""
    model = folder / str(version)
    model.mkdir(parents=True)
    tokenizer = [name for name in engine.manifest.files if name.startswith(f"{TOKENIZER}/")]
    _copy(engine, [MANIFEST, GOLDEN, *tokenizer], model / BUNDLE)
    _copy_template("text_model.py", model)
    config = text_config(engine, options, engine_name)
    (folder / "config.pbtxt").write_text(config, encoding="utf-8")


def _write_warm_up(warm: WarmUp, folder: pathlib.Path) -> None:
    """One row of real tokens: zeros as a mask would be refused, as any request's."""
    values = {"input_ids": 0, "attention_mask": 1, "token_type_ids": 0}
    for name, value in values.items():
        (folder / warm.file(name)).write_bytes(np.full(warm.shape, value, np.int64).tobytes())


def _copy(engine: Engine, names: Iterable[str], folder: pathlib.Path) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(engine.path / name, folder / name)


def _copy_template(name: str, folder: pathlib.Path) -> None:
    source = importlib.resources.files("convbert_deploy.triton") / "files" / name
    (folder / "model.py").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
