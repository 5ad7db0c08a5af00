"""EB-NeRD, news of Ekstra Bladet, from the log that `scripts/ebnerd_log.py` makes of its files."""

from ml_collections import ConfigDict

from kd_ranker.config.defaults import feature, features
from kd_ranker.configs.parquet import get_config as parquet


def get_config(variant: str = "") -> ConfigDict:
    """Give `--config.data.path`, the log; see `docs/datasets.md`."""
    config = parquet(variant)
    config.tasks = ("click", "read")
    config.value_weights = (1.0, 1.0)
    config.data.title = "EB-NeRD"
    config.data.rows = "request"
    # All articles of an impression were shown, in an order that the publishers have shuffled.
    config.data.columns = dict(
        request="impression_id", time="impression_time", user="user_id", item="item"
    )
    config.data.labels = dict(click="click", read="read")
    config.data.teacher = {}
    config.data.features = (
        dict(
            subscriber=feature("user", "category", "is_subscriber"),
            logged_in=feature("user", "category", "is_sso_user"),
            recent=feature("user", "history", length=50),
            device=feature("context", "category", "device_type"),
            kind=feature("item", "category", "article_type"),
            topics=feature("item", "bag", length=4),
            sentiment=feature("item", "dense", "sentiment_score"),
        )
        | features("user", "category", "gender", "postcode")
        | features("user", "dense", "age")
        | features("context", "category", "front_page")
        | features("item", "category", "category", "premium")
        | features("candidate", "dense", "hours_old")
    )
    # Some five of a hundred impressions have more articles than that.
    config.funnel.update(retrieved=100, passed=5, shown=1, report_at=(1, 3, 5, 10))
    config.batch.candidates = 32
    config.teacher.source = "live"
    return config
