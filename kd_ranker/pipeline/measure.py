"""Measuring trained rankers: from their parameters to the rows of a run's tables."""

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import FrozenConfigDict

from kd_ranker.batch import EvaluationBatch, FeatureSpec, abstract_items, empty_batch
from kd_ranker.batches.cutting import batch_size, evaluation_batches
from kd_ranker.distillation.modes import MODES
from kd_ranker.evaluation import baselines, request_files, results, saving, setting_names
from kd_ranker.evaluation.evaluate import PerRequest, Plan, Ranker, RankerSums, evaluate, make_serve
from kd_ranker.evaluation.metrics.calibration import calibration
from kd_ranker.evaluation.metrics.registry import METRICS, summarize
from kd_ranker.evaluation.metrics.registry import curves as metric_curves
from kd_ranker.evaluation.request_files import PerRequestByRanker, RankerKey
from kd_ranker.evaluation.results import Row
from kd_ranker.evaluation.whole import Measurable, measurable
from kd_ranker.manifest import Provenance
from kd_ranker.models.model import build_model
from kd_ranker.models.student import STUDENTS
from kd_ranker.models.teacher import TEACHERS
from kd_ranker.pipeline.job import TrainingJob
from kd_ranker.pipeline.trained import served
from kd_ranker.progress import Bar
from kd_ranker.rivals import registry
from kd_ranker.rivals.registry import Rival
from kd_ranker.training import specs
from kd_ranker.training.mapping import own_devices
from kd_ranker.training.state import States, select_run, steps_of_runs

_NOT_COUNTED = float("nan")


class SplitTables(NamedTuple):
    """The findings of a measurement: rows of the tables of a run, and more by ranker."""

    rows: list[Row]
    curves: list[Row]
    calibration: list[Row]
    each: dict[RankerKey, PerRequest]  # the contribution of each request; only of the test split


def measure(
    job: TrainingJob,
    split: str,
    states: States = (),
    *,
    serves: Mapping[str, Collection[str]] | None = None,
    with_references: bool = False,
    rivals: Sequence[Rival] = (),
    limit: int = 0,
    started_with_scores: bool = False,
) -> SplitTables:
    """Measure the teacher, then the trained students by run and head, in one pass.

    Args:
      job: the job of the students, or of the teacher.
      split: the requests to read, "validation" or "test".
      states: the trained states of the job's stacks; () measures only the teacher of students.
      serves: the heads of each run to measure; None takes all of all runs.
      with_references: whether to measure the references, too.
      rivals: those to measure as well, among the references.
      limit: how many requests an evaluation during training reads, which omits FLOPs and the bar;
        0 takes `config.evaluation.limit`.
      started_with_scores: whether the students started from a ranker that needs the final ranker's
        scores, so that they need them too.
    """
    if job.runs:
        teacher = job.live_teacher.ranker if job.live_teacher else None
    else:
        teacher = _trained_teacher(job, states)
        states = ()
    if serves is None:
        trained = job.runs if states else {}
        serves = {name: MODES[config.distill.mode].serve for name, config in trained.items()}
    students = [*_students(job, states, serves)]
    rankers = [student.ranker for student in students]
    references: tuple[str, ...] = ()
    if with_references:
        references = _known_references(job, rivals)
        ranker = baselines.baseline_ranker(job.lists, tuple(rival.name for rival in rivals))
        rankers.append(ranker._replace(serves=references))
    with job.progress.phase(split, quiet=bool(limit)):
        teacher_sums, ranker_sums = _evaluate_split(job, split, teacher, rankers, rivals, limit)

    signal = "probability" if teacher else job.dataset.spec.teacher_signal
    flops = {} if limit else _flops(job, serves)
    builder = _TableBuilder(job, split, signal, flops)
    # A teacher from elsewhere has neither a seed nor a step.
    seed, step = None, None
    if job.teacher or not job.runs:
        config = job.teacher.config if job.teacher else job.config
        seed, step = config.seed, config.teacher.train.steps
    row = builder.start("teacher", results.TEACHER) | {"seed": seed, "step": step}
    builder.add(row, teacher_sums, None)
    # The references, if any, are the last ranker.
    for student, sums_of_head in zip(students, ranker_sums, strict=False):
        config = job.runs[student.name]
        needs_scores = started_with_scores or specs.needs_scores(config)
        for serve in serves[student.name]:
            row = builder.start("student", student.name, serve)
            row |= setting_names.setting_of(config)
            row |= {
                "step": student.non_finite_step or student.last_step,
                "needs_scores": needs_scores,
            }
            if student.non_finite_step:
                builder.tables.rows.append(row | {"non_finite_step": student.non_finite_step})
            else:
                builder.add(row, sums_of_head[serve], teacher_sums)
    rival_of_name = {rival.name: rival for rival in rivals}
    for name in references:
        row = builder.start("reference", name) | {"seed": seed}
        if name in rival_of_name:
            rival = rival_of_name[name]
            row |= {"needs_scores": rival.needs_scores} | builder.costs(rival.operations)
        builder.add(row, ranker_sums[-1][name], teacher_sums)
    return builder.tables


def _trained_teacher(job: TrainingJob, states: States) -> Ranker:
    """The ranker of a teacher's job."""
    (stack,) = job.trainees.stacks
    (state,) = states
    serve = make_serve(stack.train_spec.model, stack.train_spec.mode)
    return Ranker(serve, select_run(state.parameters, 0))


def _known_references(job: TrainingJob, rivals: Sequence[Rival]) -> tuple[str, ...]:
    """The names of the baselines that the dataset can provide, and of the rivals."""
    splits = [job.dataset.columns[name] for name in ("validation", "test")]
    known = baselines.known_baselines([columns for columns in splits if len(columns)], job.lists)
    return (*known, *(rival.name for rival in rivals))


class _Student(NamedTuple):
    """A trained student."""

    name: str
    ranker: Ranker
    last_step: int
    non_finite_step: int  # at which its loss stopped being finite, or 0


def _students(
    job: TrainingJob, states: States, serves: Mapping[str, Collection[str]]
) -> Iterator[_Student]:
    """Yield the students that `serves` names, in the order of the stacks; none without states."""
    if not states:
        return
    for stack, state in zip(job.trainees.stacks, states, strict=True):
        last_steps = np.asarray(steps_of_runs(state, stack.hyperparameters))
        non_finite_steps = np.asarray(state.non_finite_step)
        model = stack.train_spec.model
        serve = make_serve(model, stack.train_spec.mode)
        # On the host, where a run is a view: JAX would compile a program for each leaf.
        on_host = jax.device_get(state.parameters)
        for index, name in enumerate(stack.names):
            if name in serves:
                parameters = select_run(on_host, index)
                parameters = served(model, parameters, job.trainees.devices[0].platform)
                ranker = Ranker(serve, parameters, serves=serves[name])
                yield _Student(name, ranker, int(last_steps[index]), int(non_finite_steps[index]))


def _evaluate_split(
    job: TrainingJob,
    split: str,
    teacher: Ranker | None,
    rankers: Sequence[Ranker],
    rivals: Sequence[Rival],
    limit: int,
) -> tuple[RankerSums, list[dict[str, RankerSums]]]:
    """`evaluate` on the requests of a split."""
    config = job.config
    dataset = job.dataset
    columns = dataset.columns[split]
    has_bar = not limit
    largest = max(len(split_columns) for split_columns in dataset.columns.values())
    requests = batch_size(config.evaluation.requests, largest)
    limit = limit or config.evaluation.limit
    keys = registry.order_keys(rivals, dataset, split) if rivals else None
    # A live teacher scores all candidates.
    by_logs = Measurable(None, False)
    if not teacher:
        by_logs = measurable(columns, config.value_weights)
    batches: Iterable[EvaluationBatch] = evaluation_batches(
        dataset,
        split,
        requests=requests,
        candidates=config.funnel.retrieved,
        limit=limit,
        measured=by_logs.requests,
        rivals=keys,
    )
    sharded = config.parallel.tables == "sharded"
    plan = Plan(
        config.value_weights,
        config.funnel.shown,
        ks=job.curve_ks,
        keep=split == "test",
        devices=job.trainees.devices if sharded else own_devices(job.trainees.devices),
        sharded=sharded,
        are_partly_scored=by_logs.are_partly_scored,
        labels_beyond_shown=bool((columns.counts.shown > config.funnel.shown).any()),
    )
    stored = len(columns)
    with job.progress.bar(
        split, min(limit or stored, stored), "request", hidden=not has_bar, leave=False
    ) as bar:
        return evaluate(teacher, rankers, _counted(batches, bar), dataset.items, plan)


def _counted(batches: Iterable[EvaluationBatch], bar: Bar) -> Iterator[EvaluationBatch]:
    """Yield batches, and add the requests of each to a bar once the next one is wanted."""
    for batch in batches:
        yield batch
        bar.update(int(np.asarray(batch.request_mask).sum()))


class _TableBuilder:
    """Adds the rows of one ranker after the other to the tables of a split.

    Attributes:
      tables: those made so far.
    """

    def __init__(self, job: TrainingJob, split: str, signal: str, flops: Mapping[RankerKey, float]):
        """Start with no rows; `signal` is what the teacher gives, `flops` are per candidate."""
        self.tables = SplitTables([], [], [], {})
        self._job = job
        self._split = split
        self._signal = signal
        self._flops = flops

    def start(self, role: str, run: str, serve: str = "user") -> Row:
        """Return the part of a row that names the ranker, with its costs."""
        row: Row = {
            "dataset": self._job.config.data.name,
            "split": self._split,
            "role": role,
            "run": run,
            "serve": serve,
        }
        return row | self.costs(self._flops.get((run, serve), _NOT_COUNTED))

    def costs(self, flops: float) -> Row:
        """Return the columns of costs of a ranker with these FLOPs per candidate."""
        teacher_flops = self._flops.get((results.TEACHER, "user"), _NOT_COUNTED)
        return {"flops_per_candidate": flops, "cost_ratio": flops / teacher_flops}

    def add(self, row: Row, ranker_sums: RankerSums, teacher: RankerSums | None) -> None:
        """Add a ranker; `teacher` is None for the teacher itself."""
        tasks = self._job.dataset.spec.tasks
        report_at = self._job.report_at
        only_order = row["role"] == "reference" and row["run"] != "oracle"
        teacher_sums = teacher.sums if teacher else None
        numbers = summarize(
            ranker_sums.sums, teacher_sums, tasks, report_at, self._signal, only_order
        )
        self.tables.rows.append(row | numbers)
        if not ranker_sums.each.sums:
            return
        ranker: Row = {"run": row["run"], "serve": row["serve"]}
        self.tables.each[str(row["run"]), str(row["serve"])] = ranker_sums.each
        self._add_curves(ranker, ranker_sums, numbers)
        # Positions, and some references, order candidates without predicting probabilities.
        gives_order = row["role"] == "teacher" and self._signal != "probability"
        if not (only_order or gives_order):
            for bin_row in calibration(ranker_sums.sums, tasks):
                self.tables.calibration.append(ranker | bin_row)

    def _add_curves(
        self, ranker: Row, ranker_sums: RankerSums, numbers: Mapping[str, float]
    ) -> None:
        """Add the points of the config, those that reach a target, and others between them."""
        tasks = self._job.dataset.spec.tasks
        report_at = self._job.report_at
        curves = metric_curves(ranker_sums.sums, tasks)
        reached = [numbers[name] for name in METRICS["passed_for"].columns(tasks, report_at)]
        ks = [*report_at.ks, *(int(k) for k in reached if np.isfinite(k))]
        retrieved = next(iter(curves.values())).size
        for k in request_files.spaced_ks(retrieved, ks, spaced=150):
            values = {name: float(curve[k - 1]) for name, curve in curves.items()}
            self.tables.curves.append(ranker | {"k": k} | values)


def _flops(job: TrainingJob, serves: Mapping[str, Collection[str]]) -> dict[RankerKey, float]:
    """FLOPs per candidate of a job's teacher, and of students for the heads that a choice reads."""
    spec = job.dataset.spec
    flops = {(results.TEACHER, "user"): teacher_flops(job)}
    for name, choices in serves.items():
        config = job.runs[name]
        mode = MODES[config.distill.mode]
        student = FrozenConfigDict(config.student)
        for serve in choices:
            heads = saving.heads_read(mode.serve[serve], mode.heads_per_task * len(spec.tasks))
            flops[name, serve] = _flops_of("student", student, spec, heads, config.funnel.retrieved)
    return flops


# A sweep needs the same numbers on each split and in each cohort, and each is a compilation.
@functools.lru_cache(maxsize=256)
def _flops_of(
    role: str, config: FrozenConfigDict, spec: FeatureSpec, heads: int, retrieved: int
) -> float:
    """FLOPs per candidate of the compiled model that a section of a config describes.

    They are those of one request with `retrieved` candidates.
    """
    module = {"student": STUDENTS, "teacher": TEACHERS}[role][config.name]
    model, init = build_model(module, spec, heads, config)
    # Shapes are enough to count, without the optimizer's slots.
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), 0))
    serve = make_serve(model, MODES["none"])
    inputs = shapes, empty_batch(spec, 1, retrieved), abstract_items(spec)
    return saving.flops(lambda *arrays: serve(*arrays).probability, *inputs) / retrieved


def teacher_flops(job: TrainingJob) -> float:
    """FLOPs per candidate of a job's teacher.

    For a teacher that was trained elsewhere, and in the job of a teacher, they are
    `config.teacher.flops_per_candidate`, or if that is 0 those of the model in `config.teacher`.
    """
    config = (job.teacher or job).config.teacher
    spec = job.dataset.spec
    if config.flops_per_candidate and not job.teacher:
        return float(config.flops_per_candidate)
    retrieved = job.config.funnel.retrieved
    return _flops_of("teacher", FrozenConfigDict(config), spec, len(spec.tasks), retrieved)


def write_measured(
    job: TrainingJob, workdir: Path, owner: Provenance, *splits: SplitTables
) -> None:
    """Write the tables of a run: rows of all splits, curves and calibration of the last.

    `owner` has the provenance of the rankers.
    """
    tasks = job.config.tasks
    last = splits[-1]
    files: dict[str, str | bytes] = {}
    if last.each:
        files |= request_files.request_files(
            PerRequestByRanker(np.array(job.curve_ks), last.each), tasks
        )
        curves = results.curves_columns(tasks)
        files[results.CURVES_FILE] = results.to_csv(last.curves, curves)
        columns = results.CALIBRATION_COLUMNS
        files[results.CALIBRATION_FILE] = results.to_csv(last.calibration, columns)
    rows = [row for split in splits for row in split.rows]
    files[results.FILE] = results.to_csv(rows, results.columns(tasks, job.report_at))
    results.write_tables(workdir, files, owner)
    logging.info("wrote %s", workdir / results.FILE)
