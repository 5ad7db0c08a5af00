import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_ranker.batch import IN_BATCH, Stage
from kd_ranker.batches import sampling
from kd_ranker.batches.cutting import unpack
from kd_ranker.batches.sampling import Slots
from kd_ranker.requests.columns import needed
from kd_ranker.requests.request import block_of
from kd_ranker.requests.row_files import columns_of, proper_probability, spread_order
from tests.batches.packing_by_hand import full_batch, packed, prepared, starts_of
from tests.random_batches import SPEC
from tests.requests.random_requests import random_request

V1 = dataclasses.replace(SPEC, teacher_version="v1")
PER_CANDIDATE = [field.name for field in IN_BATCH if field.of in ("candidate", "shown", "scored")]


def test_only_properly_logged_probabilities_count():
    logged = np.array([0.3, 0.0, 1.0, np.nan, 1.2, -0.1, np.inf, 0.3], np.float32)
    request = dataclasses.replace(
        random_request(0, version="v1"),
        teacher_probability=np.stack([logged, np.full_like(logged, 0.5)], axis=1),
        teacher_weight=np.array([1, 1, 1, 1, 1, 1, 1, 0], np.float32),
    )
    found = proper_probability(block_of([request], SPEC), "v1")
    nan = np.nan
    np.testing.assert_array_equal(found[:, 0], np.float32([0.3, 0, 1, nan, nan, nan, nan, nan]))
    np.testing.assert_array_equal(found[:, 1], [0.5] * 7 + [nan])
    assert np.isnan(proper_probability(block_of([request], SPEC), "v0")).all()


@pytest.mark.parametrize(("logged", "passed"), [(2, 4), (4, 4), (9, 9), (30, 20)])
def test_the_passed_include_the_shown_and_are_candidates(logged, passed):
    request = dataclasses.replace(random_request(0, shown=4), num_passed=logged)
    counts = columns_of([request], V1).counts
    assert [int(counts.reached(stage)[0]) for stage in list(Stage)[1:]] == [20, passed, 4]


def test_every_run_of_the_spread_order_is_spread_evenly():
    order, run = np.tile(spread_order(1000), 2), 50
    gaps = [np.diff(np.sort(order[at : at + run])).max() for at in range(1000)]
    # An even distance is 20; a random sample of 50 leaves gaps of some 100.
    assert max(gaps) <= 60
    for number in (0, 1, 2, 7, 100):
        assert sorted(spread_order(number).tolist()) == list(range(number))


@pytest.mark.parametrize("negative_rate", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("candidates", [6, 14, 30])
def test_over_all_offsets_each_of_a_kind_is_drawn_equally_often(candidates, negative_rate):
    """Every offset of every kind, one kind at a time: no candidate twice, and none preferred."""
    request = random_request(3, shown=9, passed=16, retrieved=40)
    data, kinds, slots = prepared(columns_of([request], V1, True), candidates, negative_rate)
    ends = np.cumsum(kinds[0, sampling.KINDS : 2 * sampling.KINDS])
    starts = np.concatenate([[0], ends[:-1]])
    for kind, number in enumerate(kinds[0, : sampling.KINDS]):
        counts = {}
        for offset in range(number):
            start = np.zeros((1, 1, sampling.KINDS))
            start[..., kind] = (offset + 0.5) / number
            of_offset = sampling.draw_starts(np.zeros((1, 1), int), start, kinds[None])
            drawn = unpack(packed(data, of_offset, slots), 0)
            items = drawn.item_id[0][drawn.stage[0] > 0].tolist()
            assert len(set(items)) == len(items) == min(candidates, 40)
            for item in items[starts[kind] : ends[kind]]:
                counts[item] = counts.get(item, 0) + 1
        wanted = ends[kind] - starts[kind]
        assert set(counts.values()) <= {wanted}
        assert len(counts) == (number if wanted else 0)


def by_item(batch):
    """For each request of a batch, the fields of each of its candidates, by item."""

    def fields_at(row, place):
        arrays = {name: getattr(batch, name) for name in PER_CANDIDATE}
        return {name: array[row, place] for name, array in arrays.items() if place < array.shape[1]}

    requests = []
    for row, items in enumerate(batch.item_id):
        places = np.flatnonzero(batch.stage[row])
        requests.append({int(items[place]): fields_at(row, place) for place in places})
    return requests


@pytest.mark.parametrize("logged", [Stage.RETRIEVED, Stage.PASSED, Stage.SHOWN, None])
@pytest.mark.parametrize("stage", [Stage.SHOWN, Stage.PASSED, Stage.RETRIEVED])
@pytest.mark.parametrize("scored", [9, 20, 0])
def test_candidates_that_cannot_count_are_left_out(stage, logged, scored):
    requests = [random_request(seed) for seed in range(4)]
    requests += [random_request(5, 0, 0, 3), random_request(6, 4, 4, 9), random_request(7, 1, 1, 1)]
    probability = np.random.default_rng(scored).random((scored, 3), dtype=np.float32)
    requests[2] = dataclasses.replace(
        requests[2], teacher_probability=probability, teacher_weight=np.ones(scored, np.float32)
    )
    whole = columns_of(requests, V1, for_training=True)

    def batch_of(columns, stage, logged=Stage.RETRIEVED):
        data, kinds, slots = prepared(columns, 12, 0.5, stage=stage)
        starts = starts_of(kinds, np.arange(len(requests))[:, None], 3)
        return unpack(packed(data, starts, slots, logged), 0)

    everything = batch_of(whole, Stage.RETRIEVED)
    counting = batch_of(needed(whole, V1, logged, history=True), stage, logged or Stage.RETRIEVED)
    for drawn, left in zip(by_item(everything), by_item(counting), strict=True):
        for item, fields in drawn.items():
            # A teacher's score of a shown candidate without drawn labels does not bring it in.
            counts = stage < Stage.SHOWN and fields["stage"] >= stage
            counts |= fields.get("label_weight", 0) > 0
            if logged in (Stage.RETRIEVED, Stage.PASSED) and fields["stage"] >= logged:
                counts |= np.any(fields.get("teacher_weight", 0))
            assert item in left or not counts
        for item, fields in left.items():
            for name, value in fields.items():
                if name.startswith("teacher") and (logged is None or fields["stage"] < logged):
                    assert not np.any(value)
                else:
                    np.testing.assert_array_equal(value, drawn[item][name])
    if stage == Stage.SHOWN and logged in (None, Stage.SHOWN):
        assert counting.item_id.shape[1] == counting.num_labeled == 4


def sample_of(request, candidates, negative_rate=1.0, seed=0, passed_share=0.5):
    """The fields of a training sample of one request."""
    data, kinds, slots = prepared(
        columns_of([request], V1, True), candidates, negative_rate, passed_share
    )
    starts = starts_of(kinds, np.zeros((1, 1), int), seed)
    few = dataclasses.asdict(unpack(packed(data, starts, slots), 0))
    batch = dataclasses.asdict(unpack(packed(data, starts, Slots(*(candidates,) * 3)), 0))
    # With the fewest slots that do, a batch is the same but for zeros at the end.
    for name, array in batch.items():
        if array.ndim == 1:
            np.testing.assert_array_equal(array, few[name])
        else:
            width = few[name].shape[1]
            np.testing.assert_array_equal(array[:, :width], few[name])
            assert not array[:, width:].any()
    return {name: array[0] for name, array in batch.items()}


@given(
    positives=st.integers(0, 6),
    negatives=st.integers(0, 30),
    rate=st.floats(0, 1),
    slots=st.integers(1, 20),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_reweighted_labels_keep_their_totals(positives, negatives, rate, slots, seed):
    shown = positives + negatives
    positive = np.random.default_rng(seed).permutation(np.arange(shown) < positives)
    request = dataclasses.replace(
        random_request(seed, shown, shown, 40),
        user_label=np.repeat(positive[:, None], len(SPEC.tasks), axis=1).astype(np.uint8),
    )
    fields = sample_of(request, slots, rate, seed)
    weight, label = fields["label_weight"], fields["user_label"][:, 0]
    kept = weight > 0
    assert len(np.unique(fields["item_id"])) == slots
    # What is kept stands for all of its kind.
    if positives:
        np.testing.assert_allclose(weight[kept & (label == 1)].sum(), positives, rtol=1e-5)
    if negatives and slots >= 2:
        np.testing.assert_allclose(weight[kept & (label == 0)].sum(), negatives, rtol=1e-5)
    if positives + max(round(rate * negatives), 1) <= slots:
        assert (kept & (label == 1)).sum() == positives


# The last two: more slots than the passed can fill, and more than there are candidates.
@pytest.mark.parametrize(
    ("candidates", "share", "numbers"), [(8, 0.25, (2, 6)), (30, 1, (10, 20)), (80, 0.5, (10, 40))]
)
def test_unlabeled_slots_are_shared_and_fill_up(candidates, share, numbers):
    request = random_request(0, shown=0, passed=10, retrieved=50)
    stage = sample_of(request, candidates, passed_share=share)["stage"]
    assert ((stage == Stage.PASSED).sum(), (stage == Stage.RETRIEVED).sum()) == numbers


@pytest.mark.parametrize("events", [0, 2, SPEC.history_length, SPEC.history_length + 4])
def test_the_most_recent_events_are_kept(events):
    request = dataclasses.replace(
        random_request(0),
        history_id=np.arange(events, dtype=np.int32),
        history_features=np.arange(events, dtype=np.float32)[:, None].repeat(3, 1),
    )
    batch = full_batch(columns_of([request], V1), 20)
    kept = min(events, SPEC.history_length)
    assert batch.history_mask.sum() == kept
    np.testing.assert_array_equal(batch.history_id[0, :kept], np.arange(events)[events - kept :])
    np.testing.assert_array_equal(batch.history_features[..., 0], batch.history_id)
