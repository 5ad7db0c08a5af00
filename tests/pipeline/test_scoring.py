"""Scores of a dataset that was made of a log; see `test_commands` for others."""

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_ranker import api
from kd_ranker.evaluation.evaluate import Ranker, Served
from kd_ranker.pipeline import datasets, scoring
from kd_ranker.pipeline.job import Finished, open_job
from kd_ranker.requests.records import read_requests
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs.vocabulary import read_vocabulary
from tests.sources import faulty_logs
from tests.sources.faulty_logs import make_rows, write_log

VERSION = "0123456789ab"


def stub_teacher(config: Any) -> Finished:
    """A teacher whose probability of a candidate depends on all that it may know of it."""

    def serve(parameters: Any, batch: Any, items: Any) -> Served:
        of_item = np.asarray(items.features)[np.maximum(np.asarray(batch.item_id), 0)].sum(-1)
        of_request = np.asarray(batch.user_features).sum(-1) + 0.37 * np.asarray(batch.user_id)
        history = 0.11 * np.asarray(batch.history_id).sum(-1)
        of_candidate = np.asarray(batch.candidate_features).sum(-1) + of_item
        logit = of_candidate + (of_request + history)[:, None] + 0.7 * np.asarray(batch.item_id)
        both = np.stack([0.1 * logit, 0.2 * logit + 1], -1)
        return Served({"user": (1 / (1 + np.exp(-both))).astype(np.float32)}, {})

    ranker = Ranker(serve, None)  # type: ignore[arg-type]
    of = ("stub", open_job(config), "", "user", None, ranker, VERSION, {})
    return Finished(*of)  # type: ignore[arg-type]


@pytest.fixture
def stubbed(monkeypatch):
    monkeypatch.setattr(scoring, "load_teacher", stub_teacher)


def test_scores_of_a_select_are_one_file(tmp_path, stubbed):
    log = write_log(tmp_path / "log", make_rows(3, requests=40), files=3)
    config = faulty_logs.config(log, tmp_path / "datasets")
    select = faulty_logs.config("", tmp_path / "datasets", sql=f"SELECT * FROM '{log}/*.parquet'")
    tables = []
    for of in (config, select):
        of.evaluation.requests = 8
        api.prepare(of)
        names = sorted(api.log_teacher(of).directory.glob("*.parquet"))
        table = pa.concat_tables(map(pq.read_table, names))
        tables.append(table.sort_by([("request", "ascending"), ("item", "ascending")]))
    assert [path.name for path in names] == ["00000-data.parquet"]
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize("by_request", [False, True])
@pytest.mark.parametrize("stage", ["shown", "passed", "retrieved"])
def test_scores_of_a_log_join_its_rows_by_request_and_item(tmp_path, stubbed, by_request, stage):
    rows = make_rows(3, requests=40, faults=0.05, texts=True)
    log = write_log(tmp_path / "log", rows, by_request, files=3, shuffle=5)
    config = faulty_logs.config(log, tmp_path / "datasets")
    config.data.rows = "request" if by_request else "candidate"
    config.evaluation.requests, config.teacher.stage = 8, stage
    api.prepare(config)
    directory = api.log_teacher(config).directory
    assert directory == datasets.scores_folder(config, VERSION)
    # The files of the log, and each request in one of those that have its rows.
    files = sorted(file.name for file in Path(log).iterdir())
    named = [f"{number:05d}-{file}" for number, file in enumerate(files)]
    assert sorted(path.name for path in directory.glob("*.parquet")) == named
    requests = {file: {*pq.read_table(log / file)["request_id"].to_pylist()} for file in files}
    scored = [{*pq.read_table(directory / name)["request"].to_pylist()} for name in named]
    assert all(of <= requests[file] for of, file in zip(scored, files, strict=True))
    assert len(set().union(*scored)) == sum(map(len, scored))
    source = f"'{log}/*.parquet'"
    if by_request:
        source = f"(SELECT request_id, unnest(item_id) AS item_id FROM {source})"
    joined = duckdb.sql(
        f"SELECT DISTINCT request_id, item_id, probability_watch, probability_like "
        f"FROM {source} AS log "
        f"JOIN '{directory}/*.parquet' AS scores ON request = request_id AND item = item_id"
    ).fetchall()
    # Of a request whose rows have several times, the dataset knows the earliest, a full minute.
    name = {}
    for row in rows:
        if isinstance(time := row.of_request["time"], int):
            name[time - (time - 1_000_000) % 60] = row.of_request["request_id"]
    dataset = datasets.dataset_of(config)
    table = read_vocabulary(dataset.directory, "item").to_pydict()
    items = dict(zip(table["id"], table["value"], strict=True))
    expected = {}
    for split in SPLITS:
        for request in read_requests(datasets.dataset_under(config, dataset, VERSION), split):
            reached = {
                "shown": len(request.user_label),
                "passed": request.num_passed,
                "retrieved": len(request.item_id),
            }
            # Rankers are measured on all candidates.
            number = reached[stage if split == "train" else "retrieved"]
            assert len(request.teacher_probability) == number
            for item, probability in zip(
                request.item_id, request.teacher_probability, strict=False
            ):
                expected[name[request.time], items[item]] = probability
    assert len(expected) > 100
    found = {(request, item): probability for request, item, *probability in joined}
    assert len(found) == len(joined)
    assert found.keys() == expected.keys()
    np.testing.assert_array_equal([found[key] for key in expected], [*expected.values()])
    assert len({tuple(of) for of in found.values()}) > 0.9 * len(found)
