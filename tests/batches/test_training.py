import dataclasses
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
    Share,
    training_batches,
)
from kd_ranker.errors import UserError
from kd_ranker.requests.records import read_requests
from kd_ranker.training.mapping import MAPPINGS
from tests.requests.random_requests import built, random_request, random_source, with_facts

OPTIONS = BatchConfig(requests=4, candidates=12, passed_share=0.5, negative_rate=0.5, seed=0)
# More than the steps whose random numbers are drawn at once.
MANY = training.BLOCK + 3
on_devices_or_not = pytest.mark.parametrize("resident", [True, False])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return built(tmp_path_factory.mktemp("data"), random_source())


def batches(dataset, needs=ALL, devices=DEFAULT_DEVICE, resident=None, taken=0, **changes):
    iterator = training_batches(
        dataset, OPTIONS._replace(**changes), needs, devices, resident=resident
    )
    iterator.set_state({"taken": taken})
    return iterator


def take(iterator, number):
    """The next whole batches, on the host."""
    return [unpack(*jax.device_get(next(iterator))) for _ in range(number)]


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def expected(dataset):
    """The first batches that one process makes, with the requests on its device."""
    return take(batches(dataset, resident=True), MANY + 20)


def test_an_epoch_reads_each_request_once_in_its_order(dataset):
    stored = np.stack([request.user_features for request in read_requests(dataset, "train")])
    for order in ("shuffled", "time"):
        drawn = [batch.user_features for batch in take(batches(dataset, order=order), 6)]
        first = np.concatenate(drawn[:3])
        second = np.concatenate(drawn[3:])
        for epoch in (first, second):
            np.testing.assert_array_equal(np.sort(epoch, axis=0), np.sort(stored, axis=0))
            assert (epoch == stored).all() == (order == "time")
        assert (first == second).all() == (order == "time")


def test_another_seed_draws_other_batches(dataset, expected):
    (other,) = take(batches(dataset, seed=1), 1)

    assert (other.item_id != expected[0].item_id).any()


@on_devices_or_not
@pytest.mark.parametrize("before", [5, training.BLOCK, training.BLOCK + 1])
def test_an_iterator_goes_on_from_a_saved_position(dataset, expected, before, resident):
    assert_same(
        expected[before : before + 4],
        take(batches(dataset, resident=resident, taken=before), 4),
    )


@on_devices_or_not
def test_batches_taken_together_are_those_taken_one_by_one(dataset, expected, resident):
    iterator = batches(dataset, resident=resident)
    taken = []
    for most in itertools.cycle([1, 25, 3, training.BLOCK]):
        if len(taken) >= len(expected):
            break
        packed, span = iterator.take(most)
        assert 1 <= span.stop - span.start <= most
        taken += [unpack(jax.device_get(packed), step) for step in range(*span)]
        assert iterator.get_state() == {"taken": len(taken)}
    assert_same(expected, taken[: len(expected)])


@pytest.mark.parametrize(
    ("stage", "logged", "sampler"),
    [
        (Stage.RETRIEVED, Stage.SHOWN, "funnel"),
        (Stage.RETRIEVED, Stage.RETRIEVED, "uniform"),
        (Stage.PASSED, Stage.RETRIEVED, "hard"),
        (Stage.PASSED, None, "funnel"),
        (Stage.SHOWN, None, "funnel"),
    ],
)
def test_reading_per_batch_gives_the_batches_of_memory(dataset, stage, logged, sampler):
    options = {"needs": Needs(stage, logged), "sampler": sampler}

    resident = take(batches(dataset, **options, resident=True), MANY)

    assert_same(resident, take(batches(dataset, **options, resident=False), MANY))
    first = resident[0]
    if stage != Stage.RETRIEVED:
        assert first.item_id.shape[1] < 12
    if stage != Stage.SHOWN:
        assert first.num_labeled < first.num_scored < 12


class DeviceWithMemory:
    """A device that reports its memory, as a CPU does not."""

    def __init__(self, limit, in_use):
        self.statistics = {"bytes_limit": limit, "bytes_in_use": in_use}

    def memory_stats(self):
        return self.statistics


def test_data_stays_on_a_device_that_has_room_for_it(dataset, monkeypatch):
    columns = dataset.columns["train"]
    counts = columns.counts
    numbers = [len(columns), counts.retrieved.sum(), counts.shown.sum()]
    size = sum(number * row.itemsize for number, row in zip(numbers, columns.types, strict=True))
    room = round(size / training._SHARE_OF_MEMORY)

    def fits_in(free):
        device = DeviceWithMemory(limit=10 * room, in_use=10 * room - free)
        monkeypatch.setattr(jax, "local_devices", lambda: [device])
        return training._fits(columns, Stage.RETRIEVED, copies=1)

    assert fits_in(room + 1)
    assert not fits_in(room - 1)


@pytest.mark.parametrize("scores_stage", [Stage.RETRIEVED, Stage.PASSED])
def test_what_runs_need_changes_no_draw_by_scores(dataset, scores_stage):
    def items_drawn(logged):
        iterator = training_batches(
            dataset,
            OPTIONS._replace(sampler="hard", candidates=6),
            Needs(Stage.RETRIEVED, logged),
            scores_stage=scores_stage,
        )
        return [batch.item_id for batch in take(iterator, MANY)]

    assert_same(items_drawn(logged=None), items_drawn(logged=scores_stage))


@on_devices_or_not
def test_without_histories_a_batch_is_the_same_otherwise(dataset, expected, resident):
    (without,) = take(batches(dataset, Needs(history=False), resident=resident), 1)
    for field in dataclasses.fields(without):
        found = getattr(without, field.name)
        with_history = getattr(expected[0], field.name)
        if field.name.startswith("history"):
            assert found.shape == (4, 0, *with_history.shape[2:])
        else:
            np.testing.assert_array_equal(found, with_history)


@on_devices_or_not
@pytest.mark.parametrize("mapping", ["pmap", "shard_map"])
def test_several_devices_make_the_batches_that_one_makes(dataset, expected, mapping, resident):
    several = MAPPINGS[mapping](jax.devices()[:2])
    made = batches(dataset, devices=several, resident=resident)
    for one, (packed, step) in zip(expected[:MANY], made, strict=False):
        assert len(packed.rows.sharding.device_set) == 2
        rows = np.asarray(packed.rows).reshape(4, training.BLOCK, -1)
        assert_same(one, unpack(dataclasses.replace(packed, rows=rows), step))


@pytest.mark.parametrize("largest", [0, 4])
def test_a_batch_has_room_for_the_largest_request(tmp_path, monkeypatch, largest):
    monkeypatch.setattr(training, "_CHUNK", 2)

    def requests(split):
        for seed, request in enumerate(random_source().requests(split)):
            size = 20 if seed == largest else 5
            yield random_request(request.request_id, shown=1, passed=3, retrieved=size)

    dataset = built(tmp_path, dataclasses.replace(random_source(), requests=requests))

    (batch,) = take(batches(dataset, requests=12, candidates=32), 1)

    sizes = batch.candidate_mask.sum(axis=1)
    assert sorted(sizes.tolist()) == [5] * 11 + [20]


def test_large_batches_are_made_in_several_passes(dataset, expected, monkeypatch):
    monkeypatch.setattr(training, "_PASS", 2**14)
    passes = []

    class Counting(Devices):
        def shard(self, batch):
            passes.append(batch.shape[1])
            return super().shard(batch)

    iterator = batches(dataset, resident=True, devices=Counting())
    assert_same(expected[:MANY], take(iterator, MANY))
    assert set(passes) == {4}


class PartOf(Devices):
    """The devices of one of several processes."""

    def __init__(self, *share):
        self._share = Share(*share)

    @property
    def share(self):
        return self._share


@pytest.mark.parametrize(("parts", "sampler"), [(2, "hard"), (4, "funnel")])
def test_parts_of_a_batch_make_the_batch_of_one_process(dataset, parts, sampler):
    whole = take(batches(dataset, sampler=sampler), 5)
    shares = [
        take(batches(dataset, devices=PartOf(part, parts), sampler=sampler), 5)
        for part in range(parts)
    ]
    for batch, *of_parts in zip(whole, *shares, strict=True):
        assert_same(jax.tree.map(lambda *leaves: np.concatenate(leaves), *of_parts), batch)


def test_too_many_processes_are_an_error(dataset):
    with pytest.raises(UserError, match="12 training requests for 13 processes"):
        batches(dataset, devices=PartOf(0, 13))


def test_training_never_sees_facts_for_the_evaluation(tmp_path, expected):
    """Not by its fields, and not in any other way: facts do not change the batches."""
    facts = {"true_probability", "incumbent", "propensity"}
    assert facts.isdisjoint(field.name for field in dataclasses.fields(CandidateBatch))
    source = random_source()

    def requests(split):
        return (with_facts(request, 0) for request in source.requests(split))

    known = built(tmp_path, dataclasses.replace(source, requests=requests))
    assert not known.columns["train"].counts.known.any()
    assert_same(expected[:6], take(batches(known), 6))
