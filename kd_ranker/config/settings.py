"""Checks a config before anything long begins: each fault is one line that says what to change."""

import difflib
import math
from collections.abc import Iterable

import jax
from ml_collections import ConfigDict

from kd_ranker.batches.loader import ORDERS
from kd_ranker.distillation.losses import LOSSES
from kd_ranker.distillation.modes import MODES
from kd_ranker.embedding.row_optimizers import ROW_OPTIMIZERS
from kd_ranker.errors import UserError, check_choice
from kd_ranker.models.model import COMPUTE_DTYPES
from kd_ranker.models.student import STUDENTS
from kd_ranker.models.teacher import TEACHERS
from kd_ranker.sources.registry import SOURCES
from kd_ranker.sweep.members import AXES
from kd_ranker.training.mapping import MAPPINGS
from kd_ranker.training.optimizers import OPTIMIZERS, SCHEDULES
from kd_ranker.training.recipes import TEACHER_STAGES

TEACHER_SOURCES = ("live", "logged")

_POSITIVE = (
    "funnel.retrieved", "funnel.passed", "funnel.shown",
    "batch.requests", "batch.candidates", "teacher.batch.requests", "teacher.batch.candidates",
    "train.steps", "train.log_every", "train.checkpoint_every", "train.eval_limit",
    "teacher.train.steps", "teacher.train.log_every", "teacher.train.checkpoint_every",
    "teacher.train.eval_limit", "student.width", "student.interests", "teacher.width",
    "teacher.attention_hidden", "teacher.experts", "teacher.expert_hidden",
    "evaluation.requests", "data.history_length", "distill.temperature",
    "distill.top_k",
)  # fmt: skip
_NOT_NEGATIVE = (
    "seed", "data.seed", "batch.seed", "teacher.batch.seed", "distill.weight",
    "parallel.devices", "evaluation.limit", "sweep.group_size",
    *(f"{model}.{table}_rows" for model in ("student", "teacher") for table in (
        "user", "item", "category",
    )),
    "train.eval_every", "teacher.train.eval_every", "student.table_scale", "teacher.table_scale",
    "teacher.cross_layers", "teacher.flops_per_candidate",
    *(f"{prefix}optimizer.{name}" for prefix in ("", "teacher.") for name in (
        "learning_rate", "weight_decay", "table_learning_rate", "table_weight_decay",
        "warmup_steps",
    )),
)  # fmt: skip
_SHARES = (
    "batch.passed_share", "teacher.batch.passed_share",
    "batch.negative_rate", "teacher.batch.negative_rate",
)  # fmt: skip
# What the elements of a tuple must be; ml_collections holds single values to their type.
_ELEMENTS: dict[str, tuple[type, ...]] = {
    "tasks": (str,),
    "value_weights": (int, float),
    "funnel.report_at": (int,),
    "student.hidden": (int,),
    "sweep.modes": (str,),
    "sweep.losses": (str,),
    "sweep.weights": (int, float),
    "sweep.temperatures": (int, float),
    "sweep.learning_rates": (int, float),
    "sweep.seeds": (int,),
    "sweep.data_seeds": (int,),
}


def validate(config: ConfigDict) -> None:
    """Raises UserError on the first fault in a config."""
    _check_elements(config)
    _check_names(config)
    _check_numbers(config)
    _check_tasks(config)
    _check_funnel(config)
    _check_devices(config)


def check_key(config: ConfigDict, key: str) -> None:
    """Raises UserError unless `config` has `key`, written like `train.steps`."""
    section: object = config
    above = ""
    for part in key.split("."):
        if not isinstance(section, ConfigDict) or part not in section:
            raise UserError(f"config key {key!r} does not exist; {_hint(config, key, above)}")
        section, above = section[part], f"{above}{part}."


def _hint(config: ConfigDict, key: str, above: str) -> str:
    """What may have been meant by a key of which only the sections `above` exist."""
    known = _keys(config)
    if close := difflib.get_close_matches(key, known, n=1, cutoff=0.8):
        return f"did you mean {close[0]!r}?"
    # A key that was put into the wrong section, or into none.
    name = key.rpartition(".")[2]
    if same := [other for other in known if other.rpartition(".")[2] == name]:
        return f"did you mean {' or '.join(map(repr, same))}?"
    section = _get(config, above[:-1]) if above else config
    if isinstance(section, ConfigDict):
        return f"config.{above[:-1]}".rstrip(".") + f" has: {', '.join(sorted(section))}"
    return f"config.{above[:-1]} is one value"


def _keys(config: ConfigDict, prefix: str = "") -> list[str]:
    keys = []
    for name, value in config.items():
        keys.append(prefix + name)
        if isinstance(value, ConfigDict):
            keys += _keys(value, f"{prefix}{name}.")
    return keys


def _get(config: ConfigDict, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = value[part]  # type: ignore[index]
    return value


def _check_elements(config: ConfigDict) -> None:
    for key, types in _ELEMENTS.items():
        for element in _get(config, key):  # type: ignore[attr-defined]
            # bool is an int to Python, and no number to anyone else.
            if not isinstance(element, types) or isinstance(element, bool):
                wanted = {str: "names", int: "whole numbers"}.get(types[-1], "numbers")
                raise UserError(f"{key} holds {element!r}; it takes {wanted}")


def _check_names(config: ConfigDict) -> None:
    choices: dict[str, Iterable[str]] = {
        "data.name": SOURCES,
        "student.name": STUDENTS,
        "student.compute_dtype": COMPUTE_DTYPES,
        "teacher.name": TEACHERS,
        "teacher.compute_dtype": COMPUTE_DTYPES,
        "teacher.source": TEACHER_SOURCES,
        "teacher.stage": TEACHER_STAGES,
        "batch.order": ORDERS,
        "teacher.batch.order": ORDERS,
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
    for loss in config.sweep.losses:
        check_choice("sweep.losses", loss, LOSSES)
    serves = MODES[config.distill.mode].serve
    # Only a mode with a choice of heads looks at the key.
    if len(serves) > 1:
        check_choice("distill.serve", config.distill.serve, serves)


def _check_numbers(config: ConfigDict) -> None:
    for key in (*_POSITIVE, *_NOT_NEGATIVE):
        if not math.isfinite(_get(config, key)):  # type: ignore[arg-type]
            raise UserError(f"{key}={_get(config, key)} must be a finite number")
    for key in _POSITIVE:
        if not _get(config, key) > 0:  # type: ignore[operator]
            raise UserError(f"{key}={_get(config, key)} must be greater than 0")
    for key in _NOT_NEGATIVE:
        if not _get(config, key) >= 0:  # type: ignore[operator]
            raise UserError(f"{key}={_get(config, key)} must not be negative")
    for key in _SHARES:
        if not 0 <= _get(config, key) <= 1:  # type: ignore[operator]
            raise UserError(f"{key}={_get(config, key)} must lie in [0, 1]")
    for key in ("sweep.weights", "sweep.seeds", "sweep.data_seeds"):
        for number in _get(config, key):  # type: ignore[attr-defined]
            if not 0 <= number < math.inf:
                raise UserError(f"{key} holds {number}; give finite numbers of at least 0")
    for key in ("sweep.temperatures", "sweep.learning_rates"):
        for number in _get(config, key):  # type: ignore[attr-defined]
            if not 0 < number < math.inf:
                raise UserError(f"{key} holds {number}; give finite numbers greater than 0")
    if "topk" in (config.distill.loss, *config.sweep.losses) and (
        config.distill.top_k >= config.batch.candidates
    ):
        raise UserError(
            f"distill.top_k={config.distill.top_k} takes in all batch.candidates="
            f"{config.batch.candidates} of a request, which tells the loss topk nothing; lower it"
        )
    if config.sweep.learning_rates and not config.optimizer.learning_rate:
        raise UserError("sweep.learning_rates scales optimizer.learning_rate, which is 0")
    for size in config.student.hidden:
        if size < 1:
            raise UserError(f"student.hidden holds {size}; a layer has at least 1 unit")
    for key in ("sweep.modes", "sweep.weights", "sweep.seeds"):
        if not _get(config, key):
            raise UserError(f"{key} is empty; give it at least one value")
    for axis in AXES:
        values = config.sweep[axis]
        if len(set(values)) < len(values):
            raise UserError(f"sweep.{axis}={tuple(values)} names a value twice")


def _check_tasks(config: ConfigDict) -> None:
    known = SOURCES[config.data.name].tasks_of(config.data)
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
    if not (all(0 <= w < math.inf for w in config.value_weights) and any(config.value_weights)):
        raise UserError(
            f"value_weights={tuple(config.value_weights)} must be finite, not negative, nor all 0"
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
