"""From a config to what the step needs: a recipe, its numbers, and the state to start from."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from kd_ranker.batch import FeatureSpec, Stage
from kd_ranker.distillation.losses import LOSSES
from kd_ranker.distillation.modes import MODES, Mode
from kd_ranker.embedding.row_optimizers import ROW_OPTIMIZERS
from kd_ranker.models.model import Model, Parameters, build_model
from kd_ranker.models.student import STUDENTS
from kd_ranker.models.teacher import TEACHERS
from kd_ranker.training.optimizers import OPTIMIZERS, SCHEDULES
from kd_ranker.training.step import Hyperparameters, Recipe, TrainState, init_state

TEACHER_STAGES = {"passed": Stage.PASSED, "retrieved": Stage.RETRIEVED}


def hyperparameters(config: ConfigDict, optimizer: ConfigDict) -> Hyperparameters:
    """The traced numbers of a run; `optimizer` is `config.optimizer` or the teacher's."""
    numbers = {
        "distill_weight": config.distill.weight,
        "temperature": config.distill.temperature,
        "learning_rate": optimizer.learning_rate,
        "table_learning_rate": optimizer.table_learning_rate,
        "weight_decay": optimizer.weight_decay,
        "table_weight_decay": optimizer.table_weight_decay,
    }
    return Hyperparameters(**{name: jnp.float32(number) for name, number in numbers.items()})


def student_model(config: ConfigDict, spec: FeatureSpec) -> tuple[Model, Parameters]:
    """The student of `config` with its initial parameters."""
    heads = MODES[config.distill.mode].heads_per_task * len(spec.tasks)
    return build_model(
        STUDENTS[config.student.name], spec, heads, config.student, jax.random.key(config.seed)
    )


def teacher_model(config: ConfigDict, spec: FeatureSpec) -> tuple[Model, Parameters]:
    """The teacher of `config` with its initial parameters."""
    return build_model(
        TEACHERS[config.teacher.name],
        spec,
        len(spec.tasks),
        config.teacher,
        jax.random.key(config.seed),
    )


def student_start(
    config: ConfigDict, spec: FeatureSpec, live_teacher: Model | None
) -> tuple[Recipe, TrainState]:
    """Recipe and first state of the student of `config`.

    `live_teacher` scores the batches inside the step; None where their probabilities are logged.
    """
    model, parameters = student_model(config, spec)
    mode = MODES[config.distill.mode]
    # The mode none has no use for a teacher, so it does not pay for one.
    used_teacher = live_teacher if mode.teacher_logits is not None else None
    recipe = _recipe(config, model, mode, config.optimizer, config.train.steps, used_teacher)
    return recipe, _state(recipe, parameters, config, spec)


def teacher_start(config: ConfigDict, spec: FeatureSpec) -> tuple[Recipe, TrainState]:
    """Recipe and first state of the teacher of `config`; it learns from user labels alone."""
    model, parameters = teacher_model(config, spec)
    recipe = _recipe(
        config,
        model,
        MODES["none"],
        config.teacher.optimizer,
        config.teacher.train.steps,
        live_teacher=None,
    )
    return recipe, _state(recipe, parameters, config, spec)


def _recipe(
    config: ConfigDict,
    model: Model,
    mode: Mode,
    optimizer: ConfigDict,
    steps: int,
    live_teacher: Model | None,
) -> Recipe:
    return Recipe(
        model=model,
        mode=mode,
        distill_loss=LOSSES[config.distill.loss],
        optimizer=OPTIMIZERS[optimizer.name](),
        row_optimizer=ROW_OPTIMIZERS[optimizer.table_name],
        schedule=SCHEDULES[optimizer.schedule](steps, optimizer.warmup_steps),
        teacher=live_teacher,
        teacher_stage=TEACHER_STAGES[config.teacher.stage],
    )


def _state(
    recipe: Recipe, parameters: Parameters, config: ConfigDict, spec: FeatureSpec
) -> TrainState:
    # A stream of its own, apart from the one that drew the parameters.
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    return init_state(
        recipe, parameters, len(spec.tasks), config.distill.affine, jax.random.key_data(key)
    )
