"""MovieLens 1M: `configs/movielens.py` with ten times the ratings and a sample of the catalogue."""

from ml_collections import ConfigDict

from kd_ranker.configs.movielens import get_config as movielens


def get_config(variant: str = "", source: str = "movielens_1m") -> ConfigDict:
    """The default setting; give `--config.data.path`, or leave it empty to download."""
    config = movielens(variant, source)
    config.data.negatives = 500  # candidates drawn from unrated items; 0 takes all
    config.data.max_users = 0  # users, drawn at random, who make requests; 0 takes all
    config.funnel.retrieved = 1000  # holds the negatives and the rated items of one request
    for batch in (config.batch, config.teacher.batch):
        batch.negative_rate = 0.1
    return config
