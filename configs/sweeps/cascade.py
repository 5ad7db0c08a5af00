"""What distilling saves in the built-in cascade: every mode, five weights, three seeds."""

from ml_collections import ConfigDict

from configs import cascade, sweeps


def get_config(variant: str = "") -> ConfigDict:
    """`configs/cascade.py` and its variants, with the sweep to start from."""
    return sweeps.with_modes_and_weights(cascade.get_config(variant))
