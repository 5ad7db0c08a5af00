"""MovieLens: real ratings. watch = rated, like = rated 4 or more, share = rated 5."""

from ml_collections import ConfigDict

from kd_ranker.config import defaults
from kd_ranker.config.defaults import feature, features
from kd_ranker.sources.movielens import STARS


def get_config(variant: str = "") -> ConfigDict:
    """MovieLens 100K; give `--config.data.path`, or leave it empty to download.

    `:1m` has ten times the ratings, and a sample of the catalog as candidates. `:32m` has ratings
    in half stars of 87,585 films, of a sample of the users.
    """
    defaults.check_variant(variant, "1m", "32m")
    config = defaults.get_config(f"movielens_{variant or '100k'}")
    config.data.labels = {task: task for task in config.tasks}
    stars = len(STARS[variant or "100k"])
    config.data.features = (
        features("user", "dense", "rated", "mean_rating", standardize=False)
        | features("user", "dense", "genres_rated", "genres_liked", length=20, standardize=False)
        | dict(recent=feature("user", "history", "history", length=20))
        | features("event", "dense", "history_stars", length=stars, standardize=False)
        | features("event", "dense", "history_age", standardize=False)
        | features("context", "dense", "hour_sin", "hour_cos", standardize=False)
        | features("context", "dense", "requests_before", standardize=False)
        | features("context", "dense", "pause")
        | features("context", "category", "weekday")
        | features("item", "bag", "genres", length=10)
        | features("item", "dense", "decade")
        | features("candidate", "dense", "ratings_before", "mean_before", standardize=False)
    )
    if variant != "32m":  # which knows nothing of users
        config.data.features.update(features("user", "dense", "age"))
        config.data.features.update(features("user", "category", "gender", "occupation"))
    # In the larger sets it holds the negatives and the rated items of one request.
    config.funnel.update(retrieved=1000 if variant else 1682, passed=100)
    for batch in (config.batch, config.teacher.batch):
        batch.update(requests=48, candidates=80 if variant == "32m" else 64)
        # A weight of 1 / 0.03 keeps probabilities calibrated.
        batch.negative_rate = 0.1 if variant else 0.03
    for optimizer, rate in ((config.optimizer, 1e-2), (config.teacher.optimizer, 5e-3)):
        optimizer.learning_rate = optimizer.table_learning_rate = rate
        optimizer.update(weight_decay=0.1, table_weight_decay=1.0)
    if variant == "32m":
        # Of 200,948 users; 0 takes all, for twenty times the disk and time.
        config.data.update(ratings_per_request=16, max_users=10_000)
    return config
