"""Alignment with the teacher against hand-worked cases, scikit-learn and SciPy."""

import jax.numpy as jnp
import numpy as np
from scipy.special import kl_div
from sklearn.metrics import log_loss

from kd_ranker.evaluation import alignment


def random_case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    student, teacher = generator.uniform(0.02, 0.98, size=(2, 3, 20, 2)).astype(np.float32)
    weight = generator.integers(0, 2, size=(3, 20, 2)).astype(np.float32)
    return student, teacher, weight


def test_teacher_bce_is_the_log_loss_of_scikit_learn() -> None:
    student, teacher, weight = random_case()
    losses, weights = alignment.teacher_bce_sums(
        jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(weight)
    )
    for task in range(2):
        # A target t is t of a positive and 1 - t of a negative.
        p, t, w = (array[..., task].ravel() for array in (student, teacher, weight))
        expected = log_loss(
            np.repeat([1, 0], p.size),
            np.tile(p, 2),
            sample_weight=np.concatenate([w * t, w * (1 - t)]),
        )
        np.testing.assert_allclose(losses[:, task].sum() / weights[:, task].sum(), expected, 1e-5)


def test_bce_minus_entropy_is_the_divergence_of_scipy() -> None:
    student, teacher, weight = random_case()
    losses, _ = alignment.teacher_bce_sums(
        jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(weight)
    )
    entropies = alignment.teacher_entropy_sums(jnp.asarray(teacher), jnp.asarray(weight))
    divergence = kl_div(teacher, student) + kl_div(1 - teacher, 1 - student)
    expected = (weight * divergence).sum(axis=1)
    np.testing.assert_allclose(losses - entropies, expected, rtol=1e-4, atol=1e-5)
    divergences = alignment.teacher_kl_sums(
        jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(weight)
    )
    np.testing.assert_allclose(divergences, expected, rtol=1e-5)


def test_the_divergence_of_a_close_student_keeps_its_digits() -> None:
    # In float32 the cross entropies of 2,000 items sum to a number with two digits left for it.
    teacher = np.linspace(0.1, 0.9, 2000)[None, :, None]
    student = teacher + 1e-3
    divergence = kl_div(teacher, student) + kl_div(1 - teacher, 1 - student)
    measured = alignment.teacher_kl_sums(
        jnp.asarray(student, jnp.float32),
        jnp.asarray(teacher, jnp.float32),
        jnp.ones((1, 2000, 1), jnp.float32),
    )
    np.testing.assert_allclose(measured, divergence.sum(axis=1), rtol=1e-2)


def test_entropy_by_hand() -> None:
    # One fair coin, log 2, and two certainties, 0.
    entropies = alignment.teacher_entropy_sums(
        jnp.array([[[0.5], [0.0], [1.0]]]), jnp.ones((1, 3, 1))
    )
    np.testing.assert_allclose(entropies, [[np.log(2)]], rtol=1e-6)


def test_nan_of_weight_zero_contributes_exactly_nothing() -> None:
    student, teacher, weight = random_case()
    holes = np.where(weight > 0, teacher, np.nan)
    clean = np.where(weight > 0, teacher, 0.5).astype(np.float32)
    for left, right in zip(
        alignment.teacher_bce_sums(jnp.asarray(student), jnp.asarray(holes), jnp.asarray(weight)),
        alignment.teacher_bce_sums(jnp.asarray(student), jnp.asarray(clean), jnp.asarray(weight)),
        strict=True,
    ):
        np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(
        alignment.teacher_entropy_sums(jnp.asarray(holes), jnp.asarray(weight)),
        alignment.teacher_entropy_sums(jnp.asarray(clean), jnp.asarray(weight)),
    )
    np.testing.assert_array_equal(
        alignment.teacher_kl_sums(jnp.asarray(student), jnp.asarray(holes), jnp.asarray(weight)),
        alignment.teacher_kl_sums(jnp.asarray(student), jnp.asarray(clean), jnp.asarray(weight)),
    )


def test_alignment_ratio_by_hand() -> None:
    # (0.5 - 0.4) / 0.4 = 1/4 and (0.3 - 0.3) / 0.2 = 0; their mean is 1/8.
    ratio = alignment.alignment_ratio(
        np.array([0.5, 0.3]), np.array([0.4, 0.3]), np.array([0.4, 0.2])
    )
    np.testing.assert_allclose(ratio, 0.125)


def test_alignment_ratio_is_undefined_without_a_distance_and_below_0_of_a_better_student() -> None:
    student, teacher = np.array([0.5, 0.3]), np.array([0.4, 0.4])
    for distance in ([0.1, 0.0], [0.1, 1e-7], [0.1, -1e-7], [0.1, np.nan]):
        assert np.isnan(alignment.alignment_ratio(student, teacher, np.array(distance)))
    assert alignment.alignment_ratio(student[1:], teacher[1:], np.array([0.1])) < 0
