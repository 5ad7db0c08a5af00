"""KuaiRand: a short-video feed's log, tested on videos that were shown at random."""

from ml_collections import ConfigDict

from kd_ranker.config import defaults
from kd_ranker.config.features import feature
from kd_ranker.sources.kuairand import (
    ACTIONS,
    CANDIDATE_ACTIONS,
    USER_CATEGORIES,
    USER_FLAGS,
    USER_NUMBERS,
)


def get_config(variant: str = "") -> ConfigDict:
    """`:pure` (the default), `:1k` or `:27k`; give `--config.data.path`, the unpacked archive."""
    defaults.check_variant(variant, "pure", "1k", "27k")
    config = defaults.get_config(f"kuairand_{variant or 'pure'}")
    config.data.session_minutes = 30  # the pause that ends a session
    # Random impressions are few: a user has about three a day.
    config.data.random_session_minutes = 720
    config.data.impressions_per_request = 10
    config.data.negatives = 90  # candidates that were not shown
    config.data.test = "random"  # or standard: videos that the app's policies chose
    # The first days of the validation and of the test, in Beijing: a week, and the ten days after.
    config.data.validation_from = "2022-04-22"
    config.data.test_from = "2022-04-29"
    config.data.train_requests = 200_000  # 0 takes all
    config.data.validation_requests = 5_000
    config.data.test_requests = 10_000
    config.data.max_users = 0  # number of users to keep; 0 keeps all
    _name_columns(config.data, hashed_into=1 << 20 if variant in ("1k", "27k") else 8192)
    if variant in ("1k", "27k"):
        # Most of the millions of videos occur once or twice.
        for model in (config.student, config.teacher):
            model.item_rows = 1 << 20
    config.funnel.retrieved = 100
    config.funnel.passed = 30
    config.funnel.report_at = (10, 20, 30, 50)
    config.batch.requests = 64
    config.batch.candidates = 48
    config.teacher.batch.requests = 128
    config.train.steps = 3000
    config.teacher.train.steps = 3000
    return config


def _name_columns(data: ConfigDict, hashed_into: int) -> None:
    """Name the columns of the log that `sources/kuairand.py` writes."""
    data.rows = "request"
    data.columns = ConfigDict(
        dict(request="request", time="time", user="user", item="item", position="position",
            split="split")
    )  # fmt: skip
    data.split = "column"
    data.labels = ConfigDict(
        dict(watch="long_view", like="is_like", share="is_forward", follow="is_follow",
            comment="is_comment", click="is_click")
    )  # fmt: skip
    data.allow = ("few_positives", "one_label")  # some actions are rare
    features = dict(
        pause=feature("context", "dense"),
        hour_sin=feature("context", "dense", standardise=False),
        hour_cos=feature("context", "dense", standardise=False),
        weekday=feature("context", "category"),
        tab=feature("context", "category"),
        recent=feature("user", "history", "history", length=20),
        history_actions=feature("event", "dense", length=len(ACTIONS), standardise=False),
        history_age=feature("event", "dense", standardise=False),
        author=feature("item", "category", "author_id", hashed=True, size=hashed_into),
        music=feature("item", "category", "music_id", hashed=True, size=hashed_into),
        tags=feature("item", "bag", length=4),
        duration=feature("item", "dense"),
        shape=feature("item", "dense"),
        days_to_end=feature("item", "dense"),
        days_old=feature("candidate", "dense"),
    )
    for name in ("video_type", "upload_type", "music_type"):
        features[name] = feature("item", "category")
    for name in USER_CATEGORIES:
        features[name] = feature("user", "category")
    for name in (*USER_NUMBERS, *USER_FLAGS, *(f"user_{of}" for of in ("seen", *ACTIONS))):
        features[name] = feature("user", "dense", standardise=False)
    for name in ("seen", *CANDIDATE_ACTIONS):
        features[f"video_{name}"] = feature("candidate", "dense", standardise=False)
    data.features = ConfigDict(features)
