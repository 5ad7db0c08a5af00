import json

from kd_ranker.pipeline import runs
from kd_ranker.pipeline.job import open_job
from kd_ranker.pipeline.measure import measure


def trained(members, workdir):
    """The rows of members that train in one program, by name, and the lines of `metrics.jsonl`."""
    job = open_job(next(iter(members.values())), members)
    with runs.progress_bar("", 20) as bar:
        states = runs.fit(job, workdir, bar)
    measured = measure(job, "test", states)
    rows = {name: [row for row in measured.rows if row["member"] == name] for name in members}
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return rows, [json.loads(line) for line in lines]


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
