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
    device: index of the GPU, as CUDA counts them; CPU runners ignore it and what follows.
    cuda_graphs: replay each shape's work as one CUDA graph. max_graphs: shapes that may have one at
        a time; every graph keeps its own input and output buffers.
    """

    threads: int | None = None
    device: int = 0
    cuda_graphs: bool = True
    max_graphs: int = 32


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
