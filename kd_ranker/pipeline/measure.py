"""Measuring trained rankers: from their parameters to the rows of a run's tables."""

import functools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

from kd_ranker.batch import FeatureSpec, abstract_items, empty_batch
from kd_ranker.batches.evaluation import evaluation_batches, num_evaluation_batches
from kd_ranker.distillation.modes import MODES
from kd_ranker.evaluation import cost, kept, references, results, totals
from kd_ranker.evaluation.evaluate import Plan, Ranker, evaluate, make_serve
from kd_ranker.evaluation.kept import Kept
from kd_ranker.evaluation.measured import write_tables
from kd_ranker.evaluation.metrics import METRICS, result_columns
from kd_ranker.evaluation.references import (
    NO_PROBABILITIES,
    Statistics,
    known_references,
    only_order,
    reference_ranker,
)
from kd_ranker.evaluation.results import Row
from kd_ranker.evaluation.totals import Each, Summed
from kd_ranker.manifest import MadeOf
from kd_ranker.models.model import Model, Parameters, build_model
from kd_ranker.models.student import STUDENTS
from kd_ranker.models.teacher import TEACHERS
from kd_ranker.pipeline.job import Job
from kd_ranker.training.placing import first_devices, own_devices

_NOT_COUNTED = float("nan")


class Students(NamedTuple):
    """A trained group of students.

    Attributes:
      names: one per member.
      ranker: how they rank; its parameters are stacked.
      steps: the last step of each member.
      non_finite_step: for each member 0, or the step at which its loss stopped being finite.
    """

    names: tuple[str, ...]
    ranker: Ranker
    steps: tuple[int, ...]
    non_finite_step: tuple[int, ...]

    def only(self, names: Collection[str]) -> "Students":
        """The members with one of these names, in their order here, if any."""
        places = [place for place, name in enumerate(self.names) if name in names]
        parameters = jax.tree.map(lambda leaf: leaf[np.array(places, int)], self.ranker.parameters)
        return Students(
            names=tuple(self.names[place] for place in places),
            ranker=self.ranker._replace(parameters=parameters),
            steps=tuple(self.steps[place] for place in places),
            non_finite_step=tuple(self.non_finite_step[place] for place in places),
        )


class Judge(NamedTuple):
    """The teacher that a measurement compares with.

    Attributes:
      ranker: how it ranks; None where the dataset holds its scores.
      signal: the kind of its scores, one of `batch.TEACHER_SIGNALS`.
      seed: the seed that it was trained with; None for one from elsewhere.
      step: its last step; None for one from elsewhere.
    """

    ranker: Ranker | None
    signal: str
    seed: int | None
    step: int | None


class Measured(NamedTuple):
    """The findings of a measurement.

    Attributes:
      rows: of `results.csv`.
      curves: rows of `curves.csv`.
      calibration: rows of `calibration.csv`.
      each: the contribution of each request, by member and serve name; only of the test split.
    """

    rows: list[Row]
    curves: list[Row]
    calibration: list[Row]
    each: dict[kept.Who, Each]


def _judge(job: Job) -> Judge:
    """The teacher of a job's students."""
    teacher, live = job.teacher, job.live_teacher
    return Judge(
        ranker=live.ranker if live else None,
        signal="probability" if live else job.dataset.spec.teacher_signal,
        seed=teacher.seed if teacher else None,
        step=teacher.step if teacher else None,
    )


def trained_judge(job: Job, ranker: Ranker, step: int) -> Judge:
    """The teacher that a job trains, with `ranker` at `step` of its training."""
    return Judge(ranker, "probability", job.config.seed, step)


def train_statistics(job: Job) -> Statistics:
    """The statistics of a job's training requests, which some references need."""
    return references.train_statistics(
        job.dataset, job.config.value_weights, job.config.funnel.shown, seed=0
    )


def measure(
    job: Job,
    split: str,
    students: Sequence[Students] = (),
    *,
    judge: Judge | None = None,
    serves: Mapping[str, Collection[str]] | None = None,
    statistics: Statistics | None = None,
    limit: int = 0,
    costs: bool = True,
) -> Measured:
    """Measure the teacher, then the students by member and serving choice, in one pass.

    Args:
      job: the job of the students, or of the teacher.
      split: the requests to read, "validation" or "test".
      students: the trained groups of the job's members; without any, only the teacher is measured.
      judge: the teacher; None takes that of the job's students.
      serves: the serving choices of each member; None takes all.
      statistics: those that references use, which are then measured as well.
      limit: how many requests are read at most; 0 takes `config.evaluation.limit`.
      costs: whether to count FLOPs. An evaluation during training omits them, and the bar.
    """
    teacher = judge or _judge(job)
    groups = [
        group.ranker._replace(serves=[serves[name] for name in group.names] if serves else None)
        for group in students
    ]
    referred: tuple[str, ...] = ()
    if statistics is not None:
        splits = [job.dataset.columns[name] for name in ("validation", "test")]
        referred = known_references([of for of in splits if len(of)], statistics)
        groups.append(reference_ranker([statistics])._replace(serves=[referred]))
    of_teacher, of_groups = _summed(job, split, teacher.ranker, groups, limit, costs)
    flops_of_teacher = teacher_flops(job) if costs else _NOT_COUNTED
    measured = Measured([], [], [], {})

    def named(role: str, member: str, serve: str = "user") -> Row:
        dataset = job.config.data.name
        return dict(dataset=dataset, split=split, role=role, member=member, serve=serve)

    row = named("teacher", results.TEACHER) | {"seed": teacher.seed, "step": teacher.step}
    row = results.with_cost(row, flops_of_teacher, flops_of_teacher)
    _add(measured, job, row, of_teacher, None, teacher.signal)
    for group, of_group in zip(students, of_groups, strict=False):
        first = job.members[group.names[0]]
        flops = _student_flops(first, job.dataset.spec) if costs else {}
        for index, name in enumerate(group.names):
            for serve in serves[name] if serves else MODES[first.distill.mode].serve:
                row = named("student", name, serve) | results.made_of(job.members[name])
                row |= {"step": group.steps[index]}
                row = results.with_cost(row, flops.get(serve, _NOT_COUNTED), flops_of_teacher)
                if non_finite_step := group.non_finite_step[index]:
                    measured.rows.append(row | {"non_finite_step": non_finite_step})
                    continue
                _add(measured, job, row, of_group[index][serve], of_teacher, teacher.signal)
    for name in referred:
        row = named("reference", name) | {"seed": teacher.seed}
        _add(measured, job, row, of_groups[-1][0][name], of_teacher, teacher.signal)
    return measured


def _summed(
    job: Job,
    split: str,
    teacher: Ranker | None,
    groups: Sequence[Ranker],
    limit: int,
    bar: bool,
) -> tuple[Summed, list[list[dict[str, Summed]]]]:
    """`evaluate` on the requests of a split."""
    config, dataset = job.config, job.dataset
    requests, limit = config.evaluation.requests, limit or config.evaluation.limit
    batches: Iterable = evaluation_batches(
        dataset, split, requests=requests, candidates=config.funnel.retrieved, limit=limit
    )
    if bar:
        total = num_evaluation_batches(dataset, split, requests=requests, limit=limit)
        batches = tqdm(batches, split, total, leave=False, unit="batch", disable=None)
    sharded = config.parallel.tables == "sharded"
    plan = Plan(
        config.value_weights,
        config.funnel.shown,
        ks=job.kept_ks,
        keep=split == "test",
        devices=(first_devices if sharded else own_devices)(config.parallel.devices),
        sharded=sharded,
    )
    return evaluate(teacher, groups, batches, dataset.items, plan)


def _add(
    measured: Measured,
    job: Job,
    row: Row,
    summed: Summed,
    of_teacher: Summed | None,
    signal: str,
) -> None:
    """Add a ranker's rows of all tables, and the contribution of each request.

    `signal` is that of `summarise`.
    """
    tasks, sums = job.dataset.spec.tasks, summed.sums
    teacher_sums = of_teacher.sums if of_teacher else None
    numbers = totals.summarise(sums, teacher_sums, tasks, job.report_at, signal)
    only_orders = row["member"] in NO_PROBABILITIES
    if only_orders:
        numbers = only_order(numbers)
    measured.rows.append(row | numbers)
    if not summed.each.alone:
        return
    measured.each[str(row["member"]), str(row["serve"])] = summed.each
    who = {"member": row["member"], "serve": row["serve"]}
    curves = totals.curves(sums, tasks)
    passed_for = result_columns(METRICS["passed_for"], tasks, job.report_at)
    needed = [numbers[column] for column in passed_for]
    ks = _sampled_ks(job.report_at.ks, next(iter(curves.values())).size, needed)
    measured.curves.extend(
        who | {"k": k} | {name: float(curve[k - 1]) for name, curve in curves.items()} for k in ks
    )
    # Positions, and some references, order candidates without predicting probabilities.
    if only_orders or (row["role"] == "teacher" and signal == "rank"):
        return
    table = totals.calibration_table(sums)
    measured.calibration.extend(
        who
        | {"task": task, "bin": bin_index}
        | {name: float(of_bins[index, bin_index]) for name, of_bins in table.items()}
        for index, task in enumerate(tasks)
        for bin_index in np.flatnonzero(table["weight"][index]).tolist()
    )


def _sampled_ks(ks: Sequence[int], retrieved: int, needed: Sequence[float]) -> list[int]:
    """The k at which curves are kept: all small ones, then in steps of a few percent.

    They include `ks`, those of the config, and `needed`, those that reach a target.
    """
    spaced = np.unique(np.geomspace(1, retrieved, 150).round().astype(int)).tolist()
    named = [min(k, retrieved) for k in ks]
    return sorted({*spaced, *named, *(int(k) for k in needed if np.isfinite(k))})


def _student_flops(config: ConfigDict, spec: FeatureSpec) -> dict[str, float]:
    """FLOPs per candidate by serving choice, counting only the heads that the choice reads."""
    mode = MODES[config.distill.mode]
    heads = mode.heads_per_task * len(spec.tasks)
    read = {name: cost.heads_read(served, heads) for name, served in mode.serve.items()}
    return {
        name: _flops_of_described(
            "student", config.student.to_json(), spec, number, config.funnel.retrieved
        )
        for name, number in read.items()
    }


# A sweep needs the same numbers on each split and in each cohort, and each is a compilation.
@functools.lru_cache(maxsize=256)
def _flops_of_described(
    role: str, section: str, spec: FeatureSpec, heads: int, retrieved: int
) -> float:
    """`_flops_per_candidate` of the model that a section of a config, as JSON, describes."""
    config = ConfigDict(json.loads(section))
    module = {"student": STUDENTS, "teacher": TEACHERS}[role][config.name]
    model, init = build_model(module, spec, heads, config)
    # Shapes are enough to count, without the optimiser's slots.
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), 0))
    return _flops_per_candidate(model, shapes, spec, retrieved)


def _flops_per_candidate(
    model: Model, parameters: Parameters, spec: FeatureSpec, retrieved: int
) -> float:
    """FLOPs of the compiled model on one request with `retrieved` candidates, per candidate."""
    items = abstract_items(spec)
    serve = make_serve(model, MODES["none"])

    def probability(*arguments: Any) -> Any:
        return serve(*arguments).probability

    return cost.flops(probability, parameters, empty_batch(spec, 1, retrieved), items) / retrieved


def teacher_flops(job: Job) -> float:
    """FLOPs per candidate of a job's teacher.

    For a teacher that was trained elsewhere, and in the job of a teacher, they are
    `config.teacher.flops_per_candidate`, or if that is 0 those of the model in `config.teacher`.
    """
    spec, retrieved = job.dataset.spec, job.config.funnel.retrieved
    if teacher := job.teacher:
        return _flops_per_candidate(teacher.model, teacher.parameters, spec, retrieved)
    if job.config.teacher.flops_per_candidate:
        return float(job.config.teacher.flops_per_candidate)
    section = job.config.teacher.to_json()
    return _flops_of_described("teacher", section, spec, len(spec.tasks), retrieved)


def write_measured(job: Job, workdir: Path, owner: MadeOf, *splits: Measured) -> None:
    """Write the tables of a run, `results.csv` last; see `measured.write_tables`.

    Args:
      job: the job that was measured.
      workdir: the folder to write to.
      owner: the fingerprints of the rankers.
      *splits: what was measured on each split; curves and calibration are those of the last.
    """
    tasks = job.config.tasks
    names = results.columns(tasks, job.report_at)
    measured = splits[-1]._replace(rows=[row for split in splits for row in split.rows])
    files: dict[str, str | bytes] = {}
    if measured.each:
        files |= kept.files(Kept(np.array(job.kept_ks), measured.each), tasks)
        curves = results.curves_columns(tasks)
        files[results.CURVES_FILE] = results.to_csv(measured.curves, curves)
        files[results.CALIBRATION_FILE] = results.to_csv(
            measured.calibration, results.CALIBRATION_COLUMNS
        )
    files[results.FILE] = results.to_csv(measured.rows, names)
    write_tables(workdir, files, owner)
    logging.info("wrote %s", workdir / results.FILE)
