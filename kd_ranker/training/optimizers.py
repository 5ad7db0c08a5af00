"""Optimisers of the dense parameters and schedules, by name. Embedding rows have their own."""

from collections.abc import Callable

import optax

from kd_ranker.embedding.row_optimizers import ADAM_B1, ADAM_B2, ADAM_EPSILON

# Directions without a learning rate: the step scales them, so that the rate stays a traced value.
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adagrad": lambda: optax.scale_by_rss(initial_accumulator_value=0.1),
    "adam": lambda: optax.scale_by_adam(b1=ADAM_B1, b2=ADAM_B2, eps=ADAM_EPSILON),
    "sgd": optax.identity,
}

# (steps, warm-up steps) -> step, counted from 1 -> factor of the peak learning rate.
SCHEDULES: dict[str, Callable[[int, int], optax.Schedule]] = {
    "constant": lambda steps, warmup: optax.join_schedules(
        [optax.linear_schedule(0.0, 1.0, max(warmup, 1)), optax.constant_schedule(1.0)], [warmup]
    ),
    "cosine": lambda steps, warmup: optax.warmup_cosine_decay_schedule(
        0.0, 1.0, min(warmup, steps // 2), steps
    ),
}
