"""Trained rankers: the runs in workdirs, their configs, and their parameters from checkpoints."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from kd_ranker import manifest
from kd_ranker.cohorts.plan import Sweep, open_sweep
from kd_ranker.config import checks
from kd_ranker.distillation.modes import MODES
from kd_ranker.embedding.lookup import without_slots
from kd_ranker.embedding.row_optimizers import TPU_LANES
from kd_ranker.errors import UserError, check_choice, command, listed
from kd_ranker.evaluation import setting_names
from kd_ranker.evaluation.evaluate import Ranker, make_serve
from kd_ranker.manifest import Provenance
from kd_ranker.models.model import Model, Parameters
from kd_ranker.pipeline import datasets
from kd_ranker.pipeline.cluster import register
from kd_ranker.pipeline.remote import Place, fetched, place_of
from kd_ranker.pipeline.trainees import Trainees, open_trainees
from kd_ranker.requests.records import Dataset
from kd_ranker.training import specs
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.mapping import put
from kd_ranker.training.state import select_run

TRAIN_TEACHER = f"{command('train_teacher')}, {datasets.SAME_FLAGS}"
_RUNS = ("train_teacher", "train", "sweep")
_TRUST = "if you trust that file, add --trust, or trust=True in Python"


class TrainedRanker(NamedTuple):
    """A trained ranker."""

    title: str  # a description for people
    trainees: Trainees  # with which it was trained
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
        return self.trainees.runs.get(self.run, self.trainees.config)

    @property
    def dataset(self) -> Dataset:
        """The dataset that it was trained on, which has its ids, means and deviations."""
        return self.trainees.dataset

    @property
    def role(self) -> Literal["teacher", "student"]:
        """Its role in the results."""
        return self.trainees.role


def is_run(workdir: Place) -> bool:
    """Test whether a workdir holds a run, finished or not."""
    with fetched(workdir, with_checkpoints=False) as folder:
        return (folder / workdirs.CONFIG_FILE).exists()


def config_of(workdir: Place, trust: bool = False, remedy: str = _TRUST) -> ConfigDict:
    """Read the config of the run in a workdir; UserError if it is missing.

    A run may use a loss, a mode or the like that its config file registers. A workdir can come from
    anyone, so the file at `registered_by` is executed only with `trust`. A file that is needed and
    missing, or not trusted, is a UserError, which says `remedy`.
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
        fault, *_ = str(error).split(";")  # without the remedy of a config that one can edit
        raise UserError(
            f"the run at {workdir} needs {file}, which would be executed ({fault}); {remedy}"
        ) from error
    return config


def check_select(config: ConfigDict, workdir: Place, trust: bool) -> None:
    """Raise UserError for a log by `data.sql` that the config of a run names, without `trust`.

    A workdir can come from anyone, and a SELECT can read any file that this process can read.
    """
    sql = " ".join(config.data.get("sql", "").split())
    if sql and not trust:
        raise UserError(
            f"the run at {workdir} reads its log by data.sql, which can read any file here "
            f"({sql}); if you trust it, add --trust, or trust=True in Python; else name a log of "
            "your own, with data.sql=''"
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
            raise UserError(f"{place} is of {owner}, and --run={run} is for a sweep; leave it out")
        trainees = open_trainees(config, {"": config} if owner == "train" else None)
        workdirs.check_dataset(workdir, trainees.dataset.provenance)
        remedy = f"finish it with: {command(owner)}, with the flags that started it"
        manifest.check(workdir, remedy)
        saved = _Saved(f"the {trainees.role} at {place}", trainees, run, serve, workdir)
        if owner == "sweep":
            sweep = open_sweep(config, workdir, trainees.dataset.provenance)
            saved = _saved_in_sweep(sweep, trainees, place, run, serve)
        return _restored(saved, remedy, with_slots)


def load_teacher(config: ConfigDict) -> TrainedRanker:
    """Load the finished teacher in `config.teacher.workdir`; UserError if it is of other data."""
    if not config.teacher.workdir:
        raise UserError(
            f"teacher.workdir is empty; make a teacher with: {TRAIN_TEACHER}, and name its workdir"
        )
    place = place_of(config.teacher.workdir)
    remedy = f"make one with: {TRAIN_TEACHER}"
    trained = config_of(place)
    its_dataset = datasets.dataset_name(trained)
    dataset = datasets.dataset_name(config)
    if its_dataset != dataset:
        raise UserError(
            f"the teacher at {place} was trained on {its_dataset} for {', '.join(trained.tasks)}, "
            f"not on {dataset} for {', '.join(config.tasks)}; {remedy}"
        )
    trained.data.dir = config.data.dir or trained.data.dir
    teacher = open_ranker(place, config=trained)
    if teacher.role != "teacher":
        raise UserError(f"{place} holds a {teacher.role}, not a teacher; {remedy}")
    return teacher


class _Saved(NamedTuple):
    """A ranker among those that a checkpoint holds."""

    title: str
    trainees: Trainees
    run: str  # "" outside of sweeps
    serve: str  # "" for the default of its config
    folder: Path  # with the checkpoint


def _saved_in_sweep(sweep: Sweep, trainees: Trainees, place: Place, run: str, serve: str) -> _Saved:
    """Find a student of a sweep, by default the best; UserError if there is none."""
    if run and run not in sweep.runs:
        raise UserError(
            f"the sweep at {place} has no run {run!r}; name one of: {listed(sweep.runs)}"
        )
    if not sweep.is_complete():
        raise UserError(
            f"the sweep at {place} is not finished; start it again with the flags that started it"
        )
    best = setting_names.best_run(sweep.validation(), run)
    if best is None and not run:
        raise UserError(
            f"no student of the sweep at {place} reaches the criterion for the best on "
            f"validation; name one with --run: {listed(sweep.runs)}"
        )
    # A named run may miss the criterion.
    name, best_serve = best or (run, "")
    (cohort,) = (number for number, names in enumerate(sweep.plan) if name in names)
    how = "--run" if run else f"the best of {len(sweep.runs)} on validation"
    return _Saved(
        f"run {name} of the sweep at {place} ({how})",
        trainees.of(sweep.cohorts[cohort]),
        name,
        serve or best_serve,
        sweep.folders[cohort],
    )


def _restored(saved: _Saved, remedy: str, with_slots: bool) -> TrainedRanker:
    """Restore a ranker from its checkpoint; UserError if it is unfinished or diverged."""
    trainees, run = saved.trainees, saved.run
    # The teacher of a student and its scores may be gone: their provenance is the recorded one.
    recorded = manifest.read(saved.folder, remedy)["provenance"]
    provenance = {**recorded, **trainees.provenance}
    states, step = trainees.restored(saved.folder, provenance)
    steps = trainees.steps_of(run)
    if step < steps:
        raise UserError(f"{saved.title} stopped at step {step} of {steps}; {remedy}")
    number = [run in stack.names for stack in trainees.stacks].index(True)
    stack = trainees.stacks[number]
    state = states[number]
    index = stack.names.index(run)
    if diverged_at := int(state.non_finite_step[index]):
        raise UserError(
            f"{saved.title} stopped being finite at step {diverged_at}; name another one, or train "
            "one with a smaller learning rate or weight"
        )

    model = stack.train_spec.model
    mode = stack.train_spec.mode
    default = served_head(trainees.runs[run]) if trainees.runs else next(iter(mode.serve))
    serve = saved.serve or default
    check_choice("--serve", serve, mode.serve)
    parameters = select_run(state.parameters, index)
    version = _version_of(parameters)
    if not with_slots:
        parameters = served(model, parameters, jax.default_backend())
    return TrainedRanker(
        title=saved.title,
        trainees=trainees,
        run=run,
        serve=serve,
        model=model,
        ranker=Ranker(make_serve(model, mode), put(parameters)),
        version=version,
        provenance=provenance,
        needs_scores=_needs_scores(trainees, run, saved.folder),
    )


def served_head(config: ConfigDict) -> str:
    """Return the head that a student ranks by; a mode without a choice ignores the key."""
    heads = MODES[config.distill.mode].serve
    return config.distill.serve if len(heads) > 1 else next(iter(heads))


def _version_of(parameters: Parameters) -> str:
    """A digest of exact weights."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(parameters):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:12]


def _needs_scores(trainees: Trainees, run: str, folder: Path) -> bool:
    """Whether the training of a student needs the final ranker's scores; a teacher's does not."""
    if not trainees.runs:
        return False
    config = trainees.runs[run]
    return workdirs.started_with_scores(folder, config) or specs.needs_scores(config)


def served(model: Model, parameters: Parameters, platform: str) -> Parameters:
    """The parameters of a trained model without the slots of its optimizer, for a platform."""
    # A TPU would copy narrow rows to read them, and saves no memory with these.
    lanes = TPU_LANES if platform == "tpu" else 1
    return dataclasses.replace(
        parameters, tables=without_slots(model.embedding, parameters.tables, lanes)
    )
