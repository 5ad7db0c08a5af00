"""What a sampler of Optuna asks for."""

import math

import numpy as np
import pytest

from kd_ranker.config import schema
from kd_ranker.config.asking import Trial, ask
from kd_ranker.config.drawing import methods_of

pytest.importorskip("optuna", reason="the extra optuna")

KEYS = schema.sweepable_by_name()
RATE, WEIGHT, STEPS = "optimizer.learning_rate", "distill.weight", "train.steps"
RUNS = [{"distill.mode": "shared", WEIGHT: weight, "seed": 0} for weight in (0.3, 1.0)]
RANGES = {RATE: (1e-4, 1.0), STEPS: (10, 1000)}
(METHOD,) = methods_of(RUNS, KEYS, RANGES)


def criterion(drawn):
    """Least at a rate of 0.02, 300 steps and a weight of 1."""
    return (
        math.log10(drawn[RATE] / 0.02) ** 2
        + ((drawn[STEPS] - 300) / 300) ** 2
        + (drawn[WEIGHT] != 1.0)
    )


def search(sampler, rounds, seed, of_drawn=criterion):
    trials = []
    for _ in range(rounds):
        asked = ask(METHOD, KEYS, trials, draws=4, sampler=sampler, seed=seed)
        trials += [Trial(drawn, of_drawn(drawn)) for drawn in asked]
    return trials


def test_what_is_asked_for_is_in_the_spaces_and_short():
    for trial in search("tpe", rounds=3, seed=0):
        drawn = trial.drawn
        assert {*drawn} == {RATE, WEIGHT, STEPS}
        assert 1e-4 <= drawn[RATE] <= 1.0
        assert drawn[RATE] == float(f"{drawn[RATE]:.3g}")
        assert 10 <= drawn[STEPS] <= 1000
        assert isinstance(drawn[STEPS], int)
        assert drawn[WEIGHT] in (0.3, 1.0)


def test_a_sampler_learns_from_what_it_is_told():
    last = [[trial.criterion for trial in search("tpe", 8, seed)[-8:]] for seed in range(5)]
    first = [[trial.criterion for trial in search("tpe", 2, seed)] for seed in range(5)]
    assert np.median(last) < 0.5 * np.median(first)
    # By what they are told, not by their order.
    away = [
        [-trial.criterion for trial in search("tpe", 8, s, lambda d: -criterion(d))[-8:]]
        for s in range(5)
    ]
    assert np.median(away) > 2 * np.median(first)


def test_the_same_trials_give_the_same_questions_and_another_seed_gives_others():
    assert search("tpe", 3, seed=1) == search("tpe", 3, seed=1)
    assert search("tpe", 1, seed=1) != search("tpe", 1, seed=2)


def test_a_draw_that_diverged_is_told_as_failed():
    trials = search("tpe", 2, seed=0)
    trials[0] = trials[0]._replace(criterion=math.nan)
    assert len(ask(METHOD, KEYS, trials, draws=2, sampler="tpe", seed=0)) == 2
