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
# # A log of your own
#
# A log has a row per candidate: who asked, what was retrieved, how far it came, what the user did,
# and the score of the final ranker. Here is one, made up. Users have a taste in genres, and some
# films are better than others. Today's early ranker knows only how good a film is, roughly. The
# final ranker knows both, and has scored all candidates.

# %%
import numpy as np
import pandas as pd
from ml_collections import ConfigDict

import kd_ranker as kd

REQUESTS, CANDIDATES, PASSED, SHOWN = 1500, 60, 20, 5
USERS, FILMS, GENRES = 100, 300, 8
draw = np.random.default_rng(0)
taste = draw.normal(size=(USERS, GENRES))
genre = draw.integers(0, GENRES, FILMS)
quality = draw.normal(size=FILMS)

request = np.repeat(np.arange(REQUESTS), CANDIDATES)
user = np.repeat(draw.integers(0, USERS, REQUESTS), CANDIDATES)
film = np.concatenate([draw.choice(FILMS, CANDIDATES, replace=False) for _ in range(REQUESTS)])
liking = 1.2 * taste[user, genre[film]] + 0.6 * quality[film] - 2
log = pd.DataFrame(
    {
        "request": request,
        "at": 1_700_000_000 + 600 * request,
        "who": [f"user {number}" for number in user],
        "film": [f"film {number}" for number in film],
        "genre": [f"genre {number}" for number in genre[film]],
        "early": quality[film] + draw.normal(size=len(film)),
        "final": 1 / (1 + np.exp(-liking)),
    }
)
is_passed = log.groupby("request")["early"].rank(ascending=False) <= PASSED
is_shown = log["final"].where(is_passed).groupby(request).rank(ascending=False) <= SHOWN
log["stage"] = np.select([is_shown, is_passed], ["shown", "passed"], "retrieved")
log["liked"] = np.where(is_shown, draw.random(len(log)) < log["final"], np.nan)
log.to_parquet("log.parquet")
log.head()

# %% [markdown]
# The config names the columns. `kd-ranker prepare --config=parquet --config.data.infer=True` with
# the path of a log, or `kd.infer` with the log itself, writes a first one to edit.

# %%
config = kd.configs.parquet()
config.tasks, config.value_weights = ("like",), (1.0,)
config.data.path = "log.parquet"
config.data.columns = ConfigDict(
    dict(request="request", time="at", user="who", item="film", stage="stage", incumbent="early")
)
config.data.labels = ConfigDict(dict(like="liked"))
config.data.teacher = ConfigDict(dict(like="final"))
config.data.features = ConfigDict(dict(genre=kd.configs.feature("item", "category")))
config.funnel.update(retrieved=CANDIDATES, passed=PASSED, shown=SHOWN, report_at=(5, 10, 20))
config.teacher.source = "logged"
print(kd.prepare(config))

# %% [markdown]
# Early rankers that learn from the log alone, and two that follow the final ranker as well.

# %%
config.parallel.devices = 1
config.batch.update(requests=32, candidates=CANDIDATES)
config.train.update(steps=300, eval_every=0)
config.optimizer.update(learning_rate=0.01, table_learning_rate=0.01)
students = kd.sweep(
    config,
    "runs/own_log",
    runs=[
        {"distill.mode": "none"},
        {"distill.mode": "none", "train.unshown_weight": 0.3},
        {"distill.mode": "aux"},
        {"distill.mode": "shared", "distill.loss": "softmax"},
    ],
    seeds=(0, 1, 2),
)
print(students.table())

# %% [markdown]
# The decision: an early ranker that follows the final ranker may pass a third of what passes today.
# What users get then, this log cannot say, as they saw only what the final ranker chose; the answer
# names the size of the live test that can.

# %%
report = kd.report(students)
print(report)
report  # in a notebook, the page with the figures
