"""Sweeps to start from, one file a dataset."""

from ml_collections import ConfigDict


def with_modes_and_weights(config: ConfigDict) -> ConfigDict:
    """No distillation, and each way of distilling at weights over two orders of magnitude."""
    config.sweep.modes = ("none", "aux", "shared")
    config.sweep.weights = (0.1, 0.3, 1.0, 3.0, 10.0)
    config.sweep.seeds = (0, 1, 2)
    return config
