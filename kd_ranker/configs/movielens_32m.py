"""MovieLens 32M: ratings in half stars of 87,585 films, by default of a sample of the users."""

from ml_collections import ConfigDict

from kd_ranker.configs.movielens_1m import get_config as movielens_1m


def get_config(variant: str = "") -> ConfigDict:
    """The default setting; give `--config.data.path`, or leave it empty to download."""
    config = movielens_1m(variant, "movielens_32m")
    config.data.ratings_per_request = 16
    config.data.max_users = 10_000  # of 200,948; 0 takes all, for twenty times the disk and time
    for batch in (config.batch, config.teacher.batch):
        batch.candidates = 80
    return config
