"""Which runs halving stops, by hand."""

import io
import math

from kd_ranker.config.runs import sweep_runs
from kd_ranker.evaluation import results, setting_names
from kd_ranker.evaluation.halving import runs_behind
from kd_ranker.evaluation.metrics.metric import ReportAt
from kd_ranker.evaluation.metrics.target import CRITERION, TARGET
from tests.sweeps import config_of


def behind(config, criterion):
    """The runs that stop, given the criterion by parts of the names of runs."""
    rows = []
    for name, run in sweep_runs(config).items():
        (value,) = [value for part, value in criterion.items() if part in f"{name}-"]
        row = {"split": "validation", "role": "student", "run": name, "serve": "user"}
        rows.append(row | setting_names.setting_of(run) | {CRITERION: float(value)})
    columns = results.columns(config.tasks, ReportAt((10,), (TARGET,)))
    return runs_behind(results.read_csv(io.StringIO(results.to_csv(rows, columns))))


def test_each_method_keeps_its_better_half():
    config = config_of(modes=("aux", "shared"), weights=(0.5, 1.0, 2.0, 4.0))
    # The worst of `aux` is better than the best of `shared`.
    aux = {f"aux-weight{weight}-": place for weight, place in ((0.5, 3), (1.0, 1), (2.0, 4))}
    shared = {f"shared-weight{weight}-": 10 + weight for weight in (0.5, 1.0, 2.0, 4.0)}
    assert behind(config, {**aux, "aux-weight4.0-": 2, **shared}) == {
        "aux-weight0.5-seed0", "aux-weight2.0-seed0",
        "shared-weight2.0-seed0", "shared-weight4.0-seed0",
    }  # fmt: skip


def test_the_mean_over_repeats_decides_and_all_of_them_stop():
    config = config_of(modes=("shared",), weights=(1.0, 2.0), seeds=(0, 1))
    criterion = {
        "weight1.0-seed0": 10, "weight1.0-seed1": 60, "weight2.0-seed0": 30, "weight2.0-seed1": 30
    }  # fmt: skip
    assert behind(config, criterion) == {"shared-weight1.0-seed0", "shared-weight1.0-seed1"}


def test_of_three_settings_one_stops_and_of_one_none():
    config = config_of(modes=("none", "shared"), weights=(1.0, 2.0, 4.0))
    criterion = {"none": 90, "weight1.0": 5, "weight2.0": 7, "weight4.0": 6}
    assert behind(config, criterion) == {"shared-weight2.0-seed0"}


def test_a_setting_that_diverged_in_a_repeat_stops_first():
    config = config_of(modes=("shared",), weights=(1.0, 2.0), seeds=(0, 1))
    criterion = {"weight1.0-seed0": 1, "weight1.0-seed1": math.nan, "weight2.0": 50}
    assert behind(config, criterion) == {"shared-weight1.0-seed0", "shared-weight1.0-seed1"}
