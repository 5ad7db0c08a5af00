"""Agreement with labels and teacher against hand-worked cases, scikit-learn and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import kl_div
from scipy.stats import kendalltau
from sklearn.metrics import log_loss, ndcg_score, roc_auc_score

from kd_ranker.evaluation import agreement, funnel

teacher_tau = jax.jit(agreement.teacher_tau)


def random_case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    student, teacher = generator.uniform(0.02, 0.98, size=(2, 3, 20, 2)).astype(np.float32)
    weight = generator.integers(0, 2, size=(3, 20, 2)).astype(np.float32)
    return student, teacher, weight


def test_teacher_bce_is_the_log_loss_of_scikit_learn() -> None:
    student, teacher, weight = random_case()
    losses, weights = agreement.teacher_bce_sums(
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
    losses, _ = agreement.teacher_bce_sums(
        jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(weight)
    )
    entropies = agreement.teacher_entropy_sums(jnp.asarray(teacher), jnp.asarray(weight))
    divergence = kl_div(teacher, student) + kl_div(1 - teacher, 1 - student)
    expected = (weight * divergence).sum(axis=1)
    np.testing.assert_allclose(losses - entropies, expected, rtol=1e-4, atol=1e-5)
    divergences = agreement.teacher_kl_sums(
        jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(weight)
    )
    np.testing.assert_allclose(divergences, expected, rtol=1e-5)


def test_the_divergence_of_a_close_student_keeps_its_digits() -> None:
    # In float32 the cross entropies of 2,000 items sum to a number with two digits left for it.
    teacher = np.linspace(0.1, 0.9, 2000)[None, :, None]
    student = teacher + 1e-3
    divergence = kl_div(teacher, student) + kl_div(1 - teacher, 1 - student)
    measured = agreement.teacher_kl_sums(
        jnp.asarray(student, jnp.float32),
        jnp.asarray(teacher, jnp.float32),
        jnp.ones((1, 2000, 1), jnp.float32),
    )
    np.testing.assert_allclose(measured, divergence.sum(axis=1), rtol=1e-2)


def test_entropy_by_hand() -> None:
    # One fair coin, log 2, and two certainties, 0.
    entropies = agreement.teacher_entropy_sums(
        jnp.array([[[0.5], [0.0], [1.0]]]), jnp.ones((1, 3, 1))
    )
    np.testing.assert_allclose(entropies, [[np.log(2)]], rtol=1e-6)


def test_nan_of_weight_zero_contributes_exactly_nothing() -> None:
    student, teacher, weight = random_case()
    holes = np.where(weight > 0, teacher, np.nan)
    clean = np.where(weight > 0, teacher, 0.5).astype(np.float32)
    for left, right in zip(
        agreement.teacher_bce_sums(jnp.asarray(student), jnp.asarray(holes), jnp.asarray(weight)),
        agreement.teacher_bce_sums(jnp.asarray(student), jnp.asarray(clean), jnp.asarray(weight)),
        strict=True,
    ):
        np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(
        agreement.teacher_entropy_sums(jnp.asarray(holes), jnp.asarray(weight)),
        agreement.teacher_entropy_sums(jnp.asarray(clean), jnp.asarray(weight)),
    )
    np.testing.assert_array_equal(
        agreement.teacher_kl_sums(jnp.asarray(student), jnp.asarray(holes), jnp.asarray(weight)),
        agreement.teacher_kl_sums(jnp.asarray(student), jnp.asarray(clean), jnp.asarray(weight)),
    )


def test_alignment_ratio_by_hand() -> None:
    # (0.5 - 0.4) / 0.4 = 1/4 and (0.3 - 0.3) / 0.2 = 0; their mean is 1/8.
    ratio = agreement.alignment_ratio(
        np.array([0.5, 0.3]), np.array([0.4, 0.3]), np.array([0.4, 0.2]), np.array([True, True])
    )
    np.testing.assert_allclose(ratio, 0.125)
    # A task that the teacher did not score is left out.
    ratio = agreement.alignment_ratio(
        np.array([0.5, 0.3]),
        np.array([0.4, np.nan]),
        np.array([0.4, np.nan]),
        np.array([True, False]),
    )
    np.testing.assert_allclose(ratio, 0.25)


def test_alignment_ratio_is_undefined_without_a_distance_and_below_0_of_a_better_student() -> None:
    student, teacher = np.array([0.5, 0.3]), np.array([0.4, 0.4])
    for distance in ([0.1, 0.0], [0.1, 1e-7], [0.1, -1e-7], [0.1, np.nan]):
        known = np.ones(2, bool)
        assert np.isnan(agreement.alignment_ratio(student, teacher, np.array(distance), known))
    assert agreement.alignment_ratio(student[1:], teacher[1:], np.array([0.1]), known[1:]) < 0


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


def test_tau_of_a_student_that_tells_none_apart_is_0_and_of_a_diverged_one_nan() -> None:
    teacher, mask = np.random.default_rng(2).uniform(size=(1, 30)), np.ones((1, 30), bool)
    tau, counts = teacher_tau(np.ones((1, 30)), teacher, mask)
    assert (tau == 0).all()
    assert counts.all()
    diverged = np.where(np.arange(30) == 4, np.nan, teacher)
    assert np.isnan(teacher_tau(diverged, teacher, mask)[0]).all()
    # Where the teacher does not know that candidate, the others are judged.
    np.testing.assert_allclose(teacher_tau(diverged, diverged, mask)[0], 1)


def test_tau_of_one_candidate_or_equal_ones_does_not_count() -> None:
    for teacher in (np.ones((1, 1)), np.ones((1, 20)), np.full((1, 20), np.nan)):
        student = np.arange(teacher.size, dtype=float)[None]
        tau, counts = teacher_tau(student, teacher, np.ones(teacher.shape, bool))
        assert (tau == 0).all()
        assert not counts.any()


@pytest.mark.parametrize("shown", [1, 5, 30])
def test_ndcg_is_that_of_scikit_learn(shown: int) -> None:
    student, teacher, mask = orders(20, 25, 0.7)
    curves = funnel.funnel_curves(student, teacher, mask, shown)
    ndcg, counts = agreement.teacher_ndcg(curves.gain, curves.ideal_gain)
    for request in range(len(mask)):
        gain = np.where(np.isnan(teacher[request]), 0.0, teacher[request])[mask[request]]
        assert counts[request] == (gain.sum() > 0)
        if gain.size > 1 and counts[request]:
            expected = ndcg_score([gain], [student[request, mask[request]]], k=shown)
            np.testing.assert_allclose(ndcg[request], expected, rtol=1e-5)
        elif counts[request]:
            assert ndcg[request] == 1


def test_ndcg_by_hand() -> None:
    # Gains 1, 0, 3 against the ideal 3, 1, 0: (1 + 3 / 2) / (3 + 1 / log2 3).
    ndcg, counts = agreement.teacher_ndcg(
        jnp.array([[1.0, 0.0, 3.0], [0.0, 0.0, 0.0]]), jnp.array([[3.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    )
    np.testing.assert_allclose(ndcg, [2.5 / (3 + 1 / np.log2(3)), 0.0], rtol=1e-6)
    np.testing.assert_array_equal(counts, [True, False])


def test_user_bce_sums_by_hand() -> None:
    # -log 0.5 = 0.6931, -log(1 - 0.8) = 1.6094 with weight 4; the last is not shown.
    losses, weights = agreement.user_bce_sums(
        jnp.array([[[0.5], [0.8], [0.9]]]),
        jnp.array([[[1.0], [0.0], [0.0]]]),
        jnp.array([[1.0, 4.0, 0.0]]),
    )
    np.testing.assert_allclose(losses, [[0.6931 + 4 * 1.6094]], rtol=1e-4)
    np.testing.assert_allclose(weights, [[5.0]])


def test_user_calibration_sums_by_hand() -> None:
    predicted, observed = agreement.user_calibration_sums(
        jnp.array([[[0.5], [0.8], [0.9]]]),
        jnp.array([[[1.0], [0.0], [1.0]]]),
        jnp.array([[2.0, 1.0, 0.0]]),
    )
    np.testing.assert_allclose(predicted, [[1.8]], rtol=1e-6)
    np.testing.assert_allclose(observed, [[2.0]])


def test_user_bce_is_the_log_loss_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    probability = generator.uniform(size=(4, 30, 2)).astype(np.float32)
    probability[0, :2, 0] = [0.0, 1.0]  # certainties, right or wrong
    label = generator.integers(0, 2, size=(4, 30, 2)).astype(np.float32)
    weight = generator.choice([0.0, 1.0, 2.5], size=(4, 30)).astype(np.float32)
    losses, weights = agreement.user_bce_sums(
        jnp.asarray(probability), jnp.asarray(label), jnp.asarray(weight)
    )
    for task in range(2):
        expected = log_loss(
            label[..., task].ravel(), probability[..., task].ravel(), sample_weight=weight.ravel()
        )
        measured = losses[:, task].sum() / weights[:, task].sum()
        np.testing.assert_allclose(measured, expected, rtol=1e-5)


def test_weight_zero_contributes_exactly_nothing() -> None:
    probability = jnp.array([[[0.3], [0.6], [jnp.nan]]])
    label = jnp.array([[[1.0], [0.0], [jnp.nan]]])
    weight = jnp.array([[1.0, 1.0, 0.0]])
    for measure in (
        agreement.user_bce_sums,
        agreement.user_calibration_sums,
        agreement.user_auc,
    ):
        with_nan = measure(probability, label, weight)
        without = measure(probability[:, :2], label[:, :2], weight[:, :2])
        for left, right in zip(with_nan, without, strict=True):
            np.testing.assert_array_equal(left, right)


def test_user_auc_by_hand() -> None:
    # Request 0: positives 0.9 and 0.5, negatives 0.5 and 0.1. Of four pairs, three are won and
    # (0.5, 0.5) is a tie: 3.5 / 4. The entry of weight 0 would lose. Request 1 has no positive.
    area, counts = agreement.user_auc(
        jnp.array([[0.9, 0.5, 0.5, 0.1, 0.95], [0.1, 0.2, 0.3, 0.4, 0.5]])[..., None],
        jnp.array([[1.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]])[..., None],
        jnp.array([[1.0, 2.0, 1.0, 7.0, 0.0], [1.0, 1.0, 1.0, 1.0, 0.0]]),
    )
    np.testing.assert_allclose(area, [[3.5 / 4], [0.0]])
    np.testing.assert_array_equal(counts, [[True], [False]])


user_auc = jax.jit(agreement.user_auc)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_user_auc_is_that_of_scikit_learn(seed: int, levels: int) -> None:
    generator = np.random.default_rng(seed)
    probability = (generator.integers(0, levels, size=(3, 12, 2)) / levels).astype(np.float32)
    label = generator.integers(0, 2, size=(3, 12, 2)).astype(np.float32)
    weight = generator.choice([0.0, 1.0, 3.0], size=(3, 12)).astype(np.float32)
    area, counts = user_auc(jnp.asarray(probability), jnp.asarray(label), jnp.asarray(weight))
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
    area, _ = agreement.user_auc(
        jnp.array([[[jnp.nan], [0.2]]]), jnp.array([[[1.0], [0.0]]]), jnp.ones((1, 2))
    )
    assert jnp.isnan(area).all()


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_cross_entropy_of_a_certainty_is_finite(label: float) -> None:
    losses = agreement.binary_cross_entropy(jnp.array([0.0, 1.0]), jnp.array([label, label]))
    assert jnp.isfinite(losses).all()
    assert losses.min() < 1e-6 < 10 < losses.max()
