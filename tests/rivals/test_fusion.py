"""Fusions of early scores against sums written out by hand."""

import numpy as np
import pytest

from kd_ranker.rivals.fusion import OneScore, RankFusion, ScoreSum, mean_places

NAN = np.nan


class Some:
    """Candidates with only the fields that a fusion reads."""

    def __init__(self, *requests):
        self.sizes = np.array([len(request) for request in requests])
        self.request = np.repeat(np.arange(len(self.sizes)), self.sizes)
        self.early_scores = np.concatenate([np.array(rows, np.float32) for rows in requests])

    def __len__(self):
        return len(self.request)


def test_the_fused_score_sums_inverse_places():
    some = Some([[3, 1], [2, 2], [1, 3]], [[5, 0], [4, 9]])

    fused = RankFusion(60).score(some)

    expected = [1 / 61 + 1 / 63, 2 / 62, 1 / 63 + 1 / 61, 1 / 61 + 1 / 62, 1 / 62 + 1 / 61]
    np.testing.assert_allclose(fused, expected)


def test_a_missing_score_adds_nothing_and_takes_no_place():
    some = Some([[NAN, 1], [2, 2], [1, 3]])

    fused = RankFusion(10).score(some)

    np.testing.assert_allclose(fused, [1 / 13, 1 / 11 + 1 / 12, 1 / 12 + 1 / 11])


def test_equal_scores_share_the_mean_of_their_places():
    places = mean_places(np.array([7.0, 7, 9, NAN, 1, 1, 1]), np.array([4, 3]))

    np.testing.assert_array_equal(places[[0, 1, 2]], [1.5, 1.5, 0])
    np.testing.assert_array_equal(places[4:], [1, 1, 1])


def test_a_constant_score_does_not_change_the_order_of_a_fusion():
    generator = np.random.default_rng(0)
    score = generator.random((50, 1))

    both = RankFusion(60).score(Some(np.hstack([score, np.full((50, 1), 3.0)])))
    alone = RankFusion(60).score(Some(score))

    np.testing.assert_array_equal(both.argsort(), alone.argsort())


def test_a_missing_score_is_the_least_known_of_its_request():
    some = Some([[NAN, 1], [2, 2], [-1, 3]], [[NAN, 4], [NAN, 5]])

    total = ScoreSum((10.0, 1.0)).score(some)

    np.testing.assert_allclose(total, [-9, 22, -7, 4, 5])


@pytest.mark.parametrize("index", [0, 1])
def test_one_score_is_the_column_itself(index):
    some = Some([[3, 1], [NAN, 2]])

    np.testing.assert_array_equal(OneScore(index).score(some), some.early_scores[:, index])
