"""Where to clip a tensor whose magnitudes were counted in a histogram.

``counts[i]`` values have a magnitude in [i * width, (i + 1) * width). Exact zeros are not among
them: every symmetric scale represents zero exactly, and a ReLU's zeros would drown the rest. All
functions return a clip in the tensor's own unit, above 0 and at most the histogram's end.
"""

from __future__ import annotations

import numpy as np

#: candidates of ``mse_clip`` as fractions of the largest magnitude
_MSE_FRACTIONS = np.linspace(1.0, 0.3, 141)
#: points a bin is split into: at a clip of 0.3 a quantization step is as narrow as 2.4 bins, and a
#: bin's middle alone would meet the same few phases of the rounding error over and over
_POINTS_A_BIN = 4


def percentile_clip(counts: np.ndarray, width: float, percentile: float) -> float:
    """The magnitude that ``percentile`` % (above 0, at most 100) of the counted values do not
    exceed, interpolated within its bin."""
    sums = np.cumsum(counts)
    wanted = sums[-1] * (percentile / 100)
    index = int(np.searchsorted(sums, wanted))
    below = sums[index - 1] if index else 0
    return (index + (wanted - below) / counts[index]) * width


def entropy_clip(counts: np.ndarray, width: float, levels: int = 128) -> float:
    """The clip whose quantized distribution diverges least from the real one (KL divergence).

    S. Migacz, "8-bit Inference with TensorRT", GTC 2017 (S7310), as NVIDIA's pytorch-quantization
    implements it (``calib/histogram.py``, ``_compute_amax_entropy``). For each candidate of i bins,
    i from ``levels`` up to the last filled bin:

    * P = the first i bins, everything above added to bin i - 1;
    * Q = the first i bins (without what is above) in ``levels`` equal levels, each level's sum
      spread evenly over its filled bins;
    * the clip is i * width for the i of the smallest KL(P || Q), the largest such i on a tie.

    The first bin takes the count of the second, as there: values next to zero are many and any
    clip serves them. ``levels`` is 128 for int8: magnitudes 0 to 127.

    All candidates at once: within a level log Q is constant, so sums over bins are differences of
    cumulative sums at the levels' edges.
    """
    bins = counts.astype(np.float64)
    bins[0] = bins[1]
    filled = np.flatnonzero(bins)
    top = int(filled[-1]) + 1 if filled.size else 0
    if top <= levels:
        return max(int(np.flatnonzero(counts)[-1]) + 1, 1) * width
    candidates = np.arange(levels, top + 1)
    sums = np.concatenate([[0.0], np.cumsum(bins)])
    occupied = np.concatenate([[0], np.cumsum(bins > 0)])
    # level l holds the bins j with floor(j * levels / i) = l
    edges = -(-(np.arange(levels + 1) * candidates[:, None]) // levels)
    mass = np.diff(sums[edges], axis=1)
    spread = np.diff(occupied[edges], axis=1)
    log_q = np.log(np.divide(mass, spread, out=np.ones_like(mass), where=spread > 0))

    total, inside, last = sums[-1], sums[candidates], bins[candidates - 1]
    above = total - inside
    p_log_p = np.cumsum(_x_log_x(bins))[candidates - 1] - _x_log_x(last) + _x_log_x(last + above)
    p_log_q = (mass * log_q).sum(axis=1) + above * log_q[:, -1]
    # a P where Q has nothing diverges without bound
    possible = (inside > 0) & ((last > 0) | (above == 0))
    log_sums = np.log(np.where(possible, inside, 1.0)) - np.log(total)
    divergence = np.where(possible, (p_log_p - p_log_q) / total + log_sums, np.inf)
    best = candidates[divergence <= divergence.min() + 1e-12][-1]
    return float(best) * width


def mse_clip(counts: np.ndarray, width: float, amax: float, levels: int = 127) -> float:
    """The clip with the smallest expected squared error of rounding and clipping.

    Error of x at clip c: (x - s * min(round(x / s), levels))^2 with s = c / levels. Candidates are
    0.3 to 1.0 times ``amax`` in steps of 0.005. Values lie evenly within their bin, none above
    ``amax``. ``levels`` is 127 for int8.
    """
    filled = np.flatnonzero(counts)
    offsets = (np.arange(_POINTS_A_BIN) + 0.5) / _POINTS_A_BIN
    points = np.minimum((filled[:, None] + offsets) * width, amax)
    weights = counts[filled] / (counts.sum() * _POINTS_A_BIN)
    best, least = amax, np.inf
    for clip in _MSE_FRACTIONS * amax:
        scale = clip / levels
        error = points - scale * np.minimum(np.rint(points / scale), levels)
        expected = float(weights @ np.square(error).sum(axis=1))
        if expected < least:
            best, least = float(clip), expected
    return best


def _x_log_x(values: np.ndarray) -> np.ndarray:
    return values * np.log(np.where(values > 0, values, 1.0))
