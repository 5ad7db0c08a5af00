"""From configs to groups: recipes, their numbers, and the states to start from.

The optimizers of the dense parameters and the schedules of rates are here by name.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from kd_ranker.batch import WHOLE, Deal, FeatureSpec, Stage
from kd_ranker.batches.samplers import SAMPLERS
from kd_ranker.batches.training import Needs
from kd_ranker.distillation.losses import DEFAULT_NUMBERS, LOSSES, LossNumbers
from kd_ranker.distillation.modes import MODES, Mode
from kd_ranker.distillation.teacher_signal import SIGNALS
from kd_ranker.distillation.terms import Term, format_terms, parse_terms, without_weights
from kd_ranker.embedding.row_optimizers import ADAM, ROW_OPTIMIZERS
from kd_ranker.errors import UserError
from kd_ranker.models.model import Init, Model, build_model
from kd_ranker.models.student import STUDENTS
from kd_ranker.models.teacher import TEACHERS
from kd_ranker.training.state import (
    Hyperparameters,
    LiveTeacher,
    OptimizerNumbers,
    Recipe,
    TrainState,
    init_state,
    stack_members,
)

# The config keys of numbers that are traced, so that the members of a group may differ in them.
TRACED_KEYS = (
    *("seed", "train.steps", "train.unshown_weight"),
    *("distill.weight", "distill.user_weight"),
    *("distill.temperature", "distill.top_k", "distill.numbers"),
    *(f"optimizer.{name}" for name in OptimizerNumbers._fields),
)

TEACHER_STAGES = {"shown": Stage.SHOWN, "passed": Stage.PASSED, "retrieved": Stage.RETRIEVED}

# Directions without a learning rate: the step scales them, so that the rate stays a traced value.
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adagrad": lambda: optax.scale_by_rss(initial_accumulator_value=0.1),
    "adam": lambda: optax.scale_by_adam(**ADAM._asdict()),
    "sgd": optax.identity,
}


# The schedules are optax's, for traced numbers of steps. Their operations have the order in which
# XLA compiles those of optax, where a division by a constant is a multiplication. So the factors
# have the same bits.


def _constant(warmup: int, step: Int[Array, ""], steps: Float[Array, ""]) -> Float[Array, ""]:
    """`optax.warmup_constant_schedule` from 0 at step 0 to 1 at step `warmup`."""
    rising = 1 - (1 - step * (1 / jnp.maximum(jnp.full_like(steps, warmup), 1)))
    return jnp.where(step < warmup, rising, 1.0)


def _cosine(warmup: int, step: Int[Array, ""], steps: Float[Array, ""]) -> Float[Array, ""]:
    """`optax.warmup_cosine_decay_schedule` up to 1 and down to 0 at the last step.

    The warm-up takes half of the steps at most.
    """
    warmed_up = jnp.minimum(warmup, jnp.floor(steps / 2))
    rising = 1 - (1 - step * (1 / jnp.maximum(warmed_up, 1)))
    fall = steps - warmed_up
    gone = jnp.minimum(step - warmed_up, fall)
    falling = 0.5 * (1 + jnp.cos(gone * (jnp.pi * (1 / fall))))
    return jnp.where(step < warmed_up, rising, falling)


SCHEDULES = {"constant": _constant, "cosine": _cosine}
"""(warm-up steps; step, counted from 1; number of steps) -> the factor of the peak rates."""


class Group(NamedTuple):
    """Members that differ only in numbers, ready to be trained.

    `init` makes their state before the first step, restricted to the members at `places` and, with
    a `deal`, to the rows of one device.
    """

    recipe: Recipe  # their common part
    names: tuple[str, ...]  # one per member, for messages and metrics; a single run's is ""
    numbers: Hyperparameters
    init: Callable[..., TrainState]

    def at(self, places: Int[np.ndarray, "n"]) -> "Group":
        """Select the numbers and the state of the members at `places`; keep all names."""
        return self._replace(
            numbers=jax.tree.map(lambda of: of[places], self.numbers),
            init=functools.partial(self.init, places),
        )


def student_model(config: ConfigDict, spec: FeatureSpec) -> tuple[Model, Init]:
    """Return the student of `config` and a function that makes its initial parameters."""
    heads = MODES[config.distill.mode].heads_per_task * len(spec.tasks)
    return build_model(STUDENTS[config.student.name], spec, heads, config.student)


def teacher_model(config: ConfigDict, spec: FeatureSpec) -> tuple[Model, Init]:
    """Return the teacher of `config` and a function that makes its initial parameters."""
    return build_model(TEACHERS[config.teacher.name], spec, len(spec.tasks), config.teacher)


def student_groups(members: Mapping[str, ConfigDict], spec: FeatureSpec) -> list[Group]:
    """Return the groups of the students of `members` (by name), in order of appearance.

    Members form a group if their configs differ only in `TRACED_KEYS`. The groups of a program read
    the same batches, so they may differ in any other key that does not change the batches.
    """
    groups: dict[str, dict[str, ConfigDict]] = {}
    for name, config in members.items():
        groups.setdefault(shared_part(config), {})[name] = config
    return [_student_group(group, spec) for group in groups.values()]


def shared_part(config: ConfigDict) -> str:
    """Return the part of a student's config that the members of its group share, as JSON."""
    shared = json.loads(config.to_json())
    if terms := terms_of(config):
        shared["distill"]["loss"] = format_terms(without_weights(terms))
    for key in TRACED_KEYS:
        section, _, name = key.rpartition(".")
        del (shared[section] if section else shared)[name]
    # At a weight of 0 unshown negatives would only cost time: a separate program.
    return json.dumps([shared, config.train.unshown_weight > 0], sort_keys=True)


def _student_group(members: Mapping[str, ConfigDict], spec: FeatureSpec) -> Group:
    configs = list(members.values())
    config = configs[0]
    model, init = student_model(config, spec)
    recipe = _recipe(model, MODES[config.distill.mode], config)._replace(
        user_loss=config.train.user_loss, unshown_are_negatives=config.train.unshown_weight > 0
    )
    numbers = stack_members([_student_numbers(config) for config in configs])
    return Group(recipe, tuple(members), numbers, _init(recipe, init, configs, spec))


def teacher_group(config: ConfigDict, spec: FeatureSpec) -> Group:
    """Return the teacher of `config` as a group of one.

    It learns from user labels. With `teacher.log_weight` the same logits also learn from the logged
    probabilities of the previous ranker.
    """
    model, init = teacher_model(config, spec)
    log_weight = config.teacher.log_weight
    recipe = _recipe(model, MODES["none"], config.teacher)
    terms: tuple[Term, ...] = ()
    if log_weight:
        recipe = recipe._replace(mode=recipe.mode._replace(teacher_logits=recipe.mode.user_logits))
        terms = (Term("bce"),)
    numbers = stack_members([_numbers(config.teacher, distill_weight=log_weight, terms=terms)])
    return Group(recipe, ("",), numbers, _init(recipe, init, [config], spec))


def needs(
    groups: Sequence[Group], teacher: LiveTeacher | None, stage: Stage = Stage.RETRIEVED
) -> Needs:
    """Return the needs of the groups, and of the live teacher if there is one.

    Without one, the logged teacher scores candidates of `stage` or a later one.
    """
    read_stages = any(not SIGNALS[name].needs_scores for name in signals_of(groups))
    models = [group.recipe.model for group in groups] + ([teacher.model] if teacher else [])
    of_unshown = any(group.recipe.unshown_are_negatives for group in groups)
    return Needs(
        stage=min(
            teacher.stage if teacher else Stage.SHOWN,
            Stage.RETRIEVED if of_unshown or read_stages else Stage.SHOWN,
        ),
        logged=stage if learn_from_scores(groups) and teacher is None else None,
        history=any(model.reads_history for model in models),
    )


def signals_of(groups: Sequence[Group]) -> set[str]:
    """Return the names of the signals that the groups learn from."""
    return {term.signal for group in groups for term in group.numbers.terms}


def learn_from_scores(groups: Sequence[Group]) -> bool:
    """Return True if any of the groups learns from the final ranker's scores."""
    return any(SIGNALS[name].needs_scores for name in signals_of(groups))


def needs_scores(config: ConfigDict) -> bool:
    """Return True if a student's loss or the draw of its batches needs the final ranker's scores.

    One that starts with the parameters of another run may need them for that; see `warm_start`.
    """
    of_loss = any(SIGNALS[term.signal].needs_scores for term in terms_of(config))
    return of_loss or SAMPLERS[config.batch.sampler].needs_scores


def terms_of(config: ConfigDict) -> tuple[Term, ...]:
    """Return the terms of a student's distillation loss; () if its mode does not use a teacher.

    They are the config key `distill.loss`.
    """
    if MODES[config.distill.mode].teacher_logits is None:
        return ()
    return parse_terms(config.distill.loss)


def _student_numbers(config: ConfigDict) -> Hyperparameters:
    distill, terms = config.distill, terms_of(config)
    # Without a teacher there is nothing else to learn from.
    user_weight = distill.user_weight if MODES[distill.mode].teacher_logits else 1.0
    own = {name: value for term in terms for name, value in LOSSES[term.loss].numbers.items()}
    if terms and distill.numbers and len(distill.numbers) != len(own):
        names = ", ".join(own) or "none"
        raise UserError(
            f"distill.numbers has {len(distill.numbers)} numbers, and the losses take {len(own)} "
            f"({names}); give one for each, or ()"
        )
    given = dict(zip(own, distill.numbers or own.values(), strict=False))
    return _numbers(
        config,
        user_weight=user_weight,
        distill_weight=distill.weight,
        terms=terms,
        loss=LossNumbers(distill.temperature, distill.top_k, given),
        unshown_weight=config.train.unshown_weight,
    )


def _numbers(trainee: ConfigDict, **numbers: Any) -> Hyperparameters:
    """The traced numbers of one member; `trainee` is `config` or `config.teacher`."""
    optimizer = OptimizerNumbers(*(trainee.optimizer[name] for name in OptimizerNumbers._fields))
    of_teacher = {"user_weight": 1, "loss": DEFAULT_NUMBERS}
    numbers = {**of_teacher, "unshown_weight": 0, "steps": trainee.train.steps, **numbers}
    return jax.tree.map(jnp.float32, Hyperparameters(optimizer=optimizer, **numbers))


def _recipe(model: Model, mode: Mode, trainee: ConfigDict) -> Recipe:
    optimizer = trainee.optimizer
    return Recipe(
        model=model,
        mode=mode,
        optimizer=OPTIMIZERS[optimizer.name](),
        row_optimizer=ROW_OPTIMIZERS[optimizer.table_name],
        schedule=functools.partial(SCHEDULES[optimizer.schedule], optimizer.warmup_steps),
    )


def _init(
    recipe: Recipe, init: Init, configs: Sequence[ConfigDict], spec: FeatureSpec
) -> Callable[..., TrainState]:
    keys = jnp.stack([jax.random.key(config.seed) for config in configs])

    def init_group(places: Int[np.ndarray, "n"] | None = None, deal: Deal = WHOLE) -> TrainState:
        slots = recipe.row_optimizer.slots(recipe.model.embedding.width)
        return init_state(
            recipe,
            jax.vmap(lambda key: init(key, slots, deal))(keys if places is None else keys[places]),
            len(spec.tasks),
            configs[0].distill.affine,
        )

    return init_group
