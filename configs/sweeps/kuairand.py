"""What distilling saves on KuaiRand: every mode, five weights, three seeds."""

from ml_collections import ConfigDict

from configs import kuairand, sweeps


def get_config(variant: str = "") -> ConfigDict:
    """`configs/kuairand.py` or a variant of it, with the sweep to start from."""
    return sweeps.with_modes_and_weights(kuairand.get_config(variant))
