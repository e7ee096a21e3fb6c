"""The number formats a graph can be typed in."""

from __future__ import annotations

import enum


class Precision(str, enum.Enum):
    """Storage and compute type of a graph; ``value`` is its name in files and on the command line."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"

    def __str__(self) -> str:
        return self.value

    @property
    def quantized(self) -> bool:
        """Linear layers compute in 8 bits, between QuantizeLinear and DequantizeLinear nodes."""
        return self in (Precision.INT8, Precision.FP8)
