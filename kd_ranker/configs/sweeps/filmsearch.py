"""Sweep that measures the saving of distillation from a final ranker of film search."""

from collections.abc import Iterator

from ml_collections import ConfigDict

from kd_ranker.config import defaults
from kd_ranker.configs.filmsearch import get_config as filmsearch
from kd_ranker.configs.sweeps.methods import Run, compare_methods


def get_config(variant: str = "") -> ConfigDict:
    """`configs/filmsearch.py`, with the sweep to start from.

    `:paper` tunes the learning rate of each method, and each repeat has its own order of the data.
    `:lexical` is without the sentence vectors.
    """
    defaults.check_variant(variant, "paper", "lexical")
    config = filmsearch("lexical" if variant == "lexical" else "")
    config.sweep.whole_repeats = variant == "paper"
    config.sweep.rivals = ("trees",) if variant == "lexical" else ("fusion", "trees")
    return config


def sweep(config: ConfigDict, variant: str = "") -> Iterator[Run]:
    """Yield the runs."""
    rates = (3e-3, 1e-2, 3e-2) if variant == "paper" else (1e-2,)
    # Students without scores are best after a few hundred steps, those with scores after many.
    steps = {"train.steps": (300, 1500)}
    return compare_methods(rates, unshown=(0.3,), more=steps)
