"""RecFlow: the published coarse ranking experiment, as near as it comes; see docs/recflow.md."""

import datetime

from ml_collections import ConfigDict

from kd_ranker.config import defaults


def get_config(variant: str = "") -> ConfigDict:
    """All days; give `--config.data.path`. `:small` takes four days and some of their requests."""
    defaults.check_variant(variant, "small")
    config = defaults.get_config("recflow")
    config.tasks = ("effective_view",)
    config.value_weights = (1.0,)
    config.data.train_days = _days("2024-01-13", "2024-02-16")
    config.data.validation_days = ("2024-02-17",)
    config.data.test_days = ("2024-02-18",)
    config.data.max_requests_per_day = 0  # draw so many of each day; 0 takes all
    config.data.authors = 1 << 18  # hash the authors to so many values
    config.data.history_length = 50
    config.funnel.retrieved = 600  # at least the most rows that the log has of a request
    config.funnel.passed = 200
    config.funnel.shown = 10  # the final ranker's own top, `rank_pos`
    config.funnel.report_at = (50, 100, 200)
    config.batch.order = "time"
    config.batch.requests = 64
    config.batch.candidates = 64
    config.student.name = "two_tower"
    config.student.width = 32
    config.student.hidden = (128, 64)
    config.student.item_rows = 1 << 22  # for up to 82 million videos
    config.distill.loss = "softmax"
    config.teacher.source = "logged"  # the log's own positions
    for optimizer in (config.optimizer, config.teacher.optimizer):
        optimizer.learning_rate = 1e-2
        optimizer.table_learning_rate = 1e-2
        optimizer.schedule = "constant"
    # One pass over 9.37 million requests, less those of the last two days.
    config.train.steps = 138_000
    config.train.eval_every = 10_000
    config.train.checkpoint_every = 5_000
    if variant == "small":
        _shrink(config)
    return config


def _days(first: str, last: str) -> tuple[str, ...]:
    """All days from the first to the last."""
    start, end = map(datetime.date.fromisoformat, (first, last))
    number = (end - start).days + 1
    return tuple((start + datetime.timedelta(day)).isoformat() for day in range(number))


def _shrink(config: ConfigDict) -> None:
    config.data.train_days = _days("2024-02-15", "2024-02-16")
    config.data.max_requests_per_day = 2000
    config.data.authors = 1 << 14
    config.student.item_rows = 0
    config.batch.requests = 32
    config.train.steps = 2 * 2000 // 32  # one pass
    config.train.log_every = 10
    config.train.checkpoint_every = 100
    config.train.eval_every = 100
