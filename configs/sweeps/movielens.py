"""What distilling saves on MovieLens 100K: every mode, five weights, three seeds."""

from ml_collections import ConfigDict

from configs import movielens, sweeps


def get_config(variant: str = "") -> ConfigDict:
    """`configs/movielens.py`, with the sweep to start from."""
    return sweeps.with_modes_and_weights(movielens.get_config(variant))
