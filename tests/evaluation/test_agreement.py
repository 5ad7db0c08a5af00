"""Agreement with labels and teacher against hand-worked cases, scikit-learn and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import kl_div
from scipy.stats import kendalltau
from sklearn.metrics import roc_auc_score

from kd_ranker.evaluation import agreement
from kd_ranker.evaluation.agreement import binary_cross_entropy, divergence, weighted_sum

teacher_tau = jax.jit(agreement.teacher_tau)
user_auc = jax.jit(agreement.user_auc)


def random_case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    student, teacher = generator.uniform(0.02, 0.98, size=(2, 3, 20, 2)).astype(np.float32)
    student[0, :2, 0] = [0.0, 1.0]  # certainties, right or wrong
    weight = generator.choice([0.0, 1.0, 2.5], size=(3, 20, 2)).astype(np.float32)
    return student, teacher, weight


def test_the_divergence_is_that_of_scipy_with_its_digits_where_it_is_small() -> None:
    _, teacher, _ = random_case()
    student = teacher[::-1]
    expected = kl_div(teacher, student) + kl_div(1 - teacher, 1 - student)
    np.testing.assert_allclose(divergence(student, teacher), expected, rtol=1e-3, atol=1e-6)
    # In float32 the cross entropies of 2,000 items sum to a number with two digits left for it.
    teacher = np.linspace(0.1, 0.9, 2000)[None, :, None]
    student = teacher + 1e-3
    expected = kl_div(teacher, student) + kl_div(1 - teacher, 1 - student)
    measured = divergence(jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32))
    found = weighted_sum(measured, jnp.ones((1, 2000, 1)))
    np.testing.assert_allclose(found, expected.sum(axis=1), rtol=1e-2)


def test_weight_zero_contributes_exactly_nothing() -> None:
    probability, label, weight = random_case()
    label = np.round(label)
    holes = [jnp.where(weight > 0, of, jnp.nan) for of in (probability, label)]
    clean = [jnp.where(weight > 0, of, 0.5) for of in (probability, label)]
    for measure in (
        lambda p, y, w: weighted_sum(binary_cross_entropy(p, y), w),
        lambda p, y, w: weighted_sum(divergence(p, y), w),
        agreement.user_auc,
        agreement.calibration_bin_sums,
    ):
        with_nan, without = measure(*holes, weight), measure(*clean, weight)
        jax.tree.map(np.testing.assert_array_equal, with_nan, without)


def orders(
    requests: int, candidates: int, known_share: float, levels: int = 10_000, least: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values of a student that follows a teacher in part, with holes, ties and padding."""
    generator = np.random.default_rng(5)
    shape = (requests, candidates)
    teacher = generator.uniform(size=shape)
    student = (teacher + generator.uniform(size=shape)) / 2
    student, teacher = (np.ceil(levels * array) / levels for array in (student, teacher))
    mask = np.arange(candidates) < generator.integers(least, candidates + 1, size=(requests, 1))
    teacher[generator.uniform(size=shape) > known_share] = np.nan
    # What lies on padding must not matter.
    student[~mask], teacher[~mask] = np.nan, 7
    return student.astype(np.float32), teacher.astype(np.float32), mask


@pytest.mark.parametrize("levels", [3, 10_000])
def test_tau_of_few_candidates_is_that_of_scipy(levels: int) -> None:
    student, teacher, mask = orders(40, agreement.NEIGHBOURS + 1, 0.8, levels)
    tau, counts = teacher_tau(student, teacher, mask)
    for request in range(len(mask)):
        known = mask[request] & ~np.isnan(teacher[request])
        own = teacher[request, known]
        assert counts[request] == (len(set(own)) > 1)
        expected = 0.0
        if len(set(own)) > 1 and len(set(student[request, known])) > 1:
            expected = kendalltau(student[request, known], own).statistic
        np.testing.assert_allclose(tau[request], expected, atol=1e-6)


@pytest.mark.parametrize("known_share", [0.1, 1.0])
def test_tau_of_many_candidates_is_that_of_scipy_but_for_the_sample(known_share: float) -> None:
    student, teacher, mask = orders(100, 400, known_share, least=300)
    tau, counts = teacher_tau(student, teacher, mask)
    known = mask & ~np.isnan(teacher)
    expected = [
        kendalltau(student[request, known[request]], teacher[request, known[request]]).statistic
        for request in range(len(mask))
    ]
    assert counts.all()
    error = np.asarray(tau) - expected
    assert np.sqrt(np.mean(error**2)) < (0.1 if known_share < 1 else 0.03)
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(len(error))


def test_tau_where_one_of_the_two_ties_all_or_diverged() -> None:
    teacher, mask = np.random.default_rng(2).uniform(size=(1, 30)), np.ones((1, 30), bool)
    tau, counts = teacher_tau(np.ones((1, 30)), teacher, mask)
    assert (tau == 0).all()
    assert counts.all()
    for equal in (np.ones((1, 1)), np.ones((1, 20)), np.full((1, 20), np.nan)):
        tau, counts = teacher_tau(
            np.arange(equal.size, dtype=float)[None], equal, np.ones(equal.shape, bool)
        )
        assert (tau == 0).all()
        assert not counts.any()
    diverged = np.where(np.arange(30) == 4, np.nan, teacher)
    assert np.isnan(teacher_tau(diverged, teacher, mask)[0]).all()
    # Where the teacher does not know that candidate, the others are judged.
    np.testing.assert_allclose(teacher_tau(diverged, diverged, mask)[0], 1)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_user_auc_is_that_of_scikit_learn(seed: int, levels: int) -> None:
    generator = np.random.default_rng(seed)
    probability = (generator.integers(0, levels, size=(3, 12, 2)) / levels).astype(np.float32)
    label = generator.integers(0, 2, size=(3, 12, 2)).astype(np.float32)
    weight = generator.choice([0.0, 1.0, 3.0], size=(3, 12)).astype(np.float32)
    area, counts = user_auc(probability, label, np.repeat(weight[..., None], 2, axis=2))
    for request in range(3):
        shown = weight[request] > 0
        for task in range(2):
            labels = label[request, shown, task]
            has_both = len(set(labels)) == 2
            assert counts[request, task] == has_both
            if has_both:
                expected = roc_auc_score(labels, probability[request, shown, task])
                np.testing.assert_allclose(area[request, task], expected, rtol=1e-6)


def test_user_auc_of_a_diverged_model_is_nan() -> None:
    ones = jnp.ones((1, 2, 1))
    area, _ = agreement.user_auc(jnp.array([[[jnp.nan], [0.2]]]), ones.at[0, 1].set(0), ones)
    assert jnp.isnan(area).all()
