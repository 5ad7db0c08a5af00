import dataclasses
import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from kd_ranker.batch import Stage
from kd_ranker.batches.cutting import unpack
from kd_ranker.batches.samplers import SAMPLERS, Sampler, checked, evenly, funnel, hard, scores_of
from kd_ranker.batches.training import ALL, BatchConfig, Needs, training_batches
from kd_ranker.errors import UserError
from kd_ranker.requests.row_files import columns_of
from tests.random_batches import SPEC
from tests.requests.random_requests import built, random_request, random_source

BATCH = BatchConfig(1, 12, 1.0, 1.0, seed=0)
V1 = dataclasses.replace(SPEC, teacher_version="v1")
# (shown, passed, retrieved, scored) of a request.
SIZES = [(4, 9, 20, 9), (0, 0, 3, 0), (1, 1, 1, 1), (7, 7, 7, 0), (2, 12, 30, 30), (5, 5, 30, 5)]


def ragged_request(seed):
    shown, passed, retrieved, scored = SIZES[seed % len(SIZES)]
    generator = np.random.default_rng(seed)
    probability = generator.random((scored, 3)).astype(np.float32)
    probability[generator.random((scored, 3)) < 0.2] = np.nan
    return dataclasses.replace(
        random_request(seed, shown, passed, retrieved),
        teacher_probability=probability,
        teacher_weight=np.ones(scored, np.float32),
    )


@pytest.fixture(scope="module", params=[True, False], ids=["all scored", "passed scored"])
def dataset(tmp_path_factory, request):
    """Requests of all sizes; the scores of one reach beyond the passed, or it is left out."""
    seeds = [seed for seed in range(12) if request.param or seed % len(SIZES) != 4]
    source = random_source(train=len(seeds))

    def requests(split):
        return map(ragged_request, seeds) if split == "train" else source.requests(split)

    folder = tmp_path_factory.mktemp("data")
    return built(folder, dataclasses.replace(source, requests=requests))


@pytest.fixture(autouse=True)
def copy_of_funnel(monkeypatch):
    """A sampler that is `funnel`, and has no compiled form because it is another function."""

    def copy(*arguments):
        return funnel(*arguments)

    monkeypatch.setitem(SAMPLERS, "copy", Sampler(copy))


def take(dataset, sampler, number, needs=ALL, resident=True, candidates=12):
    sizes = BatchConfig(4, candidates, 0.5, 0.5, seed=0, sampler=sampler)
    batches = iter(training_batches(dataset, sizes, needs, resident=resident))
    return [unpack(*jax.device_get(next(batches))) for _ in range(number)]


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(
    ("stage", "logged"),
    [
        (Stage.RETRIEVED, Stage.RETRIEVED),
        (Stage.PASSED, None),
        (Stage.SHOWN, Stage.PASSED),
        (Stage.SHOWN, None),
    ],
)
def test_funnel_on_the_host_makes_the_compiled_batches(dataset, stage, logged, resident):
    needs = Needs(stage, logged)

    compiled = take(dataset, "funnel", 3, needs)
    on_host = take(dataset, "copy", 3, needs, resident)

    for compiled_batch, host_batch in zip(compiled, on_host, strict=True):
        for field in dataclasses.fields(compiled_batch):
            expected = getattr(compiled_batch, field.name)
            found = getattr(host_batch, field.name)
            # The host's batches may have more padding.
            missing = np.subtract(found.shape, expected.shape)
            padded = np.pad(expected, [(0, number) for number in missing])
            np.testing.assert_array_equal(padded, found, err_msg=field.name)


@pytest.mark.parametrize("candidates", [1, 2, 12, 40])
@pytest.mark.parametrize("sampler", ["funnel", "uniform", "hard"])
def test_a_batch_tells_the_truth_about_its_candidates(dataset, sampler, candidates):
    requests = {}
    for seed in range(12):
        request = ragged_request(seed)
        requests[request.user_features.tobytes()] = request
    for batch in take(dataset, sampler, 3, resident=False, candidates=candidates):
        for row, features in enumerate(batch.user_features):
            request = requests[features.tobytes()]
            place = {int(item): at for at, item in enumerate(request.item_id)}
            real = np.flatnonzero(batch.stage[row])
            at = np.array([place[int(item)] for item in batch.item_id[row][real]])
            assert len(set(at.tolist())) == len(at) == min(candidates, len(place))
            np.testing.assert_array_equal(
                batch.candidate_features[row][real], request.candidate_features[at]
            )
            numbers = (len(request.item_id), request.num_passed, len(request.user_label))
            reached = [at < number for number in numbers]
            np.testing.assert_array_equal(batch.stage[row][real], np.sum(reached, axis=0))
            labeled = np.flatnonzero(batch.label_weight[row])
            np.testing.assert_array_equal(labeled, np.arange(len(labeled)))  # they come first
            is_shown = reached[-1]
            assert is_shown[labeled].all()
            labels = request.user_label[at[labeled]]
            np.testing.assert_array_equal(batch.user_label[row][labeled], labels)
            if sampler == "uniform":
                weight = batch.label_weight[row][labeled]
                np.testing.assert_allclose(weight, len(place) / len(real), rtol=1e-6)
                assert len(labeled) == is_shown.sum()
            is_scored = at < len(request.teacher_probability)
            stored = request.teacher_probability[at[is_scored]]
            scored_slots = is_scored[: batch.num_scored]
            found = batch.teacher_probability[row][: len(real)][scored_slots]
            np.testing.assert_array_equal(found, np.nan_to_num(stored))
            weight = batch.teacher_weight[row]
            assert weight.sum() == (~np.isnan(stored)).sum()
            np.testing.assert_array_equal(weight[: len(real)][scored_slots], ~np.isnan(stored))


def counts_of(shown, passed, retrieved, positives):
    return SimpleNamespace(shown=shown, passed=passed, retrieved=retrieved, positives=positives)


@pytest.mark.parametrize("sizes", [(4, 5, 11), (0, 3, 0), (1, 0, 0), (6, 6, 6)])
def test_over_all_keys_each_place_is_drawn_equally_often(sizes):
    ends = np.cumsum([0, *sizes])
    groups = [np.arange(start, stop) for start, stop in itertools.pairwise(ends)]
    n = int(ends[-1])
    for number in range(n + 1):
        for group, size in zip(groups, sizes, strict=True):
            drawn = np.zeros(n, int)
            for quota, start in itertools.product(range(n), range(size)):
                key = [(quota + 0.5) / n, *[(start + 0.5) / max(size, 1)] * len(sizes)]
                places = evenly(groups, number, np.array(key))
                assert len(np.unique(places)) == len(places) == number
                drawn[places] += 1
                # In proportion: within one of the exact share.
                assert abs(np.isin(group, places).sum() - number * size / n) < 1
            assert (drawn[group] == number * size).all()


@pytest.mark.parametrize("name", ["uniform", "hard"])
@pytest.mark.parametrize("counts", [(5, 9, 20, 2), (3, 3, 8, 0), (16, 16, 16, 1), (4, 4, 4, 4)])
def test_labels_represent_all_that_were_shown(name, counts):
    """Over many keys, Σ factor · label has the expectation Σ label for any labels."""
    counts, number = counts_of(*counts), 4000
    batch = BatchConfig(1, 8, 0.5, 0.4, seed=0)
    scores = np.random.default_rng(1).random(counts.retrieved)
    drawn = np.zeros((number, counts.retrieved))
    for row, key in enumerate(np.random.default_rng(0).random((number, 4))):
        places, factors = SAMPLERS[name].function(counts, scores, batch, key)
        drawn[row, places] = factors
    shown = drawn[:, : counts.shown]
    error = shown.std(axis=0) / np.sqrt(number) + 1e-9
    assert (np.abs(shown.mean(axis=0) - 1) < 5 * error).all()


@pytest.mark.parametrize(("share", "unscored"), [(0, 3), (0.5, 3), (1, 3), (1, 15), (0.5, 17)])
def test_hard_takes_the_highest_scores_among_those_not_shown(share, unscored):
    counts = counts_of(3, 9, 20, 1)
    batch = BATCH._replace(candidates=11, passed_share=share)
    scores = np.random.default_rng(0).random(20)
    scores[3 : 3 + unscored] = np.nan
    scores[:3] = 2.0  # shown
    wanted = min(round(share * 8), 17 - unscored)
    by_score = sorted((-score, at) for at, score in enumerate(scores) if at >= 3 and score == score)
    highest = {at for _, at in by_score[:wanted]}
    random, pairs = np.zeros(20), []
    for key in np.random.default_rng(0).random((2000, 4)):
        places, factors = hard(counts, scores, batch, key)
        assert len(set(places)) == 11
        assert {0, 1, 2} | highest <= set(places)
        np.testing.assert_array_equal(factors > 0, places < 3)
        random[list(set(places) - highest)] += 1
        pairs.append((places[1], sum(3 <= at < 9 for at in {*places} - highest)))
    others = [at for at in range(3, 20) if at not in highest]
    # Each other one is equally likely: (8 − wanted) of 17 − wanted.
    likely = (8 - wanted) / (17 - wanted)
    assert (np.abs(random[others] / 2000 - likely) < 5 * np.sqrt(0.25 / 2000)).all()
    assert not likely or abs(np.corrcoef(*zip(*pairs, strict=True))[0, 1]) < 0.12  # independent


def test_scores_are_the_mean_over_the_tasks_that_have_one():
    request = random_request(0, shown=1, passed=3, retrieved=4)
    probability = np.array([[0.2, 0.4, 0.9], [0.2, np.nan, 0.4], [np.nan] * 3], np.float32)
    columns = columns_of([dataclasses.replace(request, teacher_probability=probability)], V1)
    expected = [0.5, 0.3, np.nan, np.nan]
    np.testing.assert_allclose(scores_of(columns, Stage.RETRIEVED, 0), expected, rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(scores_of(columns, Stage.SHOWN, 0)), [0, 1, 1, 1])


@pytest.mark.parametrize(
    "result",
    [
        # More than a batch takes, or no such place.
        (np.arange(13), np.ones(13)),
        ([20], [1.0]),
        ([-1], [1.0]),
        ([0.5], [1.0]),
        (["a"], [1.0]),
        # No such factor.
        ([3], [np.nan]),
        ([3], [1e39]),
        ([3], [-1]),
        # A place twice, or without a factor.
        ([3, 3], [1, 1]),
        ([3, 4], [1]),
        # No pairs of arrays.
        None,
        3,
        np.arange(3),
        "places",
        ([[1], [2, 3]], np.ones(2)),
    ],
)
def test_a_sampler_that_breaks_its_contract_is_an_error(result):
    counts = columns_of([random_request(0)], V1).counts.of(0)
    number = int(counts.retrieved)
    good = (np.array([0, number - 1]), np.ones(2))
    assert checked(good, counts, BATCH._replace(sampler="mine")) == good
    with pytest.raises(UserError, match=f"sampler mine, request 0: .* from 0 to {number - 1}"):
        checked(result, counts, BATCH._replace(sampler="mine"))
