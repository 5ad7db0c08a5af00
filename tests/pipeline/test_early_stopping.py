"""Runs that stop early, and keep their best state."""

import json
import shutil

import numpy as np
import pytest

from kd_ranker import api
from kd_ranker.evaluation import results
from tests import small
from tests.faults import fault_of

EVERY, EVALUATIONS = 2, 3
# At a rate that is too high, runs get worse after some steps.
STOPPED = {
    "sweep__modes": ("none", "aux"),
    "sweep__weights": (0.5, 4.0),
    "sweep__seeds": (0, 1),
    "optimizer__learning_rate": 0.05,
    "train__early_stopping": (EVERY, EVALUATIONS),
    "train__eval_every": 0,
    "train__eval_limit": 10_000,  # all of validation
    "train__checkpoint_every": 4,
}


def config_of(world, **changes):
    config = world.config(**STOPPED | changes)
    # Runs of two lengths, neither of them a multiple of the steps between evaluations.
    config.sweep.axes.train.steps = (13, 31)
    return config


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory):
    """The workdir of a sweep of `STOPPED`; tests change copies."""
    workdir = tmp_path_factory.mktemp("stopped") / "sweep"
    assert small.sweep(config_of(world), workdir)
    return workdir


def validation(workdir):
    frame = results.read_csv(workdir / results.FILE)
    rows = frame[(frame["split"] == "validation") & (frame["role"] == "student")]
    return rows[rows["serve"] == "user"].set_index("run")


def evaluations(workdir):
    """The steps and criteria of each run's evaluations, by the lines of metrics.jsonl."""
    found = {}
    for line in (workdir / "cohorts/0/metrics.jsonl").read_text().splitlines():
        scalars = json.loads(line)
        for name, value in scalars.items():
            if name.startswith("eval/passed_for_99/"):
                found.setdefault(name.rpartition("/")[2], []).append((scalars["step"], value))
    return found


def test_a_run_is_evaluated_until_it_stops_or_ends_and_its_best_state_is_kept(stopped):
    rows = validation(stopped)
    found = evaluations(stopped)
    assert {*found} == {*rows.index}
    num_stopped = 0
    for run, of_run in found.items():
        steps = np.array([step for step, _ in of_run])
        criteria = np.array([criterion for _, criterion in of_run])
        best = np.argmin(criteria)  # the first of equals
        end = 13 if "steps13" in run else 31
        # It stops at the first evaluation that is EVALUATIONS after the best one so far.
        sought = [
            step
            for index, step in enumerate(steps)
            if step - steps[np.argmin(criteria[: index + 1])] >= EVERY * EVALUATIONS
        ]
        assert steps[-1] == min([*sought[:1], end])
        num_stopped += steps[-1] < end
        assert rows.loc[run, "step"] == steps[best]
        # Measured again, from the state that was kept.
        assert rows.loc[run, "passed_for_99"] == pytest.approx(criteria[best], rel=1e-6)
    assert 0 < num_stopped < len(found)


def test_a_sweep_resumes_with_the_best_states_so_far(world, stopped, tmp_path):
    workdir = shutil.copytree(stopped, tmp_path / "sweep")
    newest = max(int(folder.name) for folder in (workdir / "cohorts/0/checkpoints").glob("[0-9]*"))
    assert newest == 31  # whenever the last run stopped
    for folder in (f"checkpoints/{newest}", "test"):
        shutil.rmtree(workdir / "cohorts/0" / folder)
    for file in (results.FILE, "cohorts/0/results.csv"):
        (workdir / file).unlink()

    assert small.sweep(config_of(world), workdir)

    assert (workdir / results.FILE).read_bytes() == (stopped / results.FILE).read_bytes()
    assert not small.sweep(config_of(world), workdir)


def test_one_student_and_its_teacher_stop_by_their_own_criteria(world, tmp_path):
    teacher_config = world.config(
        teacher__workdir="",
        teacher__train__steps=40,
        teacher__train__early_stopping=(2, 2),
        teacher__train__eval_limit=10_000,
        teacher__optimizer__learning_rate=0.3,
    )
    teacher = api.train_teacher(teacher_config, tmp_path / "teacher")
    lines = [
        json.loads(line) for line in (tmp_path / "teacher/metrics.jsonl").read_text().splitlines()
    ]
    losses = {
        line["step"]: np.mean([line[f"eval/user_bce/{task}"] for task in teacher_config.tasks])
        for line in lines
        if f"eval/user_bce/{teacher_config.tasks[0]}" in line
    }
    assert max(losses) < 40
    best = min(losses, key=losses.get)
    table = teacher.results
    rows = table[(table["role"] == "teacher") & (table["split"] == "validation")]
    measured = np.mean([rows.iloc[0][f"user_bce/{task}"] for task in teacher_config.tasks])
    assert measured == pytest.approx(losses[best], rel=1e-5)

    config = world.config(train__steps=20, train__early_stopping=(1, 1), train__checkpoint_every=3)
    student = api.train(config, tmp_path / "student")
    rows = student.results[student.results["role"] == "student"]
    assert rows["step"].nunique() == 1
    assert rows["step"].iloc[0] < 20
    # A stopped run is a complete one.
    api.export(student, tmp_path / "exported", formats=("jax",))


def test_a_run_that_diverges_is_reported_though_it_was_evaluated_before(world, tmp_path):
    config = world.config(
        sweep__modes=("none",),
        sweep__seeds=(0,),
        train__early_stopping=(1, 20),
        train__steps=20,
    )
    config.sweep.axes.optimizer.learning_rate = (0.01, 1e36)
    small.sweep(config, tmp_path / "sweep")
    rows = validation(tmp_path / "sweep")
    assert rows["non_finite_step"].notna().sum() == 1
    assert rows["passed_for_99"].notna().sum() == 1


def test_halving_and_early_stopping_are_refused_together(world, tmp_path):
    line = fault_of(small.sweep, config_of(world, sweep__halving=(5,)), tmp_path)
    assert "leave one of them out, as with sweep.halving=()" in line
