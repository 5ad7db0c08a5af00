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
# A log is Parquet files, a row a candidate: who asked for what, what was shown, what the user did,
# and what the final ranker said. Here is one, made up: users like the films of their own genre, and
# the final ranker knows that. A few rows are at fault.

# %%
import numpy as np
import pandas as pd
from ml_collections import ConfigDict

import kd_ranker as kd

REQUESTS, CANDIDATES, SHOWN, FILMS, GENRES = 400, 20, 5, 200, 4
draw = np.random.default_rng(0)
request = np.repeat(np.arange(REQUESTS), CANDIDATES)
user = np.repeat(draw.integers(0, 50, REQUESTS), CANDIDATES)
film = np.concatenate([draw.choice(FILMS, CANDIDATES, replace=False) for _ in range(REQUESTS)])
probability = np.where(user % GENRES == film % GENRES, 0.8, 0.2)
is_shown = np.tile(np.arange(CANDIDATES) < SHOWN, REQUESTS)
log = pd.DataFrame(
    {
        "request": request,
        "at": 1_700_000_000 + 60 * request,
        "who": [f"user {number}" for number in user],
        "film": [f"film {number}" for number in film],
        "genre": [f"genre {number}" for number in film % GENRES],
        "shown": is_shown.astype(int),
        "liked": np.where(is_shown, draw.random(len(user)) < probability, np.nan),
        "said": np.where(draw.random(len(user)) < 0.02, np.nan, probability),
    }
)
log.loc[17, "film"] = None
log.to_parquet("log.parquet")
log.head()

# %% [markdown]
# The config names the columns. `kd-ranker prepare --config=parquet --config.data.infer` with
# the path of a log, or `kd.infer` with the log itself, writes a first one to edit.

# %%
config = kd.configs.parquet()
config.tasks, config.value_weights = ("like",), (1.0,)
config.data.path = "log.parquet"
config.data.columns = ConfigDict(
    dict(request="request", time="at", user="who", item="film", stage="shown")
)
config.data.stages = ConfigDict(dict(shown="1", passed="0"))
config.data.labels = ConfigDict(dict(like="liked"))
config.data.teacher = ConfigDict(dict(like="said"))
config.data.features = ConfigDict(dict(genre=kd.configs.feature("item", "category")))
config.funnel.update(retrieved=CANDIDATES, passed=8, shown=SHOWN, report_at=(5, 8, 12))
config.teacher.source = "logged"
config.parallel.devices = 1
config.batch.requests, config.batch.candidates, config.train.steps = 16, CANDIDATES, 100

# %% [markdown]
# What was wrong with the log is said at once, and in a report beside the dataset. So few requests
# would be refused, as 100 positives a split are the least that an answer can stand on: here we say
# that this is as it should be.

# %%
config.data.allow = ("few_positives",)
kd.prepare(config)

# %% [markdown]
# Students that learn from the log alone, and what following the final ranker saves.

# %%
students = kd.sweep(config, "runs/own_log", modes=("none", "aux"), weights=(0.3, 1))
kd.report(students)
