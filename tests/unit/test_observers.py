"""Statistics of a tensor's values, and the ranges chosen from them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from convbert_deploy.calibration.observers import BINS, METHODS, Observer, TensorSummary
from convbert_deploy.calibration.thresholds import entropy_clip, mse_clip
from convbert_deploy.errors import GraphError, InputError


def observed(*batches: np.ndarray, histograms: bool = True) -> TensorSummary:
    observer = Observer(histograms=histograms)
    for batch in batches:
        observer.update(np.atleast_2d(np.asarray(batch, np.float32)))
    return observer.summary()


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


def values_of(kind: str) -> np.ndarray:
    """(2000, 16) float32 values shaped like activations."""
    random = np.random.default_rng(3)
    normal = random.normal(size=(2000, 16))
    shaped = {
        "normal": normal,
        "outlier-channel": normal * np.where(np.arange(16) == 3, 20, 1),
        "gelu": gelu(2 * normal),
        "relu": np.maximum(normal - 1.5, 0),
        "heavy-tail": random.standard_t(3, size=normal.shape),
    }
    return shaped[kind].astype(np.float32)


KINDS = ("normal", "outlier-channel", "gelu", "relu", "heavy-tail")


def histogram_of(values: np.ndarray, exponent: int) -> np.ndarray:
    magnitudes = np.abs(values[values != 0]).astype(np.float64)
    return np.histogram(magnitudes, bins=BINS, range=(0, 2.0**exponent))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_summary_equals_statistics_of_all_values_at_once(kind):
    values = values_of(kind)
    summary = observed(*np.array_split(values, 7))

    assert summary.count == values.size
    assert summary.zeros == (values == 0).sum()
    assert (summary.minimum, summary.maximum) == (values.min(), values.max())
    assert np.array_equal(summary.channel_amax, np.abs(values).max(axis=0))
    assert 2.0 ** (summary.exponent - 1) <= summary.largest < 2.0**summary.exponent
    assert np.array_equal(summary.histogram, histogram_of(values, summary.exponent))


def test_histogram_depends_neither_on_order_nor_on_batches():
    values = values_of("heavy-tail") / 1000
    ascending = values[np.argsort(np.abs(values).max(axis=1))]

    summaries = [
        observed(values),
        observed(*ascending),  # the range doubles many times
        observed(*np.array_split(ascending[::-1], 5)),
        observed(np.zeros((3, 16)), values),
    ]

    for summary in summaries:
        assert np.array_equal(summary.histogram, summaries[0].histogram)
        assert summary.exponent == summaries[0].exponent


def test_range_grows_by_any_factor_without_losing_a_value():
    summary = observed(np.full(10, 1e-30), np.full(5, 3.0), np.full(7, 3e38), np.zeros(4))

    assert summary.histogram.sum() == 22
    assert summary.zeros == 4
    assert summary.histogram[0] == 15
    assert summary.amax("minmax") == np.float32(3e38)


def test_moving_average_weighs_batches_with_momentum():
    summary = observed(np.full(4, -10.0), np.full(400, 20.0), np.zeros(3))

    assert summary.moving_average == pytest.approx(0.9 * (0.9 * 10 + 0.1 * 20), rel=1e-12)
    assert summary.amax("moving-average") == summary.moving_average


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "values", [[4.0], [-4.0], [3.0] * 1000, [-2.5, 2.5], [1e-6], [65504.0], [3.4e38]]
)
def test_tensors_of_one_magnitude_keep_it(method, values):
    assert observed(values).amax(method) == abs(np.float32(values[0]))


@pytest.mark.parametrize("method", METHODS)
def test_tensor_of_zeros_has_a_usable_range(method):
    summary = observed(np.zeros(100), -np.zeros(100))

    assert summary.amax(method) == 1.0
    assert summary.zeros == 200
    assert not np.signbit(summary.channel_amax).any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", [[1e-45], [0, 0, 1e-40], [1e-45, 1e-38], [1.0, 1e-45, 0.0]])
def test_tiny_values_give_a_scale_that_is_a_normal_number(method, values):
    amax = observed(values).amax(method)

    assert np.float32(amax / 127) >= np.finfo(np.float32).tiny


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_stays_inside_the_values_seen(method, kind):
    values = values_of(kind)

    assert 0 < observed(values).amax(method) <= np.abs(values).max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percentile", [50, 99, 99.99, 100])
def test_percentile_is_that_of_the_nonzero_magnitudes(kind, percentile):
    values = values_of(kind)
    summary = observed(values)
    width = 2.0**summary.exponent / BINS

    exact = np.percentile(np.abs(values[values != 0]), percentile, method="inverted_cdf")

    assert abs(summary.amax("percentile", percentile=percentile) - exact) <= width


def entropy_by_definition(counts: np.ndarray, width: float) -> float:
    """The published procedure, one candidate after another."""
    bins = counts.astype(np.float64)
    bins[0] = bins[1]
    found = {}
    for i in range(128, int(np.flatnonzero(bins)[-1]) + 2):
        p, q = bins[:i].copy(), np.zeros(i)
        p[-1] += bins[i:].sum()
        level = np.arange(i) * 128 // i
        for k in np.unique(level):
            inside = (level == k) & (bins[:i] > 0)
            if inside.any():
                q[inside] = bins[:i][inside].sum() / inside.sum()
        if q.sum() == 0 or ((p > 0) & (q == 0)).any():
            continue
        p, q = p / p.sum(), q / q.sum()
        filled = p > 0
        found[i] = (p[filled] * np.log(p[filled] / q[filled])).sum()
    least = min(found.values())
    return max(i for i, kl in found.items() if kl <= least + 1e-12) * width


@pytest.mark.parametrize("kind", ["outlier-channel", "gelu", "heavy-tail"])
def test_entropy_equals_its_definition(kind):
    # merged four to one, so that the definition's loops end soon
    counts = observed(values_of(kind)).histogram.reshape(-1, 4).sum(axis=1)

    assert entropy_clip(counts, 0.25) == entropy_by_definition(counts, 0.25)


def test_entropy_gives_the_first_bin_the_count_of_the_second():
    counts = observed(values_of("gelu")).histogram.reshape(-1, 4).sum(axis=1)
    crowded = counts.copy()
    crowded[0] += 10**7

    assert entropy_clip(crowded, 0.25) == entropy_clip(counts, 0.25)
    assert entropy_by_definition(crowded, 0.25) == entropy_clip(crowded, 0.25)


@pytest.mark.parametrize("levels", [127, 63])
def test_entropy_has_one_level_more_than_int8_has_above_zero(levels):
    summary = observed(values_of("heavy-tail"))
    width = 2.0**summary.exponent / BINS
    expected = entropy_clip(summary.histogram, width, levels + 1)

    assert summary.amax("entropy", levels=levels) == expected
    assert expected != entropy_clip(summary.histogram, width, levels)


def test_entropy_clips_a_lone_outlier_and_minmax_does_not():
    values = values_of("normal").ravel()
    summary = observed(np.append(values, 40.0))

    assert summary.amax("minmax") == 40
    assert summary.amax("entropy") < 0.5 * 40


def squared_error(values: np.ndarray, clip: float) -> float:
    scale = clip / 127
    quantized = np.clip(np.rint(values / scale), -127, 127) * scale
    return float(np.square(values - quantized).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_mse_clip_is_the_best_of_the_candidates_on_the_values(kind):
    values = values_of(kind).astype(np.float64)
    summary = observed(values)
    candidates = np.linspace(0.3, 1.0, 141) * summary.largest
    best = min(squared_error(values, clip) for clip in candidates)

    assert squared_error(values, summary.amax("mse")) <= 1.02 * best


def test_mse_clips_more_when_levels_are_few():
    summary = observed(values_of("heavy-tail"))
    width = 2.0**summary.exponent / BINS

    coarse, fine = (
        mse_clip(summary.histogram, width, summary.largest, levels) for levels in (31, 1023)
    )

    assert coarse < fine


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_zeros_do_not_move_the_range(method):
    values = values_of("gelu")
    with_zeros = np.concatenate([values, np.zeros((20_000, 16), np.float32)])

    assert observed(with_zeros).amax(method) == observed(values).amax(method)


def test_ranges_alone_need_no_histogram_and_refuse_what_does():
    values = values_of("normal")
    summary = observed(values, histograms=False)

    assert summary.histogram is None
    assert summary.amax("minmax") == np.abs(values).max()
    for method in ("percentile", "entropy", "mse"):
        with pytest.raises(GraphError, match=f"method {method} needs histograms"):
            summary.amax(method)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_not_finite_values_are_refused_and_not_counted(poison):
    observer = Observer()
    observer.update(np.ones((2, 3), np.float32))
    before = observer.summary()

    with pytest.raises(GraphError, match="expected finite"):
        observer.update(np.array([[1, poison, 2]], np.float32))
    assert observer.summary() == before


def test_channels_are_dropped_where_the_last_axis_changes():
    summary = observed(np.ones((2, 3)), np.ones((2, 4)), np.ones((2, 3)))

    assert summary.channel_amax is None
    assert summary.count == 20


@pytest.mark.parametrize("split", [1, 3, 6])
def test_resumed_observer_ends_with_the_same_summary(split):
    batches = np.array_split(values_of("heavy-tail"), 7)
    first = Observer()
    for batch in batches[:split]:
        first.update(batch)
    written = TensorSummary.from_json(first.summary().to_json())
    second = Observer.resumed(written)
    for batch in batches[split:]:
        second.update(batch)

    assert second.summary() == observed(*batches)
    assert written == first.summary(), "resuming must not change what it resumes from"


def test_unknown_method_and_percentile_are_named():
    summary = observed([1.0])

    with pytest.raises(InputError, match="'kl', expected minmax, moving-average, percentile"):
        summary.amax("kl")
    for percentile in (0, 100.1, float("nan")):
        with pytest.raises(InputError, match="percentile"):
            summary.amax("percentile", percentile=percentile)


def test_nothing_observed_is_an_error():
    observer = Observer()
    observer.update(np.empty((0, 4), np.float32))

    with pytest.raises(GraphError, match="no value was observed"):
        observer.summary()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("count", 31_999),
        ("zeros", 1),
        ("minimum", 1e9),
        ("maximum", float("nan")),
        ("moving_average", -1.0),
        ("moving_average", 1e9),
        ("exponent", 0),
        ("histogram", [-1] * 5),
        ("histogram", [1] * (BINS + 1)),
        ("channel_amax", [0.5] * 16),
    ],
)
def test_contradictory_numbers_are_not_read(field, value):
    data = observed(values_of("normal")).to_json()
    TensorSummary.from_json(data)

    with pytest.raises(ValueError, match=r"\d"):
        TensorSummary.from_json(data | {field: value})


def test_summaries_that_differ_in_one_number_are_not_equal():
    summary = observed(values_of("normal"))
    other = summary.histogram.copy()
    other[5] += 1

    assert dataclasses.replace(summary, histogram=other) != summary
