"""From a log to a row of results.csv, with a teacher that lives elsewhere."""

import json
import math

import pytest

from kd_ranker import api
from kd_ranker.errors import UserError
from kd_ranker.evaluation import results
from kd_ranker.pipeline import datasets, scoring
from kd_ranker.requests import storage
from tests import small
from tests.sources import faulty_logs
from tests.sources.faulty_logs import make_rows, write_log


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    log = write_log(folder / "log", make_rows(0, requests=60, faults=0.02, texts=True))
    return faulty_logs.made_small(faulty_logs.config(log, folder / "datasets"), steps=6)


def test_a_student_follows_a_logged_teacher_without_any_model_of_it(config, tmp_path):
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
    told = (tmp_path / "student" / "data_report.json").read_bytes()
    assert told == (directory / "data_report.json").read_bytes()


def test_a_log_without_users_trains_a_student_and_is_scored_by_it(config, tmp_path):
    search = config.copy_and_resolve_references()
    search.data.columns.update(user="", incumbent="score")
    search.distill.mode = "aux"
    api.prepare(search)
    rows = small.rows_on_test(api.train(search, tmp_path / "student"))
    assert all(math.isfinite(row["user_bce/watch"]) for row in rows)
    scored, _ = scoring.score_unseen(search, tmp_path / "student", output=tmp_path / "scored")
    assert scored.directory == tmp_path / "scored"
    with pytest.raises(UserError, match=r"reads a log in another way .*: data\.columns\.user; "):
        scoring.score_unseen(config, tmp_path / "student", output=tmp_path / "other")


def test_a_dataset_goes_by_another_name_only_where_its_contents_would_differ(config):
    def name(**changes):
        other = config.copy_and_resolve_references()
        other.data.update(changes)
        return datasets.dataset_name(other)

    assert name() == name(
        processes=4, memory=2.0, infer=True, dir="elsewhere", allow=(), title="May"
    )
    assert name() != name(strict=True)
    assert name() != name(split="user")
    assert name() != name(features={"age": {"length": 2}})


def test_prepare_data_prints_what_was_found_whether_it_builds_the_dataset_or_finds_it(
    config, tmp_path, capsys
):
    new = config.copy_and_resolve_references()
    new.data.dir = str(tmp_path)
    print(api.prepare(new, thorough=True))
    told = capsys.readouterr().out
    print(api.prepare(new, thorough=True))
    assert capsys.readouterr().out == told
    directory = api.prepare(new).directory
    report = json.loads((directory / "data_report.json").read_text())
    candidates, requests = report["candidates"], report["splits"]["train"]["requests"]
    reasons = {name: of["candidates"] for name, of in candidates["by_reason"].items()}
    rejected = sum(reasons.values())
    assert rejected == candidates["rejected"] > 0
    where, page, counts, *remarks, epochs = told.splitlines()
    assert where == f"dataset: {directory}"
    assert page == f"data report: {directory / 'data_report.html'}"
    assert counts == (
        f"candidates: {candidates['in_the_log']} in the log = "
        f"{candidates['in_the_log'] - rejected} used + {rejected} rejected "
        f"({', '.join(f'{name} {number}' for name, number in reasons.items())})"
    )
    assert remarks == [f"remark: {remark}" for remark in report["remarks"]]
    assert len(remarks) > 5
    assert epochs == (
        f"epochs: {6 * 8 / requests:.3g} in train.steps=6, of {requests} training requests, "
        "8 a step"
    )


def test_a_dataset_that_is_there_needs_its_faults_allowed_too(config):
    directory = api.prepare(config).directory
    other = config.copy_and_resolve_references()
    other.data.allow = ("rejected", "times")
    with pytest.raises(
        UserError, match=r": few_positives: .*'few_positives', 'rejected', 'times'"
    ) as e:
        api.prepare(other)
    assert str(e.value).startswith(str(directory))
    # Training is another matter: the dataset is there.
    assert datasets.data_lines(other, datasets.dataset_of(other))


def test_a_build_that_fails_leaves_no_half_dataset(config, monkeypatch):
    def broken(*arguments):
        raise UserError("the disk is full")

    other = config.copy_and_resolve_references()
    other.data.test_share = 0.5
    monkeypatch.setattr(storage, "write_index", broken)
    with pytest.raises(UserError, match="the disk is full"):
        api.prepare(other)
    monkeypatch.undo()
    parent = storage.directory_of("x", other.data.dir).parent.parent
    name = datasets.dataset_name(other)
    assert not (parent / name / storage.FORMAT_VERSION).exists()
    assert not [*parent.parent.glob(".parquet-*")]
    assert json.loads((api.prepare(other).directory / "log.json").read_text())
