"""The shortest time a machine allows for a model: its arithmetic and its memory, nothing else.

``floor = max(FLOPs / GEMM rate, bytes of weights / read bandwidth)``

FLOPs count two for a multiply-add, in products alone: GELU, softmax, LayerNorm and moving data are
left out, so the floor is a lower bound. For a sequence of L tokens, with H = ``hidden_size``,
A = ``heads * head_dim``, K = ``conv_kernel_size``, h = ``heads``, I = ``intermediate_size``,
G = ``num_groups`` and E = ``embedding_size``, each layer takes, times 2 L:

* query, key, value, conv_out: ``4 H A``
* separable convolution: ``H K`` (depthwise) ``+ H A`` (pointwise)
* kernels of the convolution: ``A h K``, and its windowed sum ``A K``
* attention scores and context: ``2 L A``
* attention output: ``2 A H``; feed-forward: ``2 H I / G``

and the model ``E H`` where E differs from H, and its head. Where a task reads one row of the last
layer (sequence classification, multiple choice), the attention output and the feed-forward block of
that layer count for one row.

The weights are those of the same products, each read once a batch, in the bytes of the arithmetic; of
the embedding tables only a few rows are read, which are left out. All products are counted at the
rate of the candidate's arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from convbert_deploy.architecture import Architecture, Task

FORMULA = "floor = max(FLOPs / GEMM rate, bytes of weights / read bandwidth)"
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "fp8": 1}
#: Arithmetic without a rate of its own is held to the next one: no library here multiplies fp8.
_STAND_INS = {"fp8": "int8"}


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """What this machine reached with ``threads`` threads.

    gemm_gflops: GFLOP/s by arithmetic (fp32, bf16, fp16, int8), None where nothing here can.
    gemm_by: the library and size that reached it. read_gb_s, copy_gb_s: 10^9 bytes a second over
    a buffer of ``buffer_bytes``, larger than the last-level cache; a copy counts read and write.
    """

    threads: int
    gemm_gflops: Mapping[str, float | None]
    gemm_by: Mapping[str, str | None]
    read_gb_s: float
    copy_gb_s: float
    buffer_bytes: int

    @classmethod
    def from_worker(cls, data: Mapping[str, Any]) -> Ceiling:
        names = [
            name.removeprefix("gemm_").removesuffix("_gflops")
            for name in data
            if name.endswith("_gflops")
        ]
        return cls(
            threads=data["threads"],
            gemm_gflops={name: data[f"gemm_{name}_gflops"] for name in names},
            gemm_by={name: data[f"gemm_{name}_by"] for name in names},
            read_gb_s=data["read_gb_s"],
            copy_gb_s=data["copy_gb_s"],
            buffer_bytes=data["buffer_bytes"],
        )

    def to_json(self) -> dict[str, Any]:
        rates = {f"gemm_{name}_gflops": rate for name, rate in self.gemm_gflops.items()}
        sources = {f"gemm_{name}_by": source for name, source in self.gemm_by.items()}
        return {
            "threads": self.threads,
            **rates,
            **sources,
            "read_gb_s": self.read_gb_s,
            "copy_gb_s": self.copy_gb_s,
            "buffer_bytes": self.buffer_bytes,
            "formula": FORMULA,
        }


@dataclasses.dataclass(frozen=True)
class Floor:
    """ms: the shortest possible time; bound: ``compute`` or ``memory``, whichever it is made of."""

    ms: float
    bound: str
    flops: float


@dataclasses.dataclass(frozen=True)
class Costs:
    """Work of one architecture and task."""

    architecture: Architecture
    task: Task

    def flops(self, lengths: Sequence[int]) -> float:
        """FLOPs for sequences of these lengths, without padding."""
        sizes = self.architecture
        linear = self._layer_weights() * sizes.num_hidden_layers + self._embedding_weights()
        width = sizes.heads * sizes.head_dim
        # The windowed sum multiplies activations with activations: work without weights.
        windows = width * sizes.conv_kernel_size * sizes.num_hidden_layers
        attention = 2 * width * sizes.num_hidden_layers
        tokens, squares = sum(lengths), sum(length * length for length in lengths)
        head_rows = len(lengths) if self._per_sequence else tokens
        unread = self._weights_after_mixing() * (tokens - head_rows)
        return 2.0 * (
            (linear + windows) * tokens
            - unread
            + attention * squares
            + self._head_weights() * head_rows
        )

    def weight_bytes(self, arithmetic: str) -> float:
        """Bytes of the weights of every product."""
        layers = self._layer_weights() * self.architecture.num_hidden_layers
        count = layers + self._embedding_weights() + self._head_weights()
        return float(count * _BYTES[arithmetic])

    def floor(
        self, lengths: Sequence[int], batches: int, arithmetic: str, ceiling: Ceiling
    ) -> Floor | None:
        """For sequences computed in so many batches; None where the rate is unknown."""
        rate = ceiling.gemm_gflops.get(_STAND_INS.get(arithmetic, arithmetic))
        if not rate:
            return None
        flops = self.flops(lengths)
        compute_ms = flops / rate / 1e6
        memory_ms = batches * self.weight_bytes(arithmetic) / ceiling.read_gb_s / 1e6
        bound = "compute" if compute_ms >= memory_ms else "memory"
        return Floor(max(compute_ms, memory_ms), bound, flops)

    @property
    def _per_sequence(self) -> bool:
        return self.task in (Task.SEQUENCE_CLASSIFICATION, Task.MULTIPLE_CHOICE)

    def _layer_weights(self) -> int:
        sizes = self.architecture
        hidden, width = sizes.hidden_size, sizes.heads * sizes.head_dim
        taps = sizes.conv_kernel_size
        return (
            4 * hidden * width
            + hidden * taps
            + hidden * width
            + width * sizes.heads * taps
            + self._weights_after_mixing()
        )

    def _weights_after_mixing(self) -> int:
        """Of a layer's products after attention and convolution, which treat rows alike."""
        sizes = self.architecture
        width = sizes.heads * sizes.head_dim
        block = 2 * sizes.hidden_size * sizes.intermediate_size // sizes.num_groups
        return 2 * width * sizes.hidden_size + block

    def _embedding_weights(self) -> int:
        sizes = self.architecture
        if sizes.embedding_size == sizes.hidden_size:
            return 0
        return sizes.embedding_size * sizes.hidden_size

    def _head_weights(self) -> int:
        """Labels are few: a classifier's last product is left out, its dense layer is not."""
        sizes = self.architecture
        if self.task is Task.MASKED_LM:
            return sizes.embedding_size * (sizes.hidden_size + sizes.vocab_size)
        return sizes.hidden_size**2 if self._per_sequence else 0
