"""Label metrics against hand-worked cases and scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from kd_ranker.evaluation import label_metrics


def test_user_bce_sums_by_hand() -> None:
    # -log 0.5 = 0.6931, -log(1 - 0.8) = 1.6094 with weight 4; the last is not shown.
    losses, weights = label_metrics.user_bce_sums(
        jnp.array([[[0.5], [0.8], [0.9]]]),
        jnp.array([[[1.0], [0.0], [0.0]]]),
        jnp.array([[1.0, 4.0, 0.0]]),
    )
    np.testing.assert_allclose(losses, [[0.6931 + 4 * 1.6094]], rtol=1e-4)
    np.testing.assert_allclose(weights, [[5.0]])


def test_user_calibration_sums_by_hand() -> None:
    predicted, observed = label_metrics.user_calibration_sums(
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
    losses, weights = label_metrics.user_bce_sums(
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
        label_metrics.user_bce_sums,
        label_metrics.user_calibration_sums,
        label_metrics.user_auc,
    ):
        with_nan = measure(probability, label, weight)
        without = measure(probability[:, :2], label[:, :2], weight[:, :2])
        for left, right in zip(with_nan, without, strict=True):
            np.testing.assert_array_equal(left, right)


def test_user_auc_by_hand() -> None:
    # Request 0: positives 0.9 and 0.5, negatives 0.5 and 0.1. Of four pairs, three are won and
    # (0.5, 0.5) is a tie: 3.5 / 4. The entry of weight 0 would lose. Request 1 has no positive.
    area, counts = label_metrics.user_auc(
        jnp.array([[0.9, 0.5, 0.5, 0.1, 0.95], [0.1, 0.2, 0.3, 0.4, 0.5]])[..., None],
        jnp.array([[1.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]])[..., None],
        jnp.array([[1.0, 2.0, 1.0, 7.0, 0.0], [1.0, 1.0, 1.0, 1.0, 0.0]]),
    )
    np.testing.assert_allclose(area, [[3.5 / 4], [0.0]])
    np.testing.assert_array_equal(counts, [[True], [False]])


user_auc = jax.jit(label_metrics.user_auc)


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
    area, _ = label_metrics.user_auc(
        jnp.array([[[jnp.nan], [0.2]]]), jnp.array([[[1.0], [0.0]]]), jnp.ones((1, 2))
    )
    assert jnp.isnan(area).all()


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_cross_entropy_of_a_certainty_is_finite(label: float) -> None:
    losses = label_metrics.binary_cross_entropy(jnp.array([0.0, 1.0]), jnp.array([label, label]))
    assert jnp.isfinite(losses).all()
    assert losses.min() < 1e-6 < 10 < losses.max()
