"""Rankers of finished runs, opened to teach, to be scored with, to start from or to be exported."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from kd_ranker import manifest
from kd_ranker.config import checks, schema
from kd_ranker.distillation.modes import MODES, Mode
from kd_ranker.embedding.lookup import without_slots
from kd_ranker.embedding.row_optimizers import TPU_LANES
from kd_ranker.errors import UserError, check_choice, command
from kd_ranker.evaluation import policy, results
from kd_ranker.evaluation.evaluate import Ranker, make_serve
from kd_ranker.evaluation.policy import POLICIES, Policy
from kd_ranker.manifest import MadeOf
from kd_ranker.models.model import Model, Parameters
from kd_ranker.pipeline import datasets
from kd_ranker.pipeline.cluster import register
from kd_ranker.pipeline.remote import Place, fetched, place_of
from kd_ranker.requests.records import Dataset
from kd_ranker.sweep import TEST, Members, Sweep, open_sweep
from kd_ranker.training import checkpoints, recipes
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.loop import abstract_states
from kd_ranker.training.mapping import put
from kd_ranker.training.recipes import Group
from kd_ranker.training.state import States, TrainState, select_member

TRAIN_TEACHER = f"{command('train_teacher')}, {datasets.SAME_FLAGS}"
_RUNS = ("train_teacher", "train", "sweep")


class Finished(NamedTuple):
    """The ranker of a finished run."""

    title: str  # a description for people
    role: str  # "teacher" or "student"
    member: str  # its name in a sweep; "" elsewhere
    config: ConfigDict  # of its run
    serve: str  # which of its probabilities it ranks by
    model: Model
    ranker: Ranker  # as the evaluation calls it
    version: str  # a name for its exact weights
    dataset: Dataset  # has its ids, means and deviations
    made_of: MadeOf  # the fingerprints that its checkpoint records
    policy: Policy | None = None  # chooses how many candidates it passes per request, if named

    @property
    def parameters(self) -> Parameters:
        """Its trained parameters, on a device."""
        return self.ranker.parameters

    @property
    def mode(self) -> Mode:
        """The mode that it was trained with; that of a teacher is `none`."""
        return MODES[self.config.distill.mode if self.role == "student" else "none"]


def config_of(workdir: Place, trust: bool = False) -> ConfigDict:
    """Read the config of the run in a workdir.

    A run may use a loss, a mode or the like that its config file registers. A workdir can come from
    anyone, so that file is executed only if the caller trusts it.

    Args:
      workdir: of any command.
      trust: whether to execute the file at `registered_by`, which other config files need not be.

    Raises:
      UserError: there is no run, or its config names something that only that file registers and
        the file is not trusted, or is missing.
    """
    with fetched(workdir, with_checkpoints=False) as folder:
        if not (folder / workdirs.CONFIG_FILE).exists():
            raise UserError(
                f"no run at {workdir}: it holds no {workdirs.CONFIG_FILE}; name the --workdir of "
                f"{', '.join(map(command, _RUNS))}"
            )
        config = workdirs.read_config(folder)
    file = config.get("registered_by", "")
    if file and not (trust and Path(file).is_file()):
        try:
            checks.validate(config, config.parallel.devices or config.parallel.members or 1)
        except UserError as error:
            if not trust:
                raise UserError(
                    f"the run at {workdir} needs {file}, which would be executed ({error}); if you "
                    "trust that file, add --trust, or trust=True in Python"
                ) from error
        else:
            return config  # everything that it names is known without the file
    register(file)
    checks.check_keys(config)
    return config


def open_finished(
    workdir: Path,
    member: str = "",
    serve: str = "",
    data_dir: str = "",
    trust: bool = False,
    policy_name: str = "",
) -> Finished:
    """Open the ranker of a finished run; that of a student does not need its teacher.

    Args:
      workdir: of a teacher, a student or a sweep.
      member: of a sweep; "" takes the best one, see `results.best_member`.
      serve: its serving choice; "" takes that of its config, of a sweep the best.
      data_dir: the folder of its dataset; "" takes that of its config.
      trust: see `config_of`.
      policy_name: the policy of how many to pass, one of `POLICIES`; "" takes none.

    Raises:
      UserError: there is no run or it is not finished, its dataset is missing or has changed, or
        there is no such member, serving choice or policy.
    """
    if policy_name:
        check_choice("--policy", policy_name, POLICIES)
    config = config_of(workdir, trust)
    config.data.dir = data_dir or config.data.dir
    owner = workdirs.owner_of(workdir)
    if owner not in _RUNS:
        raise UserError(f"{workdir} is of {owner}; name one of {', '.join(_RUNS)}")
    if member and owner != "sweep":
        raise UserError(f"{workdir} holds one ranker, and no {member!r}; leave --member out")
    if policy_name and owner != "sweep":
        raise UserError(
            f"{workdir} is of {owner}, and only a sweep fits policies; leave --policy out"
        )
    dataset = datasets.dataset_of(config)
    workdirs.check_dataset(workdir, dataset.identity)
    remedy = f"finish it with: {command(owner)}, with the flags that started it"
    manifest.check(workdir, remedy)
    if owner == "sweep":
        sweep = open_sweep(config, workdir, dataset.identity)
        return _member(sweep, member, serve, policy_name, dataset)
    if owner == "train":
        return _student(f"the student at {workdir}", serve, "", {"": config}, dataset, workdir)
    check_choice("--serve", serve or "user", MODES["none"].serve)
    config.teacher.workdir = str(workdir)
    return load_teacher(config, dataset)


def load_teacher(config: ConfigDict, dataset: Dataset) -> Finished:
    """Load the trained teacher in `config.teacher.workdir`.

    Raises:
      UserError: it is missing, unfinished, or of other tasks, other data or another config than
        that in its workdir.
    """
    if not config.teacher.workdir:
        raise UserError(
            f"teacher.workdir is empty; make a teacher with: {TRAIN_TEACHER}, and name its workdir"
        )
    with fetched(place_of(config.teacher.workdir)) as workdir:
        if not (workdir / workdirs.CONFIG_FILE).exists():
            raise UserError(f"no teacher at {workdir}; make it with: {TRAIN_TEACHER}")
        owner = workdirs.owner_of(workdir)
        if owner not in (None, "train_teacher"):
            raise UserError(
                f"{workdir} holds a run of {owner}, not a teacher; make one with: {TRAIN_TEACHER}"
            )
        trained = workdirs.read_config(workdir)
        other, own = datasets.dataset_name(trained), datasets.dataset_name(config)
        if other != own:
            raise UserError(
                f"the teacher at {workdir} was trained on {other} for {', '.join(trained.tasks)}, "
                f"not on {own} for {', '.join(config.tasks)}; make one with: {TRAIN_TEACHER}"
            )
        workdirs.check_dataset(workdir, dataset.identity)
        state, step = restored_teacher(trained, dataset, workdir)
        if step < trained.teacher.train.steps:
            raise UserError(
                f"the teacher at {workdir} stopped at step {step} of {trained.teacher.train.steps};"
                f" finish it with: {TRAIN_TEACHER}"
            )
    model, _ = recipes.teacher_model(trained, dataset.spec)
    version = digest_of(state.parameters)
    parameters = put(served(model, state.parameters, jax.default_backend()))
    return Finished(
        title=f"the teacher at {config.teacher.workdir}",
        role="teacher",
        member="",
        config=trained,
        serve="user",
        model=model,
        ranker=Ranker(make_serve(model, MODES["none"]), parameters),
        version=version,
        dataset=dataset,
        made_of={**made_of_teacher(trained, dataset), "version": version},
    )


def made_of_teacher(config: ConfigDict, dataset: Dataset) -> MadeOf:
    """The fingerprints of the teacher that a config trains on a dataset."""
    return {"config": schema.fingerprint({"": config}, "teacher"), **dataset.identity}


def restored_teacher(config: ConfigDict, dataset: Dataset, workdir: Path) -> tuple[TrainState, int]:
    """Restore the state of the teacher of a config and a dataset, as `restored`."""
    groups = [recipes.teacher_group(config, dataset.spec)]
    (state,), step = restored(groups, workdir, made_of_teacher(config, dataset))
    return state, step


def restored(groups: Sequence[Group], workdir: Path, made_of: MadeOf) -> tuple[States, int]:
    """Restore the newest checkpoint of the rankers of a run that can be read.

    Returns:
      The states on the host, and their step; abstract states and 0 without a checkpoint.
    """
    with checkpoints.open_in(workdir) as saved:
        return checkpoints.restore(saved, abstract_states(groups), None, made_of)


def served(model: Model, parameters: Parameters, platform: str) -> Parameters:
    """The parameters of a trained model without the slots of its optimiser, for a platform."""
    learned = select_member(parameters, 0)
    # A TPU would copy narrow rows to read them, and saves no memory with these.
    lanes = TPU_LANES if platform == "tpu" else 1
    return learned.replace(tables=without_slots(model.embedding, learned.tables, lanes))


def digest_of(parameters: Parameters) -> str:
    """A name for exact weights: twelve hex digits."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(parameters):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:12]


def ranker_line(ranker: Finished) -> str:
    """The line on a ranker for the terminal."""
    return f"ranker: {ranker.title}, by its probabilities {ranker.serve!r}"


def _member(sweep: Sweep, member: str, serve: str, policy_name: str, dataset: Dataset) -> Finished:
    workdir = sweep.workdir
    if member and member not in sweep.members:
        raise UserError(
            f"the sweep at {workdir} has no member {member!r}; it has: {', '.join(sweep.members)}"
        )
    if not sweep.is_complete():
        raise UserError(
            f"the sweep at {workdir} is not finished; finish it with: {command('sweep')}, with the "
            "flags that started it"
        )
    best = results.best_member(sweep.validation(), member)
    if best is None and not member:
        raise UserError(
            f"no student of the sweep at {workdir} reaches the criterion for the best on "
            f"validation; name one with --member: {', '.join(sweep.members)}"
        )
    # A named member may miss the criterion.
    name, best_serve = best or (member, "")
    (index,) = (index for index, names in enumerate(sweep.plan) if name in names)
    how = "--member" if member else f"the best of {len(sweep.members)} on validation"
    title = f"member {name} of the sweep at {workdir} ({how})"
    folder = sweep.folders[index]
    found = _student(title, serve or best_serve, name, sweep.cohorts[index], dataset, folder)
    if policy_name:
        found = found._replace(policy=_policy(folder / TEST, found, policy_name))
    return found


def _policy(folder: Path, student: Finished, name: str) -> Policy:
    """Read a policy of a student of a sweep from the folder of its test tables."""
    fitted = {}
    if policy.FILE in manifest.read(folder, "start the sweep again")["files"]:
        fitted = policy.from_json((folder / policy.FILE).read_text())
    own = fitted.get((student.member, student.serve), {})
    if name not in own:
        raise UserError(
            f"--policy={name!r}: {student.title} has {', '.join(own) or 'none'} by its "
            f"probabilities {student.serve!r}; a sweep fits those of funnel.policies, for the "
            "settings that validation chose"
        )
    return own[name]


def _student(
    title: str, serve: str, name: str, members: Members, dataset: Dataset, folder: Path
) -> Finished:
    """The student `name` of those that were trained together in a folder."""
    config = members[name]
    mode = MODES[config.distill.mode]
    # A mode without a choice ignores the key.
    serve = serve or (config.distill.serve if len(mode.serve) > 1 else next(iter(mode.serve)))
    check_choice("--serve", serve, mode.serve)
    remedy = "finish it with the command and the flags that it was started with"
    # The teacher and its scores may be gone: their fingerprints are those recorded.
    made_of = {
        **manifest.read(folder, remedy)["made_of"],
        "config": schema.fingerprint(members, "student"),
        **dataset.identity,
    }
    groups = recipes.student_groups(members, dataset.spec)
    states, step = restored(groups, folder, made_of)
    if step < (steps := max(of.train.steps for of in members.values())):
        raise UserError(f"{title} stopped at step {step} of {steps}; {remedy}")
    ((group, state),) = (of for of in zip(groups, states, strict=True) if name in of[0].names)
    place = group.names.index(name)
    if diverged_at := int(state.non_finite_step[place]):
        raise UserError(f"{title} stopped being finite at step {diverged_at}")
    parameters = select_member(state.parameters, place)
    model = group.recipe.model
    return Finished(
        title=title,
        role="student",
        member=name,
        config=config,
        serve=serve,
        model=model,
        ranker=Ranker(make_serve(model, mode), put(parameters)),
        version=digest_of(parameters),
        dataset=dataset,
        made_of=made_of,
    )
