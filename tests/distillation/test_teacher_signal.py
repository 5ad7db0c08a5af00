import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logit, softmax

from kd_ranker.batch import Stage
from kd_ranker.distillation.teacher_signal import (
    SIGNALS,
    probability_of_rank,
    probability_of_stage,
)
from tests.random_batches import SPEC, random_batch


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
    assert abs(1 / probability_of_rank(np.float64(rank)) - 2 - rank) < 1e-3


def test_what_is_unknown_stays_unknown_and_devices_agree_with_the_host():
    rank = np.array([np.nan, 0.0, 3.0], np.float32)
    np.testing.assert_array_equal(probability_of_rank(rank), np.float32([np.nan, 0.5, 0.2]))
    np.testing.assert_array_equal(probability_of_rank(jnp.asarray(rank)), probability_of_rank(rank))


def test_a_stage_is_a_grade_that_weighs_a_tenth_of_the_one_above_it():
    stages = jnp.array([Stage.SHOWN, Stage.PASSED, Stage.RETRIEVED], jnp.int8)
    shares = softmax(logit(np.asarray(probability_of_stage(stages), np.float64)))
    np.testing.assert_allclose(shares, np.array([100, 10, 1]) / 111, rtol=1e-5)


def test_every_candidate_of_a_batch_has_its_stage_for_a_label_of_every_task():
    batch = random_batch(0)
    probability, weight = map(np.asarray, SIGNALS["stage"](batch))
    assert probability.shape == weight.shape == (*batch.stage.shape, len(SPEC.tasks))
    np.testing.assert_array_equal(weight, np.repeat((batch.stage > 0)[..., None], 3, axis=-1))
    for task in range(len(SPEC.tasks)):
        for stage in (Stage.SHOWN, Stage.PASSED, Stage.RETRIEVED):
            of_stage = probability[batch.stage == stage, task]
            assert len(of_stage)
            assert len(np.unique(of_stage)) == 1
            assert (
                of_stage[0] > probability[(batch.stage > 0) & (batch.stage < stage), task]
            ).all()
    # Whatever was logged.
    silent = batch.replace(
        teacher_probability=np.full_like(batch.teacher_probability, np.nan),
        teacher_weight=np.zeros_like(batch.teacher_weight),
    )
    np.testing.assert_array_equal(SIGNALS["stage"](silent), (probability, weight))
