"""Sweeps in which settings stop early."""

import json
import shutil

import numpy as np
import pytest

from kd_ranker.evaluation import results
from tests import small
from tests.faults import fault_of

# Of the three weights of `aux`, one stops.
HALVED = {
    "sweep__modes": ("none", "aux"),
    "sweep__weights": (0.5, 1.0, 4.0),
    "sweep__seeds": (0, 1),
    "sweep__halving": (5,),
    "train__eval_every": 0,
    "train__checkpoint_every": 5,
}


@pytest.fixture(scope="module")
def halved(world, tmp_path_factory):
    """The workdir of a sweep of `HALVED`; tests change copies."""
    workdir = tmp_path_factory.mktemp("halved") / "sweep"
    assert small.sweep(world.config(**HALVED), workdir)
    return workdir


def validation(workdir):
    frame = results.read_csv(workdir / results.FILE)
    return frame[(frame["split"] == "validation") & (frame["role"] == "student")]


def stopped_weight(workdir):
    rows = validation(workdir)
    (weight,) = set(rows.loc[rows["step"] == 5, "distill_weight"])
    return weight


def test_the_worst_setting_of_a_method_stops(halved):
    rows = validation(halved)
    stopped = rows[rows["step"] == 5]
    assert set(stopped["seed"]) == {0, 1}
    assert set(stopped["mode"]) == {"aux"}
    assert (rows.loc[rows["step"] != 5, "step"] == 20).all()
    # By the lines of metrics.jsonl.
    lines = (halved / "cohorts/0/metrics.jsonl").read_text().splitlines()
    (line,) = [line for line in map(json.loads, lines) if line["step"] == 5]
    passed = {
        weight: np.mean(
            [line[f"eval/passed_for_99/aux-weight{weight}-seed{seed}"] for seed in (0, 1)]
        )
        for weight in (0.5, 1.0, 4.0)
    }
    assert passed[stopped_weight(halved)] == max(passed.values())


def test_a_stopped_run_is_measured_by_its_head_and_the_others_by_all(halved):
    heads = validation(halved).groupby("run")["serve"].agg(set)
    stopped = f"aux-weight{stopped_weight(halved)}-"
    for run, of_run in heads.items():
        if run.startswith(("none", stopped)):
            assert of_run == {"user"}
        else:
            assert of_run == {"user", "teacher", "blend"}


def test_the_others_train_as_without_halving(world, halved, tmp_path):
    assert small.sweep(world.config(**HALVED | {"sweep__halving": ()}), tmp_path)
    keys = ["run", "serve"]
    rows = validation(halved)
    rows = rows[rows["step"] == 20].set_index(keys)
    whole = validation(tmp_path).set_index(keys).loc[rows.index]
    columns = rows.select_dtypes("number").columns.difference(results.saving.SAVINGS)
    np.testing.assert_allclose(rows[columns], whole[columns], rtol=2e-3, atol=1e-6, equal_nan=True)


def test_a_sweep_resumes_after_runs_have_stopped(world, halved, tmp_path):
    workdir = shutil.copytree(halved, tmp_path / "sweep")
    for folder in ("checkpoints/20", "test"):
        shutil.rmtree(workdir / "cohorts/0" / folder)
    for file in (results.FILE, "cohorts/0/results.csv"):
        (workdir / file).unlink()

    assert small.sweep(world.config(**HALVED), workdir)

    assert (workdir / results.FILE).read_bytes() == (halved / results.FILE).read_bytes()
    assert not small.sweep(world.config(**HALVED), workdir)


def test_an_extension_trains_the_settings_that_are_left(world, halved, tmp_path):
    workdir = shutil.copytree(halved, tmp_path / "sweep")
    more = {"sweep__seeds": (0, 1, 2), "sweep__extend": True}
    assert small.sweep(world.config(**HALVED | more), workdir)
    rows = validation(workdir)
    new = rows[rows["seed"] == 2]
    assert set(new["distill_weight"]) == {0.0, 0.5, 1.0, 4.0} - {stopped_weight(halved)}
    assert (new["step"] == 20).all()
    assert not small.sweep(world.config(**HALVED | more), workdir)


def test_settings_in_several_cohorts_are_refused(world, tmp_path):
    config = world.config(**HALVED, sweep__cohort_size=4)
    line = fault_of(small.sweep, config, tmp_path)
    assert "sweep.halving compares settings that train together" in line
    assert "2 cohorts" in line
    assert not (tmp_path / "cohorts").exists()
