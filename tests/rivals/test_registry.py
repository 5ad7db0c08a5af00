"""Which rivals apply, and the numbers that they hand to the evaluation."""

import dataclasses
import sys

import numpy as np
import pytest

from kd_ranker.batch import Stage
from kd_ranker.batches.cutting import evaluation_batches
from kd_ranker.errors import UserError
from kd_ranker.rivals import registry
from kd_ranker.rivals.registry import Rival, Task, order_keys
from tests.rivals.some_dataset import open_some

WEIGHTS = (1.0, 2.0, 4.0)


class Given:
    """Scores of all candidates in their order."""

    def __init__(self, scores):
        self.scores, self.start = scores, 0

    def score(self, candidates):
        first, self.start = self.start, self.start + len(candidates)
        return self.scores[first : self.start]


def test_a_key_is_the_share_of_the_request_with_a_lower_score(tmp_path):
    dataset, requests = open_some(tmp_path)
    number = sum(len(request.item_id) for request in requests["test"])
    scores = np.random.default_rng(0).integers(0, 6, number).astype(float)
    scores[::7] = np.nan

    keys = order_keys([Rival("some", "", Given(scores))], dataset, "test")

    start = 0
    for request in requests["test"]:
        stop = start + len(request.item_id)
        own = np.nan_to_num(scores[start:stop], nan=-np.inf)
        lower = (own[None] < own[:, None]).mean(axis=1)
        np.testing.assert_allclose(keys[start:stop, 0], lower, rtol=1e-6)
        start = stop


def test_a_batch_has_the_numbers_of_its_own_candidates(tmp_path):
    dataset, requests = open_some(tmp_path)
    of_split = requests["test"]
    number = sum(len(request.item_id) for request in of_split)
    keys = np.arange(2.0 * number, dtype=np.float32).reshape(number, 2)

    batches = list(evaluation_batches(dataset, "test", requests=2, candidates=25, rivals=keys))

    starts = np.cumsum([0, *(len(request.item_id) for request in of_split)])
    for place, request in enumerate(of_split):
        batch = batches[place // 2]
        row = place % 2
        mask = np.asarray(batch.batch.candidate_mask[row])
        item_id = np.asarray(batch.batch.item_id[row])[mask]
        stored = [list(request.item_id).index(item) for item in item_id]
        np.testing.assert_array_equal(
            np.asarray(batch.rivals[row])[mask], keys[starts[place] + np.array(stored)]
        )


def test_all_kinds_are_fitted_with_each_setting(tmp_path):
    dataset, _ = open_some(tmp_path, train=30)
    task = Task(dataset, WEIGHTS, shown=3, scored=Stage.PASSED)

    rivals = registry.fit(task, ("fusion", "trees", "ease"))

    names = [rival.name for rival in rivals]
    assert len(set(names)) == len(names)
    assert {rival.family for rival in rivals if rival.needs_scores} == {"trees on scores"}
    assert {"score first", "rank fusion: k0 60", "score sum: 1 first + 0.25 second"} <= set(names)
    assert {"trees on labels: with item rates", "EASE: regularization 1000"} <= set(names)
    assert all(rival.operations > 0 for rival in rivals if not rival.family.startswith("score "))


def test_no_trees_learn_scores_that_are_not_logged(tmp_path):
    dataset, _ = open_some(tmp_path, train=30)

    rivals = registry.fit(Task(dataset, WEIGHTS, shown=3, scored=None), ("trees",))

    assert {rival.family for rival in rivals} == {"trees on labels", "trees on stages"}


def test_a_constant_early_score_is_refused_by_its_name(tmp_path):
    dataset, _ = open_some(tmp_path, constant=True)

    with pytest.raises(UserError, match="'second', which is the same for all validation"):
        registry.check(dataset, ("fusion",))


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("fusion", {"early_scores": ("one",)}, "at least two scores"),
        ("ease", {"history_length": 0}, "no history"),
        ("ease", {"num_items": 50_000}, "at most 20,000 items; there are 50,000"),
    ],
)
def test_a_rival_that_does_not_apply_is_refused_with_the_reason(name, change, reason, tmp_path):
    dataset, _ = open_some(tmp_path)
    spec = dataclasses.replace(dataset.spec, **{"cheap_item_features": 0} | change)

    with pytest.raises(UserError, match=f"sweep.rivals has '{name}'.*{reason}"):
        registry.check(dataclasses.replace(dataset, spec=spec), (name,))


def test_trees_without_lightgbm_name_the_command_to_install(tmp_path, monkeypatch):
    dataset, _ = open_some(tmp_path)
    monkeypatch.setitem(sys.modules, "lightgbm", None)

    with pytest.raises(UserError, match="pip install lightgbm"):
        registry.check(dataset, ("trees",))
