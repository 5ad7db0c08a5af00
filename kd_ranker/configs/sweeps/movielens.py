"""Sweep for the saving of distilling on MovieLens 100K, with a final ranker trained here."""

from collections.abc import Iterator

from ml_collections import ConfigDict

from kd_ranker.config import defaults
from kd_ranker.configs.movielens import get_config as movielens
from kd_ranker.configs.sweeps.methods import Run, compare_methods


def get_config(variant: str = "") -> ConfigDict:
    """`configs/movielens.py`; `:paper` tunes more, longer runs at lower rates included."""
    defaults.check_variant(variant, "paper")
    config = movielens()
    config.sweep.rivals = ("trees", "ease")
    config.sweep.whole_repeats = variant == "paper"
    return config


def sweep(config: ConfigDict, variant: str = "") -> Iterator[Run]:
    """Yield the runs; all films have a label, rated or not, so there are no stages."""
    rates = (3e-3, 1e-2)
    if variant == "paper":
        steps = {"train.steps": (1500, 4000)}
        return compare_methods(rates, weights=(0.3, 1.0), stages=False, more=steps)
    return compare_methods(rates, stages=False)
