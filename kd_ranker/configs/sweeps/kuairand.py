"""Sweep for the saving of distilling on KuaiRand, with a final ranker that is trained here."""

from collections.abc import Iterator

from ml_collections import ConfigDict

from kd_ranker.configs.kuairand import get_config as kuairand
from kd_ranker.configs.sweeps.methods import Run, compare_methods


def get_config(variant: str = "") -> ConfigDict:
    """`configs/kuairand.py` or a variant of it, with the sweep to start from."""
    config = kuairand(variant)
    config.sweep.rivals = ("trees",)
    return config


def sweep(config: ConfigDict, variant: str = "") -> Iterator[Run]:
    """Yield the runs."""
    return compare_methods(rates=(2e-3, 6e-3))
