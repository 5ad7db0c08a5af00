"""Train the cohorts of a sweep, here or on a cluster; then test what validation chose."""

import contextlib
import functools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from kd_ranker import manifest
from kd_ranker.cohorts.memory import cohort_size
from kd_ranker.cohorts.plan import TEST, Sweep, open_sweep, read_plan
from kd_ranker.config import checks, schema
from kd_ranker.config.keys import JOIN, PLAN
from kd_ranker.config.runs import common, sweep_runs
from kd_ranker.distillation.modes import MODES
from kd_ranker.errors import UserError
from kd_ranker.evaluation import saving, setting_names
from kd_ranker.manifest import has_provenance as is_measured
from kd_ranker.pipeline import cluster, datasets
from kd_ranker.pipeline.job import Teachers, TrainingJob, make_job
from kd_ranker.pipeline.measure import measure, write_measured
from kd_ranker.pipeline.remote import Place, local_folder, owned, place_of
from kd_ranker.pipeline.tracked import track_results, tracked
from kd_ranker.pipeline.trained import is_run, load_teacher, served_head
from kd_ranker.pipeline.trainees import Trainees, open_trainees
from kd_ranker.pipeline.training import check_job, fit, training_bar
from kd_ranker.progress import Bar, Progress, Show
from kd_ranker.requests.lock import hold
from kd_ranker.rivals import registry
from kd_ranker.rivals.registry import Rival
from kd_ranker.tracking.tracker import Tracker
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.processes import on_first
from kd_ranker.training.specs import TEACHER_STAGES, stopped_runs
from kd_ranker.training.state import States


def train_sweep(config: ConfigDict, workdir: Place, show: Show, progress: Progress) -> None:
    """Train the students of `config.sweep` cohort by cohort and join their results; or do one part.

    See `api.sweep`; the config is valid.
    """
    part = config.sweep.part
    if config.launcher == "ray" or part:
        workdir = local_folder("--workdir", workdir, "is shared by all that train cohorts")
    if part.isdecimal():
        cohorts = train_part(config, Path(workdir), int(part), progress=progress)
        show(f"cohort {part} of {cohorts} is trained")
        return
    with owned(workdir) as folder:
        if not train_all(config, workdir, folder, progress):
            show(f"the sweep in {workdir} is complete; there is nothing to do")
        if part == PLAN:
            cohorts = len(read_plan(folder))
            show(f"cohorts: {cohorts}")
            show(f"numbers: 0-{cohorts - 1}")


def train_part(
    config: ConfigDict,
    workdir: Path,
    number: int,
    held: bool = False,
    progress: Progress | None = None,
) -> int:
    """Train and measure one cohort of a planned sweep; return the number of cohorts.

    Only the folder of the cohort is held. On a cluster the sweep's own process has `held` it.
    """
    sweep, trainees = _open(config, workdir, unchanged=not held)
    sweep.check_planned()
    if number >= len(sweep.plan):
        raise UserError(
            f"sweep.part={number} is no cohort of the sweep in {workdir}; choose a number from 0 "
            f"to {len(sweep.plan) - 1}"
        )
    cohort = trainees.of(sweep.cohorts[number])
    folder = sweep.folders[number]
    job = make_job(cohort, Teachers(cohort.dataset), progress or Progress())
    holding = contextlib.nullcontext() if held else owned(folder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(holding)
        bar = stack.enter_context(training_bar(job.progress, check_job(job)))
        tracker = stack.enter_context(tracked("sweep", config, workdir, workdir, job.runs, True))
        _train_cohort(job, folder, bar, tracker)
    return len(sweep.plan)


def _open(config: ConfigDict, workdir: Path, unchanged: bool = True) -> tuple[Sweep, Trainees]:
    """Open a sweep and its dataset; check that the workdir is free or holds the same sweep."""
    trainees = open_trainees(config, unchanged=unchanged)
    dataset = trainees.dataset.provenance
    # Keys that may differ from those of the sweep in the workdir: those that change no more than
    # how it is tested, joined and reported; and with `sweep.extend` those that add runs.
    free = {*schema.without_influence("report"), "costs", "report", "sweep.rivals"}
    keys_of_runs = {
        *("sweep.runs", "sweep.search", "sweep.draws", "sweep.draw_seed", "sweep.round"),
        "sweep.sampler",
        *(schema.axis_of(key.name) for key in schema.sweepable()),
        *(schema.range_of(key.name) for key in schema.with_range()),
    }
    if not config.sweep.extend:
        free -= keys_of_runs
    workdirs.check(workdir, "sweep", config, dataset, without=sorted(free))
    return open_sweep(config, workdir, dataset), trainees


def train_all(
    config: ConfigDict, place: Place, workdir: Path, progress: Progress, more_follow: bool = False
) -> bool:
    """Do what is left of a sweep at a place; return False if it is complete.

    If `more_follow`, its runs are measured on validation only, as later ones may be chosen.
    """
    sweep, trainees = _open(config, workdir)
    if left_out := len(sweep_runs(config)) - len(sweep.runs):
        progress.show(f"{left_out} new runs are of settings that halving stopped: left out")
    dataset = trainees.dataset
    part = config.sweep.part
    if part == JOIN:
        sweep.check_planned()
    datasets.keep_data_report(dataset, workdir)
    if sweep.is_complete():
        _check_teachers(sweep)
        return False
    teachers = Teachers(dataset)
    first = next(iter(sweep.runs.values()))
    dataset_with_scores = teachers.open(first).dataset
    checks.check_teacher_signals(dataset_with_scores, sweep.runs.values())
    checks.check_labels(dataset_with_scores)
    registry.check(dataset_with_scores, config.sweep.rivals)
    # By the memory that is free: of several processes, one decides.
    size = on_first(
        lambda: cohort_size(config, sweep.runs.values(), dataset_with_scores.spec, trainees.devices)
    )
    sweep = sweep.planned(size)
    # Last, so that an extension counts once its cohorts are known.
    workdirs.write_config(workdir, "sweep", config, dataset.provenance)
    cohorts = _Cohorts(sweep, trainees, teachers, progress)
    with (
        tracked("sweep", config, place, workdir, sweep.runs) as tracker,
        contextlib.ExitStack() as held,
    ):
        # The tracker has the sweep now, so that parts find it.
        if part == PLAN:
            return True
        # Another run may hold only one of the folders.
        for folder in sweep.folders:
            on_first(functools.partial(held.enter_context, hold(folder)))
        if part != JOIN:
            _train_cohorts(config, workdir, cohorts, progress, tracker)
        elif untrained := _untrained(cohorts):
            raise UserError(
                f"{workdir} lacks {len(untrained)} of its {len(sweep.plan)} cohorts: "
                f"{', '.join(map(str, untrained))}; train each by its number, as "
                f"sweep.part={untrained[0]}"
            )
        if more_follow:
            return True
        _test_and_join(sweep, cohorts, tracker)
        track_results(tracker, workdir, "student")
    return True


class _Cohorts:
    """The cohorts of a planned sweep, in order; a pass over them opens each teacher when needed."""

    def __init__(self, sweep: Sweep, trainees: Trainees, teachers: Teachers, progress: Progress):
        self._trainees = [trainees.of(runs) for runs in sweep.cohorts]
        self._folders = sweep.folders
        self._teachers = teachers
        self._progress = progress

    def __len__(self) -> int:
        return len(self._trainees)

    def __iter__(self) -> Iterator[tuple[TrainingJob, Path]]:
        """Yield the job of each cohort, and its folder."""
        for trainees, folder in zip(self._trainees, self._folders, strict=True):
            yield make_job(trainees, self._teachers, self._progress), folder


def _check_teachers(sweep: Sweep) -> None:
    """Raise UserError if a teacher's workdir holds another one than a complete sweep learned from.

    Logged scores have no workdir, and a teacher that is gone cannot be compared.
    """
    versions: dict[str, str] = {}  # by workdir, as cohorts share teachers
    for cohort, folder in zip(sweep.cohorts, sweep.folders, strict=True):
        config = common(cohort)
        workdir = config.teacher.workdir
        if not workdir:
            continue
        trained_under = manifest.read(folder, "start the sweep again")["provenance"]["teacher"]
        if workdir not in versions:
            exists = is_run(place_of(workdir))
            versions[workdir] = load_teacher(config).version if exists else trained_under
        if versions[workdir] != trained_under:
            raise UserError(
                f"{sweep.workdir} holds a sweep under the teacher {trained_under}, and {workdir} "
                f"holds {versions[workdir]}; name the first one in teacher.workdir, or use another "
                "--workdir"
            )


def _train_cohorts(
    config: ConfigDict, workdir: Path, cohorts: _Cohorts, progress: Progress, tracker: Tracker
) -> None:
    """Train the cohorts one after the other, or first on a cluster, as one task each."""
    # All are checked before the first one trains.
    steps = 0
    for job, _ in cohorts:
        steps += check_job(job)
    if config.launcher == "ray":
        # This process holds the workdir, so the others do not.
        train = functools.partial(train_part, held=True)
        calls = [(config, workdir, number) for number in _untrained(cohorts)]
        cluster.call_on_cluster(config, train, calls, "cohorts")
    with training_bar(progress, steps) as bar:
        for number, (job, folder) in enumerate(cohorts, start=1):
            progress.show(f"cohort {number} of {len(cohorts)}")
            _train_cohort(job, folder, bar, tracker)


def _untrained(cohorts: _Cohorts) -> list[int]:
    """The numbers of the cohorts that are not trained and measured on validation."""
    return [
        number
        for number, (job, folder) in enumerate(cohorts)
        if not is_measured(folder, job.provenance)
    ]


def _train_cohort(job: TrainingJob, folder: Path, bar: Bar, tracker: Tracker) -> None:
    """Train the runs of a cohort and measure them on validation, if that is not done."""
    if is_measured(folder, job.provenance):
        bar.update(job.config.train.steps)
        return
    states = fit(job, folder, bar, tracker)
    started_with_scores = workdirs.started_with_scores(folder, job.config)
    # One head shows where a run was when halving stopped it.
    stopped = stopped_runs(job.trainees.stacks, states) if job.config.sweep.halving else set()
    serves = {
        name: [served_head(run)] if name in stopped else list(MODES[run.distill.mode].serve)
        for name, run in job.runs.items()
    }
    measured = measure(
        job, "validation", states, serves=serves, started_with_scores=started_with_scores
    )
    write_measured(job, folder, job.provenance, measured)


def _test_and_join(sweep: Sweep, cohorts: _Cohorts, tracker: Tracker) -> None:
    """Measure on test what validation chose, and write the tables of the whole sweep."""
    chosen = setting_names.chosen(sweep.validation())
    tested = sweep.with_any(chosen)
    teachers_done = set[str]()  # those under which the references were measured
    for job, folder in cohorts:
        if folder in tested:
            serves = {name: chosen[name] for name in job.runs if name in chosen}
            teacher = job.provenance["teacher"]
            with_references = teacher not in teachers_done
            _test_cohort(job, folder, serves, with_references, tracker)
            teachers_done.add(teacher)
    sweep.join(tested)


def _test_cohort(
    job: TrainingJob,
    folder: Path,
    serves: Mapping[str, Collection[str]],
    with_references: bool,
    tracker: Tracker,
) -> None:
    """Measure the runs that validation chose on the test split, if that is not done.

    `serves` are the chosen heads of each chosen run.
    """
    owner = {**job.provenance, "serves": json.dumps(serves), "references": str(with_references)}
    names = job.config.sweep.rivals if with_references else ()
    if names:
        owner["rivals"] = ",".join(names)
    if is_measured(folder / TEST, owner):
        return
    students: States = ()
    if serves:
        students, step = job.restored(folder)
        steps = max(job.trainees.steps_of(run) for run in serves)
        if step < steps:  # the newest checkpoint is damaged, and an older one was restored
            with training_bar(job.progress, job.config.train.steps) as bar:
                students = fit(job, folder, bar, tracker)
    measured = []
    rivals = list[Rival]()
    if with_references:
        # Validation chooses among the references too.
        rivals = fitted_rivals(job, names)
        measured.append(measure(job, "validation", with_references=True, rivals=rivals))
        best = saving.best_of_families(measured[0].rows)
        rivals = [rival for rival in rivals if rival.name in best]
    tested = measure(
        job,
        "test",
        students,
        serves=serves,
        with_references=with_references,
        rivals=rivals,
        started_with_scores=workdirs.started_with_scores(folder, job.config),
    )
    write_measured(job, folder / TEST, owner, *measured, tested)


def fitted_rivals(job: TrainingJob, names: Sequence[str]) -> list[Rival]:
    """Fit the rivals of a sweep to the training requests, with each of their settings."""
    if not names:
        return []
    config = job.config
    logged = config.teacher.source == "logged"
    task = registry.Task(
        job.dataset,
        config.value_weights,
        config.funnel.shown,
        scored=TEACHER_STAGES[config.teacher.stage] if logged else None,
    )
    with job.progress.phase("rivals"):
        return registry.fit(task, names)
