"""KuaiRand: a short-video feed's log, tested on videos that were shown at random."""

from ml_collections import ConfigDict

from kd_ranker.config import defaults
from kd_ranker.config.defaults import feature, features
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
    is_large = variant in ("1k", "27k")
    config = defaults.get_config(f"kuairand_{variant or 'pure'}")
    config.data.labels = dict(watch="long_view", like="is_like", share="is_forward")
    config.data.labels.update(follow="is_follow", comment="is_comment", click="is_click")
    config.data.allow = ("few_positives", "one_label")  # some actions are rare
    # From the columns of the log that `sources/kuairand.py` writes.
    size = 1 << 20 if is_large else 8192
    of_user = (*USER_NUMBERS, *USER_FLAGS, *(f"user_{count}" for count in ("seen", *ACTIONS)))
    of_video = (f"video_{count}" for count in ("seen", *CANDIDATE_ACTIONS))
    config.data.features = (
        features("user", "dense", *of_user, standardize=False)
        | features("user", "category", *USER_CATEGORIES)
        | features("context", "dense", "hour_sin", "hour_cos", standardize=False)
        | features("context", "dense", "pause")
        | features("context", "category", "weekday", "tab")
        | dict(recent=feature("user", "history", "history", length=20))
        | features("event", "dense", "history_actions", length=len(ACTIONS), standardize=False)
        | features("event", "dense", "history_age", standardize=False)
        | dict(author=feature("item", "category", "author_id", hashed=True, size=size))
        | dict(music=feature("item", "category", "music_id", hashed=True, size=size))
        | features("item", "category", "video_type", "upload_type", "music_type")
        | features("item", "bag", "tags", length=4)
        | features("item", "dense", "duration", "shape", "days_to_end")
        | features("candidate", "dense", *of_video, standardize=False)
        | features("candidate", "dense", "days_old")
    )
    if is_large:
        # Most of the millions of videos occur once or twice.
        config.student.item_rows = config.teacher.item_rows = 1 << 20
    config.funnel.update(retrieved=100, passed=30, report_at=(10, 20, 30, 50))
    config.batch.update(requests=64, candidates=48)
    config.train.steps = config.teacher.train.steps = 3000
    return config
