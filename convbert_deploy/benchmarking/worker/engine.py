"""One of our engine bundles, run as ``convbert-deploy run`` does."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np


def load(settings: dict[str, Any]) -> EngineModel:
    from convbert_deploy.backends.base import RunnerOptions
    from convbert_deploy.engine import Engine

    engine = Engine.load(pathlib.Path(settings["model"]))
    runner = engine.runner(RunnerOptions(threads=settings["threads"]))
    runner.__enter__()
    return EngineModel(engine, runner, settings)


class EngineModel:
    def __init__(self, engine: Any, runner: Any, settings: dict[str, Any]) -> None:
        from convbert_deploy.environment import versions

        self._runner = runner
        self.arithmetic = settings["arithmetic"]
        plan = engine.path / "model.plan"
        graph = [engine.path / name for name in ("model.onnx", "model.onnx.data")]
        files = [plan] if plan.is_file() else [path for path in graph if path.is_file()]
        self.weights_bytes = sum(path.stat().st_size for path in files)
        used = ("convbert_deploy", "onnxruntime", "tensorrt", "tensorrt_rtx")
        self.versions = {k: v for k, v in versions().items() if v and k in used}
        self.notes: list[str] = []

    def prepare(self, batches: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        return batches

    def infer(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._runner.infer(feed)
