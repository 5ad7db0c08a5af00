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
    mask, of_shown = np.ones((2, 3), bool), {"value": teacher}
    curves = funnel_curves(student, teacher, mask, 2, of_shown=of_shown).curves
    assert jnp.isnan(curves["survival"][0]).all()
    assert jnp.isnan(curves["value"][0]).all()
    np.testing.assert_allclose(curves["survival"][1], [0.5, 1.0, 1.0])


@pytest.mark.parametrize("size", [1, 7, 2000, 1 << 16])
def test_ascending_sorts_as_numpy_does_stably(size):
    rng = np.random.default_rng(size)
    values = rng.normal(size=size).astype(np.float32)
    special = rng.choice(np.array([np.inf, -np.inf, np.nan, -np.nan, 0.0, -0.0], np.float32), size)
    for of in (values, values.round(), np.where(rng.random(size) < 0.5, special, values)):
        np.testing.assert_array_equal(funnel.ascending(of), np.argsort(of, kind="stable"))
