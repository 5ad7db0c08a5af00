"""References against restatements one candidate after the other."""

import dataclasses
import itertools

import jax
import numpy as np
import pandas as pd
import pytest

from kd_ranker.batch import EvaluationBatch
from kd_ranker.evaluation.baselines import (
    BASELINES,
    LISTS,
    baseline_ranker,
    known_baselines,
    lists_of,
)
from kd_ranker.evaluation.evaluate import Plan, evaluate
from kd_ranker.requests import storage
from kd_ranker.requests.records import read_requests
from scripts.personal import item_share
from tests.random_batches import SPEC, random_batch, random_items
from tests.requests.random_requests import random_source

WEIGHTS, SHOWN = (1.0, 2.0, 4.0), 3


def built(tmp_path, change, source=None):
    """A dataset of the requests of a source, each changed by a function of it and its split."""
    source = source or random_source()

    def requests(split):
        for request in source.requests(split):
            yield dataclasses.replace(request, **change(request, split))

    changed = dataclasses.replace(source, requests=requests)
    storage.build(lambda: changed, "some", str(tmp_path))
    return storage.open_dataset("some", str(tmp_path), made_by="")


def faulty(request, _):
    """A request of one of two versions, with holes in the teacher's log and its own weights."""
    generator = np.random.default_rng(request.request_id)
    probability = request.teacher_probability.copy()
    probability[generator.random(probability.shape) < 0.1] = np.nan
    probability[generator.random(probability.shape) < 0.1] = 1.5
    return {
        "teacher_probability": probability,
        "teacher_weight": (generator.random(len(probability)) < 0.8).astype(np.float32),
        "teacher_version": "v0" if request.request_id % 4 == 0 else "v1",
        "label_weight": generator.uniform(0, 3, len(request.label_weight)).astype(np.float32),
    }


@pytest.mark.parametrize("version", ["v1", ""], ids=["logged", "labels-only"])
def test_the_lists_are_those_of_one_candidate_after_the_other(version, tmp_path):
    source = random_source(train=30)
    spec = dataclasses.replace(source.spec, teacher_version=version)
    dataset = built(tmp_path, faulty, dataclasses.replace(source, spec=spec))
    # One line per candidate; a value is NaN without a proper number for each task.
    lines = []
    for request in read_requests(dataset, "train"):
        places = len(request.item_id)
        shown = len(request.label_weight)
        weight = np.zeros(places)
        weight[:shown] = request.label_weight
        label = np.zeros(places)
        label[:shown] = request.user_label @ WEIGHTS / 7
        value = np.full(places, np.nan)
        if request.teacher_version == "v1":
            scores = request.teacher_probability
            is_probability = ((scores >= 0) & (scores <= 1)).all(axis=1)
            is_proper = (request.teacher_weight > 0) & is_probability
            scored = len(request.teacher_weight)
            value[:scored] = np.where(is_proper, scores @ np.array(WEIGHTS) / 7, np.nan)
        frame = pd.DataFrame({
            "item": request.item_id, "weight": weight, "liked": weight * label,
            "passed": np.arange(places) < request.num_passed,
            "shown": np.arange(places) < shown, "value": value,
        })  # fmt: skip
        frame["first"] = frame["value"].rank(ascending=False, method="first") <= SHOWN
        lines.append(frame)
    by_item = pd.concat(lines).groupby("item")
    number = by_item.size()
    total = by_item.sum()
    expected = {
        "popularity": total["weight"] / total["weight"].max(),
        "show_rate": total["shown"] / (10 + total["passed"]),
        "pass_rate": total["passed"] / (10 + number),
        "static_list": total["liked"] / (10 + total["weight"]),
    }
    if version:
        num_scored = by_item["value"].count()
        expected["static_list"] = total["value"] / (10 + num_scored)
        expected["top_rate"] = total["first"] / (10 + num_scored)
        assert total["first"].max() > 1

    found = lists_of(dataset, WEIGHTS, SHOWN)
    assert found.keys() == expected.keys()
    for name, numbers in expected.items():
        every = numbers.reindex(range(SPEC.num_items), fill_value=0)
        np.testing.assert_allclose(found[name], every, rtol=1e-5, err_msg=name)


def test_if_all_passed_are_shown_the_rate_is_of_the_retrieved(tmp_path):
    dataset = built(tmp_path, lambda request, _: {"num_passed": len(request.label_weight)})
    lists = lists_of(dataset, WEIGHTS, SHOWN)
    np.testing.assert_array_equal(lists["show_rate"], lists["pass_rate"])
    assert len(np.unique(lists["show_rate"])) > 3
    # A training split has no facts for the evaluation, and a log may have no teacher.
    columns = dataset.columns
    assert known_baselines([columns["train"]], lists) == ("random", *LISTS)
    del lists["top_rate"]
    without = tuple(name for name in BASELINES if name != "top_rate")
    assert known_baselines([columns["test"]], lists) == without


def random_lists():
    numbers = np.random.default_rng(0).random((len(LISTS), SPEC.num_items), dtype=np.float32)
    return dict(zip(LISTS, numbers, strict=True))


def evaluation_batch(seed, known=True):
    batch = random_batch(seed, requests=4, candidates=12)
    truth = np.random.default_rng(seed).random((4, 12, 3), dtype=np.float32)
    truth = truth if known else np.full_like(truth, np.nan)
    # Scores of any size, some equal, some unknown.
    score = 1e30 * np.random.default_rng(seed).integers(-3, 4, (4, 12)).astype(np.float32)
    score[:, 2:4] = np.nan
    unknown = np.full_like(score, np.nan)
    return EvaluationBatch(batch, truth, score, unknown, request_mask=np.arange(4) < 3)


def measured(batches):
    """The sums of the references by name."""
    ranker = baseline_ranker(random_lists())
    _, (summed,) = evaluate(None, [ranker], batches, random_items(), Plan(WEIGHTS, SHOWN))
    return {name: measured.sums for name, measured in summed.items()}


def test_a_rival_with_the_order_of_a_reference_has_its_sums():
    batch = evaluation_batch(1)
    keys = np.nan_to_num(batch.incumbent, nan=-1e38)
    batch = dataclasses.replace(batch, rivals=np.stack([keys, -keys], axis=-1))
    ranker = baseline_ranker(random_lists(), ("same", "reversed"))

    _, (summed,) = evaluate(None, [ranker], [batch], random_items(), Plan(WEIGHTS, SHOWN))

    same, incumbent = summed["same"].sums, summed["incumbent"].sums
    np.testing.assert_array_equal(same["survival"], incumbent["survival"])
    assert (summed["reversed"].sums["survival"] != incumbent["survival"]).any()


def survival(sums):
    return sums["survival"] / sums["funnel_requests"]


def test_a_baseline_is_measured_by_its_own_order():
    """The top k of each, request by request, against the logged teacher's top."""
    batches = [evaluation_batch(seed) for seed in (1, 2)]
    sums = measured(batches)
    assert set(sums) == set(BASELINES)
    lists = random_lists()

    def values_by(name, batch):
        """What a baseline orders by [requests, candidates]."""
        if name == "oracle":
            return batch.true_probability @ np.array(WEIGHTS)
        if name == "incumbent":
            return np.nan_to_num(batch.incumbent, nan=-1e38)
        return lists[name][batch.batch.item_id]

    for name in ("oracle", "incumbent", *lists):
        kept = np.zeros(12)
        num_requests = 0
        for batch, request in itertools.product(batches, range(3)):
            value = values_by(name, batch)[request]
            teacher_value = batch.batch.teacher_probability[request] @ np.array(WEIGHTS)
            candidates = np.flatnonzero(batch.batch.stage[request] > 0)
            is_known = (batch.batch.teacher_weight[request] > 0).all(axis=1)
            by_teacher = np.argsort(-teacher_value, kind="stable")
            top = [place for place in by_teacher if is_known[place] and place in candidates][:SHOWN]
            order = candidates[np.argsort(-value[candidates], kind="stable")]
            num_requests += bool(top)
            kept += [len({*top} & {*order[: k + 1]}) / max(len(top), 1) for k in range(12)]
        np.testing.assert_allclose(survival(sums[name]), kept / num_requests, rtol=1e-5)
    without_truth = measured([evaluation_batch(1, known=False)])
    assert np.isnan(without_truth["oracle"]["survival"]).all()


@pytest.mark.parametrize(("unknown", "known"), [(0.05, True), (0.2, False), (1.0, False)])
@pytest.mark.parametrize("field", ["incumbent", "true_probability"])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_baseline_must_know_nearly_all_candidates(unknown, known, field, split, tmp_path):
    """One that orders the others at random would look worse than it is."""
    generator = np.random.default_rng(0)

    def change(request, of_split):
        values = getattr(request, field).copy()
        values[generator.random(len(values)) < unknown * (of_split == split)] = np.nan
        return {field: values}

    dataset = built(tmp_path, change)
    columns = [dataset.columns[name] for name in ("validation", "test")]
    found = known_baselines(columns, random_lists())
    absent = {"incumbent": "incumbent", "true_probability": "oracle"}[field]
    assert found == tuple(name for name in BASELINES if known or name != absent)


def test_a_split_of_one_request_is_inspected_too(tmp_path):
    source = random_source(validation=1)
    columns = built(tmp_path, lambda *_: {}, source).columns["validation"]
    assert known_baselines([columns], random_lists()) == (*BASELINES,)


def test_a_random_order_follows_from_its_request():
    batch = evaluation_batch(1)
    backwards = jax.tree.map(lambda array: array[::-1], batch)

    sums = measured([batch])
    sums_backwards = measured([backwards])

    for name in BASELINES:
        found = sums_backwards[name]["survival"]
        np.testing.assert_allclose(found, sums[name]["survival"], rtol=1e-5)


@pytest.mark.parametrize(("items", "size", "noise"), [(50, 20, 2.0), (50, 2, 0.0), (3, 3, 0.0)])
def test_the_share_of_an_item_is_that_of_the_variances_drawn(items, size, noise):
    """A request's mean takes as much of the item's own effect as of the noise."""
    rng = np.random.default_rng(0)
    number, effect = 60_000 // size, rng.normal(0, 1, items)
    item = np.argsort(rng.random((number, items)), axis=1)[:, :size]
    value = effect[item] + rng.normal(0, 5, (number, 1)) + rng.normal(0, noise, item.shape)
    expected = effect.var() / (effect.var() + noise**2)
    request = np.repeat(np.arange(number), size)
    assert abs(item_share(request, item.ravel(), value.ravel()) - expected) < 0.02
    # No item occurs twice.
    assert np.isnan(item_share(np.zeros(3), np.arange(3), np.arange(3.0)))
