import json

import numpy as np
import pytest

from kd_ranker.pipeline import runs
from kd_ranker.pipeline.job import Opened
from kd_ranker.pipeline.measure import measure
from tests import small


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small.open_world(tmp_path_factory)


def trained(members, workdir):
    """The rows of members that train in one program, by name, and the lines of `metrics.jsonl`."""
    job = Opened(next(iter(members.values()))).job(members)
    with runs.progress_bar("", 20) as bar:
        students = runs.fit_students(job, workdir, bar)
    measured = measure(job, "test", students)
    rows = {name: [row for row in measured.rows if row["member"] == name] for name in members}
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return rows, [json.loads(line) for line in lines]


@pytest.mark.slow
def test_members_of_any_shape_and_length_are_measured_as_the_same_member_alone(world, tmp_path):
    members = {
        "shorter": world.config(train__steps=10),
        "wider": world.config(student__width=40, student__hidden=(16, 8), distill__mode="aux"),
    }
    rows, lines = trained(members, tmp_path / "together")
    for name, config in members.items():
        alone = trained({name: config}, tmp_path / name)[0][name]
        assert [row["step"] for row in rows[name]] == [config.train.steps] * len(alone)
        for row, expected in zip(rows[name], alone, strict=True):
            measured = {key for key, value in expected.items() if isinstance(value, float)}
            assert len(measured) > 20
            for key in measured:
                np.testing.assert_allclose(
                    row[key], expected[key], rtol=2e-3, atol=1e-6, equal_nan=True
                )
        logged = [line["step"] for line in lines if f"loss/{name}" in line]
        assert logged == [step for step in (5, 10, 15, 20) if step <= config.train.steps]


def test_a_member_that_is_not_finite_after_its_last_step_is_marked_with_that_step(world, tmp_path):
    """The loss that would tell is one that it no longer trains on."""
    short = {"train__steps": 1, "optimizer__learning_rate": 1e39}
    same = {"distill__mode": "none", "optimizer__schedule": "constant", "train__log_every": 1}
    members = {
        "healthy": world.config(train__steps=3, **same),
        "ill": world.config(**same | short),
    }
    rows, lines = trained(members, tmp_path)
    assert [row.get("non_finite_step") for row in rows["healthy"]] == [None]
    assert [row["non_finite_step"] for row in rows["ill"]] == [1]
    assert [line["step"] for line in lines if "loss/ill" in line] == [1]
