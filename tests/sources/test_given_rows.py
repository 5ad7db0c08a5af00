"""Requests of a frame of a row a candidate."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

import kd_ranker as kd
from kd_ranker.sources import given, given_rows
from tests.sources.test_given import SPEC, mappings

NAN = np.nan
COLUMNS = {
    "request_id": "session",
    "time": "at",
    "user_id": "user",
    "user_features": ["age", "visits"],
    "context": "hour",
    "history_id": "recent",
    "item_id": "item",
    "candidate_features": "match",
    "candidate_category": "shelf",
    "stage": "came",
    "user_label": ["click", "buy"],
    "teacher_probability": ["says_click", "says_buy"],
    "item_features": ["price", "size"],
}


def frame_of(**changes):
    """Sessions b, of four candidates; a, of two; and c, of one; not in order, nor together."""
    columns = {
        "session": ["b", "a", "b", "b", "c", "a", "b"],
        "at": [50, 40, 50, 50, 60, 40, 50],
        "user": [1, 2, 1, 1, 3, 2, 1],
        "age": [0.5, 0.25, 0.5, 0.5, 1, 0.25, 0.5],
        "visits": [3, 4, 3, 3, 5, 4, 3],
        "hour": [7, 8, 7, 7, 9, 8, 7],
        "recent": [[5, 6], None, [5, 6], [5, 6], [], None, [5, 6]],
        "item": [10, 11, 12, 13, 11, 10, 14],
        "match": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
        "shelf": [0, NAN, 2, 3, NAN, 1, 0],
        "came": ["retrieved", "shown", "shown", "passed", "shown", "passed", "shown"],
        "click": [NAN, 1, 0, NAN, 1, NAN, 1],
        "buy": [NAN, 0, 0, NAN, 1, NAN, NAN],
        "says_click": [NAN, 0.5, 0.6, NAN, NAN, 0.7, 0.8],
        "says_buy": [NAN, 0.1, NAN, 0.2, NAN, 0.3, 0.4],
        "price": [1, 2, 3, 4, 2, 1, 5],
        "size": [6, 7, 8, 9, 7, 6, 5],
    }
    return pd.DataFrame(columns | changes)


def made(frame, columns=COLUMNS):
    mapped = given_rows.requests_of(frame, columns)
    return [given.request_of(each, place, SPEC) for place, each in enumerate(mapped)]


def assert_is(request, **fields):
    for name, expected in fields.items():
        np.testing.assert_array_equal(
            getattr(request, name), np.array(expected, getattr(request, name).dtype), name
        )


def test_rows_become_requests_in_the_order_of_the_funnel():
    b, a, c = made(frame_of())
    assert [(of.request_id, of.time, of.user_id, of.num_passed) for of in (b, a, c)] == [
        (0, 50, 1, 3),  # texts are no ids: their places are
        (1, 40, 2, 2),
        (2, 60, 3, 1),
    ]
    assert_is(
        b,
        user_features=[0.5, 3],
        context=[7],
        history_id=[5, 6],
        item_id=[12, 14, 13, 10],
        candidate_features=[[0.3], [0.7], [0.4], [0.1]],
        candidate_category=[[2], [0], [3], [0]],
        user_label=[[0, 0], [1, 0]],
        label_weight=[1, 0],  # one of the second's labels is missing
        teacher_probability=[[0.6, NAN], [0.8, 0.4], [NAN, 0.2]],
        teacher_weight=[1, 1, 1],
    )
    assert_is(
        a,
        history_id=[],
        item_id=[11, 10],
        candidate_category=[[-1], [1]],
        user_label=[[1, 0]],
        teacher_probability=[[0.5, 0.1], [0.7, 0.3]],
    )
    assert_is(c, item_id=[11], user_label=[[1, 1]], history_id=[], teacher_probability=[[NAN, NAN]])


def test_without_a_stage_those_with_a_label_were_shown_and_all_were_passed():
    columns = {name: of for name, of in COLUMNS.items() if name != "stage"}
    b, a, c = made(frame_of(), columns)
    assert [(of.num_passed, len(of.user_label)) for of in (b, a, c)] == [(4, 2), (2, 1), (1, 1)]
    assert_is(b, item_id=[12, 14, 10, 13])  # the others as they stand in the frame


def test_what_a_teacher_says_of_one_that_was_not_passed_is_kept():
    frame = frame_of()
    frame.loc[0, "says_buy"] = 0.9
    b, a, _ = made(frame)
    assert_is(b, teacher_probability=[[0.6, NAN], [0.8, 0.4], [NAN, 0.2], [NAN, 0.9]])
    assert len(a.teacher_probability) == 2


def test_items_have_what_their_rows_say_and_others_nothing():
    spec = dataclasses.replace(SPEC, categories=(kd.Category("kind", of="item", size=4),))
    columns = COLUMNS | {"item_category": "kind"}
    frames = [frame_of(kind=[0, 3, NAN, 1, 3, 0, 2])]
    found = given_rows.items_of(frames, columns, spec)
    features, category = np.zeros((30, 2)), np.full((30, 1), -1)
    features[10:15] = [[1, 6], [2, 7], [3, 8], [4, 9], [5, 5]]
    category[10:15, 0] = [0, 3, -1, 1, 2]
    np.testing.assert_array_equal(found["item_features"], features)
    np.testing.assert_array_equal(found["item_category"], category)


def exploded(requests):
    """Requests of `mappings` as a frame of a row a candidate, in an order of chance."""
    rows = []
    for each in requests:
        shown, passed = len(each["user_label"]), each["num_passed"]
        belongs = {name: each[name] for name in ("request_id", "time", "user_id", "history_id")}
        belongs |= {"teacher_version": each["teacher_version"], "events": each["history_features"]}
        belongs |= {"u": each["user_features"], "hour": each["context"][0]}
        for place, item in enumerate(each["item_id"]):
            row = {"item": item, "match": each["candidate_features"][place, 0], "rank": place}
            row["shelf"] = each["candidate_category"][place, 0]
            row["stage"] = ("shown", "passed", "retrieved")[(place >= shown) + (place >= passed)]
            if place < shown:
                row |= dict(zip(("click", "buy"), each["user_label"][place], strict=True))
                row["counts"] = each["label_weight"][place]
            if place < passed:
                row["says"] = each["teacher_probability"][place]
                row["trusted"] = each["teacher_weight"][place]
            rows.append(belongs | row)
    frame = pd.DataFrame(rows)
    frame["says"] = [cell if np.ndim(cell) else np.full(2, NAN) for cell in frame["says"]]
    return frame.sample(frac=1, random_state=0).sort_values("rank", kind="stable")


def test_a_dataset_of_rows_is_that_of_the_requests(tmp_path):
    requests = [*mappings()]
    columns = {
        **{name: name for name in ("request_id", "time", "user_id", "history_id", "stage")},
        "teacher_version": "teacher_version",
        "history_features": "events",
        "user_features": "u",
        "context": "hour",
        "item_id": "item",
        "candidate_features": ["match"],
        "candidate_category": "shelf",
        "user_label": ("click", "buy"),
        "label_weight": "counts",
        "teacher_probability": "says",  # a column of vectors
        "teacher_weight": "trusted",
    }
    frame = exploded(requests)
    dataset = kd.Dataset.from_requests(frame, SPEC, columns=columns, directory=tmp_path)
    expected = kd.Dataset.from_requests(requests, SPEC, directory=tmp_path)
    assert dataset.directory == expected.directory  # of which the content decides
    assert dataset.config.funnel == expected.config.funnel
    # A frame a split, in which requests stand in the order of time as well.
    frame = frame.sort_values(["time", "request_id", "rank"])
    split = given.splits_of([given.request_of(each, 0, SPEC) for each in requests], 0.1, 0.1)
    frames = {
        name: frame[frame["request_id"].isin({each.request_id for each in of})]
        for name, of in split.items()
    }
    again = kd.Dataset.from_requests(frames, SPEC, columns=columns, directory=tmp_path)
    assert again.directory == expected.directory


@pytest.mark.parametrize(
    ("changes", "columns", "message"),
    [
        ({"user": [1, 2, 1, 9, 3, 2, 1]}, {}, "session b has rows whose 'user' is 1 and 9"),
        ({"recent": [[5, 6]] * 3 + [[5, 7]] + [[5, 6]] * 3}, {}, r"b has .* \[5, 6\] and \[5, 7\]"),
        ({"age": [NAN, 1, 2, NAN, 1, 1, NAN]}, {}, "session b has rows whose 'age' is nan and 2.0"),
        ({"size": [6, 7, 8, 9, 0, 6, 5]}, {}, "item 11 has rows whose 'size' is 7 and 0"),
        ({"session": ["b", None] + ["b"] * 5}, {}, "row 1 of the frame has no 'session'"),
        ({"came": ["won"] * 7}, {}, "'came' holds 'won', and a stage is one of: retrieved, passed"),
        ({"match": [NAN] * 7}, {}, "request 0: candidate_features holds nan, and takes finite"),
        ({"item": [10, 11, 12, 13, 30, 10, 14]}, {}, r"'item' must lie in \[0, 30\)"),
        ({"item": ["x"] * 7}, {}, "'item', which holds item_id: could not convert string"),
        ({"click": [2] * 7}, {}, "request 0: user_label holds 2; labels are 0 or 1"),
        ({"user": [0.5] * 7}, {}, "request 0: user_id holds 0.5, and takes whole numbers"),
        ({}, {"user_id": "who"}, "names 'who' for user_id, which the frame lacks"),
        ({}, {"time": ["at", "hour"]}, "columns= names 2 columns for time, which takes one"),
        ({}, {"num_passed": "at"}, "a field in columns=='num_passed' does not exist; choose one"),
        ({}, {"context": ["hour", "at"]}, r"request 0: context has the shape \(2,\), and should"),
        ({}, {"item_features": "price"}, r"item_features has the shape \(30, 1\), and should have"),
    ],
)  # fmt: skip
def test_a_fault_is_one_line_that_names_request_and_column(tmp_path, changes, columns, message):
    with pytest.raises(kd.UserError, match=message) as caught:
        kd.Dataset.from_requests(
            frame_of(**changes), SPEC, columns=COLUMNS | columns, directory=tmp_path
        )
    assert "\n" not in str(caught.value)
    assert not [*tmp_path.iterdir()]


def test_columns_are_of_a_frame_and_name_what_is_needed(tmp_path):
    with pytest.raises(kd.UserError, match="DataFrame of a row a candidate, and this is a list"):
        kd.Dataset.from_requests([*mappings()], SPEC, columns=COLUMNS, directory=tmp_path)
    without = {name: of for name, of in COLUMNS.items() if name != "user_label"}
    with pytest.raises(kd.UserError, match="columns= does not say which one holds user_label"):
        kd.Dataset.from_requests(frame_of(), SPEC, columns=without, directory=tmp_path)
