"""Sweeps to start from, one file a dataset; as functions, they are called like their files."""

from kd_ranker.configs.sweeps.cascade import get_config as cascade
from kd_ranker.configs.sweeps.filmsearch import get_config as filmsearch
from kd_ranker.configs.sweeps.kuairand import get_config as kuairand
from kd_ranker.configs.sweeps.movielens import get_config as movielens

__all__ = ["cascade", "filmsearch", "kuairand", "movielens"]
