"""RecFlow: close reproductions of two published experiments; see docs/datasets.md."""

import pandas as pd
from ml_collections import ConfigDict

from kd_ranker.config import defaults
from kd_ranker.config.defaults import feature, features


def get_config(variant: str = "") -> ConfigDict:
    """Configure the paper's coarse ranking, on all days; give `--config.data.path`.

    `:small` takes four days and some of their requests. `:lcron` is the protocol of LCRON: the
    first thirty of a student's forty candidates should include the final ranker's top ten.
    """
    defaults.check_variant(variant, "small", "lcron")
    config = defaults.get_config("recflow")
    config.tasks = ("effective_view",)
    config.value_weights = (1.0,)
    # The mirror lacks the day before (docs/datasets.md).
    config.data.train_days = _days("2024-01-14", "2024-02-16")
    config.data.update(validation_days=("2024-02-17",), test_days=("2024-02-18",))
    # The columns of the log that `sources/recflow.py` writes.
    config.data.time_unit = "ms"
    config.data.labels = dict(watch="long_view", effective_view="effective_view", like="like")
    config.data.labels.update(share="forward", follow="follow", comment="comment")
    # The final ranker's order is the same for all tasks.
    config.data.teacher = dict.fromkeys(config.data.labels, "position")
    config.data.teacher_signal = "rank"
    config.data.allow = ("teacher_coverage",)  # rows that only passed may have no position
    config.data.features = (
        features("user", "dense", "views", standardize=False)
        | features("user", "category", "gender", "province", "age")
        | dict(recent=feature("user", "history", "history", length=50))
        | features("event", "dense", "history_age", "history_duration", standardize=False)
        | features("event", "dense", "history_watched", standardize=False)
        | features("context", "dense", "hour_sin", "hour_cos", standardize=False)
        | features("context", "dense", "pause")
        | features("context", "category", "weekday")
        | dict(author=feature("item", "category", "author_id", hashed=True, size=1 << 18))
        | features("item", "category", "category_level_one", "category_level_two", "upload_type")
        | features("item", "dense", "duration")
        | features("candidate", "dense", "days_old")
    )
    # No less than the rows of any request in the log.
    config.funnel.update(retrieved=600, report_at=(50, 100, 200))
    config.batch.update(order="time", requests=64, candidates=64)
    # The rows are for up to 82 million videos.
    config.student.update(name="two_tower", hidden=(128, 64), item_rows=1 << 22)
    config.distill.loss = "softmax"
    config.teacher.source = "logged"  # the log's own positions
    for optimizer in (config.optimizer, config.teacher.optimizer):
        optimizer.update(learning_rate=1e-2, table_learning_rate=1e-2, schedule="constant")
    # One pass, if days are equal: 34 of 37, of 9.37 million requests.
    config.train.update(steps=134_500, eval_every=10_000, checkpoint_every=5_000)
    if variant == "small":
        config.data.update(train_days=_days("2024-02-15", "2024-02-16"), max_requests_per_day=2000)
        config.data.features.author.size = 1 << 14
        config.student.item_rows = 0
        config.batch.requests = 32
        one_pass = 2 * 2000 // 32
        config.train.update(steps=one_pass, log_every=10, checkpoint_every=100, eval_every=100)
    if variant == "lcron":
        _follow_lcron(config)
    return config


def _days(first: str, last: str) -> tuple[str, ...]:
    """All days from the first to the last."""
    return tuple(pd.date_range(first, last).strftime("%Y-%m-%d"))


def _follow_lcron(config: ConfigDict) -> None:
    config.data.train_days = _days("2024-01-14", "2024-02-02")
    config.data.update(validation_days=("2024-02-03",), test_days=("2024-02-04",), of_each_stage=10)
    # survival@30 is their Recall@10@30.
    config.funnel.update(retrieved=40, passed=30, report_at=(10, 20, 30))
    config.batch.update(requests=1024, candidates=40)
    config.student.history = "mean"
    # As their baseline FS-RankNet: pairs of candidates at different stages, without user labels.
    config.distill.update(loss="ranknet:stage", user_weight=0.0, affine=False)
    # A pass, if days are equal: 20 of 37, of 9.37 million requests.
    config.train.update(steps=4_950, eval_every=1_000, checkpoint_every=1_000)
    config.sweep.update(modes=("none", "shared"), seeds=(0, 1, 2))
    config.sweep.axes.distill.loss = ("ranknet:stage", "softmax:stage", "topk:stage")
    config.sweep.axes.optimizer.learning_rate = (5e-3, 1e-2)
