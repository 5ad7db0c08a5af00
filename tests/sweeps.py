"""Configs of small sweeps, and what their tables record."""

from kd_ranker.configs import cascade
from kd_ranker.distillation.teacher_signal import SIGNALS
from kd_ranker.distillation.terms import parse_terms


def config_of(axes=(), **sweep):
    """A config with `sweep.NAME=value`, and axes by the names of their keys."""
    config = cascade("small")
    config.sweep.update(sweep)
    changes = {f"sweep.axes.{key}": values for key, values in dict(axes).items()}
    config.update_from_flattened_dict(changes)
    return config


def needs_scores(role, distill_loss):
    """What a row of `results.csv` records of a ranker with these terms."""
    if role != "student":
        return None
    if distill_loss is None:
        return False
    return any(SIGNALS[term.signal].needs_scores for term in parse_terms(distill_loss))
