"""Checks a config before anything long begins: each fault is one line that says what to change."""

from collections.abc import Iterable

import jax
from ml_collections import ConfigDict

from kd_ranker.data.sources import SOURCES
from kd_ranker.distillation.losses import LOSSES
from kd_ranker.distillation.modes import MODES
from kd_ranker.embedding.row_optimizers import ROW_OPTIMIZERS
from kd_ranker.errors import UserError, check_choice
from kd_ranker.models.student import STUDENTS
from kd_ranker.models.teacher import TEACHERS
from kd_ranker.training.mapping import MAPPINGS
from kd_ranker.training.optimizers import OPTIMIZERS, SCHEDULES
from kd_ranker.training.recipes import TEACHER_STAGES

TEACHER_SOURCES = ("live", "logged")

_POSITIVE = (
    "funnel.retrieved", "funnel.passed", "funnel.shown",
    "batch.requests", "batch.candidates", "teacher.batch.requests", "teacher.batch.candidates",
    "train.steps", "train.log_every", "train.checkpoint_every", "train.eval_limit",
    "teacher.train.steps", "teacher.train.log_every", "teacher.train.checkpoint_every",
    "teacher.train.eval_limit", "student.width", "teacher.width", "evaluation.requests",
    "data.history_length", "distill.temperature",
)  # fmt: skip
_NOT_NEGATIVE = (
    "distill.weight", "parallel.devices", "evaluation.limit", "train.eval_every",
    "teacher.train.eval_every", "student.table_scale", "teacher.table_scale",
    *(f"{prefix}optimizer.{name}" for prefix in ("", "teacher.") for name in (
        "learning_rate", "weight_decay", "table_learning_rate", "table_weight_decay",
        "warmup_steps",
    )),
)  # fmt: skip
_SHARES = (
    "batch.passed_share", "teacher.batch.passed_share",
    "batch.negative_rate", "teacher.batch.negative_rate",
)  # fmt: skip


def validate(config: ConfigDict) -> None:
    """Raises UserError on the first fault in a config."""
    _check_names(config)
    _check_numbers(config)
    _check_tasks(config)
    _check_funnel(config)
    _check_devices(config)


def _get(config: ConfigDict, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = value[part]  # type: ignore[index]
    return value


def _check_names(config: ConfigDict) -> None:
    choices: dict[str, Iterable[str]] = {
        "data.name": SOURCES,
        "student.name": STUDENTS,
        "teacher.name": TEACHERS,
        "teacher.source": TEACHER_SOURCES,
        "teacher.stage": TEACHER_STAGES,
        "distill.mode": MODES,
        "distill.loss": LOSSES,
        "parallel.mapping": MAPPINGS,
        "optimizer.name": OPTIMIZERS,
        "optimizer.table_name": ROW_OPTIMIZERS,
        "optimizer.schedule": SCHEDULES,
        "teacher.optimizer.name": OPTIMIZERS,
        "teacher.optimizer.table_name": ROW_OPTIMIZERS,
        "teacher.optimizer.schedule": SCHEDULES,
    }
    for key, names in choices.items():
        check_choice(key, _get(config, key), names)
    for mode in config.sweep.modes:
        check_choice("sweep.modes", mode, MODES)
    serves = MODES[config.distill.mode].serve
    # Only a mode with a choice of heads looks at the key.
    if len(serves) > 1:
        check_choice("distill.serve", config.distill.serve, serves)


def _check_numbers(config: ConfigDict) -> None:
    for key in _POSITIVE:
        if not _get(config, key) > 0:  # type: ignore[operator]
            raise UserError(f"{key}={_get(config, key)} must be greater than 0")
    for key in _NOT_NEGATIVE:
        if not _get(config, key) >= 0:  # type: ignore[operator]
            raise UserError(f"{key}={_get(config, key)} must not be negative")
    for key in _SHARES:
        if not 0 <= _get(config, key) <= 1:  # type: ignore[operator]
            raise UserError(f"{key}={_get(config, key)} must lie in [0, 1]")
    for weight in config.sweep.weights:
        if not weight >= 0:
            raise UserError(f"sweep.weights holds {weight}; a distillation weight is not negative")
    for key in ("sweep.modes", "sweep.weights", "sweep.seeds"):
        if not _get(config, key):
            raise UserError(f"{key} is empty; give it at least one value")


def _check_tasks(config: ConfigDict) -> None:
    known = SOURCES[config.data.name].tasks
    if not config.tasks:
        raise UserError(f"tasks is empty; {config.data.name} has: {', '.join(known)}")
    for task in config.tasks:
        if task not in known:
            raise UserError(
                f"tasks holds {task!r}, which {config.data.name} lacks; it has: {', '.join(known)}"
            )
    if len(set(config.tasks)) < len(config.tasks):
        raise UserError(f"tasks={tuple(config.tasks)} names a task twice")
    if len(config.value_weights) != len(config.tasks):
        raise UserError(
            f"value_weights has {len(config.value_weights)} numbers for {len(config.tasks)} tasks; "
            "give one a task"
        )
    if not (all(w >= 0 for w in config.value_weights) and any(config.value_weights)):
        raise UserError(
            f"value_weights={tuple(config.value_weights)} must not be negative, nor all 0"
        )


def _check_funnel(config: ConfigDict) -> None:
    funnel = config.funnel
    if not funnel.shown <= funnel.passed <= funnel.retrieved:
        raise UserError(
            f"funnel.shown={funnel.shown}, funnel.passed={funnel.passed}, "
            f"funnel.retrieved={funnel.retrieved}: a funnel may not widen on its way"
        )
    for k in funnel.report_at:
        if not 1 <= k <= funnel.retrieved:
            raise UserError(f"funnel.report_at holds {k}; give numbers in [1, {funnel.retrieved}]")


def _check_devices(config: ConfigDict) -> None:
    available = jax.device_count()
    if config.parallel.devices > available:
        raise UserError(
            f"parallel.devices={config.parallel.devices}, but there are {available}; 0 takes all"
        )
    devices = config.parallel.devices or available
    for key in ("batch.requests", "teacher.batch.requests"):
        requests = _get(config, key)
        if requests % devices:  # type: ignore[operator]
            raise UserError(
                f"{key}={requests} cannot be shared by {devices} devices; take a multiple of "
                f"{devices}, or set parallel.devices"
            )
