"""Logs as sources: by an independent restatement, and by single rows."""

import collections
import contextlib
import functools
import itertools
import json
import shutil
import signal
import uuid
from typing import NamedTuple

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from kd_ranker import api
from kd_ranker.batch import Request
from kd_ranker.config.defaults import feature
from kd_ranker.errors import UserError
from kd_ranker.requests.request import SPLITS
from kd_ranker.requests.source import Source
from kd_ranker.sources.logs import database, query
from kd_ranker.sources.logs.source import check_unchanged
from kd_ranker.sources.logs.verdict import REFUSED
from tests import small
from tests.sources import faulty_logs
from tests.sources.faulty_logs import TASKS, Restated, Row, make_rows, restate, same, write_log
from tests.sources.log_server import Server


class Log(NamedTuple):
    """What became of a log."""

    source: Source
    requests: dict[str, list[Request]]
    report: dict
    rejected: pd.DataFrame
    server: Server  # that knows the files beside the dataset
    vocabularies: dict[str, dict[int, object]]  # id -> value

    @property
    def counts(self) -> dict[str, int]:
        reasons = self.report["candidates"]["by_reason"]
        return {name: of["candidates"] for name, of in reasons.items()}

    def items_of(self, request) -> list:
        return [self.vocabularies["item"][item] for item in request.item_id.tolist()]


def read(config, folder) -> Log:
    """Reads a log, without writing a dataset."""
    folder.mkdir()
    with contextlib.closing(faulty_logs.open_source(config)) as source:
        source.write_side_files(folder)
        requests = faulty_logs.all_requests(source)
    assert {split: len(requests[split]) for split in SPLITS} == source.num_requests
    bad = folder / "rejected" / "rejected.parquet"
    server = Server(folder)
    return Log(
        source,
        requests,
        json.loads((folder / "data_report.json").read_text()),
        pd.read_parquet(bad) if bad.exists() else pd.DataFrame({"reason": []}),
        server,
        {name: {id_: value for value, id_ in of.items()} for name, of in server.ids.items()},
    )


def read_rows(folder, rows, by_request=False, written=(), **changes) -> Log:
    """Reads a log of rows, `written` with options of `write_log`, with changes of `config.data`."""
    own = folder / f"log {len([*folder.iterdir()])}"
    log = write_log(own / "log", rows, by_request, **dict(written))
    changes = {"rows": "request" if by_request else "candidate"} | changes
    return read(faulty_logs.config(log, folder / "datasets", **changes), own / "beside")


@pytest.fixture
def build(tmp_path):
    return functools.partial(read_rows, tmp_path)


@pytest.fixture
def config(tmp_path):
    """A config of a log of a file with faults."""
    log = write_log(tmp_path / "log", make_rows(3, faults=0.05))
    return faulty_logs.config(log, tmp_path / "datasets")


def change(path, edit):
    """Edits the table of a file."""
    pq.write_table(edit(pq.read_table(path)), path)


def columns_with(**changes):
    """The columns of `faulty_logs.config`, with changes."""
    return {**faulty_logs.config("", "").data.columns, **changes}


def assert_as_restated(log: Log, restated: Restated) -> None:
    """Compares all that a request holds with the restatement; a server makes features of it."""
    assert log.counts == restated.reasons == collections.Counter(log.rejected["reason"])
    candidates = log.report["candidates"]
    assert candidates["in_the_log"] == restated.candidates
    assert candidates["in_the_log"] == candidates["used"] + candidates["rejected"]
    by_time = sorted(restated.requests.values(), key=lambda of: of["time"])
    assert_ids_and_scales(log, restated, [of for of in by_time if of["split"] == "train"])
    assert {*log.vocabularies["user"].values()} == {of["user_id"] for of in by_time}
    assert {*log.vocabularies["item"].values()} == {*restated.items}
    for split in SPLITS:
        expected = [of for of in by_time if of["split"] == split]
        assert [request.time for request in log.requests[split]] == [of["time"] for of in expected]
        for request, of in zip(log.requests[split], expected, strict=True):
            candidates = of["candidates"]
            shown = [c for c in candidates if c["stage"] == "shown"]
            passed = [c for c in candidates if c["stage"] != "retrieved"]
            log.server.check(request, of, candidates)
            assert log.items_of(request) == [c["item_id"] for c in candidates]
            assert request.num_passed == len(passed)
            labels = [[c[task] or 0 for task in TASKS] for c in shown]
            np.testing.assert_array_equal(request.user_label, np.reshape(labels, (-1, 2)))
            np.testing.assert_allclose(request.label_weight, [label_weight(c) for c in shown])
            by_teacher = np.array(
                [[c[f"teacher_probability_{task}"] for task in TASKS] for c in candidates],
                np.float32,
            )
            # A teacher that scored more than what passed is kept for all.
            all_scored = not np.isnan(by_teacher[len(passed) :]).all()
            number = len(candidates) if all_scored else len(passed)
            np.testing.assert_array_equal(request.teacher_probability, by_teacher[:number])
            weights = [float(c["version"] == "v1") for c in candidates[:number]]
            np.testing.assert_array_equal(request.teacher_weight, weights)
    for index, item in log.vocabularies["item"].items():
        fields = log.source.item_features[index], log.source.item_category[index]
        log.server.check_item(*fields, restated.items[item])


def label_weight(candidate):
    if any(candidate[task] is None for task in TASKS):
        return 0.0
    weight = candidate["weight"]
    if weight is None or np.isnan(weight):
        return 1.0
    return weight if 0 <= weight < np.inf else 0.0


def assert_ids_and_scales(log: Log, restated: Restated, train: list[dict]) -> None:
    """Those that a server knows: of the values that training has, the most frequent first."""
    candidates = list(itertools.chain.from_iterable(of["candidates"] for of in train))
    trained = collections.Counter(candidate["item_id"] for candidate in candidates)
    items = [(restated.items[item], number) for item, number in trained.items()]
    of_requests = {
        "age": train, "hour": train, "score": candidates,
        "duration": [of for of, _ in items], "quality": [of for of, _ in items],
    }  # fmt: skip
    for of in itertools.chain(*log.server.told["dense"].values()):
        if of["column"] not in of_requests:
            continue
        values = [row[of["column"]] for row in of_requests[of["column"]]]
        known = np.array([x for x in values if x is not None and np.isfinite(x)])
        scale = (0, 1, known.mean()) if of["column"] == "hour" else (known.mean(), known.std(), 0)
        np.testing.assert_allclose([of["mean"], of["scale"], of["missing"]], scale, rtol=1e-5)
    counts = {
        "source": collections.Counter(of["source"] for of in candidates),
        "country": collections.Counter(of["country"] for of in train),
        "author": collections.Counter(), "tags": collections.Counter(),
    }  # fmt: skip
    for of, number in items:
        counts["author"][of["author"]] += number
        for tag in [tag for tag in of["tags"] or [] if tag][:3]:
            counts["tags"][tag] += number
    for name, number in counts.items():
        known = [value for value in number if value not in (None, "")]
        kept = sorted(known, key=lambda value: (-number[value], value))
        kept = kept[:5] if name == "author" else kept
        assert [*log.vocabularies[f"feature-{name}"].values()] == kept
    numbers = [trained[item] for item in log.vocabularies["item"].values()]
    assert numbers == sorted(numbers, reverse=True)


def add_vectors(rows, seed):
    """Vectors of events and candidates; some are missing, of another length or lack an entry."""
    generator = np.random.default_rng(seed)
    for row in rows:
        events = len([item for item in row.of_request["recent"] or [] if item is not None])
        stars = generator.normal(size=events + generator.integers(2)).tolist()
        views = generator.normal(size=(events, 2)).tolist()
        row.of_request["stars"] = [None, *stars[1:]] if stars else None
        row.of_request["views"] = views if generator.integers(4) else None
        for candidate in row.candidates:
            length = float(len(str(candidate["item_id"])))
            candidate["embedding"] = [length, candidate["quality"], 1]


VECTORS = dict(
    stars=feature("event", "dense", standardize=False),
    views=feature("event", "dense", length=2, standardize=False),
    embedding=feature("item", "dense", length=3),
    again=feature("candidate", "dense", "embedding", length=3, standardize=False),
    short=feature("candidate", "dense", "embedding", length=2),
)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    by_request=st.booleans(),
    files=st.integers(1, 3),
    texts=st.booleans(),
    faults=st.sampled_from([0.06, 0.06, 0.0]),
    is_reversed=st.booleans(),
)
def test_each_row_is_used_or_rejected_with_its_reason(
    tmp_path_factory, seed, by_request, files, texts, faults, is_reversed
):
    rows = make_rows(seed, requests=40, texts=texts, faults=faults)[:: -1 if is_reversed else 1]
    add_vectors(rows, seed)
    features = ConfigDict({**faulty_logs.config("", "").data.features, **VECTORS})
    folder = tmp_path_factory.mktemp("faulty")
    log = read_rows(folder, rows, by_request, {"files": files}, features=features)
    assert_as_restated(log, restate(rows, faulty_logs.config("", "")))


@pytest.mark.parametrize("texts", [False, True])
def test_layout_order_and_number_of_files_change_nothing(build, texts):
    rows = make_rows(1, requests=70, texts=texts)
    whole = build(rows, strict=True)  # which a log without faults passes
    for by_request, written in (
        (True, {}),
        (False, {"files": 4, "shuffle": 0, "row_group": 40}),
        (True, {"files": 2, "shuffle": 1, "row_group": 5}),
    ):
        other = build(rows, by_request, written)
        assert same(whole.requests, other.requests)
        for name in ("item_features", "item_category"):
            fields = (getattr(of.source, name) for of in (whole, other))
            np.testing.assert_array_equal(*fields)
        assert whole.vocabularies == other.vocabularies
        assert other.source.spec == whole.source.spec


def test_rejected_rows_have_all_columns_and_are_few_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(query, "MOST_REPORTED", 2)
    folder = write_log(tmp_path / "log", make_rows(3, requests=40, faults=0.05), files=3)
    file = min(folder.glob("*.parquet"))
    traces = [uuid.UUID(int=row) for row in range(pq.read_metadata(file).num_rows)]
    change(file, lambda table: table.append_column("reason", pa.array(traces, pa.uuid())))
    log = read(faulty_logs.config(folder, tmp_path / "datasets"), tmp_path / "beside")
    counts = log.rejected["reason"].value_counts().to_dict()
    assert counts == {reason: min(count, 2) for reason, count in log.counts.items()}
    for path, rows in log.rejected.groupby("file"):
        original = pq.read_table(path).take(rows["row"].to_numpy()).to_pandas()
        trace = original.pop("reason").map(str) if path == str(file) else [None] * len(rows)
        assert [of or None for of in rows["reason_"].fillna("")] == [*trace]
        found = rows[original.columns].reset_index(drop=True)
        pd.testing.assert_frame_equal(found, original, check_dtype=False)


def test_rejected_candidates_of_lists_are_rows_of_their_own(build):
    rows = make_rows(4)
    rows[3].candidates[1]["stage"] = "lost"
    rows[3].candidates[2]["item_id"] = None
    log = build(rows, by_request=True)
    assert log.rejected["reason"].tolist() == ["unknown_stage", "missing_item"]
    assert log.rejected["row"].tolist() == [3, 3]
    stages = [["lost"], [rows[3].candidates[2]["stage"]]]
    assert [of.tolist() for of in log.rejected["stage"]] == stages
    assert log.rejected["user_id"].tolist() == [rows[3].of_request["user_id"]] * 2


def test_missing_empty_and_unequal_lists_are_told_apart(tmp_path):
    path = write_log(tmp_path / "log", make_rows(5), by_request=True) / "part-0.parquet"
    table = pq.read_table(path).to_pylist()
    number = [len(row["item_id"]) for row in table]
    table[0]["item_id"] = None
    table[1]["item_id"] = []
    table[2]["score"] = table[2]["score"][:-1]
    # A list that is missing is one of missing values.
    table[3]["teacher_probability_watch"] = None
    table[4]["watch"] = None
    change(path, lambda of: pa.Table.from_pylist(table, of.schema))
    config = faulty_logs.config(path, tmp_path / "datasets", rows="request")
    log = read(config, tmp_path / "beside")
    assert log.counts == {"no_candidates": 2, "lists_differ": number[2]}
    assert log.report["candidates"]["in_the_log"] == 2 + sum(number[2:])
    assert len(log.rejected) == 3
    first, second = log.requests["train"][:2]
    assert np.isnan(first.teacher_probability[:, 0]).all()
    assert not np.isnan(first.teacher_probability[:, 1]).any()
    assert second.label_weight.tolist() == [0, 0, 0]


@pytest.mark.parametrize("by_request", [False, True])
def test_an_item_listed_twice_has_the_positives_of_both_rows(build, by_request):
    """An impression, and further down the click on it, which may say nothing of another task."""
    rows = make_rows(32)
    first = rows[0].candidates[0]
    # Each lacks a label that the other has.
    first |= {"watch": None, "like": 1, "score": 5.0, "weight": 2.0}
    once = build(rows)
    rows[0].candidates.append(dict(first, watch=1, like=None, score=9.0, weight=3.0))
    log = build(rows, by_request)
    assert log.counts == {"duplicate_item": 1}
    request = log.requests["train"][0]
    place = log.items_of(request).index(first["item_id"])
    assert request.user_label[place].tolist() == [1, 1]
    assert request.label_weight[place] == 3.0
    features = once.requests["train"][0].candidate_features
    np.testing.assert_array_equal(request.candidate_features, features)


def test_a_request_id_of_two_months_is_no_request(build):
    rows = make_rows(6)
    again = Row(rows[3].of_request | {"time": 1_000_000 + 30 * 86400}, rows[4].candidates)
    log = build([*rows, again])
    assert log.counts == {"several_hours": len(rows[3].candidates) + len(again.candidates)}
    assert sum(map(len, log.requests.values())) == len(rows) - 1
    within = Row(rows[3].of_request | {"time": rows[3].of_request["time"] + 3600}, [])
    within.candidates = [dict(rows[3].candidates[0], item_id=999)]
    log = build([*rows, within])
    assert log.report["requests"]["several_times"] == 1
    assert not log.counts
    assert not build([*rows, within, again], longest_request=31 * 86400).counts.get("several_hours")


def test_stages_without_a_column_follow_from_what_is_there(build):
    rows = make_rows(8)
    assert same(build(rows).requests, build(rows, columns=columns_with(stage="")).requests)


def test_a_flag_of_the_passed_and_positions_tell_the_stages(build):
    rows = make_rows(8)
    expected = build(rows)
    for row in rows:
        for candidate in row.candidates:
            candidate["stage"] = "no" if candidate["stage"] == "retrieved" else "yes"
    flagged = build(rows, stages=ConfigDict(dict(retrieved="no", passed="yes")))
    assert same(flagged.requests, expected.requests)
    assert not flagged.counts


@pytest.mark.parametrize("stage", ["stage", ""])
def test_a_position_of_minus_one_is_none(build, stage):
    """Without a stage, it does not make a candidate a shown one."""
    rows = make_rows(8)
    log = build(rows, columns=columns_with(stage=stage))
    number = sum(candidate["position"] is None for row in rows for candidate in row.candidates)
    for candidate in (candidate for row in rows for candidate in row.candidates):
        if candidate["position"] is None:
            candidate["position"] = -1
    with_codes = build(rows, columns=columns_with(stage=stage))
    assert same(log.requests, with_codes.requests)
    column = next(of for of in with_codes.report["columns"] if of["key"] == "data.columns.position")
    assert (column["missing"], column["out_of_range"]) == (number, 0)
    rows[0].candidates[0]["position"] = -2
    report = build(rows, columns=columns_with(stage=stage)).report
    column = next(of for of in report["columns"] if of["key"] == "data.columns.position")
    assert column["out_of_range"] == 1


def scored(signal, score, build):
    """A log with signals of a teacher, and by candidate of its first requests these and the stored.

    `score` takes the place of a candidate in its row.
    """
    rows = make_rows(11)
    for row in rows:
        for place, candidate in enumerate(row.candidates):
            candidate["teacher_probability_watch"] = score(place)
    rows[0].candidates[0]["teacher_probability_watch"] = -14.0
    rows[0].candidates[2]["teacher_probability_watch"] = score(1)
    log = build(rows, teacher_signal=signal)
    assert log.source.spec.teacher_signal == signal
    assert "predicted_over_observed/watch" not in log.report["splits"]["train"]
    watch = next(of for of in log.report["columns"] if of["key"] == "data.teacher.watch")
    assert watch["out_of_range"] == 1
    for row, request in zip(rows[:2], log.requests["train"], strict=False):
        by_item = zip(log.items_of(request), request.teacher_probability[:, 0], strict=False)
        stored = dict(by_item)
        yield row, np.array([stored.get(of["item_id"], np.nan) for of in row.candidates], float)


def test_teacher_ranks_become_numbers_that_fall_with_them(build):
    (first, one), (_, other) = scored("rank", lambda n: 1.0 + n if n < 6 else None, build)
    # Of five that are ranked, two share the first and the second place.
    number = min(len(first.candidates), 6)
    ranks = np.array([np.nan, 0.5, 0.5, *range(2, number - 1)])
    np.testing.assert_allclose(one[:number], 1 / (2 + ranks), 1e-6)
    number = min(len(other), 6)
    np.testing.assert_allclose(other[:number], 1 / (2 + np.arange(number)), 1e-6)


def test_teacher_scores_are_the_logits_of_what_is_stored(build):
    for row, stored in scored("score", lambda n: 4 * np.sin(9.0 * n), build):
        scores = np.array([of["teacher_probability_watch"] for of in row.candidates])
        scores[scores < -13.8] = np.nan  # which is too large
        np.testing.assert_allclose(np.log(stored / (1 - stored)), scores, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("by_request", "signal"), [(True, "score"), (False, "rank")])
def test_incumbent_and_propensities_are_for_the_evaluation(build, by_request, signal):
    rows, expected = make_rows(40), {}
    for candidate, score in zip(rows[-1].candidates, (np.nan, None, np.inf), strict=False):
        candidate["score"] = score
    for row in rows:
        for place, candidate in enumerate(row.candidates):
            candidate["weight"] = 0.3 * (1 + place)  # above 1 where not shown
            score = candidate["score"]
            if score is None or not np.isfinite(score) or (signal == "rank" and score < 0):
                score = np.nan
            propensity = candidate["weight"] if candidate["stage"] == "shown" else np.nan
            facts = (-score if signal == "rank" else score, propensity)
            expected[row.of_request["request_id"], candidate["item_id"]] = facts
    columns = columns_with(label_weight="", incumbent="score", propensity="weight")
    log = build(rows, by_request, columns=columns, incumbent_signal=signal)
    for request in (*log.requests["validation"], *log.requests["test"]):
        facts = [expected[request.request_id, item] for item in log.items_of(request)]
        found = np.stack([request.incumbent, request.propensity], axis=1)
        np.testing.assert_allclose(found, facts, rtol=1e-6)
        assert request.incumbent.dtype == request.propensity.dtype == np.float32
        assert np.isnan(request.true_probability).all()
    for request in log.requests["train"]:
        assert len(request.incumbent) == len(request.propensity) == 0


@pytest.mark.parametrize("by_request", [True, False])
def test_early_scores_are_columns_kept_for_the_evaluation(build, by_request):
    rows, expected = make_rows(40), {}
    for row in rows:
        for place, candidate in enumerate(row.candidates):
            candidate["weight"] = None if place % 3 == 0 else float(place)
            score = candidate["score"]
            known = np.nan if score is None or not np.isfinite(score) else score
            second = np.nan if place % 3 == 0 else place
            expected[row.of_request["request_id"], candidate["item_id"]] = (known, second)
    columns = columns_with(label_weight="", early_scores="score, weight")

    log = build(rows, by_request, columns=columns)

    for request in (*log.requests["validation"], *log.requests["test"]):
        scores = [expected[request.request_id, item] for item in log.items_of(request)]
        np.testing.assert_allclose(request.early_scores, scores, rtol=1e-6)
    for request in log.requests["train"]:
        assert request.early_scores.shape == (0, 2)


def test_bad_propensities_are_refused_with_an_example(build):
    rows = make_rows(41)
    for row in rows:
        for place, candidate in enumerate(row.candidates):
            candidate["weight"] = 0.5 if place < 3 else 0.0
    columns = columns_with(label_weight="", propensity="weight")
    build(rows, columns=columns)
    rows[0].candidates[0]["weight"] = rows[1].candidates[1]["weight"] = 1.5
    shown = sum(candidate["stage"] == "shown" for row in rows for candidate in row.candidates)
    fault = rf"data\.columns\.propensity: 2 of {shown} values of column 'weight' on .* as 1\.5; see"
    with pytest.raises(UserError, match=fault):
        build(rows, columns=columns)


@pytest.mark.parametrize("by_request", [True, False])
def test_a_log_without_users_has_one(build, by_request):
    rows = make_rows(42)
    log = build(rows, by_request, columns=columns_with(user=""))
    assert log.source.spec.num_users == 1
    for row in rows:
        row.of_request["user_id"] = 7
    assert same(log.requests, build(rows, by_request).requests)


def test_without_teacher_or_features_columns_are_zeros(build):
    empty, columns = ConfigDict(), columns_with(teacher_version="")
    log = build(make_rows(12), teacher=empty, features=empty, columns=columns)
    spec = log.source.spec
    assert spec.teacher_version == ""
    assert (spec.user_features, spec.item_features, spec.categories) == (1, 1, ())
    request = log.requests["train"][0]
    assert request.teacher_probability.shape == (0, 2)
    assert request.request_category is None
    assert log.source.item_features.tolist() == [[0.0]] * spec.num_items


def test_all_teacher_versions_count_unless_one_is_named(build):
    rows = make_rows(13)
    for candidate in rows[0].candidates:
        candidate["version"] = "v0"
    for version, weight in (("v1", 0), ("", 1)):
        log = build(rows, teacher_version=version)
        first = log.requests["train"][0]
        assert first.teacher_weight.tolist() == [weight] * first.num_passed
        assert log.report["teacher"]["other_version"] == (1 - weight) * first.num_passed
        assert log.source.spec.teacher_version


@pytest.mark.parametrize("split", ["time", "request", "user"])
def test_splits_share_what_they_must_not_share(build, split):
    log = build(make_rows(14, requests=120), split=split, validation_share=0.2, test_share=0.25)
    requests = log.requests
    ids = [{request.request_id for request in requests[name]} for name in SPLITS]
    assert sum(map(len, ids)) == len(set.union(*ids)) == 120
    times = {name: [request.time for request in requests[name]] for name in SPLITS}
    assert all(of == sorted(of) for of in times.values())
    if split == "time":
        in_order = [*itertools.chain(*times.values())]
        assert in_order == sorted(in_order)
        assert {name: len(requests[name]) for name in SPLITS[1:]} == {"validation": 24, "test": 30}
    if split == "user":
        users = [{request.user_id for request in requests[name]} for name in SPLITS]
        assert sum(map(len, users)) == len(set.union(*users))
    else:
        assert 12 <= len(requests["test"]) <= 48
        assert 8 <= len(requests["validation"]) <= 40
    # Ids of training users and items come first.
    sizes = {"user_id": log.source.spec.num_users, "item_id": log.source.spec.num_items}
    for of, size in sizes.items():
        seen = {
            name: set(np.concatenate([np.atleast_1d(getattr(r, of)) for r in requests[name]]))
            for name in SPLITS
        }
        assert seen["train"] == set(range(len(seen["train"])))
        assert set.union(*seen.values()) == set(range(size))


def test_a_split_by_hash_follows_the_seed_alone(build):
    rows = make_rows(15, requests=60, texts=True)

    def test_times(**changes):
        requests = build(rows, split="request", **changes).requests["test"]
        return [request.time for request in requests]

    # The share of the validation is taken from what is left.
    assert test_times() == test_times(validation_share=0.6) != test_times(seed=1)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (["test", "train", "validation", "train", "train", "test"], ""),
        # The first row lacks the question mark.
        (["train?", "validation", "test"], "'part', 1 requests, such as 100, do not have one of"),
        (["train", "validation", "Test", ""], "'part', 2 requests, such as 102, do not have one"),
        (["train", "train", "test"], "no request is left for the split 'validation' by data.spl"),
    ],
)
def test_a_split_may_be_a_column_that_leaves_none_open(tmp_path, splits, message):
    path = write_log(tmp_path / "log", make_rows(15, requests=len(splits))) / "part-0.parquet"
    column = [splits[(time - 1_000_000) // 60] for time in pq.read_table(path)["time"].to_pylist()]
    column[0] = column[0].rstrip("?")
    change(path, lambda table: table.append_column("part", pa.array(column)))
    config = faulty_logs.config(path, tmp_path / "datasets", split="column")
    config.data.columns.split = "part"
    if message:
        with pytest.raises(UserError, match=message):
            faulty_logs.open_source(config)
        return
    requests = read(config, tmp_path / "beside").requests
    for split in SPLITS:
        expected = [1_000_000 + 60 * place for place, of in enumerate(splits) if of == split]
        assert [request.time for request in requests[split]] == expected


def test_strict_ends_the_build_and_says_where_the_report_is(config):
    config.data.strict = True
    with pytest.raises(UserError, match=r"data.strict=True, and .* rejected candidates") as caught:
        faulty_logs.open_source(config)
    # Nothing else is left behind.
    (folder,) = (faulty_logs.Path(config.data.dir)).iterdir()
    assert folder.name == REFUSED
    assert str(folder / "data_report.html") in str(caught.value)
    assert (folder / "data_report.html").exists()
    assert (folder / "rejected").is_dir()


@pytest.mark.parametrize(
    ("seconds", "stage", "changes", "message"),
    [
        (60, "lost", {}, "not one row of the log can be used; .*unknown_stage"),
        (0.1, "passed", {}, "'validation' by data.split='time' .*; give each split times"),
        (60, "passed", {"split": "request", "validation_share": 1e-6},
         "no request is left for the split 'validation' by data.split='request' with "
         "data.validation_share=1e-06 and data.test_share=0.3; see .*data_report.html"),
    ],
)  # fmt: skip
def test_a_log_that_leaves_a_split_empty_says_why(build, seconds, stage, changes, message):
    rows = make_rows(20, requests=20)
    for number, row in enumerate(rows):
        row.of_request["time"] = 5 + int(number * seconds)
        for candidate in row.candidates:
            candidate["stage"] = stage
    with pytest.raises(UserError, match=message):
        build(rows, **changes)


def test_the_report_counts_what_is_in_a_column(build):
    rows = make_rows(21)
    rows[0].of_request["age"] = None
    rows[1].of_request["age"] = np.inf
    rows[0].candidates[0] |= {"teacher_probability_watch": 1.5, "score": None}
    rows[1].candidates[0] |= {"teacher_probability_watch": np.nan, "watch": None}
    rows[2].candidates[0]["duration"] = 5.0
    rows[3].candidates = [c for c in rows[3].candidates if c["stage"] != "shown"]
    for candidate in rows[4].candidates:
        candidate["weight"] = 0.0
    report = build(rows, by_request=True).report
    columns = {column["key"]: column for column in report["columns"]}
    age = columns["data.features.age"]
    assert (age["values"], age["missing"], age["out_of_range"]) == (30, 1, 1)
    assert columns["data.teacher.watch"]["out_of_range"] == 1
    assert columns["data.features.score"]["missing"] == 1
    train = report["splits"]["train"]
    number, shown = train["requests"], train["shown"]
    assert shown == 1 + 3 + train["labeled"]
    assert train["without_a_label"] == 2
    assert f"2 of {number} train requests ({2 / number:.1%}) have no label." in report["remarks"]
    varying = {of["name"]: of.get("items_with_several_values") for of in report["features"]}
    assert (varying["duration"], varying["author"]) == (1, 0)
    assert train["coverage/watch/shown"] == pytest.approx((shown - 2) / shown)
    kept = [c for row in rows[:number] for c in row.candidates if c["stage"] == "shown"]
    kept = pd.DataFrame([c for c in kept if (c["teacher_probability_watch"] or 0) <= 1]).dropna()
    sums = kept[["teacher_probability_watch", "watch"]].mul(kept["weight"], axis=0).sum()
    assert train["predicted_over_observed/watch"] == pytest.approx(sums.iloc[0] / sums.iloc[1])


def test_processes_change_nothing(tmp_path):
    log = write_log(tmp_path / "log", make_rows(25, requests=150, faults=0.03, texts=True), files=2)
    built = []
    for processes in (1, 2):
        config = faulty_logs.config(log, tmp_path / f"with {processes}", processes=processes)
        directory = api.prepare(config).directory
        paths = [path for path in directory.rglob("*") if path.is_file()]
        built.append({path.relative_to(directory): path.read_bytes() for path in paths})
    assert built[0] == built[1]


def test_tables_that_outgrow_memory_change_nothing(config, tmp_path, monkeypatch):
    within = read(config, tmp_path / "within")
    monkeypatch.setattr(database, "_BYTES_A_BYTE", 2**30)
    with contextlib.closing(faulty_logs.open_source(config)) as source:
        assert [*tmp_path.glob("datasets/.parquet-*/work/tables.duckdb")]
        assert same(faulty_logs.all_requests(source), within.requests)


# Reads a log, and is killed when it is in tables on disk.
_KILLED = """
import os, signal, sys
from kd_ranker.sources.logs import encode
from tests import small
from tests.sources import faulty_logs

encode.write_ordered = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
faulty_logs.open_source(faulty_logs.config(sys.argv[1], sys.argv[2]))
"""


def test_tables_of_a_killed_build_alone_are_removed(tmp_path):
    log, folder = write_log(tmp_path / "log", make_rows(27)), tmp_path / "datasets"
    killed = small.run("-c", _KILLED, str(log), str(folder))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (left,) = folder.glob(".parquet-*")
    config = faulty_logs.config(log, folder)
    with contextlib.closing(faulty_logs.open_source(config)) as source:
        (own,) = folder.glob(".parquet-*")
        assert own != left
        with contextlib.closing(faulty_logs.open_source(config)):
            assert len([*folder.glob(".parquet-*")]) == 2
        assert own.exists()
        assert faulty_logs.all_requests(source)
    assert not [*folder.glob(".parquet-*")]


def test_a_log_that_has_changed_is_not_taken_for_the_one_before(tmp_path):
    one, two = (write_log(tmp_path / name, make_rows(26), files=2) for name in ("one", "two"))
    config = faulty_logs.config(f"{one},{two}", tmp_path / "datasets")
    directory = api.prepare(config).directory
    assert api.prepare(config).directory == directory
    (one / "part-1.parquet").rename(one / "part-2.parquet")
    shutil.rmtree(two)
    with pytest.raises(UserError, match=r"has changed since .* \(1 file new, 3 files gone\)"):
        api.prepare(config)
    # A dataset may outlive its log.
    shutil.rmtree(one)
    check_unchanged(config.data, directory)


def test_a_log_behind_a_url_is_read_like_one_on_disk(config, tmp_path):
    expected = read(config, tmp_path / "of disk")
    memory = fsspec.filesystem("memory")
    memory.put(f"{config.data.path}/part-0.parquet", "/bucket/day=1/part-0.parquet")
    try:
        for number, url in enumerate(("memory://bucket", "memory://bucket/*/*.parquet")):
            config.data.path = url
            assert same(expected.requests, read(config, tmp_path / f"{number}").requests)
    finally:
        memory.rm("/bucket", recursive=True)


def test_columns_of_folders_are_features_like_others(tmp_path):
    rows = make_rows(0)
    for where, some in (("nz", rows[::2]), ("at", rows[1::2])):
        write_log(tmp_path / "log" / f"where={where}", some)
    folder = {row.of_request["request_id"]: ("nz", "at")[of % 2] for of, row in enumerate(rows)}
    config = faulty_logs.config(tmp_path / "log", tmp_path)
    config.data.features = ConfigDict(dict(where=feature("context", "category")))
    found = read(config, tmp_path / "beside")
    value = found.vocabularies["feature-where"]
    for request in itertools.chain(*found.requests.values()):
        assert value[int(request.request_category[0])] == folder[request.request_id]


def test_ids_of_numbers_in_one_file_and_texts_in_one_are_texts(tmp_path):
    log = write_log(tmp_path / "log", make_rows(3), files=2)
    config, found = faulty_logs.config(log, tmp_path / "datasets"), []
    for path in sorted(log.iterdir()):
        place = pq.read_schema(path).get_field_index("user_id")
        texts = pq.read_table(path)["user_id"].cast("string")
        change(path, lambda of, i=place, x=texts: of.set_column(i, "user_id", x))
        found.append(read(config, tmp_path / f"beside {path.stem}"))
    assert {*map(type, found[0].vocabularies["user"].values())} == {str}
    assert found[0].vocabularies == found[1].vocabularies
    assert same(found[0].requests, found[1].requests)


def test_a_file_that_is_damaged_within_is_one_line(config):
    path = faulty_logs.Path(config.data.path) / "part-0.parquet"
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(0)
    content = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    damaged = slice(start + 30, start + chunk.total_compressed_size)
    content[damaged] = bytes(chunk.total_compressed_size - 30)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be read.*part-0.parquet"):
        faulty_logs.open_source(config)


def test_columns_and_files_may_have_odd_names(config, tmp_path):
    expected = read(config, tmp_path / "of plain")
    log = write_log(tmp_path / "other", make_rows(3, faults=0.05), files=2)

    def renamed(table):
        table = table.rename_columns({"position": "place", "age": "row"})
        for name in ("FILE", "reason", "entries", "each", "request", "number"):
            table = table.append_column(name, pa.array([7] * len(table)))
        return table

    for path, name in zip(sorted(log.iterdir()), ("p1.parquet", "p[1].parquet"), strict=True):
        change(path, renamed)
        path.rename(log / name)
    config.data.path = str(log)
    config.data.columns.position, config.data.features.age.column = "place", "row"
    found = read(config, tmp_path / "of log")
    assert same(found.requests, expected.requests)
    assert found.counts == expected.counts
