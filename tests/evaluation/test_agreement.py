"""Agreement with labels and teacher where the rows of `test_metrics` do not reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import kl_div
from scipy.stats import kendalltau

from kd_ranker.evaluation import agreement
from kd_ranker.evaluation.agreement import divergence, weighted_sum

teacher_tau = jax.jit(agreement.teacher_tau)


def test_the_divergence_keeps_its_digits_where_it_is_small():
    # In float32 the cross entropies of 2,000 items sum to a number with two digits left for it.
    teacher = np.linspace(0.1, 0.9, 2000)[None, :, None]
    student = teacher + 1e-3
    expected = kl_div(teacher, student) + kl_div(1 - teacher, 1 - student)
    measured = divergence(jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32))
    found = weighted_sum(measured, jnp.ones((1, 2000, 1)))
    np.testing.assert_allclose(found, expected.sum(axis=1), rtol=1e-2)


@pytest.mark.parametrize("known_share", [0.1, 1.0])
def test_sampled_tau_of_many_candidates_is_near_scipys(known_share):
    generator, shape = np.random.default_rng(5), (100, 400)
    teacher = generator.uniform(size=shape)
    student = (teacher + generator.uniform(size=shape)) / 2
    mask = np.arange(400) < generator.integers(300, 401, size=(100, 1))
    teacher[generator.uniform(size=shape) > known_share] = np.nan
    known = mask & ~np.isnan(teacher)
    tau, counts = teacher_tau(student, teacher, mask)
    expected = []
    for row in range(len(student)):
        is_known = known[row]
        tau_of_row = kendalltau(student[row, is_known], teacher[row, is_known])
        expected.append(tau_of_row.statistic)
    assert counts.all()
    error = np.asarray(tau) - expected
    assert np.sqrt(np.mean(error**2)) < (0.1 if known_share < 1 else 0.03)
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(len(error))


def test_tau_of_a_student_that_diverged():
    teacher, mask = np.random.default_rng(2).uniform(size=(1, 30)), np.ones((1, 30), bool)
    diverged = np.where(np.arange(30) == 4, np.nan, teacher)
    assert np.isnan(teacher_tau(diverged, teacher, mask)[0]).all()
    # Where the teacher does not know that candidate, the others are judged.
    np.testing.assert_allclose(teacher_tau(diverged, diverged, mask)[0], 1)
