"""The funnel where the rows of `test_metrics`, which restate its curves, do not reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_ranker.evaluation import funnel

funnel_curves = jax.jit(funnel.funnel_curves, static_argnums=3)


def test_a_diverged_student_gives_nan_only_where_the_teacher_knows_the_candidate() -> None:
    student = np.array([[0.3, np.nan, 0.1], [0.3, np.nan, 0.1]])
    teacher = np.array([[0.5, 0.5, 0.5], [0.5, np.nan, 0.5]])
    curves = funnel_curves(student, teacher, np.ones((2, 3), bool), 2)
    assert jnp.isnan(curves.survival[0]).all()
    assert jnp.isnan(curves.value_captured[0]).all()
    np.testing.assert_allclose(curves.survival[1], [0.5, 1.0, 1.0])


@pytest.mark.parametrize("size", [1, 7, 2000, 1 << 16])
def test_ascending_sorts_as_numpy_does_stably(size):
    rng = np.random.default_rng(size)
    values = rng.normal(size=size).astype(np.float32)
    special = rng.choice(np.array([np.inf, -np.inf, np.nan, -np.nan, 0.0, -0.0], np.float32), size)
    for of in (values, values.round(), np.where(rng.random(size) < 0.5, special, values)):
        np.testing.assert_array_equal(funnel.ascending(of), np.argsort(of, kind="stable"))


def test_passed_for_on_all_ks_is_the_smallest_that_reaches_the_target() -> None:
    generator = np.random.default_rng(8)
    # Not every step rises, as with true value.
    curves = np.cumsum(generator.normal(0.4, 1, (30, 50, 2)), axis=0)
    curves[-1] = np.abs(curves[-1]) + 1
    found = funnel.passed_for(curves, np.arange(1, 31), 0.9)
    for curve, k in zip(curves.reshape(30, -1).T, found.ravel(), strict=True):
        assert k == next(k for k in range(1, 31) if curve[k - 1] / curve[-1] >= 0.9)


@pytest.mark.parametrize(
    ("curve", "target", "expected"),
    [
        # Between two k on the line, below the first k the first, and exact.
        ([5.0, 7, 8], 0.92, 28),
        ([7.9, 8, 8], 0.92, 10),
        ([7.1, 7.6, 8], 0.92, 16),
        ([5.0, 7, 8], 1, 40),
        ([7.9, 8, 8], 1, 20),
        # Nothing to capture, and where the curve is unknown.
        ([0.0, 0, 0], 0.99, np.nan),
        ([np.nan, 1, 2], 0.99, 40),
        ([np.nan] * 3, 0.99, np.nan),
    ],
)
def test_passed_for_between_the_kept_ks(curve, target, expected) -> None:
    found = funnel.passed_for(np.array(curve), np.array([10, 20, 40]), target)
    np.testing.assert_array_equal(found, expected)
