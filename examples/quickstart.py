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
# # Quickstart
#
# From nothing to an answer, on the *cascade*: a simulated feed whose true probabilities are known.
# The variant `small` takes a minute and its numbers mean nothing; leave it out for numbers that do.

# %%
import kd_ranker as kd

config = kd.configs.cascade("small")
kd.prepare(config)

# %% [markdown]
# A final ranker, the *teacher*. A run that was killed goes on where it stopped, and one that is
# done is only measured again.

# %%
teacher = kd.train_teacher(config, "runs/teacher")

# %% [markdown]
# Early rankers, the *students*: one without distillation, and three that follow the teacher, all in
# one program.

# %%
students = kd.sweep(
    config, "runs/sweep", teacher=teacher, modes=("none", "shared"), weights=(0.3, 1, 3)
)
students.results[["split", "run", "survival@30", "value_captured@30", "passed_for_99"]]

# %% [markdown]
# What that saves in the funnel, with intervals, tables and figures. `docs/concepts.md` has the
# formula of every column.

# %%
kd.report("runs/sweep")
