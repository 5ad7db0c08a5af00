import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_ranker.training.recipes import SCHEDULES

OF_OPTAX = {
    "constant": lambda warmup, steps: optax.warmup_constant_schedule(0.0, 1.0, max(warmup, 1)),
    "cosine": lambda warmup, steps: optax.warmup_cosine_decay_schedule(
        0.0, 1.0, min(warmup, steps // 2), steps
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    ("warmup", "lengths"), [(10, (1, 20, 100)), (0, (100, 7)), (50, (20, 1, 1500))]
)
def test_each_member_has_the_schedule_of_optax_for_its_own_number_of_steps(name, warmup, lengths):
    of_step = functools.partial(SCHEDULES[name], warmup, steps=jnp.float32(lengths))
    found = jax.jit(jax.vmap(of_step))(jnp.arange(1, max(lengths) + 1))
    for member, steps in enumerate(lengths):
        expected = jax.jit(OF_OPTAX[name](warmup, steps))(jnp.arange(1, steps + 1))
        np.testing.assert_allclose(found[:steps, member], expected, rtol=0, atol=2e-7)
