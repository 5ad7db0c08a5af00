"""Checks of a config before anything long begins: each fault is one line, with its remedy."""

import difflib
import itertools
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Bool
from ml_collections import ConfigDict

from kd_ranker.batches.samplers import SAMPLERS
from kd_ranker.config.keys import JOIN, PLAN, Key
from kd_ranker.config.runs import check_runs, overrides_of_runs
from kd_ranker.config.schema import axis_of, keys_of, range_of, value_of, with_range
from kd_ranker.distillation.losses import LOSSES
from kd_ranker.distillation.modes import MODES
from kd_ranker.distillation.teacher_signal import SCORES
from kd_ranker.errors import UserError, check_choice, check_tasks, command
from kd_ranker.requests.columns import Columns, slices
from kd_ranker.requests.records import Dataset
from kd_ranker.sources.registry import SOURCES
from kd_ranker.training.specs import drops_near_shown, terms_of

# Signals that only order candidates, with the reason for messages.
_ORDERS = {"stage": "stages are an order"}


def _faults(c: ConfigDict) -> Iterator[str]:
    """The faults of several keys together, or of one that is not a number."""
    if "://" in c.data.dir:
        yield f"data.dir={c.data.dir}: datasets need a folder of this machine; name one"
    if c.data.get("extends") and c.data.split != "time":
        yield (
            f"data.extends needs data.split='time', and it is {c.data.split!r}; leave data.extends "
            "out to read the whole log"
        )
    yield from _range_faults(c)
    if c.sweep.search == "optuna" and (c.sweep.halving or c.sweep.part):
        yield (
            "sweep.search='optuna' decides round by round what to train: sweep.halving needs all "
            "settings at once, and sweep.part all cohorts; leave them out"
        )
    if c.sweep.whole_repeats:
        sets_batch_seed = any("batch.seed" in overrides for overrides in overrides_of_runs(c))
        if sets_batch_seed:
            yield (
                "sweep.whole_repeats orders the data by the seed; leave batch.seed out of the runs"
            )
        if c.sweep.halving:
            yield (
                "sweep.whole_repeats trains each repeat by itself, and sweep.halving compares "
                "settings over their repeats; leave one of them out"
            )
    steps = [overrides.get("train.steps", c.train.steps) for overrides in overrides_of_runs(c)]
    if c.sweep.halving and max(c.sweep.halving) >= min(steps):
        yield (
            f"sweep.halving={c.sweep.halving} must be before the last step of every run, and one "
            f"takes {min(steps)} steps; halve earlier, or train longer"
        )
    yield from _profile_faults("train", c.train.profile, max(steps))
    if c.sweep.halving and c.train.early_stopping:
        yield (
            "sweep.halving stops settings and train.early_stopping stops runs; leave one of them "
            "out, as with sweep.halving=()"
        )
    of_teacher = c.teacher.train
    yield from _early_stopping_faults("train", c.train.early_stopping)
    yield from _early_stopping_faults("teacher.train", of_teacher.early_stopping)
    yield from _profile_faults("teacher.train", of_teacher.profile, of_teacher.steps)
    if not re.fullmatch(f"{PLAN}|{JOIN}|[0-9]*", c.sweep.part):
        yield (
            f"sweep.part={c.sweep.part!r} must be {PLAN}, the number of a cohort, {JOIN}, or empty "
            "for all"
        )
    if len(c.value_weights) != len(c.tasks) or not any(c.value_weights):
        yield (
            f"value_weights={c.value_weights} must have one weight per task of {c.tasks}, not all 0"
        )
    yield from _value_faults(c)
    if not c.funnel.shown <= c.funnel.passed <= c.funnel.retrieved:
        yield (
            f"funnel.shown={c.funnel.shown}, funnel.passed={c.funnel.passed}, funnel.retrieved="
            f"{c.funnel.retrieved}: each must be at most the next; raise or lower one"
        )
    if any(k > c.funnel.retrieved for k in c.funnel.report_at):
        yield (
            f"funnel.report_at={c.funnel.report_at} has a number above "
            f"funnel.retrieved={c.funnel.retrieved}; leave that number out"
        )
    serves = {name for mode in MODES.values() for name in mode.serve}
    if c.distill.serve not in serves:
        names = ", ".join(sorted(serves))
        yield f"distill.serve={c.distill.serve!r} does not exist; choose one of: {names}"
    student = c.costs.student
    teacher = c.costs.teacher
    if not teacher.candidate and (student.candidate or student.request or teacher.request):
        yield (
            "costs.student.* or costs.teacher.request is in your own unit, and "
            "costs.teacher.candidate=0 takes FLOPs; set that as well"
        )
    if student.candidate and len(_students(c)) > 1:
        yield (
            f"costs.student.candidate={student.candidate} is of one student, and the runs of the "
            "sweep have several; leave it 0, which takes the FLOPs of each"
        )


def _value_faults(c: ConfigDict) -> Iterator[str]:
    """The faults of tasks that a logged final ranker is to be ranked by, and does not predict."""
    columns = c.data.get("teacher")
    if c.teacher.source != "logged" or not columns or len(c.value_weights) != len(c.tasks):
        return
    for task, weight in zip(c.tasks, c.value_weights, strict=True):
        if weight and not columns.get(task):
            yield (
                f"value_weights gives {task!r} a worth of {weight:g}, and data.teacher has no "
                "column for it, so the final ranker's value is unknown; name its column, or set "
                "its worth to 0"
            )


def _range_faults(c: ConfigDict) -> Iterator[str]:
    """The faults of the ranges of a search."""
    for key in with_range():
        name = range_of(key.name)
        ends = value_of(c, name)
        if not ends:
            continue
        if c.sweep.search == "grid":
            yield (
                f"{name}={ends} is for sweep.search='random' or 'optuna'; set one, or leave the "
                "range out"
            )
        elif len(ends) != 2 or ends[0] >= ends[1]:
            yield f"{name}={ends} must be two numbers, the smaller one first"
        elif key.logarithmic and ends[0] <= 0:
            yield f"{name}={ends} is drawn by its logarithm; begin above 0"


def _early_stopping_faults(section: str, rule: Sequence[int]) -> Iterator[str]:
    if rule and len(rule) != 2:
        yield (
            f"{section}.early_stopping={rule} must be two numbers, the steps between "
            "evaluations and a number of evaluations, as (100, 5); or () for none"
        )


def _profile_faults(section: str, window: Sequence[int], steps: int) -> Iterator[str]:
    """The faults of the steps to trace, of a run that takes `steps`."""
    if not window:
        return
    if len(window) != 2 or window[0] < 1 or window[1] < 0:
        yield (
            f"{section}.profile={tuple(window)} must be the first step, counted from 1, and the "
            "number of steps to trace"
        )
    elif window[0] + window[1] - 1 > steps:
        yield (
            f"{section}.profile={tuple(window)} traces until step {sum(window) - 1}, and the run "
            f"takes {steps}; trace earlier steps"
        )


def _students(config: ConfigDict) -> set[str]:
    """Return the architectures of the runs of a sweep, each as text."""
    architectures = set()
    for overrides in overrides_of_runs(config):
        keys = sorted(key for key in overrides if key.startswith("student."))
        architectures.add(repr([(key, overrides[key]) for key in keys]))
    return architectures


def _device_faults(c: ConfigDict, available: int, single: bool) -> Iterator[str]:
    """The faults of `parallel`, and of batches that the devices cannot share."""
    parallel = c.parallel
    devices = parallel.devices or available
    if parallel.processes and parallel.devices:
        yield (
            f"parallel.processes=True uses all devices, and parallel.devices={parallel.devices} "
            "some of them; set parallel.devices=0"
        )
    needs_shard_map = (
        parallel.runs > 1
        or parallel.tables == "sharded"
        or parallel.deterministic
        or parallel.processes
    )
    if parallel.mapping == "pmap" and needs_shard_map:
        yield (
            "parallel.mapping='pmap' cannot do parallel.runs above 1, parallel.tables="
            "'sharded', parallel.deterministic or parallel.processes; take 'auto' or 'shard_map'"
        )
    if devices > available:
        yield f"parallel.devices={devices}, but there are {available}; 0 takes all"
    if parallel.runs and devices % parallel.runs:
        yield (
            f"parallel.runs={parallel.runs} does not divide the {devices} devices; take a "
            "number that does, or 0"
        )
    shared = [("teacher.batch.requests", c.teacher.batch.requests, devices)]
    if single:
        shared.append(("batch.requests", c.batch.requests, devices))
    # Where a sweep leaves it open, its runs are spread so that the requests fit.
    elif parallel.runs or parallel.mapping == "pmap":
        sharing = devices // max(parallel.runs, 1)
        swept = {
            overrides.get("batch.requests", c.batch.requests) for overrides in overrides_of_runs(c)
        }
        shared += [("batch.requests", requests, sharing) for requests in sorted(swept)]
    for name, requests, number in shared:
        if requests % number:
            yield (
                f"{name}={requests} cannot be shared by {number} devices; take a multiple of "
                f"{number}, or change parallel.devices or parallel.runs"
            )


def validate(config: ConfigDict, devices: int | None = None, single: bool = False) -> None:
    """Raise UserError on the first fault in a config, for a number of devices, or those of JAX.

    If it trains a `single` student, all devices share the requests of a batch.
    """
    available = _num_devices()
    for key in check_keys(config).values():
        key.check(value_of(config, key.name))
    check_runs(config)
    check_tasks(config.tasks, SOURCES[config.data.name].tasks_of(config.data))
    device_faults = _device_faults(config, devices or available, single)
    first_fault = next(itertools.chain(_faults(config), device_faults), None)
    if first_fault is not None:
        raise UserError(first_fault)


def check_keys(config: ConfigDict) -> dict[str, Key]:
    """Return the keys of a config by name; raise UserError unless it has exactly these."""
    if "data.name" not in flatten_dict(config.to_dict(), sep="."):
        raise _lacks(["data.name"])
    check_choice("data.name", config.data.name, SOURCES)
    keys = keys_of(config.data.name)
    # A section that is a key itself is one value.
    values = flatten_dict(config.to_dict(), is_leaf=lambda path, _: ".".join(path) in keys, sep=".")
    for name in values:
        if name not in keys:
            raise _no_key(config, name)
    if lacking := sorted(keys.keys() - values.keys()):
        raise _lacks(lacking)
    return keys


def _lacks(names: Sequence[str]) -> UserError:
    """The error for a config without some keys."""
    return UserError(
        f"the config lacks {', '.join(names)}: it is of another version of kd_ranker; install "
        "the one that environment.json of its run names, or add the keys as in docs/config.md"
    )


def check_key(config: ConfigDict, name: str) -> None:
    """Raise UserError unless there is the key or section `name`, written like `train.steps`."""
    try:
        value_of(config, name)
    except (KeyError, TypeError) as error:
        raise _no_key(config, name) from error


_OLD_KEYS = {
    "sweep.ways": "list the runs of a sweep in a function sweep(config) of the config file",
    "distill.terms": "write the terms into distill.loss, as 'softmax + 0.5 * softmax:stage'",
    "distill.term_weights": "write the weights into distill.loss, as 'bce + 0.5 * softmax:stage'",
    "teacher.signal": "write the signal into distill.loss, as 'softmax:stage'",
    "sweep.group_size": "the number of runs in one program is sweep.cohort_size",
    "parallel.members": "the number of devices to spread runs over is parallel.runs",
}


def _no_key(config: ConfigDict, name: str) -> UserError:
    """The error for a key that does not exist, with a guess at the intended one."""
    if name in _OLD_KEYS:
        return UserError(f"config key {name!r} is of an earlier version; {_OLD_KEYS[name]}")
    known = [key for key in keys_of(config.data.name) if not key.startswith(axis_of(""))]
    guesses = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    # Else a key in the wrong section, or in none.
    if not guesses:
        last = name.rpartition(".")[2]
        guesses = [other for other in known if other.rpartition(".")[2] == last]
    hint = "docs/config.md lists the keys"
    section, _, task = name.rpartition(".")
    if section in ("data.labels", "data.teacher"):
        hint = f"""name all tasks at once: --config.{section}="{{'{task}': 'COLUMN'}}\""""
    elif guesses:
        hint = f"did you mean {' or '.join(map(repr, guesses))}?"
    return UserError(f"config key {name!r} does not exist; {hint}")


def _num_devices() -> int:
    """The number of JAX's devices."""
    try:
        jax.local_devices(backend="cpu")  # its compiler counts all FLOPs
        return jax.device_count()
    # JAX asserts that there is a device, where it knows none of the kind.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition(" (set ")[0] or "there is no such device that JAX can use"
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(
            f"JAX_PLATFORMS={platforms}: {reason}; leave it unset, or name devices that are here "
            "and the CPU, as in JAX_PLATFORMS=cuda,cpu"
        ) from error


def check_students(runs: Iterable[ConfigDict], orders: Mapping[str, str] = _ORDERS) -> None:
    """Raise UserError unless students can learn from the losses and signals of their configs.

    `orders` are the signals that only order candidates, with reasons for the message.
    """
    for run in runs:
        distill = run.distill
        terms = terms_of(run)
        candidates = run.batch.candidates
        serves = MODES[distill.mode].serve
        # Only a mode with a choice of heads reads the key.
        if len(serves) > 1:
            check_choice("distill.serve", distill.serve, serves)
        takes_top_k = any(term.loss in ("topk", "dftopk") for term in terms)
        if takes_top_k and distill.top_k >= candidates:
            raise UserError(
                f"distill.top_k={distill.top_k} takes in all batch.candidates={candidates} of a "
                "request, which leaves the losses topk and dftopk nothing to learn; lower it"
            )
        total_weight = distill.weight * sum(term.weight for term in terms)
        if terms and not distill.user_weight + total_weight:
            raise UserError(
                f"distill.user_weight=0, distill.weight={distill.weight:g} and "
                f"distill.loss={distill.loss!r} leave a student nothing to learn from; raise a "
                "weight"
            )
        _check_unshown_margin(run, orders)
        for term in terms:
            if LOSSES[term.loss].needs_probabilities and term.signal in orders:
                others = sorted(
                    name for name, loss in LOSSES.items() if not loss.needs_probabilities
                )
                raise UserError(
                    f"distill.loss={distill.loss!r}: {term.loss} needs the teacher's "
                    f"probabilities, and {orders[term.signal]}; take one of: "
                    f"{', '.join(others)}, also in the losses of a sweep; or distill.mode=none"
                )


def _check_unshown_margin(run: ConfigDict, orders: Mapping[str, str]) -> None:
    """Raise UserError if the margin of a student has no negatives, or no scores, to act on."""
    margin = f"train.unshown_margin={run.train.unshown_margin:g}"
    if run.train.unshown_margin and not run.train.unshown_weight:
        raise UserError(
            f"{margin} drops unshown negatives, and train.unshown_weight=0 uses none; raise the "
            "weight, or set the margin to 0"
        )
    if not drops_near_shown(run):
        return
    if run.teacher.stage == "shown":
        raise UserError(
            f"{margin} needs the teacher's scores of unshown candidates, and teacher.stage=shown "
            "leaves them out; set teacher.stage to passed or retrieved, or the margin to 0"
        )
    if SCORES in orders:
        raise UserError(
            f"{margin} compares the teacher's probabilities, and {orders[SCORES]}; set the margin "
            "to 0, or log a teacher that was trained here"
        )


def check_teacher_signals(dataset: Dataset, runs: Collection[ConfigDict]) -> None:
    """Check that the training requests of a dataset hold the signals that students learn from.

    Raises:
      UserError: a loss takes probabilities where the log holds positions; or the log has no
        teacher, no stages or no candidate of a `teacher.stage`, and a student learns from them; or
        a sampler needs scores that the log lacks.
    """
    config = next(iter(runs))
    counts = dataset.columns["train"].counts
    num_at_stage = {"shown": counts.shown, "passed": counts.passed - counts.shown}
    signals = set()
    for run in runs:
        stage = run.teacher.stage
        run_signals = {term.signal for term in terms_of(run)}
        if drops_near_shown(run):
            run_signals.add(SCORES)
        if SCORES in run_signals and stage in num_at_stage and not num_at_stage[stage].any():
            raise UserError(
                f"teacher.stage={stage}: in the training requests, no candidate has "
                f"{stage} as its furthest stage; choose another one"
            )
        _check_sampler("batch.sampler", run.batch.sampler, dataset)
        signals |= run_signals
    if config.teacher.source == "logged":
        _check_logged(dataset, runs, SCORES in signals)
    reached = np.stack([counts.shown, counts.passed])
    if "stage" in signals and not ((reached > 0) & (reached < counts.retrieved)).any():
        raise UserError(
            "the signal stage is constant: all candidates of a request came equally far; "
            "learn from scores instead, or choose distill.mode=none"
        )


def _check_logged(dataset: Dataset, runs: Collection[ConfigDict], is_learned: bool) -> None:
    """Check the logged teacher of students; `is_learned` if any of them learns from its scores."""
    config = next(iter(runs))
    signal = dataset.spec.teacher_signal
    is_logged = _is_logged(dataset.columns["train"])
    if is_learned and signal != "probability":
        what = {"rank": "positions", "score": "scores"}[signal]
        check_students(runs, {SCORES: f"the log holds its {what}"})
    if is_learned and not is_logged.any():
        raise UserError(
            "the signal scores is missing: no training request has a proper number of its teacher; "
            "check the teacher's keys in data.*, or set distill.mode=none and "
            "train.unshown_margin=0"
        )
    missing = [
        task
        for task, weight, task_is_logged in zip(
            config.tasks, config.value_weights, is_logged, strict=True
        )
        if weight and not task_is_logged
    ]
    if is_logged.any() and missing:
        raise UserError(
            f"value_weights gives {', '.join(missing)} a weight, and no training request has a "
            "proper number of the teacher for it; set that weight to 0, or leave the task out of "
            "tasks"
        )


def _check_sampler(key: str, name: str, dataset: Dataset) -> None:
    """Raise UserError if a dataset lacks the scores that a sampler, the value of `key`, needs."""
    if SAMPLERS[name].needs_scores and not _is_logged(dataset.columns["train"]).any():
        others = sorted(name for name, sampler in SAMPLERS.items() if not sampler.needs_scores)
        raise UserError(
            f"{key}={name} needs teacher scores, and no training request has a proper one; run "
            f"{command('log_teacher')} and set teacher.source=logged, or set "
            f"{key}={' or '.join(others)}"
        )


def check_labels(dataset: Dataset) -> None:
    """Raise UserError for a split without any user label."""
    for split, columns in dataset.columns.items():
        if not _has_labels(columns):
            raise UserError(
                f"no {split} request has a user label; give labels of a positive weight to shown "
                "candidates"
            )


def _has_labels(columns: Columns) -> bool:
    shown = columns.counts.shown
    for requests in slices(shown):
        weights = columns.labels.fields(requests, shown[requests])["label_weight"]
        if (weights > 0).any():
            return True
    return False


def check_teacher_log(config: ConfigDict, dataset: Dataset) -> None:
    """Raise UserError for a teacher that is to learn from probabilities that the log lacks."""
    _check_sampler("teacher.batch.sampler", config.teacher.batch.sampler, dataset)
    spec = dataset.spec
    weight = config.teacher.log_weight
    if weight and (not spec.teacher_version or spec.teacher_signal != "probability"):
        raise UserError(
            f"teacher.log_weight={weight:g} needs teacher probabilities, which the log does not "
            "hold; leave it at 0"
        )


def _is_logged(columns: Columns) -> Bool[np.ndarray, "T"]:
    """Test each task for a valid probability, in about 1,000 requests spread over the log."""
    requests = np.arange(0, len(columns), max(1, len(columns) // 1000))
    scored = columns.candidates.fields(requests, columns.counts.scored[requests])
    return ~np.isnan(scored["teacher_probability"]).all(axis=0)
