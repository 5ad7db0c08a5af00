import jax.numpy as jnp
import numpy as np
import pytest
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


@given(rank=st.integers(0, 10**6))
def test_position_probabilities_have_a_softmax_by_zipfs_law(rank):
    """So logit p(r) = −log(1 + r). In float32 neighbors differ; NaN stays unknown."""
    probability = probability_of_rank(np.float64(rank))
    assert logit(probability) == pytest.approx(-np.log1p(rank), abs=1e-9)
    near = np.array([rank, rank + 1, np.nan], np.float32)
    better, worse, unknown = probability_of_rank(near)
    assert 0 < worse < better <= 0.5
    assert np.isnan(unknown)
    np.testing.assert_allclose(probability_of_rank(jnp.asarray(near)), probability_of_rank(near))


def test_a_stage_weighs_a_tenth_of_the_next():
    stages = jnp.array([Stage.SHOWN, Stage.PASSED, Stage.RETRIEVED], jnp.int8)
    shares = softmax(logit(np.asarray(probability_of_stage(stages), np.float64)))
    np.testing.assert_allclose(shares, np.array([100, 10, 1]) / 111, rtol=1e-5)


def test_every_candidates_stage_is_a_label_of_every_task():
    # Whatever was logged.
    batch = random_batch(0).replace(teacher_probability=None, teacher_weight=None)
    probability, weight = map(np.asarray, SIGNALS["stage"].read(batch))
    by_stage = np.array([np.nan, 1 / 101, 1 / 11, 1 / 2], np.float32)
    expected = np.repeat(by_stage[batch.stage][..., None], len(SPEC.tasks), axis=-1)
    np.testing.assert_allclose(probability, expected, rtol=1e-6)
    np.testing.assert_array_equal(weight, ~np.isnan(expected))
