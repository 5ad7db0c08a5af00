"""Sweep for the saving of distilling on MovieLens 100K, with a final ranker trained here."""

from ml_collections import ConfigDict

from kd_ranker.config import defaults
from kd_ranker.configs.movielens import get_config as movielens
from kd_ranker.configs.sweeps.ways import with_ways


def get_config(variant: str = "") -> ConfigDict:
    """`configs/movielens.py`; `:paper` tunes more, longer runs at lower rates included.

    All films have a label, rated or not, so there are no stages.
    """
    defaults.check_variant(variant, "paper")
    config = movielens()
    weights: tuple[float, ...] = (1.0,)
    if variant == "paper":
        config.sweep.axes.train.steps = (1500, 4000)
        config.sweep.whole_repeats = True
        weights = (0.3, 1.0)
    return with_ways(config, (3e-3, 1e-2), weights, stages=False, rivals=("trees", "ease"))
