"""Checks of a config before anything long begins: each fault is one line, with its remedy."""

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool
from ml_collections import ConfigDict

from kd_ranker.batches.samplers import SAMPLERS, Sampler
from kd_ranker.config.key import FINITE, Bound, Key, TermNames
from kd_ranker.config.keys import JOIN, KEYS, PLAN
from kd_ranker.config.schema import axis_of, keys_of, sweepable, value_of, ways
from kd_ranker.distillation.losses import LOSSES
from kd_ranker.distillation.modes import MODES
from kd_ranker.errors import UserError, check_choice, check_tasks
from kd_ranker.requests.columns import Columns, slices
from kd_ranker.requests.records import Dataset
from kd_ranker.sources.registry import SOURCES
from kd_ranker.training.recipes import terms_of

# Signals that only order candidates, with the reason for messages.
_ORDERS = {"stage": "stages are an order"}


def _varies_sizes(config: ConfigDict) -> bool:
    axes = [axis_of(key.name) for key in sweepable() if key.name.startswith("student.")]
    return any(len(value_of(config, axis)) > 1 for axis in axes)


def _choices_of_terms(config: ConfigDict) -> Sequence[Sequence[str]]:
    return config.sweep.axes.distill.terms or (config.distill.terms,)


def _losses(config: ConfigDict) -> Iterator[Sequence[str]]:
    """The choices of losses that a config, or its sweep, names: each the texts of its terms."""
    for terms in _choices_of_terms(config):
        losses = config.sweep.axes.distill.loss or (config.distill.loss,)
        yield from [terms] if terms else [(loss,) for loss in losses]


class Rule(NamedTuple):
    """A condition on several keys, or on one that is not a number.

    Attributes:
      broken: config -> true if it does not hold.
      message: the error; it formats values of the config `c`, such as {c.seed}.
    """

    broken: Callable[[Any], Any]
    message: str


_RULES = (
    Rule(
        lambda c: "://" in c.data.dir,
        "data.dir={c.data.dir}: datasets need a folder of this machine, on a disk or mounted; name "
        "one",
    ),
    Rule(
        lambda c: c.data.get("extends") and c.data.split != "time",
        "data.extends needs data.split='time', and it is {c.data.split!r}; leave data.extends out "
        "to read the whole log",
    ),
    Rule(
        lambda c: c.sweep.whole_repeats and c.sweep.axes.batch.seed,
        "sweep.whole_repeats orders the data by sweep.seeds, so sweep.axes.batch.seed has nothing "
        "to vary; leave one out",
    ),
    Rule(
        lambda c: c.sweep.axes.optimizer.learning_rate and not c.optimizer.learning_rate,
        "sweep.axes.optimizer.learning_rate scales the tables' rate along, and "
        "optimizer.learning_rate is 0",
    ),
    Rule(
        lambda c: not re.fullmatch(f"{PLAN}|{JOIN}|[0-9]*", c.sweep.part),
        f"sweep.part={{c.sweep.part!r}} must be {PLAN}, the number of a cohort, {JOIN}, or empty "
        "for all",
    ),
    Rule(
        lambda c: c.sweep.part and c.launcher != "local",
        "sweep.part={c.sweep.part} with launcher={c.launcher!r}, which does all parts by itself; "
        "leave one out",
    ),
    Rule(
        lambda c: len(c.value_weights) != len(c.tasks) or not any(c.value_weights),
        "value_weights={c.value_weights} must have one weight per task of {c.tasks}, not all 0",
    ),
    Rule(
        lambda c: not c.funnel.shown <= c.funnel.passed <= c.funnel.retrieved,
        "funnel.shown={c.funnel.shown}, funnel.passed={c.funnel.passed}, "
        "funnel.retrieved={c.funnel.retrieved}: each stage must be no larger than the one before",
    ),
    Rule(
        lambda c: any(k > c.funnel.retrieved for k in c.funnel.report_at),
        "funnel.report_at={c.funnel.report_at} has a number above "
        "funnel.retrieved={c.funnel.retrieved}",
    ),
    Rule(
        lambda c: (
            not c.costs.teacher.candidate
            and (c.costs.student.candidate or c.costs.student.request or c.costs.teacher.request)
        ),
        "the other costs are in your own unit, and costs.teacher.candidate=0 takes FLOPs; set that "
        "as well",
    ),
    Rule(
        lambda c: c.costs.student.candidate and _varies_sizes(c),
        "costs.student.candidate={c.costs.student.candidate} is of one student, and "
        "sweep.axes.student has several; leave it 0, which takes the FLOPs of each",
    ),
    Rule(
        lambda c: c.sweep.axes.distill.loss and any(_choices_of_terms(c)),
        "sweep.axes.distill.loss changes nothing of distill.terms; vary sweep.axes.distill.terms",
    ),
    Rule(
        # A loss such as "topk:stage" has its own signal.
        lambda c: (
            c.sweep.axes.teacher.signal
            and any(all(":" in text for text in texts) for texts in _losses(c))
        ),
        "sweep.axes.teacher.signal changes nothing of a loss with its own signal, or of terms that "
        "all have one; vary sweep.axes.distill.loss or sweep.axes.distill.terms",
    ),
    Rule(
        lambda c: c.parallel.processes and c.parallel.devices,
        "parallel.devices={c.parallel.devices} with parallel.processes, which use all of their "
        "devices; set it to 0",
    ),
    Rule(
        lambda c: (
            (
                (c.parallel.members > 1 or c.parallel.tables == "sharded")
                or (c.parallel.deterministic or c.parallel.processes)
            )
            and c.parallel.mapping == "pmap"
        ),
        "parallel.mapping='pmap' cannot do parallel.members above 1, parallel.tables='sharded', "
        "parallel.deterministic or parallel.processes; take 'auto' or 'shard_map'",
    ),
)


def validate(config: ConfigDict, devices: int | None = None) -> None:
    """Raises UserError on the first fault in a config, by default with the devices of JAX."""
    keys = check_keys(config)
    _check_platforms()
    available = jax.device_count() if devices is None else devices
    _check_values(config, keys.values(), available)
    for text, way in ways(config).items():
        try:
            _check_values(way, keys.values(), available)
        except UserError as error:
            raise UserError(f"sweep.ways={text!r}: {error}") from error
    _check_replaced(config)


def check_keys(config: ConfigDict) -> dict[str, Key]:
    """Returns the keys of a config by name; raises UserError unless it has just these."""
    check_choice("data.name", config.data.name, SOURCES)
    keys = keys_of(config.data.name)
    leaves = list(_leaves(config, keys))
    for name in leaves:
        if name not in keys:
            raise UserError(f"config key {name!r} does not exist; {_hint(config, name)}")
    if lacking := sorted(keys.keys() - leaves):
        raise UserError(
            f"the config lacks {', '.join(lacking)}; it is that of another version of kd_ranker, "
            "which environment.json of a run names"
        )
    return keys


def _check_values(config: ConfigDict, keys: Iterable[Key], devices: int) -> None:
    """Checks all but the ways of a sweep."""
    for key in keys:
        _check_value(key, value_of(config, key.name))
    check_tasks(config.tasks, SOURCES[config.data.name].tasks_of(config.data))
    for rule in _RULES:
        if rule.broken(config):
            raise UserError(rule.message.format(c=config))
    _check_devices(config, devices)


def check_key(config: ConfigDict, name: str) -> None:
    """Raises UserError unless there is the key or section `name`, written like `train.steps`."""
    try:
        value_of(config, name)
    except (KeyError, TypeError) as error:
        raise UserError(f"config key {name!r} does not exist; {_hint(config, name)}") from error


def _hint(config: ConfigDict, name: str) -> str:
    """A guess at what was meant by a key that does not exist."""
    known = [key for key in keys_of(config.data.name) if not key.startswith(axis_of(""))]
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
        return f"did you mean {close[0]!r}?"
    # A key that was put into the wrong section, or into none.
    last = name.rpartition(".")[2]
    if same := [other for other in known if other.rpartition(".")[2] == last and other != name]:
        return f"did you mean {' or '.join(map(repr, same))}?"
    return "docs/config.md lists the keys"


def _leaves(config: ConfigDict, keys: Collection[str], above: str = "") -> Iterator[str]:
    """The names of all values of a config; a section that is a key itself is one value."""
    for part, value in config.items():
        name = f"{above}{part}"
        if isinstance(value, ConfigDict) and name not in keys:
            yield from _leaves(value, keys, f"{name}.")
        else:
            yield name


_WANTED = {str: "names", int: "whole numbers", bool: "truth values", tuple: "tuples"}


def _check_value(key: Key, value: Any, is_element: bool = False) -> None:
    """Check a value of a key, or an element of its tuple."""
    if isinstance(value, (tuple, list)):
        _check_elements(key, value)
    elif isinstance(value, str):
        if isinstance(key.allowed, TermNames):
            key.allowed.check(key.name, value)
        elif key.allowed is not None and not isinstance(key.allowed, Bound):
            check_choice(key.name, value, key.allowed)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        for bound in (FINITE, key.allowed):
            if isinstance(bound, Bound) and not bound.holds(value):
                found = f" holds {value!r}, which" if is_element else f"={value!r}"
                raise UserError(f"{key.name}{found} {bound.text}")


def _check_elements(key: Key, values: Sequence[Any]) -> None:
    if key.required and not values:
        raise UserError(f"{key.name} is empty; give it at least one value")
    if key.distinct and len(set(values)) < len(values):
        raise UserError(f"{key.name}={tuple(values)} names a value twice")
    types = (int, float) if key.type is float else key.type
    takes = _WANTED.get(key.type, "numbers")
    if key.type is tuple:  # the axis of a key that is a tuple
        key = dataclasses.replace(KEYS[key.name.removeprefix(axis_of(""))], name=key.name)
    for value in values:
        # bool is an int to Python, and no number to anyone else.
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            raise UserError(f"{key.name} holds {value!r}; it takes {takes}")
        _check_value(key, value, is_element=True)


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


def _check_platforms() -> None:
    try:
        jax.devices()
        jax.local_devices(backend="cpu")  # its compiler counts all FLOPs
    # JAX asserts that there is a device, where it knows none of the kind.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition(" (set ")[0] or "there is no such device that JAX can use"
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(
            f"JAX_PLATFORMS={platforms}: {reason}; leave it unset, or name devices that are here "
            "and the CPU, as in JAX_PLATFORMS=cuda,cpu"
        ) from error


def _check_devices(config: ConfigDict, available: int) -> None:
    devices, members = config.parallel.devices or available, config.parallel.members
    if devices > available:
        raise UserError(f"parallel.devices={devices}, but there are {available}; 0 takes all")
    if members and devices % members:
        raise UserError(
            f"parallel.members={members} does not divide the {devices} devices; take a number that "
            "does, or 0"
        )
    _check_requests("teacher.batch.requests", config.teacher.batch.requests, devices)
    # Without a word on members, a sweep's own are spread so that the requests fit.
    if members or config.parallel.mapping == "pmap":
        for requests in config.sweep.axes.batch.requests or (config.batch.requests,):
            _check_requests("batch.requests", requests, devices, max(members, 1))


def check_single(config: ConfigDict, devices: int | None = None) -> None:
    """Raise UserError if the devices cannot share the batches of a single student.

    See `validate` for the arguments.
    """
    devices = config.parallel.devices or devices or jax.device_count()
    _check_requests("batch.requests", config.batch.requests, devices)


def _check_requests(name: str, requests: int, devices: int, members: int = 1) -> None:
    if requests % (sharing := devices // members):
        spread = f" with parallel.members={members}" if members > 1 else ""
        raise UserError(
            f"{name}={requests} cannot be shared by {devices} devices{spread}; take a multiple of "
            f"{sharing}, or change parallel.devices or parallel.members"
        )


def check_students(members: Iterable[ConfigDict], orders: Mapping[str, str] = _ORDERS) -> None:
    """Check that students can learn from the losses and signals of their configs.

    Args:
      members: the configs of the students to train.
      orders: signals that only order candidates -> the reason for the message.

    Raises:
      UserError: a student has nothing to learn from, a wrong number of weights or no such serving
        choice; or a loss that needs probabilities has a signal that only orders candidates.
    """
    for member in members:
        distill, terms, candidates = member.distill, terms_of(member), member.batch.candidates
        serves, weights = MODES[distill.mode].serve, tuple(distill.term_weights)
        # Only a mode with a choice of heads reads the key.
        if len(serves) > 1:
            check_choice("distill.serve", distill.serve, serves)
        if terms and weights and len(weights) != len(terms):
            raise UserError(
                f"distill.term_weights={weights} must have one number per term of "
                f"distill.terms={tuple(distill.terms)}"
            )
        if {term.loss for term in terms} & {"topk", "dftopk"} and distill.top_k >= candidates:
            raise UserError(
                f"distill.top_k={distill.top_k} takes in all batch.candidates={candidates} of a "
                "request, which leaves the losses topk and dftopk nothing to learn; lower it"
            )
        weighs = distill.user_weight or (distill.weight and any(weights or (1,)))
        if terms and not weighs:
            raise UserError(
                f"distill.user_weight=0, distill.weight={distill.weight:g} and "
                f"distill.term_weights={weights} leave a student of mode {distill.mode} nothing to "
                "learn from; raise one of them"
            )
        for loss, signal in terms:
            if LOSSES[loss].needs_probabilities and signal in orders:
                name = "distill.terms" if distill.terms else "distill.loss"
                others = sorted(name for name, of in LOSSES.items() if not of.needs_probabilities)
                raise UserError(
                    f"{name}={loss} needs the teacher's probabilities, and {orders[signal]}; "
                    f"choose {name} of: {', '.join(others)}; or distill.mode=none"
                )


def check_teacher_signals(dataset: Dataset, members: Collection[ConfigDict]) -> None:
    """Check that a dataset holds the signals that students learn from, on some training requests.

    Args:
      dataset: the dataset that they learn from.
      members: the configs of the students, which train on the same data under the same teacher.

    Raises:
      UserError: a loss takes probabilities where the log holds positions; or the log has no
        teacher, no stages or no candidate of a `teacher.stage`, and a student learns from them; or
        a sampler needs scores that the log lacks.
    """
    config = next(iter(members))
    name, counts = config.data.name, dataset.columns["train"].counts
    of_stage = {"shown": counts.shown, "passed": counts.passed - counts.shown}
    signals = set()
    for member in members:
        stage, own = member.teacher.stage, {term.signal for term in terms_of(member)}
        if "logged" in own and stage in of_stage and not of_stage[stage].any():
            raise UserError(
                f"teacher.stage={stage}: in the training requests of {name}, no candidate has "
                f"{stage} as its furthest stage; choose another one"
            )
        check_sampler("batch.sampler", member.batch.sampler, dataset)
        signals |= own
    if config.teacher.source == "logged":
        _check_logged(dataset, members, "logged" in signals)
    reached = np.stack([counts.shown, counts.passed])
    if "stage" in signals and not ((reached > 0) & (reached < counts.retrieved)).any():
        raise UserError(
            f"the signal stage is constant: all candidates of a request of {name} came equally "
            "far; choose teacher.signal=logged, or distill.mode=none"
        )


def _check_logged(dataset: Dataset, members: Collection[ConfigDict], is_learned: bool) -> None:
    """Check the logged teacher of students; `is_learned` if any of them learns from its scores."""
    config, logged = next(iter(members)), _is_logged(dataset.columns["train"])
    name, signal = config.data.name, dataset.spec.teacher_signal
    if is_learned and signal != "probability":
        what = {"rank": "positions", "score": "scores"}[signal]
        check_students(members, {"logged": f"the log of {name} holds its {what}"})
    if is_learned and not logged.any():
        raise UserError(
            f"the signal logged is missing: no training request of {name} holds a proper number "
            "of its teacher; look at the columns and the version that data.* names, or choose "
            "distill.mode=none"
        )
    missing = [
        f"{task} the weight {weight:g}"
        for task, weight, is_logged in zip(config.tasks, config.value_weights, logged, strict=True)
        if weight and not is_logged
    ]
    if logged.any() and missing:
        raise UserError(
            f"value_weights gives {', '.join(missing)}, and no training request of {name} holds a "
            "proper number of the teacher for it, so the teacher's value is unknown everywhere; "
            "set that weight to 0, or leave the task out of tasks"
        )


def check_sampler(key: str, name: str, dataset: Dataset) -> None:
    """Raise UserError if a dataset lacks the scores that a sampler, the value of `key`, needs.

    An entry of `SAMPLERS` that is not a `Sampler` is an error too.
    """
    for entry, of in SAMPLERS.items():
        if not isinstance(of, Sampler):
            raise UserError(
                f"SAMPLERS[{entry!r}] is a {type(of).__name__}; make it a `Sampler` with the "
                "function, see `kd_ranker.batches.samplers`"
            )
    if SAMPLERS[name].needs_scores and not _is_logged(dataset.columns["train"]).any():
        others = sorted(name for name, of in SAMPLERS.items() if not of.needs_scores)
        raise UserError(
            f"{key}={name} needs teacher scores, and no training request of "
            f"{dataset.spec.dataset} holds a proper one; log a teacher with log_teacher and set "
            f"teacher.source=logged, or choose {key}={' or '.join(others)}"
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
    check_sampler("teacher.batch.sampler", config.teacher.batch.sampler, dataset)
    spec, weight = dataset.spec, config.teacher.log_weight
    if weight and (not spec.teacher_version or spec.teacher_signal != "probability"):
        raise UserError(
            f"teacher.log_weight={weight:g} needs teacher probabilities, which the log of "
            f"{config.data.name} does not hold; leave it at 0"
        )


def _is_logged(columns: Columns) -> Bool[np.ndarray, "T"]:
    """Test each task for a valid probability, in about 1,000 requests spread over the log."""
    some = np.arange(0, len(columns), max(1, len(columns) // 1000))
    scored = columns.candidates.fields(some, columns.counts.scored[some])
    return ~np.isnan(scored["teacher_probability"]).all(axis=0)
