import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_ranker.training.recipes import SCHEDULES

over_lengths = pytest.mark.parametrize(
    ("steps", "warmup"), [(100, 10), (100, 0), (20, 50), (1, 0), (1500, 50)]
)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def factors(name, warmup, last, *lengths):
    """The factors of members of these lengths, [steps, members], at the steps 1 to `last`."""
    of_step = functools.partial(SCHEDULES[name], warmup, steps=jnp.float32(lengths))
    return jax.vmap(of_step)(jnp.arange(1, last + 1))


def factors_of_all_steps(name, warmup, steps):
    return np.asarray(factors(name, warmup, steps, steps)[:, 0])


@pytest.mark.parametrize("name", SCHEDULES)
@over_lengths
def test_schedules_reach_their_peak_and_never_stand_still(name, steps, warmup):
    found = factors_of_all_steps(name, warmup, steps)
    assert found[: max(steps - 1, 1)].min() > 0 or steps == 1
    assert found.max() <= 1 + 1e-6
    if warmup < steps:
        assert found.max() > 0.97 or steps == 1
    if name == "cosine":
        assert found[-1] == pytest.approx(0.0, abs=1e-6)
    elif warmup < steps:
        assert found[-1] == pytest.approx(1.0)


@pytest.mark.parametrize("name", SCHEDULES)
@over_lengths
def test_schedules_of_a_traced_number_of_steps_are_those_of_optax(name, steps, warmup):
    expected = {
        "constant": lambda: optax.warmup_constant_schedule(0.0, 1.0, max(warmup, 1)),
        "cosine": lambda: optax.warmup_cosine_decay_schedule(
            0.0, 1.0, min(warmup, steps // 2), steps
        ),
    }[name]()
    of_steps = jax.jit(expected)(jnp.arange(1, steps + 1))
    np.testing.assert_allclose(
        factors_of_all_steps(name, warmup, steps), of_steps, rtol=0, atol=2e-7
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_member_has_the_schedule_of_its_own_number_of_steps(name):
    lengths = (1, 20, 100)
    together = factors(name, 10, 100, *lengths)
    alone = [factors(name, 10, 100, steps)[:, 0] for steps in lengths]
    np.testing.assert_allclose(together, np.stack(alone, axis=1), rtol=0, atol=1e-7)
