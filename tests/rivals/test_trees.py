"""Trees: what they are fitted to, and that they learn it."""

import numpy as np
import pytest

from kd_ranker.batch import Stage
from kd_ranker.rivals import trees
from kd_ranker.rivals.candidates import in_parts, places_by
from kd_ranker.rivals.trees import TreeData, fit
from tests.rivals.some_dataset import open_some

WEIGHTS = (1.0, 2.0, 4.0)


def random_data(requests=200, size=40):
    """Candidates of two numbers: the first one decides each target, and the last needs scores."""
    generator = np.random.default_rng(0)
    numbers = generator.normal(size=(requests * size, 2)).astype(np.float32)
    sizes = np.full(requests, size)
    place = places_by(numbers[:, 0].astype(float), sizes)
    stage = np.select([place < 5, place < 15], [Stage.SHOWN, Stage.PASSED], Stage.RETRIEVED)
    user_value = np.where(place < 3, 2.0, np.where(place < 20, 0.0, np.nan))
    final_place = np.where(stage >= Stage.PASSED, place, np.nan)
    return TreeData(numbers, sizes, stage, user_value, final_place, generator.random(len(place)))


@pytest.mark.parametrize("target", ["labels", "stages", "scores"])
def test_trees_learn_the_number_that_decides_the_target(target):
    data = random_data()
    rates = np.zeros((3, 1), np.float32)

    fitted = fit(data, target, rates, shown=5, with_rates=True)

    numbers = data.numbers if target == "scores" else data.numbers[:, :1]
    found = places_by(fitted.model.predict(numbers), data.sizes)
    true = places_by(data.numbers[:, 0].astype(float), data.sizes)
    assert (found[true < 3] < 5).mean() > 0.95


@pytest.mark.parametrize(
    ("target", "with_rates", "columns"),
    [
        ("labels", True, 3),
        ("stages", True, 3),
        ("scores", True, 4),
        ("labels", False, 2),
        ("scores", False, 2),
    ],
)
def test_only_trees_on_scores_read_the_rate_that_needs_scores(target, with_rates, columns):
    data = random_data()
    data = data._replace(numbers=np.hstack([data.numbers, data.numbers]))
    rates = np.zeros((3, 2), np.float32)  # the last two of the four numbers

    fitted = fit(data, target, rates, shown=5, with_rates=with_rates)

    assert fitted.model.num_feature() == columns


def test_the_same_data_give_the_same_trees():
    first, second = (
        fit(random_data(), "stages", np.zeros((3, 1), np.float32), 5, with_rates=True)
        for _ in range(2)
    )

    assert first.model.model_to_string() == second.model.model_to_string()


def test_operations_are_the_mean_path_length_in_the_trees():
    data = random_data(requests=50)
    fitted = fit(data, "stages", np.zeros((3, 1), np.float32), 5, with_rates=True)

    leaves = fitted.model.predict(data.numbers[:, :1], pred_leaf=True)

    nodes = fitted.model.trees_to_dataframe()
    depth = dict(zip(nodes["node_index"], nodes["node_depth"], strict=True))
    paths = [
        sum(depth[f"{tree}-L{leaf}"] for tree, leaf in enumerate(of_candidate))
        for of_candidate in leaves
    ]
    assert fitted.operations == pytest.approx(np.mean(paths))


def test_trees_without_a_split_cost_nothing():
    data = random_data(requests=20)
    data = data._replace(user_value=np.where(np.isnan(data.user_value), np.nan, 0.0))

    fitted = fit(data, "labels", np.zeros((3, 1), np.float32), 5, with_rates=True)

    assert fitted.operations == 0


def test_many_levels_of_value_become_few_grades_in_their_order():
    data = random_data()._replace(
        user_value=np.random.default_rng(1).integers(0, 1000, 8000).astype(float)
    )

    grade, gains = trees._grades(data, "labels", shown=5)

    assert grade.max() < 31
    assert len(gains) > grade.max()
    order = np.argsort(data.user_value, kind="stable")
    assert (np.diff(grade[order]) >= 0).all()


def test_grades_fall_with_the_place_and_need_a_score():
    sizes = np.array([12])
    place = np.array([np.nan, *range(11)])
    data = TreeData(np.zeros((12, 1)), sizes, place, place, place, place)

    grade, _ = trees._grades(data, "scores", shown=2)

    # The best is in the first half of the 2 shown; then 2, 4 and 10 places.
    np.testing.assert_array_equal(grade, [0, 4, 3, 2, 2, 1, 1, 1, 1, 1, 1, 0])


class _Stages:
    """Candidates of two requests, of which only the stages are known."""

    def __init__(self, stage, sizes):
        self.stage, self.sizes = stage, sizes


def test_trees_see_all_wanted_candidates_and_some_others():
    generator = np.random.default_rng(0)
    stage = np.repeat([Stage.SHOWN, Stage.RETRIEVED, Stage.SHOWN], [500, 200, 20])
    is_wanted = (stage == Stage.SHOWN) & (generator.random(720) < 0.3)

    chosen = trees._sample(_Stages(stage, np.array([700, 20])), is_wanted, generator.random(720))

    assert chosen[is_wanted].all()
    others = chosen & ~is_wanted
    assert others[:500].sum() == 100
    assert others[500:700].sum() == 30
    assert chosen[700:].all()


def test_the_place_of_a_candidate_is_that_in_its_whole_request(tmp_path):
    dataset, _ = open_some(tmp_path, train=30)

    data, _ = trees.tree_data(dataset, WEIGHTS, Stage.RETRIEVED, shown=3)

    learning = slice(30 - len(data.sizes), 30)
    (candidates,) = in_parts(dataset, "train", learning)
    value = candidates.final_value(WEIGHTS, Stage.RETRIEVED)
    places = places_by(value, candidates.sizes)[~np.isnan(value)]
    known = data.final_place[~np.isnan(data.final_place)]
    # No request has so many candidates that some are left out.
    np.testing.assert_array_equal(known, places)
