"""What distilling saves on KuaiRand, with a final ranker that is trained here."""

from ml_collections import ConfigDict

from configs import kuairand, sweeps


def get_config(variant: str = "") -> ConfigDict:
    """`configs/kuairand.py` or a variant of it, with the sweep to start from."""
    return sweeps.with_ways(kuairand.get_config(variant), rates=(2e-3, 6e-3))
