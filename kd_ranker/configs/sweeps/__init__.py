"""Sweeps to start from, one file a dataset; as functions, they are called like their files."""

from types import ModuleType

from ml_collections import ConfigDict

from kd_ranker.config.runs import list_runs
from kd_ranker.configs.sweeps import cascade as _cascade
from kd_ranker.configs.sweeps import filmsearch as _filmsearch
from kd_ranker.configs.sweeps import kuairand as _kuairand
from kd_ranker.configs.sweeps import movielens as _movielens

__all__ = ["cascade", "filmsearch", "kuairand", "movielens"]


def cascade(variant: str = "") -> ConfigDict:
    """Return the config of `configs/sweeps/cascade.py` with its runs."""
    return _with_runs(_cascade, variant)


def filmsearch(variant: str = "") -> ConfigDict:
    """Return the config of `configs/sweeps/filmsearch.py` with its runs."""
    return _with_runs(_filmsearch, variant)


def kuairand(variant: str = "") -> ConfigDict:
    """Return the config of `configs/sweeps/kuairand.py` with its runs."""
    return _with_runs(_kuairand, variant)


def movielens(variant: str = "") -> ConfigDict:
    """Return the config of `configs/sweeps/movielens.py` with its runs."""
    return _with_runs(_movielens, variant)


def _with_runs(file: ModuleType, variant: str) -> ConfigDict:
    config = file.get_config(variant)
    config.sweep.runs = list_runs(file.sweep(config, variant))
    return config
