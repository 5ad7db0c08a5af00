"""Settings that a sampler of Optuna asks for, by what earlier ones reached on validation.

Ask and tell: a study is made anew for each round from all trials that were trained, so there is no
state besides them. Optuna (Akiba et al., KDD 2019) is an extra.
"""

import importlib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kd_ranker.config.drawing import Method, Overrides, Space, number_of, rounded
from kd_ranker.config.keys import OPTUNA_SAMPLERS, Key
from kd_ranker.errors import UserError


class Trial(NamedTuple):
    """A draw that was trained."""

    drawn: Overrides
    criterion: float  # smaller is better; NaN if a repeat diverged


def check_installed() -> None:
    """Raise UserError if Optuna is not installed, without importing it."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError(
            "sweep.search='optuna' needs the package optuna: install the extra `optuna`"
        )


def ask(
    method: Method,
    keys: Mapping[str, Key],
    trials: Sequence[Trial],
    draws: int,
    sampler: str,
    seed: int,
) -> list[Overrides]:
    """Return the next draws of a method; the first round is random.

    Args:
      method: what to draw.
      keys: the keys that runs may vary, by name.
      trials: all earlier draws of the method.
      draws: how many to return.
      sampler: one of `OPTUNA_SAMPLERS`.
      seed: of the search.
    """
    optuna = importlib.import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {
        name: _distribution(optuna.distributions, keys[name], space)
        for name, space in sorted(method.spaces.items())
    }
    sampler_class = getattr(optuna.samplers, OPTUNA_SAMPLERS[sampler])
    seeds = [seed, len(trials), number_of(method.name)]
    study = optuna.create_study(
        sampler=sampler_class(seed=number_of(str(seeds)) % 2**32, n_startup_trials=draws)
    )
    for trial in trials:
        failed = math.isnan(trial.criterion)
        states = optuna.trial.TrialState
        study.add_trial(
            optuna.trial.create_trial(
                state=states.FAIL if failed else states.COMPLETE,
                params=dict(trial.drawn),
                distributions=distributions,
                value=None if failed else trial.criterion,
            )
        )
    return [_drawn(method, keys, study.ask(distributions).params) for _ in range(draws)]


def _drawn(method: Method, keys: Mapping[str, Key], asked: Overrides) -> Overrides:
    drawn = dict(asked)
    for name, space in method.spaces.items():
        if not isinstance(space, list):
            drawn[name] = rounded(drawn[name], keys[name], space)
    return drawn


def _distribution(distributions: Any, key: Key, space: Space) -> Any:
    if isinstance(space, list):
        return distributions.CategoricalDistribution(space)
    low, high = space
    if key.type is int:
        return distributions.IntDistribution(int(low), int(high), log=key.logarithmic)
    return distributions.FloatDistribution(low, high, log=key.logarithmic)
