"""transformers' model run by PyTorch: eagerly, or compiled by TorchInductor."""

from __future__ import annotations

from typing import Any

import numpy as np

from .transformers_model import INPUTS, load_model, one_shape, versions, weights_bytes

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def load(settings: dict[str, Any]) -> TorchPeer:
    import torch

    torch.set_num_threads(settings["threads"])
    torch.set_grad_enabled(False)
    dtype = getattr(torch, _DTYPES[settings["precision"]])
    model = load_model(settings["model"], dtype).to(settings["device"])
    peer = CompiledPeer if settings["kind"] == "compile" else TorchPeer
    return peer(model, settings)


class TorchPeer:
    """Eager execution."""

    def __init__(self, model: Any, settings: dict[str, Any]) -> None:
        self._model, self._device = model, settings["device"]
        self._outputs = settings["outputs"]
        self.arithmetic = settings["precision"]
        self.weights_bytes = weights_bytes(model)
        self.versions = versions("torch", "transformers")
        self.notes: list[str] = []

    def prepare(self, batches: list[dict[str, np.ndarray]]) -> list[dict[str, Any]]:
        import torch

        return [{name: torch.from_numpy(batch[name]) for name in INPUTS} for batch in batches]

    def infer(self, feed: dict[str, Any]) -> dict[str, np.ndarray]:
        import torch

        with torch.inference_mode():
            return self._run(feed)

    def _run(self, feed: dict[str, Any]) -> dict[str, np.ndarray]:
        if self._device != "cpu":
            feed = {name: tensor.to(self._device) for name, tensor in feed.items()}
        outputs = self._model(**feed)
        return {name: outputs[name].float().cpu().numpy() for name in self._outputs}


class CompiledPeer(TorchPeer):
    """``torch.compile`` with frozen weights; on a GPU ``max-autotune``, which captures CUDA graphs.

    A point is compiled for its own shape. A workload of many shapes is compiled once with dynamic
    ones: static compilation would meet the recompilation limit and fall back to eager.
    """

    def __init__(self, model: Any, settings: dict[str, Any]) -> None:
        super().__init__(model, settings)
        self._eager = model

    def prepare(self, batches: list[dict[str, np.ndarray]]) -> list[dict[str, Any]]:
        import torch
        import torch._inductor.config as inductor

        inductor.freezing = True
        torch._dynamo.reset()
        fixed = one_shape(batches)
        mode = "max-autotune" if self._device != "cpu" and fixed else None
        self._model = torch.compile(self._eager, dynamic=not fixed, mode=mode)
        self.notes = ["compiled for each point's shape"] if fixed else ["compiled for any shape"]
        feeds = super().prepare(batches)
        # One of each shape: what is compiled anew for the last, smaller batch is not a run either.
        for feed in {feed["input_ids"].shape: feed for feed in feeds}.values():
            self.infer(feed)
        return feeds

    def infer(self, feed: dict[str, Any]) -> dict[str, np.ndarray]:
        import torch

        # Freezing folds the weights only without gradients, and not under inference mode.
        with torch.no_grad():
            return self._run(feed)
