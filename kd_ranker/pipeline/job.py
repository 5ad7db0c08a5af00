"""What a command trains, and what it finds trained.

A command makes its `TrainingJob` once from a config. The functions that train and measure take it
instead of a config and values from that. The teacher is opened at first use and stays open.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from kd_ranker import manifest
from kd_ranker.cohorts.memory import spread
from kd_ranker.cohorts.plan import Sweep, open_sweep
from kd_ranker.config import checks, schema
from kd_ranker.config.runs import Runs, common
from kd_ranker.embedding.lookup import without_slots
from kd_ranker.embedding.row_optimizers import TPU_LANES
from kd_ranker.errors import UserError, check_choice, command
from kd_ranker.evaluation import setting_names
from kd_ranker.evaluation.baselines import Lists, lists_of
from kd_ranker.evaluation.evaluate import Ranker, make_serve
from kd_ranker.evaluation.metrics.metric import ReportAt
from kd_ranker.evaluation.metrics.target import TARGET
from kd_ranker.evaluation.request_files import spaced_ks
from kd_ranker.manifest import Provenance
from kd_ranker.models.model import Model, Parameters
from kd_ranker.pipeline import datasets
from kd_ranker.pipeline.cluster import register
from kd_ranker.pipeline.remote import Place, fetched, place_of
from kd_ranker.progress import Progress
from kd_ranker.requests.records import Dataset
from kd_ranker.training import checkpoints, specs
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.mapping import DeviceMap, first_devices, put
from kd_ranker.training.program import abstract_states
from kd_ranker.training.specs import Stack
from kd_ranker.training.state import States, select_run

TRAIN_TEACHER = f"{command('train_teacher')}, {datasets.SAME_FLAGS}"
_RUNS = ("train_teacher", "train", "sweep")


@dataclasses.dataclass(frozen=True)
class TrainingJob:
    """Rankers that train together, and all that training and measuring them reads."""

    config: ConfigDict  # the values that its runs have in common
    runs: Runs  # the configs of the students; none in the job of a teacher
    built: Dataset  # as it was built
    devices: Sequence[jax.Device]  # of all processes
    # The teacher that was opened last, and the dataset with its scores, by `teacher.workdir` and
    # `teacher.stage`. The jobs of a sweep share it, so those of one teacher should be neighbors.
    last_teacher: dict[tuple[str, str], tuple["TrainedRanker | None", Dataset]] = dataclasses.field(
        default_factory=dict
    )
    progress: Progress = dataclasses.field(default_factory=Progress)

    def of(self, runs: Runs) -> "TrainingJob":
        """The job of other students on the same dataset, which share batches and a teacher."""
        return dataclasses.replace(self, config=common(runs), runs=runs)

    @property
    def role(self) -> Literal["teacher", "student"]:
        """The role of its rankers in the results: "teacher" or "student"."""
        return "student" if self.runs else "teacher"

    @property
    def _read(self) -> tuple["TrainedRanker | None", Dataset]:
        """The teacher, and the dataset with its scores; UserError if one is missing."""
        config, dataset, teacher = self.config, self.built, None
        live, key = config.teacher.source == "live", (config.teacher.workdir, config.teacher.stage)
        if self.runs and key not in self.last_teacher:
            if live or config.teacher.workdir:
                teacher = load_teacher(config)
                if not live:
                    dataset = datasets.dataset_under(config, dataset, teacher.version)
            elif not dataset.spec.teacher_version:
                raise UserError(
                    f"{config.data.name} holds no teacher probabilities; name a teacher in "
                    f"teacher.workdir and make them with: {datasets.LOG_TEACHER}"
                )
            self.last_teacher.clear()
            self.last_teacher[key] = teacher, dataset
        return self.last_teacher[key] if self.runs else (None, dataset)

    @property
    def teacher(self) -> "TrainedRanker | None":
        """The final ranker of the students; None where the dataset's logs replace it."""
        return self._read[0]

    @property
    def dataset(self) -> Dataset:
        """The dataset with the scores of a logged teacher."""
        return self._read[1]

    @property
    def trainee(self) -> ConfigDict:
        """The section on batches, optimizer and steps: `config`, or in a teacher's job its own."""
        return self.config if self.runs else self.config.teacher

    @property
    def live_teacher(self) -> "TrainedRanker | None":
        """The teacher if it scores the batches; None if the dataset holds its probabilities."""
        return self.teacher if self.config.teacher.source == "live" else None

    @functools.cached_property
    def stacks(self) -> list[Stack]:
        """The stacks that one program trains."""
        # Without the teacher, which a trained student does not need.
        spec = self.built.spec
        if self.runs:
            return specs.student_stacks(self.runs, spec)
        return [specs.teacher_stack(self.config, spec)]

    @functools.cached_property
    def device_map(self) -> DeviceMap:
        """The mapping of that program, and of the requests of its batches, over the devices."""
        sizes, requests = [len(of.names) for of in self.stacks], self.trainee.batch.requests
        return spread(self.config.parallel, self.devices, sizes, requests)

    @property
    def own(self) -> Provenance:
        """The provenance of its rankers, without those of a teacher and its scores."""
        config = schema.digest_of(self.runs or {"": self.config}, self.role)
        return {"config": config, **self.built.provenance}

    @functools.cached_property
    def provenance(self) -> Provenance:
        """The provenance of the trained rankers, which their checkpoints and tables record."""
        if not self.runs:
            return self.own
        teacher = self.teacher.version if self.teacher else "of the logs"
        return {**self.own, **self.dataset.provenance, "teacher": teacher}

    @functools.cached_property
    def report_at(self) -> ReportAt:
        """The points of curves in `results.csv`, with the funnel's own k and the main target."""
        funnel = self.config.funnel
        return ReportAt(
            ks=sorted({*funnel.report_at, funnel.passed}),
            targets=sorted({*funnel.targets, TARGET}),
        )

    @functools.cached_property
    def kept_ks(self) -> list[int]:
        """The k at which the curves of each test request are kept."""
        return spaced_ks(self.config.funnel.retrieved, self.report_at.ks)

    @functools.cached_property
    def lists(self) -> Lists:
        """The lists of items from the training requests, which are references."""
        weights, shown = self.config.value_weights, self.config.funnel.shown
        return lists_of(self.dataset, weights, shown)

    def restored(self, workdir: Path, provenance: Provenance | None = None) -> tuple[States, int]:
        """Restore the newest checkpoint that can be read, by default of exactly this job.

        Return the states on the host and their step; abstract states and 0 without a checkpoint.
        """
        with checkpoints.open_in(workdir) as saved:
            states = abstract_states(self.stacks)
            return checkpoints.restore(saved, states, None, provenance or self.provenance)


def open_job(
    config: ConfigDict,
    runs: Runs | None = None,
    unchanged: bool = False,
    progress: Progress | None = None,
) -> TrainingJob:
    """Open the dataset of students that train together, or without runs of their teacher.

    With `unchanged`, it is a UserError if its raw files have changed since it was built. Without
    `progress` the job shows only bars.
    """
    built, devices = datasets.dataset_of(config, unchanged), first_devices(config.parallel.devices)
    return TrainingJob(
        common(runs) if runs else config,
        runs or {},
        built,
        devices,
        progress=progress or Progress(),
    )


class TrainedRanker(NamedTuple):
    """A trained ranker."""

    title: str  # a description for people
    job: TrainingJob  # which trained it
    run: str  # its name in a sweep; "" elsewhere
    serve: str  # which of its probabilities it ranks by
    model: Model
    ranker: Ranker  # as the evaluation calls it
    version: str  # a name for its exact weights
    provenance: Provenance  # that its checkpoint records
    needs_scores: bool = False  # whether a student's training needs the final ranker's scores

    def __str__(self) -> str:
        return f"ranker: {self.title}, by its probabilities {self.serve!r}"

    @property
    def config(self) -> ConfigDict:
        """The config that it was trained with."""
        return self.job.runs.get(self.run, self.job.config)

    @property
    def dataset(self) -> Dataset:
        """The dataset that it was trained on, which has its ids, means and deviations."""
        return self.job.built


def is_run(workdir: Place) -> bool:
    """Test whether a workdir holds a run, finished or not."""
    with fetched(workdir, with_checkpoints=False) as folder:
        return (folder / workdirs.CONFIG_FILE).exists()


def config_of(workdir: Place, trust: bool = False) -> ConfigDict:
    """Read the config of the run in a workdir; UserError if it is missing.

    A run may use a loss, a mode or the like that its config file registers. A workdir can come from
    anyone, so the file at `registered_by` is executed only with `trust`. A file that is needed and
    missing, or not trusted, is a UserError.
    """
    with fetched(workdir, with_checkpoints=False) as folder:
        if not (folder / workdirs.CONFIG_FILE).exists():
            raise UserError(
                f"no run at {workdir}: it holds no {workdirs.CONFIG_FILE}; make one with: "
                f"{', '.join(map(command, _RUNS))}"
            )
        config = workdirs.read_config(folder)
    file = config.get("registered_by", "")
    if trust and Path(file).is_file():
        register(file)
    try:
        checks.check_keys(config)
        checks.validate(config, config.parallel.devices or config.parallel.runs or 1)
    except UserError as error:
        if trust:
            register(file)  # a UserError if it is missing
        if trust or not file:
            raise UserError(f"the run at {workdir}: {error}") from error
        raise UserError(
            f"the run at {workdir} needs {file}, which would be executed ({error}); if you trust "
            "that file, add --trust, or trust=True in Python"
        ) from error
    return config


def check_select(config: ConfigDict, workdir: Place, trust: bool) -> None:
    """Raise UserError for a log by `data.sql` that the config of a run names, without `trust`.

    A workdir can come from anyone, and a SELECT can read any file that this process can read.
    """
    sql = " ".join(config.data.get("sql", "").split())
    if sql and not trust:
        raise UserError(
            f"the run at {workdir} reads its log by data.sql, which can read any file of this "
            f"machine ({sql}); if you trust it, add --trust, or trust=True in Python; else name a "
            "log of your own, with data.sql=''"
        )


def open_ranker(
    place: Place,
    run: str = "",
    serve: str = "",
    config: ConfigDict | None = None,
    with_slots: bool = False,
) -> TrainedRanker:
    """Open the ranker of a finished run; that of a student does not need its teacher.

    By default it is the best run of a sweep, with its own head, and without the slots
    of the optimizers of tables. `config` is that of the run, perhaps with another `data.dir`; None
    takes that of `config_of`. A missing or unfinished run or dataset, or a run or head
    that it lacks, is a UserError.
    """
    config = config or config_of(place)
    with fetched(place) as workdir:
        owner = workdirs.read_environment(workdir).get("command")
        if owner not in _RUNS:
            raise UserError(
                f"{place} does not record which command made it, one of {', '.join(_RUNS)}; "
                f"restore its {workdirs.ENVIRONMENT_FILE}, or start that command again with its "
                "flags"
            )
        if run and owner != "sweep":
            raise UserError(f"{place} is of {owner}, and only a sweep has {run!r}; leave --run out")
        job = open_job(config, {"": config} if owner == "train" else None)
        workdirs.check_dataset(workdir, job.built.provenance)
        remedy = f"finish it with: {command(owner)}, with the flags that started it"
        manifest.check(workdir, remedy)
        title, folder = f"the {job.role} at {place}", workdir
        if owner == "sweep":
            sweep = open_sweep(config, workdir, job.built.provenance)
            title, index, run, serve = _run(sweep, place, run, serve)
            job, folder = job.of(sweep.cohorts[index]), sweep.folders[index]
        return _finished(title, job, run, serve, folder, remedy, with_slots)


def load_teacher(config: ConfigDict) -> TrainedRanker:
    """Load the finished teacher in `config.teacher.workdir`; UserError if it is of other data."""
    if not config.teacher.workdir:
        raise UserError(
            f"teacher.workdir is empty; make a teacher with: {TRAIN_TEACHER}, and name its workdir"
        )
    place = place_of(config.teacher.workdir)
    trained, remedy = config_of(place), f"make one with: {TRAIN_TEACHER}"
    other, own = datasets.dataset_name(trained), datasets.dataset_name(config)
    if other != own:
        raise UserError(
            f"the teacher at {place} was trained on {other} for {', '.join(trained.tasks)}, "
            f"not on {own} for {', '.join(config.tasks)}; {remedy}"
        )
    trained.data.dir = config.data.dir or trained.data.dir
    found = open_ranker(place, config=trained)
    if found.job.runs:
        raise UserError(f"{place} holds a {found.job.role}, not a teacher; {remedy}")
    return found


def _run(sweep: Sweep, place: Place, run: str, serve: str) -> tuple[str, int, str, str]:
    """The title, cohort, name and head of a student of a sweep, by default the best."""
    if run and run not in sweep.runs:
        raise UserError(f"the sweep at {place} has no run {run!r}; it has: {', '.join(sweep.runs)}")
    if not sweep.is_complete():
        raise UserError(
            f"the sweep at {place} is not finished; start it again with the flags that started it"
        )
    best = setting_names.best_run(sweep.validation(), run)
    if best is None and not run:
        raise UserError(
            f"no student of the sweep at {place} reaches the criterion for the best on "
            f"validation; name one with --run: {', '.join(sweep.runs)}"
        )
    # A named run may miss the criterion.
    name, best_serve = best or (run, "")
    (cohort,) = (number for number, names in enumerate(sweep.plan) if name in names)
    how = "--run" if run else f"the best of {len(sweep.runs)} on validation"
    return f"run {name} of the sweep at {place} ({how})", cohort, name, serve or best_serve


def _finished(
    title: str, job: TrainingJob, run: str, serve: str, folder: Path, remedy: str, with_slots: bool
) -> TrainedRanker:
    """A ranker of a job, from its checkpoint; UserError if it is unfinished or diverged."""
    # The teacher of a student and its scores may be gone: their provenance is the recorded one.
    provenance = {**manifest.read(folder, remedy)["provenance"], **job.own}
    states, step = job.restored(folder, provenance)
    if step < (steps := job.trainee.train.steps):
        raise UserError(f"{title} stopped at step {step} of {steps}; {remedy}")
    of_stacks = zip(job.stacks, states, strict=True)
    ((stack, state),) = (of for of in of_stacks if run in of[0].names)
    place, model, mode = stack.names.index(run), stack.train_spec.model, stack.train_spec.mode
    if diverged_at := int(state.non_finite_step[place]):
        raise UserError(f"{title} stopped being finite at step {diverged_at}")
    # A mode without a choice ignores the key.
    default = next(iter(mode.serve))
    if len(mode.serve) > 1:
        default = job.runs[run].distill.serve
    check_choice("--serve", serve or default, mode.serve)
    parameters, digest = select_run(state.parameters, place), hashlib.sha256()
    for leaf in jax.tree.leaves(parameters):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    version = digest.hexdigest()[:12]
    if not with_slots:
        parameters = served(model, parameters, jax.default_backend())
    ranker = Ranker(make_serve(model, mode), put(parameters))
    needs_scores = False
    if job.runs:
        config = job.runs[run]
        started_with_scores = workdirs.started_with_scores(folder, config)
        needs_scores = started_with_scores or specs.needs_scores(config)
    found = TrainedRanker(title, job, run, serve or default, model, ranker, version, provenance)
    return found._replace(needs_scores=needs_scores)


def served(model: Model, parameters: Parameters, platform: str) -> Parameters:
    """The parameters of a trained model without the slots of its optimizer, for a platform."""
    # A TPU would copy narrow rows to read them, and saves no memory with these.
    lanes = TPU_LANES if platform == "tpu" else 1
    return dataclasses.replace(
        parameters, tables=without_slots(model.embedding, parameters.tables, lanes)
    )
