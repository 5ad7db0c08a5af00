"""References against restatements one candidate after the other."""

import dataclasses
from collections import defaultdict

import jax
import numpy as np
import pytest

from kd_ranker.batch import EvaluationBatch
from kd_ranker.evaluation.evaluate import Plan, evaluate
from kd_ranker.evaluation.metrics import ReportAt, summarise
from kd_ranker.evaluation.references import (
    LISTS,
    NO_PROBABILITIES,
    REFERENCES,
    Statistics,
    item_share,
    known_references,
    reference_ranker,
    train_statistics,
)
from kd_ranker.requests import storage
from kd_ranker.requests.records import read_requests
from kd_ranker.training.state import select_member, stack_members
from tests.random_batches import SPEC, random_batch, random_items
from tests.requests.random_requests import random_source

WEIGHTS, SHOWN, REPORT_AT = (1.0, 2.0, 4.0), 3, ReportAt((2, 5), (0.99,))


def built(tmp_path, change, source=None):
    """A dataset of the requests of a source, each changed by a function of it and its split."""
    source = source or random_source()

    def requests(split):
        for request in source.requests(split):
            yield dataclasses.replace(request, **change(request, split))

    storage.build(dataclasses.replace(source, requests=requests), "some", str(tmp_path))
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
    labelled, weighted, said = defaultdict(float), defaultdict(float), defaultdict(list)
    retrieved, passed, shown, first = (defaultdict(int) for _ in range(4))
    for request in read_requests(dataset, "train"):
        values = {}
        for place, item in enumerate(request.item_id.tolist()):
            retrieved[item] += 1
            passed[item] += place < request.num_passed
            shown[item] += place < len(request.label_weight)
            if place < len(request.label_weight):
                labelled[item] += request.label_weight[place]
                liked = sum(w * y for w, y in zip(WEIGHTS, request.user_label[place], strict=True))
                weighted[item] += request.label_weight[place] * liked / 7
            if place < len(request.teacher_weight):
                p = request.teacher_probability[place].tolist()
                proper = request.teacher_weight[place] > 0 and all(0 <= q <= 1 for q in p)
                if proper and request.teacher_version == "v1":
                    value = sum(w * q for w, q in zip(WEIGHTS, p, strict=True)) / 7
                    said[item].append(value)
                    values[place] = value
        for place in sorted(values, key=lambda place: -values[place])[:SHOWN]:
            first[request.item_id.tolist()[place]] += 1
    items = range(SPEC.num_items)
    expected = {
        "popularity": [labelled[item] / max(labelled.values()) for item in items],
        "show_rate": [shown[item] / (10 + passed[item]) for item in items],
        "pass_rate": [passed[item] / (10 + retrieved[item]) for item in items],
        "static_list": [weighted[item] / (10 + labelled[item]) for item in items],
    }
    if version:
        expected["static_list"] = [np.sum(said[item]) / (10 + len(said[item])) for item in items]
        expected["top_rate"] = [first[item] / (10 + len(said[item])) for item in items]
        assert max(first.values()) > 1

    found = train_statistics(dataset, WEIGHTS, SHOWN, seed=5)
    assert found.lists.keys() == expected.keys()
    for name, numbers in expected.items():
        np.testing.assert_allclose(found.lists[name], numbers, rtol=1e-5, err_msg=name)
    assert 0 in expected["static_list"]
    assert int(found.seed) == 5


def test_where_all_passed_are_shown_the_rate_is_of_the_retrieved(tmp_path):
    dataset = built(tmp_path, lambda request, _: {"num_passed": len(request.label_weight)})
    lists = train_statistics(dataset, WEIGHTS, SHOWN, seed=0).lists
    np.testing.assert_array_equal(lists["show_rate"], lists["pass_rate"])
    assert len(np.unique(lists["show_rate"])) > 3


def statistics(seed=0):
    generator = np.random.default_rng(0)
    numbers = generator.random((len(LISTS), SPEC.num_items), dtype=np.float32)
    return Statistics(lists=dict(zip(LISTS, numbers, strict=True)), seed=np.int32(seed))


def evaluation_batch(seed, known=True):
    batch = random_batch(seed, requests=4, candidates=12)
    truth = np.random.default_rng(seed).random((4, 12, 3), dtype=np.float32)
    truth = truth if known else np.full_like(truth, np.nan)
    # Scores of any size, some equal, some unknown.
    score = 1e30 * np.random.default_rng(seed).integers(-3, 4, (4, 12)).astype(np.float32)
    score[:, 2:4] = np.nan
    unknown = np.full_like(score, np.nan)
    return EvaluationBatch(batch, truth, score, unknown, request_mask=np.arange(4) < 3)


def measured(batches, seeds=(0,)):
    """The teacher's sums, and those of the references by name, with an axis of seeds."""
    ranker = reference_ranker([statistics(seed) for seed in seeds])
    teacher, (summed,) = evaluate(None, [ranker], batches, random_items(), Plan(WEIGHTS, SHOWN))
    members = [{name: of.sums for name, of in member.items()} for member in summed]
    return teacher.sums, stack_members(members)


def survival(sums):
    return sums["survival"][0] / sums["funnel_requests"][0]


def test_references_are_measured_as_the_order_that_they_stand_for():
    """The top k of each, request by request, against the logged teacher's top."""
    batches = [evaluation_batch(seed) for seed in (1, 2)]
    _, sums = measured(batches)
    assert set(sums) == set(REFERENCES) == {"oracle", *NO_PROBABILITIES}
    values = {
        "oracle": lambda batch: batch.true_probability @ np.array(WEIGHTS),
        "incumbent": lambda batch: np.nan_to_num(batch.incumbent, nan=-1e38),
    }
    for list_name in LISTS:
        numbers = statistics().lists[list_name]
        values[list_name] = lambda batch, numbers=numbers: numbers[batch.batch.item_id]
    for name, value_of in values.items():
        kept, counts = np.zeros(12), 0
        for batch in batches:
            value = value_of(batch)
            teacher = batch.batch.teacher_probability @ np.array(WEIGHTS)
            for request in range(3):
                there = np.flatnonzero(batch.batch.stage[request] > 0)
                known = (batch.batch.teacher_weight[request] > 0).all(axis=1)
                judged = [i for i in there if known[i]]
                top = sorted(judged, key=lambda i: -teacher[request, i])[:SHOWN]
                order = sorted(there, key=lambda i: -value[request, i])
                counts += bool(top)
                for k in range(12):
                    kept[k] += len(set(top) & set(order[: k + 1])) / max(len(top), 1)
        np.testing.assert_allclose(survival(sums[name]), kept / counts, rtol=1e-5)


def test_the_oracle_loses_no_true_value_and_knows_nothing_where_there_is_no_truth():
    batch = evaluation_batch(1)
    # The teacher is the truth, so the oracle's order is the teacher's own.
    exact = batch.batch.replace(
        teacher_probability=batch.true_probability,
        teacher_weight=np.repeat((batch.batch.stage > 0)[..., None], 3, 2).astype(np.float32),
    )
    teacher, sums = measured([batch.replace(batch=exact)])
    for name in ("survival", "value_captured", "true_value_captured", "user_bce"):
        np.testing.assert_allclose(sums["oracle"][name][0], teacher[name], rtol=1e-5)
    assert np.isnan(measured([evaluation_batch(1, known=False)])[1]["oracle"]["survival"]).all()


@pytest.mark.parametrize("unknown", [(), ("incumbent",), ("incumbent", "true_probability")])
def test_a_dataset_has_the_references_with_a_known_input(unknown, tmp_path):
    dataset = built(
        tmp_path,
        lambda request, _: {name: np.full_like(getattr(request, name), np.nan) for name in unknown},
    )
    columns, known = dataset.columns, train_statistics(dataset, WEIGHTS, SHOWN, seed=0)
    absent = {"incumbent" in unknown and "incumbent", "true_probability" in unknown and "oracle"}
    there = tuple(name for name in REFERENCES if name not in absent)
    assert known_references([columns["test"]], known) == there
    assert known_references([columns["train"]], known) == ("random", *LISTS)
    del known.lists["top_rate"]
    assert "top_rate" not in known_references([columns["test"]], known)


@pytest.mark.parametrize(("unknown", "known"), [(0.0, True), (0.05, True), (0.2, False)])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_reference_has_to_know_nearly_all_candidates_of_both_splits(
    unknown, known, split, tmp_path
):
    """One that orders the others at random would look worse than it is."""
    generator = np.random.default_rng(0)

    def change(request, of_split):
        hidden = generator.random(len(request.incumbent)) < unknown * (of_split == split)
        return {"incumbent": np.where(hidden, np.nan, request.incumbent).astype(np.float32)}

    dataset = built(tmp_path, change)
    columns = [dataset.columns[name] for name in ("validation", "test")]
    found = known_references(columns, train_statistics(dataset, WEIGHTS, SHOWN, seed=0))
    assert "oracle" in found
    assert ("incumbent" in found) == known


def test_random_orders_follow_from_seed_and_request_and_not_from_the_batch():
    one = evaluation_batch(1)
    backwards = jax.tree.map(lambda of: of[::-1], one)
    _, sums = measured([one], seeds=(0, 1))
    _, of_backwards = measured([backwards], seeds=(0, 1))
    for name in REFERENCES:
        found, same = sums[name]["survival"], of_backwards[name]["survival"]
        np.testing.assert_allclose(found, same, rtol=1e-5)
        assert np.array_equal(*found) == (name != "random")


def test_an_order_has_no_measures_of_probabilities():
    teacher, sums = measured([evaluation_batch(1)])
    given = select_member(sums["popularity"], 0), teacher, SPEC.tasks, REPORT_AT
    row, of_order = summarise(*given), summarise(*given, only_order=True)
    known, kept = ({name for name, of in each.items() if not np.isnan(of)}
                   for each in (row, of_order))  # fmt: skip
    assert of_order == pytest.approx(row | dict.fromkeys(known - kept, np.nan), nan_ok=True)
    names = {"user_bce", "user_calibration", "teacher_bce", "teacher_kl", "teacher_kl_shown"}
    names |= {"alignment_ratio", "alignment_ratio_bce", "top_calibration"}
    assert {name.split("/")[0] for name in known - kept} == names


@pytest.mark.parametrize("size", [20, 2])
@pytest.mark.parametrize(("items", "noise"), [(50, 2.0), (50, 0.0), (3, 0.0)])
def test_the_share_of_an_item_is_that_of_the_variances_drawn(size, items, noise):
    """A request's mean takes as much of the item's own effect as of the noise."""
    rng = np.random.default_rng(0)
    size = min(size, items)
    number, effect = 60_000 // size, rng.normal(0, 1, items)
    item = np.argsort(rng.random((number, items)), axis=1)[:, :size]
    value = effect[item] + rng.normal(0, 5, (number, 1)) + rng.normal(0, noise, item.shape)
    expected = effect.var() / (effect.var() + noise**2)
    request = np.repeat(np.arange(number), size)
    assert abs(item_share(request, item.ravel(), value.ravel()) - expected) < 0.02


def test_the_share_of_an_item_where_items_are_rare_or_there_is_nothing_to_compare():
    rng = np.random.default_rng(1)
    request, item = np.repeat(np.arange(2000), 10), rng.integers(0, 8000, 20_000)
    assert abs(item_share(request, item, rng.normal(size=20_000))) < 0.02
    request, item = np.array(["a", "a", "b", "b"]), np.array(["x", "y", "x", "y"])
    assert item_share(request, item, np.array([1.0, 0.0, 5.0, 4.0])) == 1
    assert np.isnan(item_share(request, np.array(["w", "x", "y", "z"]), np.arange(4.0)))
