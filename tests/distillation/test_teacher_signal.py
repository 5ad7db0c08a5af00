import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logit, softmax

from kd_ranker.distillation.teacher_signal import probability_of_rank, rank_of_probability


def test_positions_become_probabilities_whose_softmax_is_zipfs_law():
    rank = np.arange(50)
    probability = probability_of_rank(rank)
    assert probability[0] == 0.5
    np.testing.assert_allclose(logit(probability), -np.log(1 + rank), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(
        softmax(logit(probability)), (1 / (1 + rank)) / (1 / (1 + rank)).sum(), rtol=1e-12
    )


@given(rank=st.integers(0, 10**6))
def test_neighbours_stay_apart_in_float32_and_ranks_come_back(rank):
    better, worse = probability_of_rank(np.array([rank, rank + 1], np.float32))
    assert 0 < worse < better <= 0.5
    assert rank_of_probability(probability_of_rank(np.float64(rank))) == np.float64(rank) or (
        abs(rank_of_probability(probability_of_rank(np.float64(rank))) - rank) < 1e-3
    )


def test_what_is_unknown_stays_unknown_and_devices_agree_with_the_host():
    rank = np.array([np.nan, 0.0, 3.0], np.float32)
    np.testing.assert_array_equal(probability_of_rank(rank), np.float32([np.nan, 0.5, 0.2]))
    np.testing.assert_array_equal(probability_of_rank(jnp.asarray(rank)), probability_of_rank(rank))
