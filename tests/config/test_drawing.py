"""Random search: what it draws of each method, and what stays as it was."""

import numpy as np
import pytest
from scipy import stats

from kd_ranker.config import schema
from kd_ranker.config.drawing import draw_settings, methods_of
from kd_ranker.config.runs import sweep_runs
from kd_ranker.configs import cascade

KEYS = {key.name: key for key in schema.sweepable()}
RATE, WEIGHT, UNSHOWN = "optimizer.learning_rate", "distill.weight", "train.unshown_weight"
PLAIN = [{"distill.mode": "none", RATE: rate, "seed": seed} for rate in (1, 2) for seed in (0, 1)]
SHARED = [
    {"distill.mode": "shared", RATE: rate, WEIGHT: weight, "seed": seed}
    for rate in (1, 2)
    for weight in (3, 4, 5)
    for seed in (0, 1)
]


def drawn(runs, draws, ranges=None, seed=0):
    return list(draw_settings(methods_of(runs, KEYS, ranges or {}), KEYS, draws, seed))


def test_each_method_gets_as_many_draws_with_all_of_its_repeats():
    runs = drawn(PLAIN + SHARED, draws=5)

    assert [run["distill.mode"] for run in runs] == ["none"] * 10 + ["shared"] * 10
    assert [run["seed"] for run in runs] == [0, 1] * 10
    assert all(WEIGHT not in run for run in runs[:10])
    for first, second in zip(runs[::2], runs[1::2], strict=True):
        assert first | {"seed": 1} == second


def test_a_list_is_drawn_evenly():
    runs = drawn(SHARED, draws=3000)[::2]

    for name, values in ((RATE, (1, 2)), (WEIGHT, (3, 4, 5))):
        counts = [sum(run[name] == value for run in runs) for value in values]
        assert stats.chisquare(counts).pvalue > 1e-3
    # Independently of each other.
    table = np.histogram2d([run[RATE] for run in runs], [run[WEIGHT] for run in runs], (2, 3))[0]
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_a_range_of_a_rate_is_drawn_by_its_logarithm():
    runs = drawn(PLAIN, draws=1000, ranges={RATE: (1e-3, 1e-1), "train.steps": (100, 300)})[::2]

    rates = np.log10([run[RATE] for run in runs])
    assert stats.kstest(rates, stats.uniform(-3, 2).cdf).pvalue > 1e-3
    steps = [run["train.steps"] for run in runs]
    assert {*map(type, steps)} == {int}
    assert stats.kstest(steps, stats.uniform(100, 200).cdf).pvalue > 1e-3


def test_more_draws_and_other_methods_leave_the_first_draws():
    few = drawn(PLAIN, draws=3)

    assert drawn(PLAIN, draws=7)[: len(few)] == few
    assert drawn(SHARED + PLAIN, draws=3)[-len(few) :] == few
    assert drawn(PLAIN, draws=3, ranges={RATE: (1, 2)}, seed=1) != drawn(
        PLAIN, draws=3, ranges={RATE: (1, 2)}, seed=2
    )


def test_what_is_switched_off_stays_off():
    runs = [{"distill.mode": "none", UNSHOWN: 0.0}, {"distill.mode": "none", UNSHOWN: 0.3}]

    off, on = drawn(runs, draws=1, ranges={UNSHOWN: (0.1, 0.9)})

    assert off[UNSHOWN] == 0
    assert 0.1 <= on[UNSHOWN] <= 0.9


@pytest.mark.parametrize("ends", [(0.03, 0.3), (0.1234567, 0.1234569)])
def test_a_draw_lies_in_its_range_though_it_is_rounded(ends):
    rates = [run[RATE] for run in drawn(PLAIN, draws=50, ranges={RATE: ends})]

    assert ends[0] <= min(rates) <= max(rates) <= ends[1]


def test_a_sweep_draws_its_runs_and_names_them_by_what_was_drawn():
    config = cascade("small")
    config.sweep.modes = ("none", "shared")
    config.sweep.search = "random"
    config.sweep.draws = 3
    config.sweep.ranges.optimizer.learning_rate = (1e-3, 1e-1)
    config.sweep.weights = (0.3, 1.0, 3.0)

    runs = sweep_runs(config)

    assert len(runs) == 6
    for name, run in runs.items():
        assert f"rate{run.optimizer.learning_rate!r}" in name
        # The tables' rate keeps its ratio.
        ratio = run.optimizer.table_learning_rate / run.optimizer.learning_rate
        before = config.optimizer
        assert ratio == pytest.approx(before.table_learning_rate / before.learning_rate)
