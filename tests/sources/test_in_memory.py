"""Requests that a program hands over."""

import dataclasses
import shutil

import numpy as np
import pandas as pd
import pytest

import kd_ranker as kd
from kd_ranker.batch import STORED
from kd_ranker.pipeline import datasets
from kd_ranker.requests.records import read_requests
from kd_ranker.sources import in_memory

SPEC = kd.FeatureSpec(
    dataset="mine",
    tasks=("click", "buy"),
    num_users=20,
    num_items=30,
    user_features=2,
    context_features=1,
    candidate_features=1,
    item_features=2,
    cheap_item_features=1,
    history_length=3,
    history_features=1,
    teacher_version="v1",
    categories=(kd.Category("shelf", of="candidate", size=4),),
)


GOOD = dict(user_id=1, item_id=[1, 2], user_label=[[1, 0]])


def mappings(number=20, seed=0):
    """Requests of all sizes, with all that a request may have."""
    draw = np.random.default_rng(seed)
    for index in range(number):
        shown = int(draw.integers(1, 4))
        passed = shown + int(draw.integers(0, 3))
        retrieved = passed + int(draw.integers(0, 3))
        events = int(draw.integers(0, 4))
        yield dict(
            request_id=100 + index,
            time=int(draw.integers(1000)),
            user_id=int(draw.integers(20)),
            user_features=draw.random(2).astype(np.float32),
            context=draw.random(1).astype(np.float32),
            history_id=draw.integers(0, 30, events).astype(np.int32),
            history_features=draw.random((events, 1)).astype(np.float32),
            item_id=draw.permutation(30)[:retrieved].astype(np.int32),
            candidate_features=draw.random((retrieved, 1)).astype(np.float32),
            candidate_category=draw.integers(-1, 4, (retrieved, 1)).astype(np.int32),
            num_passed=passed,
            user_label=draw.integers(0, 2, (shown, 2)).astype(np.uint8),
            label_weight=draw.random(shown).astype(np.float32),
            teacher_probability=draw.random((passed, 2)).astype(np.float32),
            teacher_weight=draw.integers(0, 2, passed).astype(np.float32),
            teacher_version="v1" if index % 3 else "v0",
        )


def read(config):
    dataset = datasets.dataset_of(config)
    return {
        split: {request.request_id: request for request in read_requests(dataset, split)}
        for split in in_memory.SPLITS
    }


def test_what_was_handed_over_is_what_is_read(tmp_path):
    made = [*mappings()]
    dataset = kd.Dataset.from_requests(made, SPEC, directory=tmp_path)
    assert kd.prepare(dataset.config).directory == dataset.directory
    found = read(dataset.config)
    together = {
        number: request for of_split in found.values() for number, request in of_split.items()
    }
    assert len(together) == len(made)
    for each in made:
        counts = (each["teacher_version"] == "v1") & (each["teacher_weight"] > 0)
        probability = np.where(counts[:, None], each["teacher_probability"], np.float32(np.nan))
        expected = each | dict(
            teacher_weight=counts, teacher_probability=probability, teacher_version="v1"
        )
        request = together[each["request_id"]]
        # Candidates for training are in another order.
        order = [each["item_id"].tolist().index(item) for item in request.item_id]
        for field in STORED:
            if field.name in expected:
                value = expected[field.name]
                if field.of in ("candidate", "shown", "scored"):
                    value = value[order[: len(value)]]
                np.testing.assert_array_equal(getattr(request, field.name), value, field.name)
    # By time: no request of a split is earlier than one of the split before.
    times = [[request.time for request in found[split].values()] for split in in_memory.SPLITS]
    assert max(times[0]) < min(times[1]) <= max(times[1]) < min(times[2])
    assert list(map(len, times)) == [16, 2, 2]


def test_a_frame_and_its_requests_are_the_same_dataset(tmp_path):
    by_mapping = [*mappings()]
    requests = [in_memory.make_request(mapping, 0, SPEC) for mapping in by_mapping]

    def directory_of(requests):
        return kd.Dataset.from_requests(requests, SPEC, directory=tmp_path).directory

    assert directory_of(requests) == directory_of(by_mapping)
    assert directory_of(pd.DataFrame(by_mapping)) == directory_of(by_mapping)


def test_other_labels_or_items_are_another_dataset(tmp_path):
    by_mapping = [*mappings()]
    first = kd.Dataset.from_requests(by_mapping, SPEC, directory=tmp_path)
    items = np.ones((30, 2))
    with_items = kd.Dataset.from_requests(by_mapping, SPEC, items, directory=tmp_path)

    by_mapping[3]["user_label"] = 1 - by_mapping[3]["user_label"]
    with_labels = kd.Dataset.from_requests(by_mapping, SPEC, directory=tmp_path)

    assert len({first.directory, with_items.directory, with_labels.directory}) == 3


def test_splits_may_be_given(tmp_path):
    made = [*mappings()]
    splits = {"train": made[5:], "validation": made[:2], "test": made[2:5]}
    config = kd.Dataset.from_requests(splits, SPEC, directory=tmp_path).config
    kd.prepare(config)
    found = read(config)
    assert {split: {*of_split} for split, of_split in found.items()} == {
        split: {each["request_id"] for each in of_split} for split, of_split in splits.items()
    }


def test_what_is_left_out_is_nothing_and_labels_weigh_1():
    # Sizes may be integers of NumPy.
    spec = dataclasses.replace(SPEC, categories=(), num_users=np.int64(20))
    assert spec.to_json() == dataclasses.replace(spec, num_users=20).to_json()
    request = in_memory.make_request(GOOD, 7, spec)
    assert (request.request_id, request.time, request.num_passed) == (7, 7, 2)
    assert request.label_weight.tolist() == [1]
    assert request.teacher_probability.shape == request.true_probability.shape == (0, 2)
    assert request.teacher_version == "v1"
    assert request.candidate_features.tolist() == [[0], [0]]
    assert request.user_features.tolist() == [0, 0]
    assert {field.name for field in STORED} == {*vars(request)}
    scored = GOOD | {"teacher_probability": [[0.5, np.nan]], "incumbent": [2, np.nan]}
    request = in_memory.make_request(scored, 0, spec)
    assert request.teacher_weight.tolist() == [1]
    np.testing.assert_array_equal(request.incumbent, [2, np.nan])
    assert np.isnan(request.true_probability).tolist() == [[True, True]] * 2
    assert np.isnan(request.propensity).all()
    in_memory.make_request(
        GOOD | {"propensity": [1, -1]}, 0, spec
    )  # of the shown, it must be above 0


def test_the_funnel_is_that_of_the_requests():
    sizes = [dict(user_id=0, item_id=[*range(n)], user_label=[[0, 0]] * 2) for n in (4, 9)]
    requests = [in_memory.make_request(each, 0, SPEC) for each in sizes]
    assert in_memory.funnel_of(requests) == dict(
        retrieved=9, passed=4, shown=2, report_at=(2, 4, 9)
    )
    some = [dataclasses.replace(request, num_passed=3) for request in requests]
    assert in_memory.funnel_of(some)["passed"] == 3


def faulty(**change):
    """Ten requests, the first with other fields; None leaves a field out."""
    fields = GOOD | change
    first = {name: value for name, value in fields.items() if value is not None}
    return [first, *[GOOD] * 9]


NO_REQUESTS = r"give a list of mappings or kd\.Request, or a table"
TOO_FEW = "has no requests for its split"


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        (faulty(item_id=None), "request 0 lacks item_id"),
        (
            faulty(label=1),
            "request 0: field='label' does not exist; choose one of: candidate_category, ",
        ),
        (faulty(user_label=[1]), r"user_label has the shape \(1,\), and should have \(1, 2\)"),
        (faulty(user_label=[[1, 0]] * 3), "3 labels, num_passed=2 and 2 items; the shown are fir"),
        (faulty(num_passed=3), "1 labels, num_passed=3 and 2 items"),
        (faulty(user_label=np.zeros((0, 2))), "0 labels, num_passed=2"),
        (faulty(context="x"), "request 0: context must be an array of numbers: could not convert"),
        (faulty(item_id=[1, 30], request_id=99), r"request 99: item_id must lie in \[0, 30\)"),
        (faulty(propensity=[0, 1]), r"request 0: propensity is 0; it must be in \(0, 1\]"),
        (faulty(teacher_weight=[1.0]), r"has the shape \(1,\), and should have \(0,\)"),
        ([GOOD | {"user_id": None}, *[GOOD] * 9], "request 0 lacks user_id"),
        (faulty(request_id=-4), "request -4: request_id must be at least 0"),
        (
            faulty(request_id=2**70),
            r"request 1180591620717411303424: request_id must be .* too large",
        ),
        (faulty(label_weight=[-0.5]), "request 0: label_weight is -0.5; a weight is at least 0"),
        (
            faulty(teacher_weight=[1, -1], teacher_probability=[[0.1, 0.2]] * 2),
            "request 0: teacher_weight is -1; a weight is at least 0",
        ),
        (faulty(request_id=7), "several requests have request_id 7; give each its own"),
        (
            {split: [GOOD | {"request_id": 5}] for split in in_memory.SPLITS},
            "several requests have request_id 5; give each its own",
        ),
        (faulty(item_id=[3, 3]), "request 0: item_id holds 3 several times; an item is one cand"),
        ({}, NO_REQUESTS),
        ([1, 2], NO_REQUESTS),
        ({"user_id": [1]}, NO_REQUESTS),
        (None, NO_REQUESTS),
        ([], TOO_FEW),
        ([GOOD], TOO_FEW),
    ],
)
def test_a_fault_is_one_line_that_names_the_request(tmp_path, requests, message):
    with pytest.raises(kd.UserError, match=message):
        kd.Dataset.from_requests(requests, SPEC, directory=tmp_path)


@pytest.mark.parametrize("share", [np.nan, -0.1, 1.0, "x", None])
def test_a_share_is_below_one(tmp_path, share):
    with pytest.raises(kd.UserError, match=rf"test_share={share!r} must be a number in \[0, 1\)"):
        kd.Dataset.from_requests([GOOD] * 20, SPEC, directory=tmp_path, test_share=share)


def test_shares_leave_requests_for_training(tmp_path):
    shares = dict(validation_share=0.6, test_share=0.6)
    with pytest.raises(kd.UserError, match="leave no requests for training"):
        kd.Dataset.from_requests([GOOD] * 20, SPEC, directory=tmp_path, **shares)


def test_other_tasks_and_a_smaller_funnel_are_refused(tmp_path):
    config = kd.Dataset.from_requests(mappings(), SPEC, directory=tmp_path).config
    config.tasks, config.value_weights = ("buy",), (1.0,)
    with pytest.raises(kd.UserError, match="have \\('click', 'buy'\\); set tasks to"):
        kd.prepare(config)
    config.tasks, config.value_weights = SPEC.tasks, (1.0, 1.0)
    most = config.funnel.retrieved
    config.funnel.update(retrieved=most - 1, report_at=(1, 2))
    with pytest.raises(kd.UserError, match=rf"retrieved={most - 1}, and a request .* has {most} "):
        kd.prepare(config)
    shutil.rmtree(config.data.path)
    with pytest.raises(kd.UserError, match=r"no requests at .*; make them with kd\.Dataset"):
        kd.prepare(config)
