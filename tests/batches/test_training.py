import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from kd_ranker.batch import CandidateBatch, Stage
from kd_ranker.batches import training
from kd_ranker.batches.cutting import unpack
from kd_ranker.batches.training import (
    ALL,
    DEFAULT_DEVICE,
    BatchConfig,
    Devices,
    Needs,
    training_batches,
)
from kd_ranker.errors import UserError
from kd_ranker.requests import storage
from kd_ranker.requests.records import read_requests
from kd_ranker.training.mapping import MAPPINGS
from tests.batches.packing_by_hand import PartOf
from tests.requests.random_requests import random_source


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("data"))
    storage.build(random_source, "small", directory)
    return storage.open_dataset("small", directory, made_by="")


OPTIONS = BatchConfig(requests=4, candidates=12, passed_share=0.5, negative_rate=0.5, seed=0)


def batches(dataset, needs=ALL, devices=DEFAULT_DEVICE, resident=None, **changes):
    return training_batches(dataset, OPTIONS._replace(**changes), needs, devices, resident=resident)


def take(iterator, number):
    """The next whole batches, on the host."""
    return [unpack(*jax.device_get(next(iterator))) for _ in range(number)]


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(dataset):
    first = take(batches(dataset), 8)
    assert_same(first, take(batches(dataset), 8))
    other = take(batches(dataset, seed=1), 8)
    assert any((a.item_id != b.item_id).any() for a, b in zip(first, other, strict=True))


def test_an_epoch_reads_each_request_once_in_its_own_order_or_by_time(dataset):
    stored = np.stack([request.user_features for request in read_requests(dataset, "train")])
    for order in ("shuffled", "time"):
        drawn = [batch.user_features for batch in take(batches(dataset, order=order), 6)]
        epochs = [np.concatenate(drawn[start : start + 3]) for start in (0, 3)]
        for epoch in epochs:
            np.testing.assert_array_equal(np.sort(epoch, axis=0), np.sort(stored, axis=0))
            assert (epoch == stored).all() == (order == "time")
        assert (epochs[0] == epochs[1]).all() == (order == "time")


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("before", [0, 5, training.BLOCK, training.BLOCK + 1])
def test_an_iterator_goes_on_where_its_state_was_taken(dataset, before, resident):
    iterator = batches(dataset, resident=resident)
    take(iterator, before)
    state = iterator.get_state()
    expected = take(iterator, 4)
    resumed = batches(dataset, resident=resident)
    resumed.set_state(state)
    assert_same(expected, take(resumed, 4))
    # Whether the requests fit into memory may have changed since.
    elsewhere = batches(dataset, resident=not resident)
    elsewhere.set_state(state)
    assert_same(expected, take(elsewhere, 4))


@pytest.mark.parametrize("resident", [True, False])
def test_batches_taken_several_at_a_time_are_those_taken_one_by_one(dataset, resident):
    number = training.BLOCK + 20
    expected = take(batches(dataset, resident=resident), number)
    iterator, taken = batches(dataset, resident=resident), []
    for most in itertools.cycle([1, 25, 3, training.BLOCK]):
        if len(taken) >= number:
            break
        packed, span = iterator.take(most)
        assert 1 <= span.stop - span.start <= most
        taken += [unpack(jax.device_get(packed), step) for step in range(*span)]
        assert iterator.get_state() == {"taken": len(taken)}
    assert_same(expected, taken[:number])


@pytest.mark.parametrize(
    ("stage", "logged", "sampler"),
    [
        (Stage.RETRIEVED, Stage.RETRIEVED, "funnel"),
        (Stage.RETRIEVED, Stage.SHOWN, "funnel"),
        (Stage.RETRIEVED, Stage.RETRIEVED, "uniform"),
        (Stage.PASSED, Stage.RETRIEVED, "hard"),
        (Stage.PASSED, None, "funnel"),
        (Stage.SHOWN, None, "funnel"),
    ],
)
def test_what_is_read_for_each_batch_gives_the_batches_of_what_stays_in_memory(
    dataset, stage, logged, sampler
):
    number, how = training.BLOCK + 3, {"needs": Needs(stage, logged), "sampler": sampler}
    resident = take(batches(dataset, **how, resident=True), number)
    assert_same(resident, take(batches(dataset, **how, resident=False), number))
    slots = resident[0].item_id.shape[1], resident[0].judged
    assert slots[0] < 12 or stage == Stage.RETRIEVED
    assert resident[0].labelled < slots[1] < 12 or stage == Stage.SHOWN


@pytest.mark.parametrize("resident", [True, False])
def test_without_histories_a_batch_is_the_same_otherwise(dataset, resident):
    whole = take(batches(dataset, resident=resident), 2)
    without = take(batches(dataset, Needs(history=False), resident=resident), 2)
    for one, other in zip(whole, without, strict=True):
        for field in dataclasses.fields(one):
            of_one, of_other = getattr(one, field.name), getattr(other, field.name)
            if field.name.startswith("history"):
                assert of_other.shape == (4, 0, *of_one.shape[2:])
            else:
                np.testing.assert_array_equal(of_one, of_other)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("mapping", ["pmap", "shard_map"])
def test_several_devices_make_the_batches_that_one_makes(dataset, mapping, resident):
    number = training.BLOCK + 3
    several = MAPPINGS[mapping](jax.devices()[:2])
    made = training_batches(dataset, OPTIONS, devices=several, resident=resident)
    for one, batch in zip(take(batches(dataset, resident=True), number), made, strict=False):
        packed, step = batch
        assert len(packed.rows.sharding.device_set) == 2
        rows = np.asarray(packed.rows).reshape(4, training.BLOCK, -1)
        assert_same(one, unpack(dataclasses.replace(packed, rows=rows), step))


def test_large_batches_are_made_in_several_passes(dataset, monkeypatch):
    number = training.BLOCK + 3
    expected = take(batches(dataset, resident=True), number)
    monkeypatch.setattr(training, "_PASS", 2**14)
    passes = []

    class Counting(Devices):
        def shard(self, batch):
            passes.append(batch.shape[1])
            return super().shard(batch)

    iterator = batches(dataset, resident=True, devices=Counting())
    assert_same(expected, take(iterator, number))
    assert set(passes) == {4}
    resumed = batches(dataset, resident=True)
    resumed.set_state(iterator.get_state())
    assert_same(take(iterator, 6), take(resumed, 6))


@pytest.mark.parametrize(("parts", "sampler"), [(2, "hard"), (4, "funnel")])
def test_the_parts_of_a_batch_are_the_batch_that_one_process_makes(dataset, parts, sampler):
    whole = take(batches(dataset, sampler=sampler), 5)
    shares = [
        take(batches(dataset, devices=PartOf(part, parts), sampler=sampler), 5)
        for part in range(parts)
    ]
    for batch, *of_parts in zip(whole, *shares, strict=True):
        assert_same(jax.tree.map(lambda *leaves: np.concatenate(leaves), *of_parts), batch)


def test_training_never_sees_facts_for_the_evaluation(tmp_path):
    """Not by its fields, and not in any other way: other facts give the same batches."""
    facts = {"true_probability", "incumbent", "propensity"}
    assert facts.isdisjoint(field.name for field in dataclasses.fields(CandidateBatch))
    source = random_source()

    def with_truth(value):
        def requests(split):
            for request in source.requests(split):
                fact = np.full(20, value, np.float32)
                truth = np.full((20, 3), value, np.float32)
                yield dataclasses.replace(
                    request, **dict.fromkeys(facts, fact) | {"true_probability": truth}
                )

        return dataclasses.replace(source, requests=requests)

    drawn = []
    for value in (0.1, 0.9):
        storage.build(functools.partial(with_truth, value), f"truth{value}", str(tmp_path))
        opened = storage.open_dataset(f"truth{value}", str(tmp_path), made_by="")
        assert all(
            (request.true_probability == np.float32(value)).all()
            for request in read_requests(opened, "train")
        )
        assert not opened.columns["train"].counts.known.any()
        drawn.append(take(batches(opened), 6))
    assert_same(*drawn)


def test_too_many_processes_are_an_error(dataset):
    with pytest.raises(UserError, match="12 training requests for 13 processes"):
        batches(dataset, devices=PartOf(0, 13))
