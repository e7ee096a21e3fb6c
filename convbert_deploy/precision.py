"""The number formats a graph can be typed in."""

from __future__ import annotations

import enum


class Precision(str, enum.Enum):
    """Storage and compute type of a graph; ``value`` is its name in files and on the command line."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"

    def __str__(self) -> str:
        return self.value

    @property
    def bytes_per_element(self) -> int:
        return 4 if self is Precision.FP32 else 2
