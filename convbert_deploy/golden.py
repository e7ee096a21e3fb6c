"""A golden request: one fixed batch and what the eager model answers to it.

Written by ``export``, carried by the graph and the engine, so that an engine can be checked where
neither the checkpoint nor torch is at hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from convbert_deploy.shapes import ShapeRange

#: enough to catch a wrong answer, few enough to read; a masked-LM's logits are thinned to these
_MAX_ELEMENTS = 2048


@dataclasses.dataclass(frozen=True)
class GoldenOutput:
    """Evenly spaced elements of one output, by flat index. values: float32."""

    shape: tuple[int, ...]
    indices: tuple[int, ...]
    values: tuple[float, ...]

    @classmethod
    def of(cls, array: np.ndarray) -> GoldenOutput:
        step = -(-array.size // _MAX_ELEMENTS)
        indices = np.arange(0, array.size, step)
        return cls(array.shape, tuple(indices.tolist()), tuple(array.reshape(-1)[indices].tolist()))

    def max_abs_difference(self, array: np.ndarray) -> float:
        """Infinity where the shape differs or a value is not finite."""
        if array.shape != self.shape:
            return float("inf")
        seen = array.reshape(-1)[list(self.indices)].astype(np.float64)
        if not np.isfinite(seen).all():
            return float("inf")
        return float(np.abs(seen - np.asarray(self.values)).max())


@dataclasses.dataclass(frozen=True)
class GoldenRequest:
    """inputs: nested lists of ints by input name; outputs: the eager float32 model's answers."""

    inputs: dict[str, Any]
    outputs: dict[str, GoldenOutput]

    @classmethod
    def of(
        cls, batch: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]
    ) -> GoldenRequest:
        return cls(
            inputs={name: array.tolist() for name, array in batch.items()},
            outputs={name: GoldenOutput.of(array) for name, array in outputs.items()},
        )

    def batch(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(rows, np.int64) for name, rows in self.inputs.items()}

    def answered(
        self,
        infer: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]],
        rows: ShapeRange,
    ) -> dict[str, np.ndarray]:
        """Outputs for ``batch()``, asked for in batches of as many rows as ``rows`` allows; too few
        are filled up with the last one. An output that is not there for all of them is left out."""
        batch = self.batch()
        count = len(next(iter(batch.values())))
        parts: list[dict[str, np.ndarray]] = []
        for first in range(0, count, rows.max):
            real = min(rows.max, count - first)
            chosen = [min(first + i, count - 1) for i in range(max(real, rows.min))]
            outputs = infer({name: array[chosen] for name, array in batch.items()})
            parts.append({name: array[:real] for name, array in outputs.items() if array.ndim})
        return {
            name: np.concatenate([part[name] for part in parts])
            for name in self.outputs
            if len({part[name].shape[1:] if name in part else None for part in parts}) == 1
            and name in parts[0]
        }

    def max_abs_difference(self, outputs: Mapping[str, np.ndarray]) -> float:
        """Infinity where an output is missing, of another shape or not finite."""
        if not all(name in outputs for name in self.outputs):
            return float("inf")
        return max(
            golden.max_abs_difference(outputs[name]) for name, golden in self.outputs.items()
        )

    def scale(self) -> float:
        """Standard deviation of the golden values: what a difference is measured against."""
        return float(np.std(np.concatenate([golden.values for golden in self.outputs.values()])))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> GoldenRequest:
        outputs = {
            name: GoldenOutput(tuple(o["shape"]), tuple(o["indices"]), tuple(o["values"]))
            for name, o in data["outputs"].items()
        }
        return cls(inputs=dict(data["inputs"]), outputs=outputs)
