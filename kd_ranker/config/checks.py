"""Checks of a config before anything long begins: each fault is one line, with its remedy."""

import difflib
import itertools
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool
from ml_collections import ConfigDict

from kd_ranker.config.key import FINITE, Bound, Key, TermNames
from kd_ranker.config.keys import JOIN, KEYS, PLAN
from kd_ranker.config.schema import NAMED_AXES, axis_of, keys_of, sweepable, value_of, ways
from kd_ranker.distillation.losses import LOSSES
from kd_ranker.distillation.modes import MODES
from kd_ranker.errors import UserError, check_choice
from kd_ranker.requests.columns import Columns, Counts, slices
from kd_ranker.requests.records import Dataset
from kd_ranker.sources.registry import SOURCES
from kd_ranker.training import recipes
from kd_ranker.training.mapping import shares

# Signals that only order candidates, with the reason for messages.
_ORDERS = {"stage": "stages are an order"}


def validate(config: ConfigDict, devices: int | None = None) -> None:
    """Raises UserError on the first fault in a config.

    Args:
      config: the config.
      devices: how many there are; None takes those of JAX.
    """
    check_choice("data.name", config.data.name, SOURCES)
    if "://" in config.data.dir:
        raise UserError(
            f"data.dir={config.data.dir}: datasets need a folder of this machine, on a disk or "
            "mounted; name one"
        )
    keys = keys_of(config.data.name)
    for name in _leaves(config, keys):
        if name not in keys:
            raise UserError(f"config key {name!r} does not exist; {_hint(config, name)}")
    _check_values(config, keys.values(), devices)
    for text, way in ways(config).items():
        try:
            _check_values(way, keys.values(), devices)
        except UserError as error:
            raise UserError(f"sweep.ways={text!r}: {error}") from error
    _check_replaced(config)


def _check_values(config: ConfigDict, keys: Iterable[Key], devices: int | None) -> None:
    """Checks all but the ways of a sweep."""
    for key in keys:
        _check_value(key, value_of(config, key.name))
    _check_axes(config)
    _check_part(config)
    _check_distillation(config)
    _check_tasks(config)
    _check_funnel(config)
    _check_costs(config)
    _check_platforms()
    _check_devices(config, jax.device_count() if devices is None else devices)


def check_key(config: ConfigDict, name: str) -> None:
    """Raises UserError unless there is the key or section `name`, written like `train.steps`."""
    section: object = config
    for part in name.split("."):
        if not isinstance(section, ConfigDict) or part not in section:
            raise UserError(f"config key {name!r} does not exist; {_hint(config, name)}")
        section = section[part]


def _hint(config: ConfigDict, name: str) -> str:
    """A guess at what was meant by a key that does not exist."""
    known = [key for key in keys_of(config.data.name) if not key.startswith(axis_of(""))]
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
        return f"did you mean {close[0]!r}?"
    # A key that was put into the wrong section, or into none.
    last = name.rpartition(".")[2]
    if same := [other for other in known if other.rpartition(".")[2] == last and other != name]:
        return f"did you mean {' or '.join(map(repr, same))}?"
    section, path = config, "config"
    for part in name.split(".")[:-1]:
        if not isinstance(section, ConfigDict) or part not in section:
            break
        section, path = section[part], f"{path}.{part}"
    if not isinstance(section, ConfigDict):
        return f"{path} is one value"
    return f"{path} has: {', '.join(sorted(set(section) - {last}))}"


def _leaves(config: ConfigDict, keys: Collection[str], above: str = "") -> Iterator[str]:
    """The names of all values of a config; a section that is a key itself is one value."""
    for part, value in config.items():
        name = f"{above}{part}"
        if isinstance(value, ConfigDict) and name not in keys:
            yield from _leaves(value, keys, f"{name}.")
        else:
            yield name


_WANTED = {str: "names", int: "whole numbers", bool: "truth values", tuple: "tuples"}


def _check_value(key: Key, value: Any) -> None:
    if isinstance(value, (tuple, list)):
        for element in value:
            _check_element(key, key.name, element, key.type)
    elif not isinstance(value, ConfigDict):
        _check_allowed(key, f"{key.name}={value!r}", value, "")


def _check_element(key: Key, holder: str, element: Any, wanted: type) -> None:
    """Checks one element of a tuple; an axis of a key that is a tuple has tuples as elements."""
    types = (int, float) if wanted is float else wanted
    # bool is an int to Python, and no number to anyone else.
    if not isinstance(element, types) or (isinstance(element, bool) and wanted is not bool):
        raise UserError(f"{holder} holds {element!r}; it takes {_WANTED.get(wanted, 'numbers')}")
    if isinstance(element, tuple):
        own = KEYS[key.name.removeprefix(axis_of(""))]
        for part in element:
            _check_element(own, holder, part, own.type)
    else:
        _check_allowed(key, f"{holder} holds {element!r}", element, ", which")


def _check_allowed(key: Key, found: str, value: Any, joint: str) -> None:
    if isinstance(value, str):
        if isinstance(key.allowed, TermNames):
            key.allowed.check(key.name, value)
        elif key.allowed is not None and not isinstance(key.allowed, Bound):
            check_choice(key.name, value, key.allowed)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        for bound in (FINITE, key.allowed):
            if isinstance(bound, Bound) and not bound.holds(value):
                raise UserError(f"{found}{joint} {bound.text}")


def _check_axes(config: ConfigDict) -> None:
    for key in sweepable():
        axis = axis_of(key.name)
        values = value_of(config, axis)
        if not len(values) and key.name in NAMED_AXES:
            raise UserError(f"{axis} is empty; give it at least one value")
        if len(set(values)) < len(values):
            raise UserError(f"{axis}={tuple(values)} names a value twice")
    if config.sweep.whole_repeats and config.sweep.axes.batch.seed:
        raise UserError(
            "sweep.whole_repeats orders the data by sweep.seeds, so sweep.axes.batch.seed has "
            "nothing to vary; leave one out"
        )
    if config.sweep.axes.optimizer.learning_rate and not config.optimizer.learning_rate:
        raise UserError(
            "sweep.axes.optimizer.learning_rate scales the tables' rate along, and "
            "optimizer.learning_rate is 0"
        )


def _check_replaced(config: ConfigDict) -> None:
    keys, of_ways = keys_of(""), ways(config).values()
    for key in sweepable():
        axis = axis_of(key.name)
        values = tuple(value_of(config, axis))
        used = any(tuple(value_of(way, axis)) == values for way in of_ways)
        if not used and values != keys[axis].default:
            raise UserError(
                f"{axis}={values} has no effect, since each of sweep.ways assigns {key.name}; "
                "change those, or set sweep.ways=()"
            )


def _check_part(config: ConfigDict) -> None:
    part = config.sweep.part
    if part not in ("", PLAN, JOIN) and not (part.isascii() and part.isdecimal()):
        raise UserError(
            f"sweep.part={part!r} must be {PLAN}, the number of a cohort, {JOIN}, or empty for all"
        )
    if part and config.launcher != "local":
        raise UserError(
            f"sweep.part={part} with launcher={config.launcher!r}, which does all parts by itself; "
            "leave one out"
        )


def _check_distillation(config: ConfigDict) -> None:
    # Only a mode with a choice of heads looks at the key.
    if len(serves := MODES[config.distill.mode].serve) > 1:
        check_choice("distill.serve", config.distill.serve, serves)
    _check_terms(config)
    axes = config.sweep.axes
    texts = itertools.chain(
        [config.distill.loss], axes.distill.loss, config.distill.terms, *axes.distill.terms
    )
    losses = {text.partition(":")[0] for text in texts}
    sizes = axes.batch.candidates or (config.batch.candidates,)
    for top_k in axes.distill.top_k or (config.distill.top_k,):
        if losses & {"topk", "dftopk"} and top_k >= min(sizes):
            raise UserError(
                f"distill.top_k={top_k} takes in all batch.candidates={min(sizes)} of a request, "
                "which leaves the losses topk and dftopk nothing to learn; lower it"
            )


def _check_terms(config: ConfigDict) -> None:
    distill, axes = config.distill, config.sweep.axes
    choices = axes.distill.terms or (distill.terms,)
    for terms, weights in itertools.product(
        choices, axes.distill.term_weights or (distill.term_weights,)
    ):
        if weights and len(weights) != max(len(terms), 1):
            raise UserError(
                f"distill.term_weights={tuple(weights)} has {len(weights)} numbers for the "
                f"{max(len(terms), 1)} of distill.terms={tuple(terms)}; give one a term"
            )
    for terms in choices:
        if len(set(terms)) < len(terms):
            raise UserError(f"distill.terms={tuple(terms)} names a term twice")
        if terms and axes.distill.loss:
            raise UserError(
                f"sweep.axes.distill.loss changes nothing of distill.terms={tuple(terms)}; vary "
                "sweep.axes.distill.terms"
            )
        name = "distill.terms" if terms else "distill.loss"
        losses = axes.distill.loss or (distill.loss,)
        for texts in [terms] if terms else [(loss,) for loss in losses]:
            if axes.teacher.signal and all(":" in text for text in texts):
                raise UserError(
                    f"sweep.axes.teacher.signal changes nothing of {name}={tuple(texts)}; vary "
                    f"sweep.axes.{name}"
                )


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


def _check_costs(config: ConfigDict) -> None:
    teacher, student = config.costs.teacher, config.costs.student
    given = {
        "costs.student.candidate": student.candidate,
        "costs.student.request": student.request,
        "costs.teacher.request": teacher.request,
    }
    for name, cost in given.items():
        if cost and not teacher.candidate:
            raise UserError(
                f"{name}={cost} is in a unit of your own, and costs.teacher.candidate=0 takes "
                "FLOPs; give that as well"
            )
    sizes = [
        axis_of(key.name)
        for key in sweepable()
        if key.name.startswith("student.") and len(value_of(config, axis_of(key.name))) > 1
    ]
    if student.candidate and sizes:
        raise UserError(
            f"costs.student.candidate={student.candidate} is of one student, and {sizes[0]} has "
            "several; leave it 0, which takes each one's FLOPs in the teacher's unit"
        )


def _check_platforms() -> None:
    try:
        jax.devices()
    # JAX asserts that there is a device, where it knows none of the kind.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition(" (set ")[0] or "there is no such device that JAX can use"
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(
            f"JAX_PLATFORMS={platforms}: {reason}; leave it unset, or set JAX_PLATFORMS=cpu"
        ) from error
    try:
        jax.local_devices(backend="cpu")
    except RuntimeError as error:
        raise UserError(
            "JAX_PLATFORMS omits the CPU, which counts all FLOPs with its compiler; add it, as in "
            "JAX_PLATFORMS=cuda,cpu"
        ) from error


def _check_devices(config: ConfigDict, available: int) -> None:
    if config.parallel.processes and config.parallel.devices:
        raise UserError(
            f"parallel.devices={config.parallel.devices} with parallel.processes: these use all of "
            "their devices; set it to 0"
        )
    if config.parallel.devices > available:
        raise UserError(
            f"parallel.devices={config.parallel.devices}, but there are {available}; 0 takes all"
        )
    devices, members = config.parallel.devices or available, config.parallel.members
    if members and devices % members:
        fitting = [number for number in range(1, devices + 1) if devices % number == 0]
        raise UserError(
            f"parallel.members={members} does not divide the {devices} devices; take one of "
            f"{', '.join(map(str, fitting))}, or 0"
        )
    wanted = {
        "members": members > 1,
        "deterministic": config.parallel.deterministic,
        "tables": config.parallel.tables == "sharded",
        "processes": config.parallel.processes,
    }
    for key in (key for key, is_wanted in wanted.items() if is_wanted):
        if config.parallel.mapping == "pmap":
            raise UserError(
                f"parallel.mapping='pmap' cannot do parallel.{key}={config.parallel[key]!r}; take "
                "'auto' or 'shard_map'"
            )
    _check_requests("teacher.batch.requests", config.teacher.batch.requests, devices)
    # Without a word on members, a sweep's own are spread so that the requests fit.
    if members or config.parallel.mapping == "pmap":
        for requests in config.sweep.axes.batch.requests or (config.batch.requests,):
            _check_requests("batch.requests", requests, devices, max(members, 1))


def check_alone(config: ConfigDict, devices: int | None = None) -> None:
    """Raise UserError if the devices cannot share the batches of a single student.

    See `validate` for the arguments.
    """
    devices = config.parallel.devices or devices or jax.device_count()
    _check_requests("batch.requests", config.batch.requests, devices)


def _check_requests(name: str, requests: int, devices: int, members: int = 1) -> None:
    sharing = devices // members
    if requests % sharing == 0:
        return
    spread = f" with parallel.members={members}" if members > 1 else ""
    fitting = ", ".join(map(str, shares(devices, requests)))
    remedy = f"parallel.members of {fitting}" if members > 1 else "set parallel.devices"
    raise UserError(
        f"{name}={requests} cannot be shared by {devices} devices{spread}; take a multiple of "
        f"{sharing}, or {remedy}"
    )


def check_students(members: Iterable[ConfigDict], orders: Mapping[str, str] = _ORDERS) -> None:
    """Check that students can learn from the losses and signals of their configs.

    Args:
      members: the configs of the students to train.
      orders: signals that only order candidates -> the reason for the message.

    Raises:
      UserError: a student has nothing to learn from, or a loss that needs probabilities has a
        signal that only orders candidates.
    """
    for member in members:
        distill, terms = member.distill, recipes.terms_of(member)
        weighs = distill.weight and any(distill.term_weights or (1,))
        if terms and not distill.user_weight and not weighs:
            key = "distill.term_weights" if distill.weight else "distill.weight"
            raise UserError(
                f"distill.user_weight=0 and {key}=0 leave a student of mode {distill.mode} nothing "
                "to learn from; raise one of them"
            )
        for loss, signal in terms:
            if LOSSES[loss].needs_probabilities and signal in orders:
                name = "distill.terms" if distill.terms else "distill.loss"
                others = sorted(name for name, of in LOSSES.items() if not of.needs_probabilities)
                choices = [*(f"{name}={other}" for other in others), "distill.mode=none"]
                raise UserError(
                    f"{name}={loss} needs the teacher's probabilities, and {orders[signal]}; "
                    f"choose one of: {', '.join(choices)}"
                )


def check_teacher_signals(dataset: Dataset, members: Collection[ConfigDict]) -> None:
    """Check that a dataset holds the signals that students learn from, on some training requests.

    Args:
      dataset: the dataset that they learn from.
      members: the configs of the students, which train on the same data under the same teacher.

    Raises:
      UserError: a loss takes probabilities where the log holds positions; or the log has no
        teacher, no stages or no candidate of a `teacher.stage`, and a student learns from them.
    """
    config = next(iter(members))
    signals = {term.signal for member in members for term in recipes.terms_of(member)}
    counts = dataset.columns["train"].counts
    of_stage = {"shown": counts.shown, "passed": counts.passed - counts.shown}
    for member in members:
        stage = member.teacher.stage
        from_teacher = any(term.signal == "logged" for term in recipes.terms_of(member))
        if from_teacher and stage in of_stage and not of_stage[stage].any():
            raise UserError(
                f"teacher.stage={stage}: in the training requests of {config.data.name}, no "
                f"candidate has {stage} as its furthest stage; choose another one"
            )
    from_log = config.teacher.source == "logged" and "logged" in signals
    if from_log and dataset.spec.teacher_signal == "rank":
        check_students(members, {"logged": f"the log of {config.data.name} holds its positions"})
    logged = _is_logged(dataset.columns["train"])
    if from_log and not logged.any():
        raise UserError(
            f"the signal logged is missing: no training request of {config.data.name} holds "
            "a proper number of its teacher; look at the columns and the version that data.* "
            "names, or choose distill.mode=none"
        )
    missing = [
        f"{task} the weight {weight:g}"
        for task, weight, is_logged in zip(config.tasks, config.value_weights, logged, strict=True)
        if weight and not is_logged
    ]
    if config.teacher.source == "logged" and logged.any() and missing:
        raise UserError(
            f"value_weights gives {', '.join(missing)}, and no training request of "
            f"{config.data.name} holds a proper number of the teacher for it, so the teacher's "
            "value is unknown everywhere; set that weight to 0, or leave the task out of tasks"
        )
    if "stage" in signals and not _stages_differ(counts):
        raise UserError(
            f"the signal stage is constant: all candidates of a request of {config.data.name} "
            "came equally far; choose teacher.signal=logged, or distill.mode=none"
        )


def check_labels(dataset: Dataset) -> None:
    """Raise UserError for a split without any user label."""
    for split, columns in dataset.columns.items():
        shown, labels = columns.counts.shown, columns.labels
        weights = (labels.fields(of, shown[of])["label_weight"] for of in slices(shown))
        if not any((weight > 0).any() for weight in weights):
            raise UserError(
                f"no {split} request of {dataset.spec.dataset} has a user label; give labels of a "
                "positive weight to shown candidates"
            )


def check_teacher_log(config: ConfigDict, dataset: Dataset) -> None:
    """Raise UserError for a teacher that is to learn from probabilities that the log lacks."""
    spec, weight = dataset.spec, config.teacher.log_weight
    if weight and (not spec.teacher_version or spec.teacher_signal == "rank"):
        raise UserError(
            f"teacher.log_weight={weight:g} needs teacher probabilities, which the log of "
            f"{config.data.name} does not hold; leave it at 0"
        )


def _is_logged(columns: Columns) -> Bool[np.ndarray, "T"]:
    """Test each task for a valid probability, in about 1,000 requests spread over the log."""
    some = np.arange(0, len(columns), max(1, len(columns) // 1000))
    scored = columns.candidates.fields(some, columns.counts.scored[some])
    return ~np.isnan(scored["teacher_probability"]).all(axis=0)


def _stages_differ(counts: Counts) -> bool:
    reached = np.stack([counts.shown, counts.passed])
    return bool(((reached > 0) & (reached < counts.retrieved)).any())
