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


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def present_values(values):
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
        for feature in self.told["dense"][field]:
            value = raw[feature["column"]]
            if feature["place"] is not None:
                has_all_places = len(value or []) == feature["length"]
                value = value[feature["place"]] if has_all_places else None
            if value is None:
                value = np.nan
            scaled = np.float32((value - feature["mean"]) / feature["scale"])
            numbers.append(scaled if np.isfinite(scaled) else feature["missing"])
        return numbers or [0]

    def categories(self, field, raw):
        ids = []
        for feature in self.told["categories"][field]:
            value = raw[feature["column"]]
            values = [value]
            if feature["kind"] == "bag":
                values = present_values(value)[: feature["length"]]
            feature_ids = [self.id_of(feature, value) for value in values]
            ids += feature_ids + [-1] * (feature["length"] - len(feature_ids))
        return ids

    def id_of(self, feature, value):
        if not present_values([value]):
            return feature["first_id"]
        if feature["buckets"]:
            assert feature["values"] == ("texts" if isinstance(value, str) else "whole numbers")
            return feature["first_id"] + 1 + hash_of(value) % feature["buckets"]
        return self.ids[f"feature-{feature['name']}"].get(value, feature["first_id"])

    def history(self, raw):
        history = self.told["history"]
        last = present_values(raw[history["column"]])[-history["length"] :]
        return [self.ids["item"][item] for item in last if item in self.ids["item"]]

    def events(self, raw):
        """The features of each event of `history`."""
        history = self.told["history"]
        items = present_values(raw[history["column"]])
        rows = np.zeros((len(items), len(history["features"])))
        if not history["features"]:
            rows = np.ones((len(items), 1))
        for column, feature in enumerate(history["features"]):
            values = raw[feature["column"]] or []
            if len(values) == len(items):
                if feature["place"] is not None:
                    values = [value[feature["place"]] for value in values]
                rows[:, column] = np.nan_to_num(np.array(values, float))
        is_known = [item in self.ids["item"] for item in items]
        length = history["length"]
        return rows[-length:][is_known[-length:]]

    def check(self, request, raw, candidates):
        """Compares a stored request with a row of the log and its candidates."""
        assert request.user_id == self.ids["user"][raw["user_id"]]
        assert_close(request.user_features, self.dense("user_features", raw))
        assert_close(request.context, self.dense("context", raw))
        assert request.request_category.tolist() == self.categories("request_category", raw)
        assert request.history_id.tolist() == self.history(raw)
        assert_close(request.history_features, self.events(raw))
        by_item = {
            self.ids["item"].get(candidate["item_id"]): candidate for candidate in candidates
        }
        assert {*request.item_id.tolist()} == {*by_item}
        for place, item in enumerate(request.item_id.tolist()):
            dense = self.dense("candidate_features", by_item[item])
            assert_close(request.candidate_features[place], dense)
            categories = self.categories("candidate_category", by_item[item])
            assert request.candidate_category[place].tolist() == categories

    def check_item(self, features, category, candidate):
        """Compares the stored fields of an item with a candidate."""
        assert_close(features, self.dense("item_features", candidate))
        assert category.tolist() == self.categories("item_category", candidate)

    def fields(self, rows):
        """The inputs of an export's programs for (request, its candidates), filled up with 0."""
        requests = [self._request(request, candidates) for request, candidates in rows]
        return {name: filled_up([fields[name] for fields in requests]) for name in requests[0]}

    def _request(self, raw, candidates):
        length = self.told["history"]["length"]
        history = self.history(raw)
        gap = length - len(history)
        items = [self.ids["item"][candidate["item_id"]] for candidate in candidates]
        dense = [self.dense("candidate_features", candidate) for candidate in candidates]
        categories = [self.categories("candidate_category", candidate) for candidate in candidates]
        return {
            "user_id": np.int32(self.ids["user"][raw["user_id"]]),
            "user_features": np.array(self.dense("user_features", raw), np.float32),
            "context": np.array(self.dense("context", raw), np.float32),
            "request_category": np.array(self.categories("request_category", raw), np.int32),
            "history_id": np.array(history + [0] * gap, np.int32),
            "history_features": np.ones((length, 1), np.float32),
            "history_mask": np.arange(length) < len(history),
            "item_id": np.array(items, np.int32),
            "candidate_features": np.array(dense, np.float32),
            "candidate_category": np.array(categories, np.int32),
        }


def filled_up(arrays):
    """Arrays that differ in their first size as one, with 0 behind the shorter ones."""
    shape = np.max([array.shape for array in arrays], axis=0).astype(int)
    whole = np.zeros((len(arrays), *shape), arrays[0].dtype)
    for place, array in enumerate(arrays):
        whole[(place, *map(slice, array.shape))] = array
    return whole
