"""Smoothing: the product stays, the error falls, and nothing is chosen that is worse than none."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from convbert_deploy.calibration.formats import (
    activation_scale,
    fake_quantized,
    quantized_weight,
    weight_scales,
)
from convbert_deploy.calibration.linears import Linear
from convbert_deploy.calibration.observers import Observer
from convbert_deploy.calibration.smoothing import (
    ALPHAS,
    SmoothingOptions,
    by_activation,
    plan_activation,
    smoothed_amax,
    smoothing_divisor,
)
from convbert_deploy.calibration.table import CalibrationTable
from convbert_deploy.errors import GraphError, InputError
from convbert_deploy.precision import Precision

ROWS, COLUMNS = 48, 32
OFF, AUTO = SmoothingOptions(None), SmoothingOptions("auto")
BOTH = pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP8])


def linear(name: str = "encoder.layer.0.output.dense", columns: int = COLUMNS) -> Linear:
    return Linear(name, f"{name}/MatMul", "activation", f"{name}.weight", ROWS, columns)


def table_of(values: np.ndarray, *, histograms: bool = True, **changes) -> CalibrationTable:
    """Statistics of ``values`` as those of the tensor ``activation``."""
    observer = Observer(histograms=histograms)
    observer.update(values)
    table = CalibrationTable(
        graph_sha256="0" * 64,
        data="texts.jsonl",
        data_sha256="0" * 64,
        samples=1,
        tokens=len(values),
        method="minmax",
        percentile=99.99,
        versions={},
        tensors={"activation": observer.summary()},
    )
    return dataclasses.replace(table, **changes)


def activation(outliers: float = 1.0, seed: int = 0, rows: int = 600) -> np.ndarray:
    """Normal values, of which two channels are ``outliers`` times as large."""
    values = np.random.default_rng(seed).normal(size=(rows, ROWS)).astype(np.float32)
    values[:, [3, 17]] *= np.float32(outliers)
    return values


def weight(seed: int = 1, columns: int = COLUMNS) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(ROWS, columns)).astype(np.float32) / 7


def plan(values, options=AUTO, precision=Precision.INT8, weights=None, table=None):
    return plan_activation(
        [linear()],
        [weight() if weights is None else weights],
        table or table_of(values),
        values,
        precision,
        options,
    )


def error_by_hand(values, matrix, amax, precision) -> float:
    scales = weight_scales(matrix, precision)
    stored = quantized_weight(matrix, scales, precision).astype(np.float64) * scales
    rounded = fake_quantized(values, activation_scale(amax, precision), precision)
    exact = values.astype(np.float64) @ matrix
    return float(np.square(rounded @ stored - exact).mean() / np.square(exact).mean())


def test_equation_four_by_hand():
    channels = np.float32([8.0, 2.0])
    matrix = np.float32([[0.5, -2.0], [0.25, 0.125]])

    divisor = smoothing_divisor(channels, matrix, 0.75)

    # s = [8^.75 / 2^.25, 2^.75 / .25^.25] = [4, 2.378...]; centred by the root of their product
    one, other = 8**0.75 / 2**0.25, 2**0.75 / 0.25**0.25
    expected = np.array([one, other]) / np.sqrt(one * other)
    assert divisor.dtype == np.float32
    assert np.allclose(divisor, expected, rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_of_alpha(alpha):
    """1 makes all channels equally large, 0 all rows of the weight."""
    values, matrix = activation(30.0), weight()
    divisor = smoothing_divisor(np.abs(values).max(axis=0), matrix, alpha)

    equal = np.abs(values / divisor).max(axis=0)
    if alpha == 0:
        equal = np.abs(matrix * divisor[:, None]).max(axis=1)
    assert np.allclose(equal, equal[0], rtol=1e-5)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_product_stays(alpha):
    values, matrix = activation(50.0), weight()
    divisor = smoothing_divisor(np.abs(values).max(axis=0), matrix, alpha)

    smoothed = (values / divisor) @ (matrix * divisor[:, None])

    assert np.allclose(smoothed, values @ matrix, rtol=1e-4, atol=1e-4)


def test_divisors_are_centred_on_one():
    """A common factor changes no product, but float16 has to hold the divided values."""
    divisor = smoothing_divisor(np.float32([1e4, 1.0, 1e-9]), np.full((3, 2), 1e-3), 0.8)

    assert divisor.max() * divisor.min() == pytest.approx(1, rel=1e-5)


@BOTH
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("outliers", [1.0, 3.0, 100.0])
def test_auto_is_never_worse_than_none(precision, seed, outliers):
    values = activation(outliers, seed)

    without, auto = plan(values, OFF, precision), plan(values, AUTO, precision)

    assert auto.error <= without.error
    assert (auto.alpha is None) == (auto.divisor is None)


def test_auto_is_none_where_the_values_lie_on_the_grid():
    """Multiples of 2^-7 up to 127 of them lose nothing as they are."""
    values = np.round(activation() * 30).clip(-127, 127).astype(np.float32) / 128
    values[0, 0] = 127 / 128
    values[:, 5] = np.round(values[:, 5] * 16) / 128

    found = plan(values, AUTO)

    assert found.alpha is None and found.divisor is None
    assert found.amax == 127 / 128


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_auto_is_the_best_of_all_and_a_fixed_alpha_is_used_as_given(alpha):
    values = activation(40.0)

    fixed = plan(values, SmoothingOptions(alpha))

    assert fixed.alpha == alpha
    expected = smoothing_divisor(np.abs(values).max(axis=0), weight(), alpha)
    assert np.array_equal(fixed.divisor, expected)
    if alpha in ALPHAS:
        assert plan(values, AUTO).error <= fixed.error


def test_a_fixed_alpha_is_used_even_where_it_hurts():
    values = activation(1.0)
    # the wrong direction: all difficulty into the activation
    matrix = weight() * 10 ** np.linspace(-2, 2, ROWS, dtype=np.float32)[:, None]

    fixed = plan(values, SmoothingOptions(0.0), weights=matrix)

    assert fixed.alpha == 0.0 and fixed.divisor is not None
    assert fixed.error > 2 * plan(values, OFF, weights=matrix).error


def test_outlier_channels_are_what_it_is_for():
    values = activation(100.0)

    without, smoothed = plan(values, OFF), plan(values, AUTO)

    assert smoothed.error < without.error / 10
    assert smoothed.amax < without.amax / 4


@BOTH
def test_the_error_is_that_of_the_products(precision):
    values = activation(20.0)

    off, on = plan(values, OFF, precision), plan(values, SmoothingOptions(0.6), precision)

    amax = float(np.abs(values).max())
    assert off.error == pytest.approx(error_by_hand(values, weight(), amax, precision), rel=1e-3)
    by_hand = error_by_hand(values / on.divisor, weight() * on.divisor[:, None], on.amax, precision)
    assert on.error == pytest.approx(by_hand, rel=1e-3)


def test_linears_of_one_activation_are_smoothed_together():
    values, first, second = activation(30.0), weight(1, 8), 20 * weight(2, 16)
    linears = [linear("encoder.layer.0.a", 8), linear("encoder.layer.0.b", 16)]

    found = plan_activation(
        linears, [first, second], table_of(values), values, Precision.INT8, SmoothingOptions(0.7)
    )

    both = np.concatenate([first, second], axis=1)
    assert found.linears == tuple(linears) and found.activation == "activation"
    expected = smoothing_divisor(np.abs(values).max(axis=0), both, 0.7)
    assert np.array_equal(found.divisor, expected)


def test_minmax_of_the_divided_is_exact_beyond_the_sample_rows():
    """The table has seen more than the rows: its channels' ranges decide."""
    values = activation(10.0)
    values[0, 5] = 90
    divisor = np.linspace(0.5, 3, ROWS, dtype=np.float32)

    found = smoothed_amax(table_of(values), "activation", values[1:100], divisor)

    assert found == pytest.approx(90 / divisor[5])
    assert smoothed_amax(table_of(values), "activation", values[1:100], None) == 90


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_other_methods_look_at_the_divided_rows(method):
    values = activation(10.0)
    values[0, 5] = 900
    divisor = np.linspace(0.5, 3, ROWS, dtype=np.float32)
    table = table_of(values, method=method, percentile=99.0)

    found = smoothed_amax(table, "activation", values, divisor)

    observer = Observer()
    observer.update(values / divisor)
    assert found == observer.summary().amax(method, percentile=99.0)
    smoothed = plan(values, SmoothingOptions(0.5), table=table)
    observer = Observer()
    observer.update(values / smoothed.divisor)
    assert smoothed.amax == observer.summary().amax(method, percentile=99.0)


def test_moving_average_stands_for_minmax():
    values = activation(10.0)
    table = table_of(values, method="moving-average")
    divisor = np.full(ROWS, 2, np.float32)

    assert smoothed_amax(table, "activation", values, divisor) == np.abs(values).max() / 2


def constant_zero(values: np.ndarray) -> np.ndarray:
    values[:, 7] = 0
    return values


def constant_value(values: np.ndarray) -> np.ndarray:
    values[:, 7] = 40
    return values


def all_zero(values: np.ndarray) -> np.ndarray:
    return np.zeros_like(values)


@BOTH
@pytest.mark.parametrize("change", [constant_zero, constant_value, all_zero])
@pytest.mark.parametrize("options", [OFF, AUTO, SmoothingOptions(0.5), SmoothingOptions(1.0)])
def test_constant_channels(change, options, precision):
    values = change(activation())

    found = plan(values, options, precision)

    assert np.isfinite(found.amax) and found.amax > 0
    assert np.isfinite(found.error) and found.error < 0.01
    if found.divisor is not None:
        assert np.isfinite(found.divisor).all() and (found.divisor > 0).all()
        assert np.isfinite((1 / found.divisor).astype(np.float16)).all()


def test_a_row_of_zeros_in_the_weight():
    matrix = weight()
    matrix[9] = 0

    found = plan(activation(30.0), AUTO, weights=matrix)

    assert np.isfinite(found.error) and np.isfinite(found.divisor).all()


def test_without_channels_smoothing_is_refused_and_none_is_not():
    values = activation()
    table = table_of(values, histograms=False)

    for options in (AUTO, SmoothingOptions(0.5)):
        with pytest.raises(GraphError, match="no channels' ranges of activation"):
            plan(values, options, table=table)
    assert plan(values, OFF, table=table).amax == np.abs(values).max()


@pytest.mark.parametrize("options", [OFF, AUTO])
def test_a_tensor_the_table_lacks(options):
    table = table_of(activation(), tensors={})

    with pytest.raises(GraphError, match="no tensor activation"):
        plan(activation(), options, table=table)


def test_by_activation_keeps_the_order():
    one, two, three = (
        Linear(name, name, source, name, 1, 1) for name, source in zip("abc", "xyx", strict=True)
    )

    assert dict(by_activation([one, two, three])) == {"x": (one, three), "y": (two,)}
    assert list(by_activation([two, one])) == ["y", "x"]


@pytest.mark.parametrize(
    ("text", "alpha"), [("auto", "auto"), ("off", None), ("0.5", 0.5), ("0", 0.0), ("1", 1.0)]
)
def test_parsing(text, alpha):
    assert SmoothingOptions.parse(text).alpha == alpha


@pytest.mark.parametrize("text", ["", "on", "1.01", "-0.1", "nan", "inf", "0,5", "None"])
def test_what_cannot_be_parsed(text):
    with pytest.raises(InputError, match=r"smoothquant .*expected auto, off or 0\.0 to 1\.0"):
        SmoothingOptions.parse(text)


@pytest.mark.parametrize("alpha", ["off", "0.5", 2, float("nan")])
def test_options_made_by_hand(alpha):
    with pytest.raises(InputError, match="smoothquant"):
        SmoothingOptions(alpha)
