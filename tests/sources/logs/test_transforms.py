"""A server's way from the raw columns of a log to the fields of a request, as two files tell it."""

import json

import numpy as np
import pandas as pd
import pytest

from tests.sources import faulty_logs
from tests.sources.faulty_logs import make_rows, write_log

MASK = 2**64 - 1


def splitmix64(bits):
    bits = (bits + 0x9E3779B97F4A7C15) & MASK
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
    return bits ^ (bits >> 31)


def hash_of(value):
    if isinstance(value, str):
        value = int(pd.util.hash_array(np.array([value], object), categorize=False)[0])
    return splitmix64(value & MASK)


class Server:
    """It knows the files beside a dataset, and nothing of the project."""

    def __init__(self, folder):
        self.told = json.loads((folder / "transforms.json").read_text())
        self.ids = {}
        for path in (folder / "vocabularies").iterdir():
            table = pd.read_parquet(path)
            self.ids[path.stem] = dict(zip(table["value"], table["id"], strict=True))

    def dense(self, field, raw):
        numbers = []
        for of in self.told["dense"][field]:
            x = raw[of["column"]]
            x = np.nan if x is None else x
            scaled = np.float32((x - of["mean"]) / of["scale"])
            numbers.append(scaled if np.isfinite(scaled) else of["missing"])
        return numbers or [0]

    def categories(self, field, raw):
        ids = []
        for of in self.told["categories"][field]:
            value = raw[of["column"]]
            values = (value or [])[: of["length"]] if of["kind"] == "bag" else [value]
            own = [self.id_of(of, value) for value in values]
            ids += own + [-1] * (of["length"] - len(own))
        return ids

    def id_of(self, of, value):
        if value is None:
            return of["first_id"]
        if of["buckets"]:
            return of["first_id"] + 1 + hash_of(value) % of["buckets"]
        return self.ids[f"feature-{of['name']}"].get(value, of["first_id"])

    def history(self, raw):
        of = self.told["history"]
        last = (raw[of["column"]] or [])[-of["length"] :]
        return [self.ids["item"][item] for item in last if item in self.ids["item"]]


@pytest.mark.parametrize("texts", [False, True])
def test_a_server_makes_the_fields_that_models_were_trained_on(tmp_path, texts):
    rows = make_rows(4, requests=40, texts=texts)
    for row, (name, value) in zip(
        rows[-3:], [("age", None), ("country", None), ("spots", None)], strict=True
    ):
        row.of_request[name] = value
    rows[-4].candidates[0]["score"] = np.nan
    of = faulty_logs.config(write_log(tmp_path / "log", rows), tmp_path / "datasets")
    source = faulty_logs.open_source(of)
    (tmp_path / "beside").mkdir()
    try:
        source.write_beside(tmp_path / "beside")
        requests = faulty_logs.all_requests(source)
    finally:
        source.close()
    server = Server(tmp_path / "beside")
    by_time = {row.of_request["time"]: row for row in rows}
    met = 0
    for request in requests["train"] + requests["validation"] + requests["test"]:
        raw, candidates = by_time[request.time].of_request, by_time[request.time].candidates
        of_item = {server.ids["item"].get(each["item_id"]): each for each in candidates}
        np.testing.assert_allclose(request.user_features, server.dense("user_features", raw))
        np.testing.assert_allclose(request.context, server.dense("context", raw))
        assert request.request_category.tolist() == server.categories("request_category", raw)
        assert request.history_id.tolist() == server.history(raw)
        assert request.user_id == server.ids["user"][raw["user_id"]]
        for place, item in enumerate(request.item_id.tolist()):
            own, met = of_item[item], met + 1
            expected = server.dense("candidate_features", own)
            np.testing.assert_allclose(request.candidate_features[place], expected, rtol=1e-6)
            expected = server.dense("item_features", own)
            np.testing.assert_allclose(source.item_features[item], expected, rtol=1e-6)
            expected = server.categories("candidate_category", own)
            assert request.candidate_category[place].tolist() == expected
            expected = server.categories("item_category", own)
            assert source.item_category[item].tolist() == expected
    assert met > 200
