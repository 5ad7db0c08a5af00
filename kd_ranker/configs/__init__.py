"""Configs of experiments, each a function from the name of a variant to a `ConfigDict`.

`configs.cascade("small")` equals `--config=configs/cascade.py:small` on a command line. Here the
functions have the names of their files. Import a file by its full module name.

    cascade     the simulated feed, the default
    movielens, kuairand, recflow, ebnerd, filmsearch
                public datasets
    letor, trec ranking files
    parquet     a user's own log, with columns to name
    sweeps      sweeps of several of these: methods, weights and seeds
"""

from kd_ranker.config.defaults import columns, feature, features
from kd_ranker.configs import sweeps
from kd_ranker.configs.cascade import get_config as cascade
from kd_ranker.configs.ebnerd import get_config as ebnerd
from kd_ranker.configs.filmsearch import get_config as filmsearch
from kd_ranker.configs.kuairand import get_config as kuairand
from kd_ranker.configs.letor import get_config as letor
from kd_ranker.configs.movielens import get_config as movielens
from kd_ranker.configs.parquet import get_config as parquet
from kd_ranker.configs.recflow import get_config as recflow
from kd_ranker.configs.trec import get_config as trec

__all__ = [
    "cascade",
    "columns",
    "ebnerd",
    "feature",
    "features",
    "filmsearch",
    "kuairand",
    "letor",
    "movielens",
    "parquet",
    "recflow",
    "sweeps",
    "trec",
]
