"""Accuracy budgets: grammar, verdicts, and what NaN means."""

from __future__ import annotations

import dataclasses

import pytest

from convbert_deploy.calibration.budget import Budget
from convbert_deploy.errors import ConvBertDeployError, InputError

FULL = "metric drop <= 0.3, agreement >= 99%, mean error <= 0.03, max error <= 0.5, kl <= 0.01"


@dataclasses.dataclass(frozen=True)
class Losses:
    metric_drop: float | None = 0.1
    agreement: float | None = 99.5
    mean_error: float | None = 0.01
    max_error: float | None = 0.2
    kl: float | None = 0.001


def test_every_clause_is_read():
    assert Budget.parse(FULL) == Budget(0.3, 99.0, 0.03, 0.5, 0.01)


@pytest.mark.parametrize(
    "text", [FULL, "metric drop <= 0", "agreement >= 99.85%", "max error <= 12, kl <= 1e-05"]
)
def test_text_and_back(text):
    assert str(Budget.parse(text)) == text
    assert Budget.parse(str(Budget.parse(text))) == Budget.parse(text)


def test_spaces_case_and_percent_do_not_matter():
    assert Budget.parse(" Metric  Drop<=.3 ,AGREEMENT>=99 ") == Budget(0.3, 99.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read the budget clause ''"),
        ("metric drop <= 0.3,", "cannot read the budget clause ''"),
        ("accuracy >= 80", "cannot read"),
        ("metric drop 0.3", "cannot read"),
        ("metric drop < 0.3", "cannot read"),
        ("kl <= nan", "cannot read"),
        ("kl <= -1", "cannot read"),
        ("metric drop >= 0.3", "expected metric drop <= "),
        ("agreement <= 99%", "expected agreement >= "),
        ("mean error <= 3%", "only the agreement is a percentage"),
        ("kl <= 1, kl <= 2", "kl twice"),
        ("agreement >= 101%", "can never be met"),
    ],
)
def test_bad_budgets_name_the_clause_and_the_grammar(text, message):
    with pytest.raises(InputError, match=message) as caught:
        Budget.parse(text)
    assert "metric drop <= POINTS" in caught.value.hint


@pytest.mark.parametrize("bound", [float("nan"), float("inf"), -0.1])
def test_a_bound_that_bounds_nothing_is_refused(bound):
    with pytest.raises(InputError, match="bound is"):
        Budget(kl=bound)


def test_met_at_the_bound_itself():
    assert Budget.parse(FULL).violations(Losses(0.3, 99.0, 0.03, 0.5, 0.01)) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metric_drop", 0.31),
        ("agreement", 98.99),
        ("mean_error", 0.031),
        ("max_error", 0.51),
        ("kl", 0.011),
    ],
)
@pytest.mark.parametrize("nan", [False, True])
def test_each_bound_is_broken_alone_and_by_nan(field, value, nan):
    value = float("nan") if nan else value
    broken = Budget.parse(FULL).violations(dataclasses.replace(Losses(), **{field: value}))
    assert len(broken) == 1
    assert broken[0].startswith(field.replace("_", " "))


def test_a_gain_is_no_drop():
    assert Budget(metric_drop=0.0).violations(Losses(metric_drop=-1.0)) == []


def test_what_the_report_lacks_cannot_be_judged():
    with pytest.raises(ConvBertDeployError, match="metric drop, which this evaluation does not"):
        Budget.parse(FULL).violations(Losses(metric_drop=None))
    assert Budget(kl=1.0).violations(Losses(metric_drop=None)) == []
