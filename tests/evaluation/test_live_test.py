"""Plans of live tests, against simulated tests."""

import numpy as np
import pytest
from scipy import stats

import kd_ranker as kd
from tests.faults import fault_of


def clicks(generator, requests):
    """Clicks on the lists of two funnels in each request, by Bernoulli draws.

    Nine of ten shown items are shared. In 40% of requests the tenth differs, and that of b is
    clicked more often. Users differ in how often they click.
    """
    user = generator.beta(4, 16, requests)
    shared = generator.binomial(9, user)
    differs = generator.random(requests) < 0.4
    tenth = generator.random((2, requests)) < np.stack([0.5 * user, 2 * user])
    tenth[1] = np.where(differs, tenth[1], tenth[0])
    return shared + tenth


def test_the_planned_numbers_have_a_power_of_80_percent():
    generator = np.random.default_rng(0)
    pilot_a, pilot_b = clicks(generator, 100_000)
    # Users click on 0.2 of the items: a has 9.5 · 0.2 clicks, and b gains 0.4 · 1.5 · 0.2.
    needed = kd.requests_needed(pilot_a, pilot_b, effect=0.12 / 1.9)
    assert needed.ab > 20 * needed.interleaved

    def found(draw, tests=1500):
        """The share of tests that see a difference."""
        return np.mean([draw() < 0.05 for _ in range(tests)])

    def ab():
        arms = (clicks(generator, needed.ab // 2)[side] for side in (0, 1))
        return stats.ttest_ind(*arms).pvalue

    def interleaved():
        a, b = clicks(generator, needed.interleaved)
        return stats.ttest_1samp(a - b, 0).pvalue

    for power in (found(ab), found(interleaved)):
        assert power == pytest.approx(0.8, abs=0.04)


def test_a_plan_worked_by_hand():
    # Var(a) = Var(b) = 1, Var(a − b) = 4, mean 2; z = 1.95996 + 0.84162, so z² = 7.84888.
    a, b = np.array([1.0, 2, 3]), np.array([3.0, 2, 1])
    assert kd.requests_needed(a, b, effect=0.5) == (32, 32)
    assert kd.requests_needed(a, b) == (1_962_220, 1_962_220)
    # Equal lists need no test of which is better.
    assert kd.requests_needed(a, a, effect=0.5) == (32, 0)


@pytest.mark.parametrize(
    ("a", "b", "effect", "message"),
    [
        ([1, 2], [1, 2, 3], 0.1, "shapes (2,) and (3,); give one number per request"),
        ([1], [2], 0.1, "2 or more requests"),
        ([1, 2], [2, 1], 0, "effect=0 of a mean value_a of 1.5 is no positive change"),
        ([0, 0], [2, 1], 0.1, "a positive mean"),
        ([1, 2], [np.nan, 1], 0.1, "finite values"),
    ],
)
def test_values_without_a_plan_are_refused_in_one_line(a, b, effect, message):
    assert message in fault_of(kd.requests_needed, np.array(a), np.array(b), effect)
