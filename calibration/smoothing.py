"""Which divisor each channel of an activation gets before it is quantized, and the range after it.

A transformer's activations have a few channels far larger than the rest; one scale for the tensor
then leaves the others a few integer steps. SmoothQuant (Xiao et al. 2022, arXiv 2211.10438, equation
4) divides channel j of the activation by ``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` and
multiplies row j of the weight by it: the product stays, and the difficulty moves into the weight,
whose columns have scales of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import GraphError, InputError
from ..precision import Precision
from .formats import activation_scale, fake_quantized, quantized_weight, weight_scales
from .linears import Linear
from .observers import Observer
from .table import CalibrationTable

#: ``auto`` tries these, and no smoothing at all. The optimum lies between 0.75 and 1 for most layers
#: of a trained ConvBERT (0.5, the paper's for OPT, is worse than none there).
ALPHAS = tuple(round(0.3 + 0.05 * step, 2) for step in range(15))
#: channels that the calibration data never moved, and rows of zeros
_LEAST = 1e-5


@dataclasses.dataclass(frozen=True)
class SmoothingOptions:
    """alpha: one for all layers in 0..1, ``auto`` for the best of ``ALPHAS`` or none per activation,
    None for no smoothing."""

    alpha: float | str | None = "auto"

    def __post_init__(self) -> None:
        if self.alpha is None or self.alpha == "auto":
            return
        if isinstance(self.alpha, str) or not 0 <= self.alpha <= 1:
            raise InputError(f"smoothquant {self.alpha!r}, expected auto, off or 0.0 to 1.0")

    @classmethod
    def parse(cls, text: str) -> SmoothingOptions:
        """Raises InputError: neither ``auto``, ``off`` nor a number in 0..1."""
        if text in ("auto", "off"):
            return cls("auto" if text == "auto" else None)
        try:
            return cls(float(text))
        except ValueError as error:
            raise InputError(f"smoothquant {text!r}, expected auto, off or 0.0 to 1.0") from error


@dataclasses.dataclass(frozen=True, eq=False)
class ActivationPlan:
    """How one activation and the weights that meet it are quantized.

    amax: range of the activation, after the division. divisor: float32 (rows,), None for no
    smoothing. error: mean squared error of the products over their mean square, measured on sample
    rows; what the search minimised.
    """

    linears: tuple[Linear, ...]
    amax: float
    alpha: float | None
    divisor: np.ndarray | None
    error: float

    @property
    def activation(self) -> str:
        return self.linears[0].activation


def plan_activation(
    linears: Sequence[Linear],
    weights: Sequence[np.ndarray],
    table: CalibrationTable,
    rows: np.ndarray,
    precision: Precision,
    options: SmoothingOptions,
) -> ActivationPlan:
    """The best of the smoothings that ``options`` allows, for linears that read one tensor.

    Args:
        weights: float32 (rows, columns) of each linear.
        rows: float32 (n, rows), sample rows of the activation.

    Raises:
        GraphError: the table lacks the activation, its channels' ranges (for smoothing), or its
            histogram (for the table's method).
    """
    weight = np.concatenate([np.asarray(array, np.float32) for array in weights], axis=1)
    products = rows @ weight
    power = float(np.mean(np.square(products), dtype=np.float64)) or 1.0
    candidates: dict[float | None, np.ndarray | None] = {None: None}
    if options.alpha is not None:
        channel_amax = _channel_amax(table, linears[0].activation)
        alphas = ALPHAS if options.alpha == "auto" else (float(options.alpha),)
        found = {alpha: smoothing_divisor(channel_amax, weight, alpha) for alpha in alphas}
        candidates = candidates | found if options.alpha == "auto" else dict(found)
    best = None
    for alpha, divisor in candidates.items():
        amax = smoothed_amax(table, linears[0].activation, rows, divisor)
        smoothed = rows if divisor is None else rows / divisor
        scaled = weight if divisor is None else weight * divisor[:, None]
        quantized = fake_quantized(smoothed, activation_scale(amax, precision), precision)
        scales = weight_scales(scaled, precision)
        dequantized = quantized_weight(scaled, scales, precision).astype(np.float32) * scales
        error = float(np.mean(np.square(quantized @ dequantized - products), dtype=np.float64))
        if best is None or error / power < best.error:
            best = ActivationPlan(tuple(linears), amax, alpha, divisor, error / power)
    assert best is not None
    return best


def smoothing_divisor(channel_amax: np.ndarray, weight: np.ndarray, alpha: float) -> np.ndarray:
    """Equation 4, float32 (rows,), scaled so that its extremes lie evenly around 1 (in the
    logarithm): a common factor changes nothing but would leave fp16's range."""
    activation = np.maximum(channel_amax.astype(np.float64), _LEAST)
    row = np.maximum(np.abs(weight).max(axis=1).astype(np.float64), _LEAST)
    divisor = activation**alpha / row ** (1 - alpha)
    return (divisor / np.sqrt(divisor.max() * divisor.min())).astype(np.float32)


def smoothed_amax(
    table: CalibrationTable, activation: str, rows: np.ndarray, divisor: np.ndarray | None
) -> float:
    """The range by the table's method. Of a divided tensor the largest magnitude is known from the
    channels', which also stands for the moving average; other methods look at the sample rows, of
    which alone the divided values are known.

    Raises:
        GraphError: the table lacks what is needed.
    """
    if divisor is None:
        return table.amax(activation)
    largest = float((_channel_amax(table, activation) / divisor).max())
    if table.method in ("minmax", "moving-average") or largest == 0:
        return largest or table.amax(activation)
    observer = Observer()
    observer.update(rows / divisor)
    return observer.summary().amax(table.method, percentile=table.percentile)


def _channel_amax(table: CalibrationTable, activation: str) -> np.ndarray:
    table.amax(activation, "minmax")  # refuses a tensor that was not observed
    channels = table.tensors[activation].channel_amax
    if channels is None:
        raise GraphError(
            f"the calibration table has no channels' ranges of {activation}, which smoothing needs",
            hint="collect it again without --table, or --smoothquant off",
        )
    return channels


def by_activation(linears: Sequence[Linear]) -> Mapping[str, tuple[Linear, ...]]:
    """Linears that read one tensor share its quantization."""
    groups: dict[str, list[Linear]] = {}
    for linear in linears:
        groups.setdefault(linear.activation, []).append(linear)
    return {name: tuple(group) for name, group in groups.items()}
