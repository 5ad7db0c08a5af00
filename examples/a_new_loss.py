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
# [requests, candidates, tasks], to a weighted sum and the sum of the weights, a number a task.
# Where a weight is 0 the probability may be anything, NaN included.
#
# This one follows the teacher only where it is sure, which may suit a teacher that is not.

# %%
import jax.numpy as jnp

import kd_ranker as kd


def bce_of_the_sure(logits, probability, weight, numbers=kd.losses.DEFAULT_NUMBERS):
    """Binary cross entropy against probabilities that are below 0.1 or above 0.9."""
    is_sure = jnp.abs(probability - 0.5) > 0.4
    return kd.losses.bce(logits, probability, jnp.where(is_sure, weight, 0), numbers)


kd.losses.LOSSES["bce_of_the_sure"] = bce_of_the_sure
kd.losses.NEEDS_PROBABILITIES.add("bce_of_the_sure")  # positions in an order would not do

# %% [markdown]
# From here on a config may name it, like any other loss. The cascade's own log holds what a final
# ranker said of the candidates that it was passed, so no teacher has to be trained.

# %%
config = kd.configs.cascade("small")
config.teacher.source = "logged"
kd.prepare(config)
students = kd.sweep(
    config,
    "runs/a_new_loss",
    modes=("none", "aux"),
    axes={"distill.loss": ("bce", "bce_of_the_sure")},
)
columns = ["mode", "distill_loss", "serve", "survival@30", "passed_for_99"]
students.results.query("role == 'student' and split == 'validation'")[columns]
