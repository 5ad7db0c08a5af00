"""MovieLens 100K: real ratings. watch = rated, like = rated 4 or more, share = rated 5."""

from ml_collections import ConfigDict

from configs import defaults


def get_config() -> ConfigDict:
    """The default setting; give `--config.data.path`, or leave it empty to download."""
    config = defaults.get_config()
    config.data.name = "movielens_100k"
    config.data.ratings_per_request = 8
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
    config.train.steps = 3000
    config.teacher.train.steps = 3000
    return config
