"""A server's way from the raw columns of a log to the fields of a request.

It is restated in plain Python from what `transforms.json` says.
"""

import json

import numpy as np
import pandas as pd

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


def allclose(one, other):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def there(values):
    return [value for value in values or [] if value not in (None, "")]


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
            if of["place"] is not None:
                x = x[of["place"]] if len(x or []) == of["length"] else None
            x = np.nan if x is None else x
            scaled = np.float32((x - of["mean"]) / of["scale"])
            numbers.append(scaled if np.isfinite(scaled) else of["missing"])
        return numbers or [0]

    def categories(self, field, raw):
        ids = []
        for of in self.told["categories"][field]:
            value = raw[of["column"]]
            values = there(value)[: of["length"]] if of["kind"] == "bag" else [value]
            own = [self.id_of(of, value) for value in values]
            ids += own + [-1] * (of["length"] - len(own))
        return ids

    def id_of(self, of, value):
        if not there([value]):
            return of["first_id"]
        if of["buckets"]:
            assert of["values"] == ("texts" if isinstance(value, str) else "whole numbers")
            return of["first_id"] + 1 + hash_of(value) % of["buckets"]
        return self.ids[f"feature-{of['name']}"].get(value, of["first_id"])

    def history(self, raw):
        of = self.told["history"]
        last = there(raw[of["column"]])[-of["length"] :]
        return [self.ids["item"][item] for item in last if item in self.ids["item"]]

    def events(self, raw):
        """The features of each event of `history`."""
        of = self.told["history"]
        items = there(raw[of["column"]])
        rows = np.zeros((len(items), len(of["features"])))
        if not of["features"]:
            rows = np.ones((len(items), 1))
        for column, each in enumerate(of["features"]):
            values = raw[each["column"]] or []
            if len(values) == len(items):
                of_place = [
                    value if each["place"] is None else value[each["place"]] for value in values
                ]
                rows[:, column] = np.nan_to_num(np.array(of_place, float))
        known = [item in self.ids["item"] for item in items]
        return rows[-of["length"] :][known[-of["length"] :]]

    def check(self, request, raw, candidates):
        """Compares a stored request with a row of the log and its candidates."""
        assert request.user_id == self.ids["user"][raw["user_id"]]
        allclose(request.user_features, self.dense("user_features", raw))
        allclose(request.context, self.dense("context", raw))
        assert request.request_category.tolist() == self.categories("request_category", raw)
        assert request.history_id.tolist() == self.history(raw)
        allclose(request.history_features, self.events(raw))
        of_item = {self.ids["item"].get(of["item_id"]): of for of in candidates}
        assert {*request.item_id.tolist()} == {*of_item}
        for place, item in enumerate(request.item_id.tolist()):
            dense = self.dense("candidate_features", of_item[item])
            allclose(request.candidate_features[place], dense)
            categories = self.categories("candidate_category", of_item[item])
            assert request.candidate_category[place].tolist() == categories

    def check_item(self, features, category, candidate):
        """Compares the stored fields of an item with a candidate."""
        allclose(features, self.dense("item_features", candidate))
        assert category.tolist() == self.categories("item_category", candidate)

    def fields(self, rows):
        """The inputs of an export's programs for (request, its candidates), filled up with 0."""
        made = [self._request(request, candidates) for request, candidates in rows]
        return {name: filled_up([of[name] for of in made]) for name in made[0]}

    def _request(self, raw, candidates):
        length, history = self.told["history"]["length"], self.history(raw)
        gap = length - len(history)
        return {
            "user_id": np.int32(self.ids["user"][raw["user_id"]]),
            "user_features": np.array(self.dense("user_features", raw), np.float32),
            "context": np.array(self.dense("context", raw), np.float32),
            "request_category": np.array(self.categories("request_category", raw), np.int32),
            "history_id": np.array(history + [0] * gap, np.int32),
            "history_features": np.ones((length, 1), np.float32),
            "history_mask": np.arange(length) < len(history),
            "item_id": np.array([self.ids["item"][of["item_id"]] for of in candidates], np.int32),
            "candidate_features": np.array(
                [self.dense("candidate_features", of) for of in candidates], np.float32
            ),
            "candidate_category": np.array(
                [self.categories("candidate_category", of) for of in candidates], np.int32
            ),
        }


def filled_up(arrays):
    """Arrays that differ in their first size as one, with 0 behind the shorter ones."""
    shape = np.max([of.shape for of in arrays], axis=0).astype(int)
    whole = np.zeros((len(arrays), *shape), arrays[0].dtype)
    for place, of in enumerate(arrays):
        whole[(place, *map(slice, of.shape))] = of
    return whole
