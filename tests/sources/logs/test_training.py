"""From a log to a row of results.csv, with a teacher that lives elsewhere."""

import json
import math

import pytest

from kd_ranker import api
from kd_ranker.errors import UserError
from kd_ranker.evaluation import results
from kd_ranker.pipeline import datasets, scoring
from tests import small
from tests.sources import faulty_logs
from tests.sources.faulty_logs import make_rows, write_log


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    log = write_log(folder / "log", make_rows(0, requests=60, faults=0.02, texts=True))
    return faulty_logs.made_small(faulty_logs.config(log, folder / "datasets"), steps=6)


def changed(config, **data):
    other = config.copy_and_resolve_references()
    other.data.update(data)
    return other


def test_a_student_follows_a_logged_teacher_without_a_model(config, tmp_path):
    directory = api.prepare(config).directory
    assert {"data_report.html", "data_report.json", "log.json", "rejected"} <= {
        path.name for path in directory.iterdir()
    }
    config.distill.mode = "aux"
    config.teacher.flops_per_candidate = 1e6
    rows = small.rows_on_test(api.train(config, tmp_path / "student"))
    assert len(rows) == 3
    for row in rows:
        assert row["cost_ratio"] == row["flops_per_candidate"] / 1e6
        assert 0 <= row["value_captured@3"] <= 1
        assert math.isfinite(row["teacher_kl/watch"])
    table = results.read_csv(tmp_path / "student" / results.FILE)
    assert set(table["dataset"]) == {"parquet"}
    # For the report, which may be made where the dataset is not.
    kept = (tmp_path / "student" / "data_report.json").read_bytes()
    assert kept == (directory / "data_report.json").read_bytes()


def test_a_log_without_users_trains_and_is_scored(config, tmp_path):
    search = changed(config, columns=dict(user="", incumbent="score"))
    search.distill.mode = "aux"
    api.prepare(search)
    rows = small.rows_on_test(api.train(search, tmp_path / "student"))
    assert all(math.isfinite(row["user_bce/watch"]) for row in rows)
    scored, _ = scoring.score_unseen(search, tmp_path / "student", output=tmp_path / "scored")
    assert scored.directory == tmp_path / "scored"
    with pytest.raises(UserError, match=r"reads a log in another way .*: data\.columns\.user; "):
        scoring.score_unseen(config, tmp_path / "student", output=tmp_path / "other")


def test_a_dataset_has_another_name_only_for_other_contents(config):
    name = datasets.dataset_name(config)
    same = dict(processes=4, memory=2.0, infer=True, dir="elsewhere", allow=(), title="May")
    assert datasets.dataset_name(changed(config, **same)) == name
    for change in ({"strict": True}, {"split": "user"}, {"features": {"age": {"length": 2}}}):
        assert datasets.dataset_name(changed(config, **change)) != name


def test_prepare_prints_what_it_found_each_time(config, tmp_path):
    new = changed(config, dir=str(tmp_path))
    built, prepared = (api.prepare(new, thorough=True) for _ in range(2))
    assert str(built) == str(prepared)
    report = json.loads((prepared.directory / "data_report.json").read_text())
    candidates, requests = report["candidates"], report["splits"]["train"]["requests"]
    reasons = {name: of["candidates"] for name, of in candidates["by_reason"].items()}
    assert sum(reasons.values()) == candidates["rejected"] > 0
    assert len(report["remarks"]) > 5
    assert str(prepared).splitlines() == [
        f"dataset: {prepared.directory}",
        f"data report: {prepared.directory / 'data_report.html'}",
        f"candidates: {candidates['in_the_log']} in the log = "
        f"{candidates['in_the_log'] - candidates['rejected']} used + {candidates['rejected']} "
        f"rejected ({', '.join(f'{name} {number}' for name, number in reasons.items())})",
        *(f"remark: {remark}" for remark in report["remarks"]),
        f"epochs: {6 * 8 / requests:.3g} in train.steps=6, of {requests} training requests, "
        "8 a step",
    ]


def test_prepare_says_that_no_column_has_the_teacher(config, tmp_path):
    named = str(api.prepare(changed(config, dir=str(tmp_path))))
    assert "\nteacher:" not in named
    # `update` would keep the keys that are there.
    unnamed = changed(config, dir=str(tmp_path))
    unnamed.data.teacher = {}
    assert "\nteacher: data.teacher names no column" in str(api.prepare(unnamed))


def test_a_dataset_that_is_there_needs_its_faults_allowed_too(config):
    directory = api.prepare(config).directory
    other = changed(config, allow=("rejected", "times"))
    with pytest.raises(
        UserError, match=rf"^{directory}.*: few_positives: .*'few_positives', 'rejected', 'times'"
    ):
        api.prepare(other)
    # Training is another matter: the dataset is there.
    assert datasets.data_lines(other, datasets.dataset_of(other))
