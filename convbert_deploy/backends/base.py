"""What every runtime looks like from outside."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np

#: Model inputs by name: ``input_ids``, ``attention_mask``, ``token_type_ids``, each int64 of shape
#: (batch, seq), or (batch, choices, seq) for multiple choice.
Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class RunnerOptions:
    """How a runner uses the machine.

    threads: intra-op CPU threads; None leaves the runtime's default.
    """

    threads: int | None = None


class Runner(Protocol):
    """A model ready to compute. Use as a context manager; ``infer`` only inside it."""

    #: short label for tables, such as ``onnxruntime-cpu fp32``
    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]

    def __enter__(self) -> Runner: ...

    def __exit__(self, *exception: object) -> None: ...

    def infer(self, batch: Batch) -> dict[str, np.ndarray]:
        """Outputs by name as float32 arrays (``logits``; ``start_logits``/``end_logits``;
        ``last_hidden_state`` for a bare encoder)."""
        ...
