"""The members of a sweep: every combination of the values in `config.sweep`."""

import itertools
from collections.abc import Iterable, Sequence

from ml_collections import ConfigDict

from kd_ranker.distillation.modes import MODES

# The keys of `config.sweep` that make members.
AXES = ("modes", "losses", "weights", "temperatures", "learning_rates", "seeds", "data_seeds")


def sweep_members(config: ConfigDict) -> dict[str, ConfigDict]:
    """The configs of a sweep's members by name, data seed by data seed.

    An axis that is empty takes the config's own value. A mode without a distillation loss has
    nothing to weigh or to soften, so it occurs once for all losses, weights and temperatures. A
    member's learning rates, of dense parameters and of tables, keep the ratio that the config's own
    have.

    A name says the mode, the weight and the seed, and of the rest what differs from the config's
    own, so that a sweep that grows keeps the names of those it has.
    """
    sweep = config.sweep
    members = {}
    combinations = itertools.product(
        _values(sweep.data_seeds, config.batch.seed),
        sweep.seeds,
        sweep.modes,
        _values(sweep.learning_rates, config.optimizer.learning_rate),
    )
    for data_seed, seed, mode, learning_rate in combinations:
        distilled = MODES[mode].teacher_logits is not None
        ways: Iterable[tuple] = itertools.product(
            _values(sweep.losses, config.distill.loss),
            sweep.weights,
            _values(sweep.temperatures, config.distill.temperature),
        )
        if not distilled:
            ways = [(config.distill.loss, 0.0, config.distill.temperature)]
        for loss, weight, temperature in ways:
            member = config.copy_and_resolve_references()
            member.seed = seed
            member.batch.seed = data_seed
            member.distill.mode = mode
            member.distill.weight = float(weight)
            member.distill.serve = next(iter(MODES[mode].serve))
            member.distill.loss = loss
            member.distill.temperature = float(temperature)
            if config.optimizer.learning_rate != learning_rate:
                ratio = learning_rate / config.optimizer.learning_rate
                member.optimizer.learning_rate = float(learning_rate)
                member.optimizer.table_learning_rate *= ratio
            members[_name(config, member)] = member
    return members


def _values(axis: Sequence, own: object) -> Sequence:
    return axis or (own,)


def _name(config: ConfigDict, member: ConfigDict) -> str:
    distill = member.distill
    distilled = MODES[distill.mode].teacher_logits is not None
    parts = [distill.mode]
    if distill.loss != config.distill.loss:
        parts.append(distill.loss)
    if distilled:
        parts.append(f"weight{distill.weight!r}")
    if distill.temperature != config.distill.temperature:
        parts.append(f"temperature{distill.temperature!r}")
    if member.optimizer.learning_rate != config.optimizer.learning_rate:
        parts.append(f"rate{member.optimizer.learning_rate!r}")
    parts.append(f"seed{member.seed}")
    if member.batch.seed != config.batch.seed:
        parts.append(f"data{member.batch.seed}")
    return "-".join(parts)
