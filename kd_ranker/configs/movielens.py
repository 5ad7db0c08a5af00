"""MovieLens 100K: real ratings. watch = rated, like = rated 4 or more, share = rated 5."""

from ml_collections import ConfigDict

from kd_ranker.config import defaults
from kd_ranker.config.features import feature
from kd_ranker.sources.movielens import stars_of


def get_config(variant: str = "", source: str = "movielens_100k") -> ConfigDict:
    """The default setting; give `--config.data.path`, or leave it empty to download."""
    defaults.check_variant(variant)
    config = defaults.get_config(source)
    _name_columns(config.data, source)
    config.data.ratings_per_request = 8
    config.data.validation_share = 0.1  # the share before it
    config.data.validation_requests_per_user = 1  # 0 takes all
    config.data.test_share = 0.2  # the last share of each user's ratings
    config.data.test_requests_per_user = 1  # 0 takes all
    config.funnel.retrieved = 1682
    config.funnel.passed = 100
    config.funnel.report_at = (10, 50, 100, 200, 400)
    config.batch.requests = 48
    config.batch.candidates = 64
    config.batch.negative_rate = 0.03  # a weight of 1 / 0.03 keeps probabilities calibrated
    config.teacher.batch.requests = 48
    config.teacher.batch.candidates = 64
    config.teacher.batch.negative_rate = 0.03
    config.optimizer.learning_rate = 1e-2
    config.optimizer.table_learning_rate = 1e-2
    config.teacher.optimizer.learning_rate = 5e-3
    config.teacher.optimizer.table_learning_rate = 5e-3
    for optimizer in (config.optimizer, config.teacher.optimizer):
        optimizer.weight_decay = 0.1
        optimizer.table_weight_decay = 1.0
    config.train.steps = 1500
    config.teacher.train.steps = 1500
    return config


def _name_columns(data: ConfigDict, source: str) -> None:
    """Name the columns of the log that `sources/movielens.py` writes."""
    stars = len(stars_of(source))
    data.rows = "request"
    data.columns = ConfigDict(
        dict(request="request", time="time", user="user", item="item", position="position",
            label_weight="label_weight", split="split")
    )  # fmt: skip
    data.split = "column"
    data.labels = ConfigDict(dict(watch="watch", like="like", share="share"))
    features = dict(
        rated=feature("user", "dense", standardise=False),
        mean_rating=feature("user", "dense", standardise=False),
        genres_rated=feature("user", "dense", length=20, standardise=False),
        genres_liked=feature("user", "dense", length=20, standardise=False),
        recent=feature("user", "history", "history", length=20),
        history_stars=feature("event", "dense", length=stars, standardise=False),
        history_age=feature("event", "dense", standardise=False),
        hour_sin=feature("context", "dense", standardise=False),
        hour_cos=feature("context", "dense", standardise=False),
        weekday=feature("context", "category"),
        pause=feature("context", "dense"),
        requests_before=feature("context", "dense", standardise=False),
        genres=feature("item", "bag", length=10),
        decade=feature("item", "dense"),
        ratings_before=feature("candidate", "dense", standardise=False),
        mean_before=feature("candidate", "dense", standardise=False),
    )
    if source != "movielens_32m":  # which knows nothing of users
        features |= dict(
            age=feature("user", "dense"),
            gender=feature("user", "category"),
            occupation=feature("user", "category"),
        )
    data.features = ConfigDict(features)
