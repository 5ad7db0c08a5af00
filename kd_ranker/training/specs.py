"""From configs to stacks: what is static in them, their hyperparameters, their first states."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from kd_ranker.batch import WHOLE, FeatureSpec, RowSharding, Stage
from kd_ranker.batches.samplers import SAMPLERS
from kd_ranker.batches.training import Needs
from kd_ranker.distillation.losses import DEFAULT_NUMBERS, LOSSES, LossNumbers
from kd_ranker.distillation.modes import MODES, Mode
from kd_ranker.distillation.teacher_signal import SIGNALS
from kd_ranker.distillation.terms import Term, format_terms, parse_terms, without_weights
from kd_ranker.embedding.row_optimizers import ROW_OPTIMIZERS
from kd_ranker.errors import UserError
from kd_ranker.models.model import Init, Model, build_model
from kd_ranker.models.student import STUDENTS
from kd_ranker.models.teacher import TEACHERS
from kd_ranker.training.optimizers import OPTIMIZERS, SCHEDULES
from kd_ranker.training.state import (
    Hyperparameters,
    LiveTeacher,
    OptimizerHyperparameters,
    States,
    TrainSpec,
    TrainState,
    init_state,
    stack_runs,
)

# The config keys of hyperparameters, in which the runs of a stack may differ. Of `distill.loss`
# these are the weights of its terms.
TRACED_KEYS = (
    "seed",
    "train.steps",
    "train.unshown_weight",
    "train.unshown_margin",
    "distill.weight",
    "distill.user_weight",
    "distill.temperature",
    "distill.top_k",
    "distill.numbers",
    *(f"optimizer.{name}" for name in OptimizerHyperparameters._fields),
)

TEACHER_STAGES = {"shown": Stage.SHOWN, "passed": Stage.PASSED, "retrieved": Stage.RETRIEVED}


class Stack(NamedTuple):
    """Runs that differ only in hyperparameters, ready to be trained.

    `init` makes their state before the first step, restricted to the runs at some indices and, with
    a `RowSharding`, to the rows of one device.
    """

    train_spec: TrainSpec  # their common part
    names: tuple[str, ...]  # one per run, for messages and metrics; a single run's is ""
    tasks: tuple[str, ...]
    hyperparameters: Hyperparameters
    init: Callable[..., TrainState]

    def at(self, indices: Int[np.ndarray, "n"]) -> "Stack":
        """Select runs, maybe some of them several times."""

        def init(
            chosen: Int[np.ndarray, "m"] | None = None, row_sharding: RowSharding = WHOLE
        ) -> TrainState:
            return self.init(indices if chosen is None else indices[chosen], row_sharding)

        return self._replace(
            names=tuple(self.names[index] for index in indices),
            hyperparameters=jax.tree.map(lambda leaf: leaf[indices], self.hyperparameters),
            init=init,
        )


def student_stacks(runs: Mapping[str, ConfigDict], spec: FeatureSpec) -> list[Stack]:
    """Return the stacks of the students of `runs` (configs by name), in order of appearance.

    Runs form a stack if their configs differ only in `TRACED_KEYS`. The stacks of a program read
    the same batches, so they may differ in any other key that does not change the batches.
    """
    stacks: dict[str, dict[str, ConfigDict]] = {}
    for name, config in runs.items():
        stacks.setdefault(shared_part(config), {})[name] = config
    return [_student_stack(stack, spec) for stack in stacks.values()]


def stopped_runs(stacks: Sequence[Stack], states: States) -> set[str]:
    """Return the names of the runs that were stopped."""
    return {
        name
        for stack, state in zip(stacks, states, strict=True)
        for name, stopped_after in zip(stack.names, np.asarray(state.stopped_after), strict=True)
        if stopped_after
    }


def shared_part(config: ConfigDict) -> str:
    """Return the part of a student's config that the runs of its stack share, as JSON."""
    shared = json.loads(config.to_json())
    if terms := terms_of(config):
        shared["distill"]["loss"] = format_terms(without_weights(terms))
    for key in TRACED_KEYS:
        section_name, _, name = key.rpartition(".")
        section = shared[section_name] if section_name else shared
        del section[name]
    # At a weight of 0 unshown negatives would only cost time: those runs are another stack. So are
    # those with a margin of 0.
    switches = [config.train.unshown_weight > 0, drops_near_shown(config)]
    return json.dumps([shared, *switches], sort_keys=True)


def _student_stack(runs: Mapping[str, ConfigDict], spec: FeatureSpec) -> Stack:
    configs = list(runs.values())
    config = configs[0]
    model, init = student_model(config, spec)
    train_spec = _train_spec(model, MODES[config.distill.mode], config)._replace(
        user_loss=config.train.user_loss,
        unshown_are_negatives=config.train.unshown_weight > 0,
        drops_near_shown=drops_near_shown(config),
        row_kernel=config.parallel.row_kernel,
    )
    hyperparameters = stack_runs([_student_hyperparameters(config) for config in configs])
    init_stack = _init(train_spec, init, configs, spec)
    return Stack(train_spec, tuple(runs), spec.tasks, hyperparameters, init_stack)


def teacher_stack(config: ConfigDict, spec: FeatureSpec) -> Stack:
    """Return the teacher of `config` as a stack of one.

    It learns from user labels. With `teacher.log_weight` the same logits also learn from the logged
    probabilities of the previous ranker.
    """
    model, init = teacher_model(config, spec)
    train_spec = _train_spec(model, MODES["none"], config.teacher)._replace(
        row_kernel=config.parallel.row_kernel
    )
    terms: tuple[Term, ...] = ()
    log_weight = config.teacher.log_weight
    if log_weight:
        mode = train_spec.mode._replace(teacher_logits=train_spec.mode.user_logits)
        train_spec = train_spec._replace(mode=mode)
        terms = (Term("bce"),)
    hyperparameters = stack_runs(
        [_hyperparameters(config.teacher, distill_weight=log_weight, terms=terms)]
    )
    init_stack = _init(train_spec, init, [config], spec)
    return Stack(train_spec, ("",), spec.tasks, hyperparameters, init_stack)


def student_model(config: ConfigDict, spec: FeatureSpec) -> tuple[Model, Init]:
    """Return the student of `config` and a function that makes its initial parameters."""
    heads = MODES[config.distill.mode].heads_per_task * len(spec.tasks)
    return build_model(STUDENTS[config.student.name], spec, heads, config.student)


def teacher_model(config: ConfigDict, spec: FeatureSpec) -> tuple[Model, Init]:
    """Return the teacher of `config` and a function that makes its initial parameters."""
    return build_model(TEACHERS[config.teacher.name], spec, len(spec.tasks), config.teacher)


def _train_spec(model: Model, mode: Mode, trainee: ConfigDict) -> TrainSpec:
    """Return what is static; `trainee` is `config` or `config.teacher`."""
    optimizer = trainee.optimizer
    return TrainSpec(
        model=model,
        mode=mode,
        optimizer=OPTIMIZERS[optimizer.name](),
        row_optimizer=ROW_OPTIMIZERS[optimizer.table_name],
        schedule=functools.partial(SCHEDULES[optimizer.schedule], optimizer.warmup_steps),
    )


def _student_hyperparameters(config: ConfigDict) -> Hyperparameters:
    distill = config.distill
    terms = terms_of(config)
    # Without a teacher there is nothing else to learn from.
    user_weight = distill.user_weight if MODES[distill.mode].teacher_logits else 1.0
    return _hyperparameters(
        config,
        user_weight=user_weight,
        distill_weight=distill.weight,
        terms=terms,
        loss_numbers=LossNumbers(distill.temperature, distill.top_k, _own_numbers(config, terms)),
        unshown_weight=config.train.unshown_weight,
        unshown_margin=config.train.unshown_margin,
    )


def _own_numbers(config: ConfigDict, terms: Sequence[Term]) -> dict[str, float]:
    """Return the numbers that the losses of terms declare, those of `distill.numbers` if given."""
    defaults: dict[str, float] = {}
    for term in terms:
        defaults |= LOSSES[term.loss].numbers
    numbers = config.distill.numbers
    if not terms or not numbers:
        return defaults
    if len(numbers) != len(defaults):
        names = ", ".join(defaults) or "none"
        raise UserError(
            f"distill.numbers has {len(numbers)} numbers, and the losses take {len(defaults)} "
            f"({names}); give one for each, or ()"
        )
    return dict(zip(defaults, numbers, strict=True))


def _hyperparameters(trainee: ConfigDict, **chosen: Any) -> Hyperparameters:
    """Return the hyperparameters of one run; `trainee` is `config` or `config.teacher`."""
    optimizer = OptimizerHyperparameters(
        *(trainee.optimizer[name] for name in OptimizerHyperparameters._fields)
    )
    defaults = {
        "user_weight": 1,
        "loss_numbers": DEFAULT_NUMBERS,
        "unshown_weight": 0,
        "unshown_margin": 0,
    }
    values = {**defaults, "steps": trainee.train.steps, **chosen}
    return jax.tree.map(jnp.float32, Hyperparameters(optimizer=optimizer, **values))


def _init(
    train_spec: TrainSpec, init: Init, configs: Sequence[ConfigDict], spec: FeatureSpec
) -> Callable[..., TrainState]:
    keys = jnp.stack([jax.random.key(config.seed) for config in configs])

    def init_stack(
        indices: Int[np.ndarray, "n"] | None = None, row_sharding: RowSharding = WHOLE
    ) -> TrainState:
        slots = train_spec.row_optimizer.slots(train_spec.model.embedding.width)
        selected = keys if indices is None else keys[indices]
        parameters = jax.vmap(lambda key: init(key, slots, row_sharding))(selected)
        return init_state(train_spec, parameters, len(spec.tasks), configs[0].distill.affine)

    return init_stack


def terms_of(config: ConfigDict) -> tuple[Term, ...]:
    """Return the terms of a student's `distill.loss`; () if its mode does not use a teacher."""
    if MODES[config.distill.mode].teacher_logits is None:
        return ()
    return parse_terms(config.distill.loss)


def needs(
    stacks: Sequence[Stack], teacher: LiveTeacher | None, logged_stage: Stage = Stage.RETRIEVED
) -> Needs:
    """Return what batches must hold for the stacks, and for the live teacher if there is one.

    A batch holds the candidates that anyone has a use for: all retrieved ones as negatives or for a
    loss on stages; those that the live teacher scores; those with a logged score; and always the
    shown that are drawn with a label. See `requests.columns.kept_kinds`.

    Args:
      stacks: the stacks that one program trains.
      teacher: the live teacher; None with a logged one.
      logged_stage: a logged teacher's scores count for candidates of this stage or a later one.
    """
    reads_stages = any(not SIGNALS[name].needs_scores for name in signals_of(stacks))
    has_negatives = any(stack.train_spec.unshown_are_negatives for stack in stacks)
    models = [stack.train_spec.model for stack in stacks]
    if teacher:
        models.append(teacher.model)
    if has_negatives or reads_stages:
        earliest_stage = Stage.RETRIEVED
    else:
        earliest_stage = teacher.stage if teacher else Stage.SHOWN
    reads_logged_scores = learn_from_scores(stacks) and teacher is None
    return Needs(
        stage=earliest_stage,
        logged=logged_stage if reads_logged_scores else None,
        history=any(model.reads_history for model in models),
    )


def signals_of(stacks: Sequence[Stack]) -> set[str]:
    """Return the names of the signals that the stacks learn from."""
    return {term.signal for stack in stacks for term in stack.hyperparameters.terms}


def learn_from_scores(stacks: Sequence[Stack]) -> bool:
    """Return True if any of the stacks learns from the final ranker's scores.

    One that only drops negatives by them learns from them, too.
    """
    if any(stack.train_spec.drops_near_shown for stack in stacks):
        return True
    return any(SIGNALS[name].needs_scores for name in signals_of(stacks))


def drops_near_shown(config: ConfigDict) -> bool:
    """Return True if a student drops negatives that the teacher scores near the shown ones."""
    return bool(config.train.unshown_weight > 0 and config.train.unshown_margin > 0)


def needs_scores(config: ConfigDict) -> bool:
    """Return True if a student's losses or the draw of its batches need the final ranker's scores.

    The choice of its negatives may need them, too. One that starts with the parameters of another
    run may need them for that; see `warm_start`.
    """
    loss_needs_scores = any(SIGNALS[term.signal].needs_scores for term in terms_of(config))
    sampler_needs_scores = SAMPLERS[config.batch.sampler].needs_scores
    return loss_needs_scores or sampler_needs_scores or drops_near_shown(config)
