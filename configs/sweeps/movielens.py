"""What distilling saves on MovieLens 100K, with a final ranker that is trained here."""

from ml_collections import ConfigDict

from configs import movielens, sweeps
from kd_ranker.config import defaults


def get_config(variant: str = "") -> ConfigDict:
    """`configs/movielens.py`; `:paper` tunes more, longer runs at lower rates included."""
    defaults.check_variant(variant, "paper")
    config = movielens.get_config()
    if variant == "paper":
        config.sweep.axes.train.steps = (1500, 4000)
        config.sweep.whole_repeats = True
        return sweeps.with_ways(config, rates=(3e-3, 1e-2), weights=(0.3, 1.0))
    return sweeps.with_ways(config, rates=(3e-3, 1e-2))
