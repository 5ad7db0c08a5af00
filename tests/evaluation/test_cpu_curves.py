"""The functions in C++, against the loops that XLA runs without them."""

import jax
import numpy as np
import pytest

from kd_ranker.evaluation import cpu_curves, funnel

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu" or not cpu_curves.are_available(),
    reason="there is no C++ compiler, or JAX computes on another device",
)


def in_both_ways(function, *arguments):
    """The result with the functions in C++, and without."""
    in_one_pass = jax.jit(jax.vmap(jax.vmap(function)))(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_curves, "are_available", lambda: False)
        by_loop = jax.jit(jax.vmap(jax.vmap(lambda *given: function(*given))))(*arguments)
    return in_one_pass, by_loop


@pytest.mark.parametrize("shown", [1, 3, 12])
def test_the_places_that_leave_are_those_of_the_loop(shown):
    generator = np.random.default_rng(shown)
    arriving = np.stack([[generator.permutation(10) for _ in range(4)] for _ in range(3)]).astype(
        np.int32
    )
    # A candidate that the teacher does not know has the place of an empty slot.
    arriving[arriving > 7] = 10
    ours, expected = in_both_ways(lambda row: funnel._leaving_places(row, shown), arriving)
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(("dtype", "shape"), [(np.float32, ()), (np.int32, ()), (np.float32, (3,))])
def test_running_sums_are_those_of_numpy_in_double_precision(dtype, shape):
    numbers = np.random.default_rng(0).normal(0, 9, (2, 3, 50, *shape)).astype(dtype)
    ours, by_loop = in_both_ways(lambda given: funnel._running_sums({"a": given})["a"], numbers)
    np.testing.assert_array_equal(ours, by_loop)
    np.testing.assert_allclose(ours, np.cumsum(numbers.astype(float), axis=2), rtol=1e-4, atol=1e-4)
