"""What is remembered of a tensor's values, and the range to quantize it with.

Everything is symmetric around zero: TensorRT wants a zero point of 0, so a range is one number,
``amax``, and an int8 scale is amax / 127.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import GraphError, InputError
from .thresholds import entropy_clip, mse_clip, percentile_clip

#: how ``TensorSummary.amax`` may find a range
METHODS = ("minmax", "moving-average", "percentile", "entropy", "mse")
BINS = 2048
_BINS_EXPONENT = 11
#: weight of the past in the moving average of the batches' amax
MOMENTUM = 0.9
#: The range of a tensor that was never anything but zero. Zero stays exactly zero under any scale;
#: this one neither divides by zero nor blows up a value that was not in the data.
ZERO_TENSOR_AMAX = 1.0
#: Histograms span [0, 2**e) with e at least this, and no range is smaller: amax / 127 stays a
#: normal float32.
_MIN_EXPONENT = -100
#: values counted at a time, so that the temporary arrays stay in the cache
_CHUNK = 1 << 16


def check_method(method: str, percentile: float) -> None:
    """Raises InputError: an unknown method, or a percentile outside (0, 100]."""
    if method not in METHODS:
        raise InputError(f"calibration method {method!r}, expected {', '.join(METHODS)}")
    if not 0 < percentile <= 100:
        raise InputError(f"percentile {percentile}, expected above 0 and at most 100")


@dataclasses.dataclass(frozen=True, eq=False)
class TensorSummary:
    """Statistics of all values of one tensor over the calibration data.

    count: values seen, ``zeros`` of them exactly zero. minimum, maximum: of all values.
    moving_average: of the batches' largest magnitudes, momentum 0.9, beginning with the first.
    exponent, histogram: int64 counts of the non-zero magnitudes in 2048 equal bins over
        [0, 2**exponent); None where only ranges were collected.
    channel_amax: float32, largest magnitude of each index of the last axis; None where that axis
        changes its length (attention scores), and without a histogram.
    """

    count: int
    zeros: int
    minimum: float
    maximum: float
    moving_average: float
    exponent: int
    histogram: np.ndarray | None
    channel_amax: np.ndarray | None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorSummary) and self.to_json() == other.to_json()

    @property
    def largest(self) -> float:
        """Largest magnitude; 0 for a tensor of zeros."""
        return max(-self.minimum, self.maximum)

    def amax(
        self, method: str = "minmax", *, percentile: float = 99.99, levels: int = 127
    ) -> float:
        """The magnitude that becomes the largest quantized one.

        Args:
            method: ``minmax``, the largest seen; ``moving-average``; ``percentile`` (of the
                non-zero values); ``entropy`` (KL); ``mse``. See ``thresholds`` for the last three.
            percentile: for that method, above 0 and at most 100.
            levels: quantized magnitudes above zero; 127 for int8. FP8 E4M3 maps amax to 448 and
                keeps its relative precision down to small values, so ``minmax`` is its method.

        Returns:
            Above 0 and never more than the largest magnitude, except that a tensor of zeros has 1.0
            and that 2**-100 is the least. Tensors of one value have that value's magnitude under
            every method.

        Raises:
            InputError: an unknown method or a percentile out of range.
            GraphError: the method needs a histogram and none was collected.
        """
        check_method(method, percentile)
        if self.largest == 0:
            return ZERO_TENSOR_AMAX
        clip = self._clip(method, percentile, levels)
        return max(min(clip, self.largest), 2.0**_MIN_EXPONENT)

    def _clip(self, method: str, percentile: float, levels: int) -> float:
        if method == "minmax":
            return self.largest
        if method == "moving-average":
            return self.moving_average
        if self.histogram is None:
            raise GraphError(
                f"method {method} needs histograms, and only ranges were collected",
                hint="collect again with histograms, or use --method minmax",
            )
        width = 2.0 ** (self.exponent - _BINS_EXPONENT)
        if method == "percentile":
            return percentile_clip(self.histogram, width, percentile)
        if method == "entropy":
            return entropy_clip(self.histogram, width, levels + 1)
        return mse_clip(self.histogram, width, self.largest, levels)

    def to_json(self) -> dict[str, Any]:
        """Numbers that ``from_json`` reads back exactly; the histogram without its empty end."""
        data: dict[str, Any] = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        if self.histogram is not None:
            data["histogram"] = np.trim_zeros(self.histogram, "b").tolist()
        if self.channel_amax is not None:
            # the shortest decimal that is this float32: half the digits of the float64 beside it
            data["channel_amax"] = [float(str(value)) for value in self.channel_amax]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorSummary:
        """Raises KeyError, TypeError or ValueError where ``data`` is not what ``to_json`` gave."""
        channels = data["channel_amax"]
        summary = cls(
            count=int(data["count"]),
            zeros=int(data["zeros"]),
            minimum=float(data["minimum"]),
            maximum=float(data["maximum"]),
            moving_average=float(data["moving_average"]),
            exponent=int(data["exponent"]),
            histogram=_whole_histogram(data["histogram"]),
            channel_amax=None if channels is None else np.asarray(channels, np.float32),
        )
        summary._check()
        return summary

    def _check(self) -> None:
        """Raises ValueError where the numbers contradict each other."""
        if not self.minimum <= self.maximum or not math.isfinite(self.maximum - self.minimum):
            raise ValueError(f"minimum {self.minimum}, maximum {self.maximum}")
        if not 0 <= self.moving_average <= self.largest * (1 + 1e-12):
            raise ValueError(f"moving average {self.moving_average} of at most {self.largest}")
        if not self.largest < 2.0**self.exponent:
            raise ValueError(f"largest magnitude {self.largest}, histogram to 2**{self.exponent}")
        if not (0 <= self.zeros <= self.count and self.count > 0):
            raise ValueError(f"{self.zeros} zeros of {self.count} values")
        if self.histogram is not None and self.histogram.sum() + self.zeros != self.count:
            raise ValueError(
                f"the histogram holds {self.histogram.sum()} values and {self.zeros} are zero, "
                f"expected {self.count} together"
            )
        channels = self.channel_amax
        if channels is not None and not (channels.size and channels.max() == self.largest):
            raise ValueError(f"channel_amax does not reach the largest magnitude {self.largest}")


class Observer:
    """Takes a tensor's values in, batch by batch; ``summary`` is what was seen so far.

    The histogram's range is the power of two above the largest magnitude and doubles when a larger
    one comes, merging pairs of bins. Bins of a power of two merge exactly, so the counts do not
    depend on the order or the size of the batches.
    """

    def __init__(self, *, histograms: bool = True) -> None:
        self._count = self._zeros = 0
        self._minimum, self._maximum = math.inf, -math.inf
        self._moving_average = 0.0
        self._exponent = _MIN_EXPONENT
        self._histogram = np.zeros(BINS, np.int64) if histograms else None
        self._channel_amax: np.ndarray | None = None

    @classmethod
    def resumed(cls, summary: TensorSummary) -> Observer:
        """An observer that goes on where ``summary`` was taken."""
        observer = cls()
        for field in dataclasses.fields(summary):
            value = getattr(summary, field.name)
            copied = value.copy() if isinstance(value, np.ndarray) else value
            setattr(observer, f"_{field.name}", copied)
        return observer

    def summary(self) -> TensorSummary:
        """Raises GraphError: nothing was seen yet."""
        if not self._count:
            raise GraphError("no value was observed, expected at least one batch")
        values = {
            field.name: getattr(self, f"_{field.name}")
            for field in dataclasses.fields(TensorSummary)
        }
        for name in ("histogram", "channel_amax"):
            values[name] = None if values[name] is None else values[name].copy()
        return TensorSummary(**values)

    def update(self, values: np.ndarray) -> None:
        """Take in the values of one batch.

        Args:
            values: float32 of shape (rows, channels); empty arrays are ignored.

        Raises:
            GraphError: NaN or infinity among them; nothing was taken in.
        """
        if not values.size:
            return
        low, high = values.min(axis=0), values.max(axis=0)
        # + 0.0 turns -0.0 into 0.0
        minimum, maximum = float(low.min()) + 0.0, float(high.max()) + 0.0
        if not (math.isfinite(minimum) and math.isfinite(maximum)):
            raise GraphError(f"values from {minimum} to {maximum}, expected finite ones")
        amax = max(-minimum, maximum)
        if self._histogram is not None:
            self._update_channels(np.maximum(np.abs(low), np.abs(high)))
        self._grow(amax)
        self._update_counts(values.reshape(-1))
        if self._count:
            self._moving_average = MOMENTUM * self._moving_average + (1 - MOMENTUM) * amax
        else:
            self._moving_average = amax
        self._minimum = min(self._minimum, minimum)
        self._maximum = max(self._maximum, maximum)
        self._count += values.size

    def _update_channels(self, amax: np.ndarray) -> None:
        if not self._count:
            self._channel_amax = amax
        elif self._channel_amax is not None:
            same = self._channel_amax.shape == amax.shape
            self._channel_amax = np.maximum(self._channel_amax, amax) if same else None

    def _grow(self, amax: float) -> None:
        """Double the range until ``amax`` lies inside."""
        # frexp: amax = m * 2**e with 0.5 <= m < 1, but e = 0 for a zero
        exponent = max(math.frexp(amax)[1], _MIN_EXPONENT) if amax else _MIN_EXPONENT
        doublings = exponent - self._exponent
        if doublings <= 0:
            return
        self._exponent = exponent
        if self._histogram is not None:
            merged = min(doublings, _BINS_EXPONENT)
            sums = self._histogram.reshape(BINS >> merged, 1 << merged).sum(axis=1)
            self._histogram[:] = 0
            self._histogram[: len(sums)] = sums

    def _update_counts(self, values: np.ndarray) -> None:
        if self._histogram is None:
            self._zeros += values.size - int(np.count_nonzero(values))
            return
        # a power of two: the product is exact, so a value always falls into the same bin
        scale = np.float32(2.0 ** (_BINS_EXPONENT - self._exponent))
        zeros = 0
        for start in range(0, values.size, _CHUNK):
            magnitudes = np.abs(values[start : start + _CHUNK])
            zeros += magnitudes.size - int(np.count_nonzero(magnitudes))
            indices = (magnitudes * scale).astype(np.intp)
            self._histogram += np.bincount(indices, minlength=BINS)
        self._histogram[0] -= zeros
        self._zeros += zeros


def _whole_histogram(counts: Any) -> np.ndarray | None:
    if counts is None:
        return None
    histogram = np.zeros(BINS, np.int64)
    trimmed = np.asarray(counts, np.int64)
    if trimmed.shape != (len(counts),) or len(counts) > BINS or (trimmed < 0).any():
        raise ValueError(
            f"a histogram of {len(counts)} bins, expected at most {BINS}, none below 0"
        )
    histogram[: len(counts)] = trimmed
    return histogram
