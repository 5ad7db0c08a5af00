"""Sweep that measures the saving of distillation from a final ranker of film search."""

from ml_collections import ConfigDict

from kd_ranker.config import defaults
from kd_ranker.configs.filmsearch import get_config as filmsearch
from kd_ranker.configs.sweeps.ways import with_ways


def get_config(variant: str = "") -> ConfigDict:
    """`configs/filmsearch.py`, with the sweep to start from.

    `:paper` tunes the learning rate of each way, and each repeat has its own order of the data.
    `:lexical` is without the sentence vectors.
    """
    defaults.check_variant(variant, "paper", "lexical")
    config = filmsearch("lexical" if variant == "lexical" else "")
    config.train.steps = 1500
    if variant == "paper":
        config.sweep.whole_repeats = True
    rates = (3e-3, 1e-2, 3e-2) if variant == "paper" else (1e-2,)
    rivals = ("trees",) if variant == "lexical" else ("fusion", "trees")
    return with_ways(config, rates=rates, unshown=(0.3,), rivals=rivals)
