"""Sweep for the saving of distilling on KuaiRand, with a final ranker that is trained here."""

from ml_collections import ConfigDict

from kd_ranker.configs.kuairand import get_config as kuairand
from kd_ranker.configs.sweeps.ways import with_ways


def get_config(variant: str = "") -> ConfigDict:
    """`configs/kuairand.py` or a variant of it, with the sweep to start from."""
    return with_ways(kuairand(variant), rates=(2e-3, 6e-3))
