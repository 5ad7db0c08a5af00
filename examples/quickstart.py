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
# From data to a decision in about two minutes: are the scores of a final ranker worth logging for
# the training of the early ranker?
#
# The data are the *cascade*, a simulated feed with known true probabilities. Its log has what most
# logs have: the candidates of each request, how far each came (retrieved, passed, shown), what
# users did with those shown, and the scores that the final ranker gave to those passed.

# %%
import kd_ranker as kd

config = kd.configs.cascade()
config.teacher.source = "logged"
config.data.update(validation_requests=200, test_requests=500)
print(kd.prepare(config))

# %% [markdown]
# Three ways to train an early ranker, with four seeds each, in one program: from what users did;
# also from how far candidates came; and from the final ranker's scores as well.

# %%
config.train.update(steps=800, unshown_weight=0.3, eval_every=0)
config.optimizer.update(learning_rate=0.02, table_learning_rate=0.02)
students = kd.sweep(
    config,
    "runs/quickstart",
    runs=[
        {"distill.mode": "none"},
        {"distill.mode": "aux", "distill.loss": "softmax:stage"},
        {"distill.mode": "aux", "distill.loss": "softmax + softmax:stage"},
    ],
    seeds=(0, 1, 2, 3),
)
print(students.table())

# %% [markdown]
# The answer: with the scores, fewer candidates need to pass to keep 99% of the final ranker's
# value, and users lose nothing. So log the scores, and pass fewer. The default job,
# `./scripts/run.sh`, tunes each way and trains longer.

# %%
report = kd.report(students)
print(report)
report  # in a notebook, the page with the figures
