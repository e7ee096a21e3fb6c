"""How far a backend may be from the eager fp32 model: one table, each row with its measurement.

fp32 rows bound the absolute error. Half-precision rows bound the error relative to the standard
deviation of the reference output over all compared cases ("scaled"), because rounding error grows
with the size of the activations and heads differ in size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

from convbert_deploy.errors import ConvBertDeployError
from convbert_deploy.precision import Precision


class MeasuredErrors(Protocol):
    """What a tolerance looks at; ``parity.Errors`` has these and more."""

    @property
    def max_abs(self) -> float: ...
    @property
    def mean_abs(self) -> float: ...
    @property
    def min_cosine(self) -> float | None: ...


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Bounds on one output's errors over all cases; None means not judged.

    max_abs: largest absolute error, in units of the output.
    max_scaled, mean_scaled: largest and mean absolute error over the reference's standard
        deviation.
    min_cosine: smallest cosine of any row (the logits of one sequence or token).
    min_argmax_agreement: fraction of rows whose argmax must agree, at real tokens.
    """

    max_abs: float | None = None
    max_scaled: float | None = None
    mean_scaled: float | None = None
    min_cosine: float | None = None
    min_argmax_agreement: float | None = None

    def largest_abs(self, scale: float) -> float:
        """The largest absolute error allowed, whatever else is; ``scale`` as for violations.

        A deviation taken from a few values is itself uncertain: use some dozens.
        """
        limits = [limit for limit in (self.max_abs,) if limit is not None]
        if self.max_scaled is not None:
            limits.append(self.max_scaled * scale)
        return min(limits, default=float("inf"))

    def violations(
        self, errors: MeasuredErrors, scale: float, argmax_agreement: float | None
    ) -> Iterator[str]:
        """Each broken bound, as text; ``scale`` is the reference's standard deviation."""
        upper = (
            ("max abs error", errors.max_abs, self.max_abs),
            ("max abs error over the output's deviation", errors.max_abs / scale, self.max_scaled),
            (
                "mean abs error over the output's deviation",
                errors.mean_abs / scale,
                self.mean_scaled,
            ),
        )
        for label, value, limit in upper:
            # Written so that NaN is a violation.
            if limit is not None and not value <= limit:
                yield f"{label} {value:.3g} is over {limit:g}"
        lower = (
            ("smallest cosine", errors.min_cosine, self.min_cosine),
            ("argmax agreement", argmax_agreement, self.min_argmax_agreement),
        )
        for label, value, limit in lower:
            if limit is not None and value is not None and not value >= limit:
                yield f"{label} {value:.6g} is under {limit:g}"


@dataclasses.dataclass(frozen=True)
class KernelTolerance:
    """Bounds for one operator alone, on inputs of standard normal size.

    atol, rtol: ``|kernel - truth| <= atol + rtol * |truth|``, truth computed in float32.
    control_factor: for half types the kernel may also be at most this many times as far from the
        truth as plain torch in the same type (flash-attention's rule); None where fp32 is exact
        enough to need no control.
    """

    atol: float
    rtol: float
    control_factor: float | None = None


# How the rows were set (2026-11-21, AMD EPYC with AVX-512, 2 cores, torch 2.13, onnxruntime 1.31.1,
# transformers 5.23):
#
# realistic: random weights at the scale of trained ones; small, medium-small and base; 14 cases of
#   batch 1 and 8 and seq 1 to 64 (fp32: 1 to 128), padded ones included. Half types: all six heads;
#   fp32: encoder, sequence classification, question answering.
# trained: a part-of-speech tagger (4 layers, groups 2, logits of deviation 2.7) and a sentiment
#   classifier (6 layers, with activation outliers), batch 1 and 8 and seq 1 to 512.
# control: eager torch computing in the half type, against eager fp32.
# faults: the least that a wrong convolution moves (uniform kernel, reversed taps, rolled heads,
#   shift by one, depthwise convolution dropped), in deviations. realistic: max 0.70, mean 0.107.
#   trained tagger: max 1.6. trained classifier: max 0.31, mean 0.047, always cosine < -0.96.

# Stock ONNX Runtime on a stock export, worst max abs: realistic 9.3e-6, trained 5.7e-6. (Eager
# float32 is itself up to 5.6e-6 from eager float64.) Twice the worst, rounded.
_FP32 = Tolerance(max_abs=2e-5, min_cosine=0.99999)

# Derived, not measured, for want of a GPU: GEMM sums in another order with TF32 off, five times the
# room of the CPU. TF32 keeps as many mantissa bits as fp16 and does not fit, as intended.
_FP32_GPU = Tolerance(max_abs=1e-4, min_cosine=0.99999)

# Control, worst, realistic: max 0.031, mean 0.0076, cosine 0.9993, argmax 0.984; trained: max
# 0.0025, mean 0.0005, cosine 0.99997, argmax 0.9997. Twice the control; a 7th of the least fault.
_FP16 = Tolerance(max_scaled=0.06, mean_scaled=0.015, min_cosine=0.998, min_argmax_agreement=0.95)

# Control, worst, realistic: max 0.21, mean 0.035, cosine 0.970, argmax 0.931; trained: max 0.036,
# mean 0.0051, cosine 0.9977, argmax 0.997. Twice the control, below the least realistic fault; on
# the trained classifier a fault is found by its cosine.
_BF16 = Tolerance(max_scaled=0.4, mean_scaled=0.07, min_cosine=0.94, min_argmax_agreement=0.85)

# 8-bit linears, SmoothQuant searched, 512 calibration texts, worst of the two trained models on the
# 18 cases of ``verify`` (random ids, which calibration never saw). int8: max 0.209, mean 0.041,
# argmax 0.984; fp8: max 0.216, mean 0.028, argmax 0.976. Twice that; no cosine, because two logits
# near zero turn freely. This finds broken Q/DQ (a weight's scale doubled, an axis swapped), not the
# weakest fault of a convolution: the fp32 graph was held to 2e-5 before it was quantized, and
# ``evaluate --budget`` judges on real texts.
_EIGHT_BIT = Tolerance(max_scaled=0.45, mean_scaled=0.08, min_argmax_agreement=0.95)

# CPU engines on our EncoderLayer (2026-11-21, an EPYC with AVX-512 VNNI and BF16), the 18 cases
# of ``verify``:
# bf16: trained classifier max 0.0082, mean 0.0019; trained tagger 0.0034, 0.0003; realistic small,
#   12 layers: encoder 0.045, 0.006, sequence classification 0.037, 0.010, question answering 0.124,
#   0.043. Less than the control, so its row stays.
# int8, a step for each token, no calibration: classifier 0.073, 0.024; tagger 0.012, 0.0015; of
#   calibrated graphs 0.233, 0.033 and 0.015, 0.0016, with static steps 0.247, 0.043 and 0.091,
#   0.0021. The row of 8 bits stays: 1.8 times the worst. Random heads are harder: realistic small
#   0.217, 0.050, and question answering 0.534, 0.078, outside it, because its logits have a
#   deviation of 0.2 only.
_CPU_BF16, _CPU_INT8 = _BF16, _EIGHT_BIT

#: (backend, precision) to bounds. ``onnx`` is the exported graph in stock ONNX Runtime on CPU.
TOLERANCES: dict[tuple[str, Precision], Tolerance] = {
    # CPU: measured as said above.
    ("onnx", Precision.FP32): _FP32,
    ("onnx", Precision.FP16): _FP16,
    ("onnx", Precision.BF16): _BF16,
    ("onnx", Precision.INT8): _EIGHT_BIT,
    ("onnx", Precision.FP8): _EIGHT_BIT,
    ("onnxruntime-cpu", Precision.FP32): _FP32,
    ("onnxruntime-cpu", Precision.FP16): _FP16,
    ("onnxruntime-cpu", Precision.BF16): _CPU_BF16,
    ("onnxruntime-cpu", Precision.INT8): _CPU_INT8,
    ("onnxruntime-cpu", Precision.FP8): _EIGHT_BIT,
    # GPU: fp32 derived, not measured; half types by the CPU control, which rounds after every
    # operator as these do, or more often than a fused kernel.
    ("onnxruntime-cuda", Precision.FP32): _FP32_GPU,
    ("onnxruntime-cuda", Precision.FP16): _FP16,
    ("onnxruntime-cuda", Precision.BF16): _BF16,
    ("onnxruntime-cuda", Precision.INT8): _EIGHT_BIT,
    ("onnxruntime-cuda", Precision.FP8): _EIGHT_BIT,
    ("tensorrt", Precision.FP32): _FP32_GPU,
    ("tensorrt", Precision.FP16): _FP16,
    ("tensorrt", Precision.BF16): _BF16,
    ("tensorrt", Precision.INT8): _EIGHT_BIT,
    ("tensorrt", Precision.FP8): _EIGHT_BIT,
    ("tensorrt-rtx", Precision.FP32): _FP32_GPU,
    ("tensorrt-rtx", Precision.FP16): _FP16,
    ("tensorrt-rtx", Precision.BF16): _BF16,
    ("tensorrt-rtx", Precision.INT8): _EIGHT_BIT,
    ("tensorrt-rtx", Precision.FP8): _EIGHT_BIT,
}

#: One operator alone, inputs of standard normal size: fp32 differs in the order of the sum only;
#: half types round the result once (2^-11 and 2^-8 of it), after float32 arithmetic.
KERNEL_TOLERANCES: dict[Precision, KernelTolerance] = {
    Precision.FP32: KernelTolerance(atol=1e-5, rtol=1e-5),
    Precision.FP16: KernelTolerance(atol=1e-5, rtol=2**-10, control_factor=2.0),
    Precision.BF16: KernelTolerance(atol=1e-5, rtol=2**-7, control_factor=2.0),
}


def tolerance_for(backend: str, precision: Precision | str) -> Tolerance:
    """The row of one backend and precision.

    Raises:
        ConvBertDeployError: there is none.
    """
    try:
        return TOLERANCES[backend, Precision(precision)]
    except (KeyError, ValueError) as error:
        backends = ", ".join(dict.fromkeys(name for name, _ in TOLERANCES))
        raise ConvBertDeployError(
            f"no tolerance is known for backend {backend} at precision {precision}: expected one "
            f"of {backends} at {', '.join(Precision)}"
        ) from error
