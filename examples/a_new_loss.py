# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # A loss of your own
#
# A loss is a function from logits, the teacher's probabilities and their weights, each
# [requests, candidates, tasks], to a weighted sum and the sum of the weights, one number per task.
# Where a weight is 0 the probability may be anything, NaN included.
#
# This one follows the teacher only where its probability is far from 1/2. How far is a number of
# the loss, which a sweep can vary.

# %%
import jax.numpy as jnp

import kd_ranker as kd


def bce_of_the_sure(logits, probability, weight, numbers=kd.losses.DEFAULT_NUMBERS):
    """Binary cross entropy against probabilities at least `distance` from 1/2."""
    is_sure = jnp.abs(probability - 0.5) >= numbers.own["distance"]
    return kd.losses.bce(logits, probability, jnp.where(is_sure, weight, 0), numbers)


kd.losses.LOSSES["bce_of_the_sure"] = kd.losses.Loss(
    bce_of_the_sure,
    needs_probabilities=True,  # positions in an order are not enough
    numbers={"distance": 0.4},
)

# %% [markdown]
# From here on a config may name it, like any other loss. The cascade's own log holds the
# probabilities of a final ranker for the candidates passed to it, so no teacher has to be trained.

# %%
config = kd.configs.cascade("small")
config.teacher.source = "logged"
kd.prepare(config)
students = kd.sweep(
    config,
    "runs/a_new_loss",
    modes=("none", "aux"),
    axes={"distill.loss": ("bce_of_the_sure",), "distill.numbers": ((0.2,), (0.4,))},
)
columns = ["mode", "distill_loss", "distill.numbers", "serve", "survival@30", "passed_for_99"]
students.results.query("role == 'student' and split == 'validation'")[columns]
