"""transformers' own model in float32: the reference of every comparison."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from convbert_deploy.architecture import Task
from convbert_deploy.backends.base import Batch, RunnerOptions


class EagerRunner:
    """Runs a transformers ConvBERT.

    padding ``hf`` runs the batch as given. ``masked`` is the truth for padding-invariant engines:
    each row is run alone without its pads, and padded positions of per-token outputs are zero.
    """

    input_names: tuple[str, ...] = ("input_ids", "attention_mask", "token_type_ids")

    def __init__(
        self,
        model: Any,
        task: Task,
        options: RunnerOptions | None = None,
        *,
        padding: str = "hf",
        name: str | None = None,
    ) -> None:
        alone = ", each row alone and unpadded" if padding == "masked" else ""
        self.name = f"eager fp32{alone}" if name is None else name
        self.output_names = task.output_names
        self._model, self._task, self._padding = model, task, padding
        self._threads = (options or RunnerOptions()).threads
        self._scope = contextlib.ExitStack()

    def __enter__(self) -> EagerRunner:
        import torch

        if self._threads is not None:
            before = torch.get_num_threads()
            torch.set_num_threads(self._threads)
            self._scope.callback(torch.set_num_threads, before)
        return self

    def __exit__(self, *exception: object) -> None:
        self._scope.close()

    def infer(self, batch: Batch) -> dict[str, np.ndarray]:
        if self._padding == "masked":
            return self._infer_rows(batch)
        return self._run(batch)

    def _run(self, batch: Batch) -> dict[str, np.ndarray]:
        import torch

        inputs = {
            name: torch.from_numpy(np.ascontiguousarray(batch[name])) for name in self.input_names
        }
        # Here, not in __enter__: the mode belongs to a thread, and another one may call.
        with torch.inference_mode():
            outputs = self._model(**inputs)
            return {name: outputs[name].float().numpy() for name in self.output_names}

    def _infer_rows(self, batch: Batch) -> dict[str, np.ndarray]:
        """Every sequence alone, cut to its real tokens."""
        seq = batch["input_ids"].shape[-1]
        lead = batch["input_ids"].shape[:-1]
        flat = {name: batch[name].reshape(-1, seq) for name in self.input_names}
        rows: list[dict[str, np.ndarray]] = []
        for index, length in enumerate(flat["attention_mask"].sum(axis=-1)):
            row = {name: array[index : index + 1, :length] for name, array in flat.items()}
            if self._task is Task.MULTIPLE_CHOICE:
                row = {name: array[:, None] for name, array in row.items()}
            rows.append(self._run(row))
        return {
            name: _stack([row[name] for row in rows], lead, seq, self._task) for name in rows[0]
        }


def _stack(rows: list[np.ndarray], lead: tuple[int, ...], seq: int, task: Task) -> np.ndarray:
    if task in (Task.SEQUENCE_CLASSIFICATION, Task.MULTIPLE_CHOICE):
        return np.concatenate(rows).reshape(
            *lead, *rows[0].shape[2 if task is Task.MULTIPLE_CHOICE else 1 :]
        )
    out = np.zeros((len(rows), seq, *rows[0].shape[2:]), np.float32)
    for index, row in enumerate(rows):
        out[index, : row.shape[1]] = row[0]
    return out
