"""The search for the layers that a budget needs high, on layers whose losses are known."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from convbert_deploy.calibration.budget import Budget
from convbert_deploy.calibration.linears import Linear
from convbert_deploy.calibration.sensitivity import Price, choose, price, sensitivities
from convbert_deploy.calibration.smoothing import ActivationPlan
from convbert_deploy.errors import ConvBertDeployError, GraphError
from convbert_deploy.evaluation.distance import Distance
from convbert_deploy.evaluation.evaluation_report import EvaluationReport, MetricValue


def report_of(mean: float, agreement: float | None = 99.0, drop: float | None = None):
    metrics = () if drop is None else (MetricValue("accuracy", 90 - drop, 90),)
    distance = Distance("sequences", 10, agreement, mean, 3 * mean, mean / 10)
    return EvaluationReport("candidate", "eager", "texts.jsonl", 10, 0, 0, metrics, distance)


def plan_of(index: int, linears: int = 1) -> ActivationPlan:
    names = [f"encoder.layer.{index}.{part}" for part in range(linears)]
    return ActivationPlan(
        tuple(Linear(n, f"{n}/MatMul", f"a{index}", f"{n}.weight", 4, 5) for n in names),
        1.0,
        None,
        None,
        0.0,
    )


class FakeMeasure:
    """Losses that add up, or ``of`` the set of quantized plans' indices; counts its calls."""

    def __init__(self, losses, of=None) -> None:
        self.plans = [plan_of(index) for index in range(len(losses))]
        self._losses = losses
        self._of = of or (lambda chosen: sum(losses[index] for index in chosen))
        self.asked: list[frozenset[int]] = []

    def __call__(self, plans):
        chosen = frozenset(self.plans.index(plan) for plan in plans)
        self.asked.append(chosen)
        return report_of(self._of(chosen))

    def order(self):
        found = sensitivities(self.plans, self, ignore)
        self.asked.clear()
        return found


def ignore(what: str, done: int, of: int) -> None:
    pass


def searched(measure: FakeMeasure, budget: Budget):
    return choose(measure.plans, measure.order(), budget, measure, ignore)


def high_indices(choice) -> set[int]:
    return {int(name.split(".")[2]) for name in choice.high}


def test_each_layer_is_measured_alone_and_the_worst_comes_first():
    measure = FakeMeasure([0.1, 0.5, 0.0, 0.3])
    seen = []

    order = sensitivities(measure.plans, measure, lambda *call: seen.append(call))

    assert measure.asked == [{0}, {1}, {2}, {3}]
    assert [found.linears for found in order] == [
        (f"encoder.layer.{index}.0",) for index in (1, 3, 0, 2)
    ]
    first = order[0]
    assert (first.mean_error, first.max_error, first.agreement) == (0.5, 1.5, 99.0)
    assert first.metric_drop is None
    assert seen == [("sensitivity of each layer", done, 4) for done in (1, 2, 3, 4)]


def test_the_drop_of_the_metric_is_kept_where_there_are_labels():
    plans = [plan_of(0)]

    (found,) = sensitivities(plans, lambda some: report_of(0.1, None, drop=0.4), ignore)

    assert found.metric_drop == pytest.approx(0.4) and found.agreement is None


def test_nan_is_worse_than_anything():
    measure = FakeMeasure([0.1, math.nan, 1e9, math.nan, 0.2])

    order = [int(found.linears[0].split(".")[2]) for found in measure.order()]

    assert order == [1, 3, 2, 4, 0]


def test_nothing_is_kept_high_within_the_budget():
    measure = FakeMeasure([0.1, 0.2, 0.1])

    choice = searched(measure, Budget(mean_error=0.5))

    assert choice.high == () and list(choice.quantized) == measure.plans
    assert measure.asked == [{0, 1, 2}]
    assert choice.report.mean_error == pytest.approx(0.4)


@pytest.mark.parametrize("bound", [0.05, 0.3, 0.55, 0.7, 1.0, 1.3, 1.5])
def test_the_fewest_layers_where_losses_add_up(bound):
    losses = [0.02, 0.3, 0.1, 0.5, 0.04, 0.25, 0.01, 0.2, 0.15]
    measure = FakeMeasure(losses)

    choice = searched(measure, Budget(mean_error=bound))

    fewest = next(
        size
        for size in range(len(losses) + 1)
        if any(
            sum(losses) - sum(losses[index] for index in high) <= bound
            for high in itertools.combinations(range(len(losses)), size)
        )
    )
    assert len(choice.high) == fewest
    kept = {measure.plans.index(plan) for plan in choice.quantized}
    assert kept | high_indices(choice) == set(range(9)) and not kept & high_indices(choice)
    assert choice.report.mean_error == pytest.approx(sum(losses[i] for i in kept))
    assert choice.report.mean_error <= bound
    assert len(measure.asked) == len(set(measure.asked))


def test_bisection_asks_for_few_of_many():
    losses = list(np.linspace(1, 0.01, 64))
    measure = FakeMeasure(losses)
    budget = Budget(mean_error=float(sum(losses[20:])))

    choice = searched(measure, budget)

    assert high_indices(choice) == set(range(20))
    # all in 8 bits, six halvings, and each of the twenty tried in 8 bits again
    assert len(measure.asked) <= 1 + 6 + 20


def test_layers_that_are_only_in_the_way_go_back_to_8_bits():
    """Alone, 0 is the worst and 1 the second; together it is 1 and 2 that break the budget."""

    def loss(chosen):
        return 0.1 * len(chosen) + (5 if 2 in chosen else 0)

    measure = FakeMeasure([0.3, 0.2, 0.15, 0.1, 0.1])
    order = measure.order()
    measure._of = loss

    choice = choose(measure.plans, order, Budget(mean_error=1.0), measure, ignore)

    assert high_indices(choice) == {2}
    assert choice.report.mean_error == pytest.approx(0.4)


def test_the_least_sensitive_goes_back_first():
    """Either 0 or 1 may; 1 loses less alone."""
    measure = FakeMeasure([0.6, 0.5, 0.4, 0.01])
    order = measure.order()
    losses, measure._of = measure._of, lambda chosen: losses(chosen) + (5 if 2 in chosen else 0)

    choice = choose(measure.plans, order, Budget(mean_error=0.9), measure, ignore)

    assert high_indices(choice) == {0, 2}


def test_no_layer_of_the_choice_could_be_spared():
    random = np.random.default_rng(0)
    for _ in range(30):
        losses = random.exponential(1, 8)
        pairs = random.exponential(0.3, (8, 8))

        def loss(chosen, losses=losses, pairs=pairs):
            together = sum(pairs[a, b] for a, b in itertools.combinations(sorted(chosen), 2))
            return sum(losses[index] for index in chosen) + together

        measure = FakeMeasure(losses, loss)
        bound = float(random.uniform(losses.min() * 1.01, loss(range(8))))
        choice = searched(measure, Budget(mean_error=bound))

        high = high_indices(choice)
        assert loss(set(range(8)) - high) <= bound
        assert all(loss(set(range(8)) - high | {index}) > bound for index in high)


def test_a_layer_that_breaks_everything_is_kept_high():
    measure = FakeMeasure([0.1, math.nan, 0.1])

    choice = searched(measure, Budget(mean_error=0.5))

    assert high_indices(choice) == {1}


@pytest.mark.parametrize("layers", [1, 2, 7])
def test_an_impossible_budget(layers):
    measure = FakeMeasure([0.5] * layers)

    with pytest.raises(GraphError, match=r"no layer .* within the budget mean error <= 0\.1"):
        searched(measure, Budget(mean_error=0.1))


def test_a_bound_on_what_is_not_measured():
    measure = FakeMeasure([0.5])

    with pytest.raises(ConvBertDeployError, match="metric drop"):
        searched(measure, Budget(metric_drop=0.1))


def test_linears_of_one_activation_stay_together():
    plans = [plan_of(0, 3), plan_of(1, 2)]

    def measure(some):
        return report_of(sum(1.0 if plan is plans[0] else 0.1 for plan in some))

    order = sensitivities(plans, measure, ignore)
    choice = choose(plans, order, Budget(mean_error=0.5), measure, ignore)

    assert order[0].linears == tuple(f"encoder.layer.0.{part}" for part in range(3))
    assert choice.high == order[0].linears
    assert choice.quantized == (plans[1],)


def test_the_choice_is_in_the_order_of_the_graph():
    measure = FakeMeasure([0.3, 0.1, 0.5, 0.2, 0.4])

    choice = searched(measure, Budget(mean_error=0.35))

    assert choice.high == tuple(f"encoder.layer.{index}.0" for index in (0, 2, 4))
    assert [measure.plans.index(plan) for plan in choice.quantized] == [1, 3]


def test_price():
    every = [plan_of(index).linears[0] for index in range(4)]
    every[3] = dataclasses.replace(every[3], columns=25)

    found = price([every[0].name, every[3].name], every)

    assert found == Price(arithmetic=pytest.approx(120 / 160), extra_bytes=120)
    assert price([], every) == Price(0.0, 0)
