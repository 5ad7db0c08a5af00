"""A server's way from the raw columns of a log to the fields of a request, as two files tell it."""

import contextlib
import json

import numpy as np
import pytest

from kd_ranker.config.defaults import feature
from tests.sources import faulty_logs
from tests.sources.faulty_logs import make_rows, write_log
from tests.sources.log_server import Server


@pytest.mark.parametrize("texts", [False, True])
def test_a_server_makes_the_fields_that_models_were_trained_on(tmp_path, texts):
    rows = make_rows(4, requests=40, texts=texts)
    for row, (name, value) in zip(
        rows[-3:], [("age", None), ("country", None), ("spots", None)], strict=True
    ):
        row.of_request[name] = value
    rows[-4].candidates[0]["score"] = np.nan
    rows[-5].of_request["spots"] = [None, "s1", "", "s2", "s3"]
    rows[-6].of_request["country"] = ""
    rows[-7].of_request["recent"] = [None, *rows[-7].of_request["recent"], None]
    generator = np.random.default_rng(5)
    for row in rows:
        events = [item for item in row.of_request["recent"] if item is not None]
        row.of_request["stars"] = generator.normal(size=len(events)).tolist()
        row.of_request["views"] = generator.normal(size=(len(events), 2)).tolist()
        for candidate in row.candidates:
            candidate["embedding"] = [
                float(len(str(candidate["item_id"]))),
                candidate["quality"],
                1,
            ]
    # A list is of another length, is missing, or has an entry that is.
    rows[-8].of_request["recent"] = rows[-9].of_request["recent"] = rows[0].of_request["recent"]
    rows[-8].of_request |= {"stars": [1.0] * 9, "views": None}
    rows[-9].of_request |= {"stars": [None, 2.0, np.nan, 3.0], "views": [[1.0, 2.0]] * 4}
    of = faulty_logs.config(write_log(tmp_path / "log", rows), tmp_path / "datasets")
    of.data.features.stars = feature("event", "dense", standardise=False)
    of.data.features.views = feature("event", "dense", length=2, standardise=False)
    of.data.features.embedding = feature("item", "dense", length=3)
    of.data.features.again = feature("candidate", "dense", "embedding", length=3, standardise=False)
    of.data.features.short = feature("candidate", "dense", "embedding", length=2)
    (tmp_path / "beside").mkdir()
    with contextlib.closing(faulty_logs.open_source(of)) as source:
        source.write_beside(tmp_path / "beside")
        requests = faulty_logs.all_requests(source)
    report = json.loads((tmp_path / "beside" / "data_report.json").read_text())
    bad = {column["key"]: column["out_of_range"] for column in report["columns"]}
    assert bad["data.features.embedding"] == 0
    assert bad["data.features.short"] == report["candidates"]["in_the_log"]
    server = Server(tmp_path / "beside")
    by_time = {row.of_request["time"]: row for row in rows}
    for request in requests["train"] + requests["validation"] + requests["test"]:
        row = by_time[request.time]
        server.check(request, row.of_request, row.candidates)
        for candidate in row.candidates:
            item = server.ids["item"][candidate["item_id"]]
            server.check_item(source.item_features[item], source.item_category[item], candidate)
