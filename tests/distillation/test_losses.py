import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.metrics import log_loss

from kd_ranker.distillation.losses import LOSSES, bce

SHAPE = (3, 4, 2)


def random_entries(seed):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=SHAPE).astype(np.float32)
    probability = generator.random(SHAPE, dtype=np.float32)
    weight = (generator.random(SHAPE) < 0.6).astype(np.float32) * generator.uniform(0.5, 2, SHAPE)
    return logits, probability, weight.astype(np.float32)


def test_bce_of_hard_labels_is_scikit_learns_log_loss():
    logits, probability, weight = random_entries(0)
    label = (probability > 0.5).astype(np.float32)
    numerator, denominator = bce(logits, label, weight)
    for task in range(SHAPE[-1]):
        expected = log_loss(
            label[..., task].ravel(),
            expit(logits[..., task].astype(np.float64)).ravel(),
            sample_weight=weight[..., task].ravel(),
        )
        np.testing.assert_allclose(numerator[task] / denominator[task], expected, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_bce_of_soft_labels_is_the_formula(temperature):
    logits, probability, weight = random_entries(1)
    target = expit(logit(probability.astype(np.float64)) / temperature)
    student = expit(logits.astype(np.float64) / temperature)
    values = -target * np.log(student) - (1 - target) * np.log(1 - student)
    numerator, denominator = bce(logits, probability, weight, temperature)
    np.testing.assert_allclose(numerator, temperature**2 * (weight * values).sum((0, 1)), rtol=1e-4)
    np.testing.assert_allclose(denominator, weight.sum((0, 1)), rtol=1e-6)


def test_certain_teachers_stay_finite_at_any_temperature():
    for temperature in (0.5, 1.0, 4.0):
        numerator, _ = bce(
            jnp.full((1, 2, 1), 3.0), jnp.array([[[0.0], [1.0]]]), jnp.ones((1, 2, 1)), temperature
        )
        assert np.isfinite(numerator).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -3.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_entries_of_weight_zero_contribute_exactly_nothing(name, poison, temperature):
    logits, probability, weight = random_entries(2)
    poisoned = np.where(weight > 0, probability, poison)

    def total(logits, probability):
        numerator, denominator = LOSSES[name](logits, probability, weight, temperature)
        return jnp.sum(numerator / denominator)

    clean = jax.value_and_grad(total)(logits, probability)
    dirty = jax.value_and_grad(total)(logits, poisoned)
    np.testing.assert_array_equal(clean[0], dirty[0])
    np.testing.assert_array_equal(clean[1], dirty[1])
    assert (np.asarray(dirty[1])[weight == 0] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_do_not_see_padding(name):
    logits, probability, weight = random_entries(3)
    padding = ((0, 0), (0, 2), (0, 0))
    expected = LOSSES[name](logits, probability, weight, 1.0)
    actual = LOSSES[name](
        np.pad(logits, padding, constant_values=7.0),
        np.pad(probability, padding),
        np.pad(weight, padding),
        1.0,
    )
    for one, other in zip(expected, actual, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
