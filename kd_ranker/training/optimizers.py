"""Optimizers of the dense parameters, and schedules of rates, by name.

The schedules are optax's, for traced numbers of steps. Their operations have the order in which XLA
compiles those of optax, where a division by a constant is a multiplication. So the factors have the
same bits.
"""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from kd_ranker.embedding.row_optimizers import ADAM

# Directions without a learning rate: the step scales them, so that the rate stays a traced value.
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adagrad": lambda: optax.scale_by_rss(initial_accumulator_value=0.1),
    "adam": lambda: optax.scale_by_adam(**ADAM._asdict()),
    "sgd": optax.identity,
}


def _constant(warmup: int, step: Int[Array, ""], steps: Float[Array, ""]) -> Float[Array, ""]:
    """`optax.warmup_constant_schedule` from 0 at step 0 to 1 at step `warmup`."""
    rising = 1 - (1 - step * (1 / jnp.maximum(jnp.full_like(steps, warmup), 1)))
    return jnp.where(step < warmup, rising, 1.0)


def _cosine(warmup: int, step: Int[Array, ""], steps: Float[Array, ""]) -> Float[Array, ""]:
    """`optax.warmup_cosine_decay_schedule` up to 1 and down to 0 at the last step.

    The warm-up takes half of the steps at most.
    """
    warmed_up = jnp.minimum(warmup, jnp.floor(steps / 2))
    rising = 1 - (1 - step * (1 / jnp.maximum(warmed_up, 1)))
    fall = steps - warmed_up
    gone = jnp.minimum(step - warmed_up, fall)
    falling = 0.5 * (1 + jnp.cos(gone * (jnp.pi * (1 / fall))))
    return jnp.where(step < warmed_up, rising, falling)


SCHEDULES = {"constant": _constant, "cosine": _cosine}
"""(warm-up steps; step, counted from 1; number of steps) -> the factor of the peak rates."""
