"""Rankers of finished runs, opened to be scored with or exported."""

from pathlib import Path

from ml_collections import ConfigDict

from kd_ranker import manifest
from kd_ranker.config import checks, schema
from kd_ranker.distillation.modes import MODES
from kd_ranker.errors import UserError, check_choice
from kd_ranker.evaluation import policy, results
from kd_ranker.evaluation.evaluate import Ranker, make_serve
from kd_ranker.evaluation.policy import POLICIES, Policy
from kd_ranker.pipeline import runs, teachers
from kd_ranker.pipeline.cluster import register
from kd_ranker.pipeline.job import Opened
from kd_ranker.pipeline.remote import Place, fetched
from kd_ranker.pipeline.teachers import Finished
from kd_ranker.sweep.sweep import TEST, Cohort, open_sweep
from kd_ranker.training import recipes
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.mapping import put
from kd_ranker.training.state import select_member

_RUNS = ("train_teacher", "train", "sweep")


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
                f"experiments.{', .'.join(_RUNS)}"
            )
        config = workdirs.read_config(folder)
    file = config.get("registered_by", "")
    if file and not (trust and Path(file).is_file()):
        devices = config.parallel.devices or config.parallel.members or 1
        try:
            checks.validate(config, devices)
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
    command = workdirs.owner_of(workdir)
    if command not in _RUNS:
        raise UserError(f"{workdir} is of experiments.{command}; name one of {', '.join(_RUNS)}")
    if member and command != "sweep":
        raise UserError(f"{workdir} holds one ranker, and no {member!r}; leave --member out")
    if policy_name and command != "sweep":
        raise UserError(
            f"{workdir} is of experiments.{command}, and only a sweep fits policies; leave "
            "--policy out"
        )
    opened = Opened(config)
    workdirs.check_dataset(workdir, opened.dataset.identity)
    remedy = f"finish it with: python -m experiments.{command}, with the flags that started it"
    manifest.check(workdir, remedy)
    if command == "train_teacher":
        check_choice("--serve", serve or "user", MODES["none"].serve)
        config.teacher.workdir = str(workdir)
        found = teachers.load_teacher(config, opened.dataset)
    elif command == "train":
        found = _student(f"the student at {workdir}", serve, "", {"": config}, opened, workdir)
    else:
        found = _member(member, serve, policy_name, config, opened, workdir)
    return found


def ranker_line(ranker: Finished) -> str:
    """The line on a ranker for the terminal."""
    return f"ranker: {ranker.title}, by its probabilities {ranker.serve!r}"


def _member(
    member: str, serve: str, policy_name: str, config: ConfigDict, opened: Opened, workdir: Path
) -> Finished:
    sweep = open_sweep(config, workdir, opened.dataset.identity)
    if member and member not in sweep.members:
        raise UserError(
            f"the sweep at {workdir} has no member {member!r}; it has: {', '.join(sweep.members)}"
        )
    if not sweep.is_complete():
        raise UserError(
            f"the sweep at {workdir} is not finished; finish it with: python -m experiments.sweep, "
            "with the flags that it was started with"
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
    found = _student(title, serve or best_serve, name, sweep.cohorts[index], opened, folder)
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
    title: str, serve: str, name: str, members: Cohort, opened: Opened, folder: Path
) -> Finished:
    """The student `name` of those that were trained together in a folder."""
    config, dataset = members[name], opened.dataset
    serves = MODES[config.distill.mode].serve
    # A mode without a choice ignores the key.
    serve = serve or (config.distill.serve if len(serves) > 1 else next(iter(serves)))
    check_choice("--serve", serve, serves)
    remedy = "finish it with the command and the flags that it was started with"
    # The teacher and its scores may be gone: their fingerprints are those recorded.
    made_of = {
        **manifest.read(folder, remedy)["made_of"],
        "config": schema.fingerprint(members, "student"),
        **dataset.identity,
    }
    job = opened.job(members)
    groups, step = runs.trained_students(job, folder, made_of)
    if step < (steps := job.config.train.steps):
        raise UserError(f"{title} stopped at step {step} of {steps}; {remedy}")
    (group,) = (only for of in groups if (only := of.only((name,))).names)
    if group.non_finite_step[0]:
        raise UserError(f"{title} stopped being finite at step {group.non_finite_step[0]}")
    parameters = select_member(group.ranker.parameters, 0)
    model, _ = recipes.student_model(config, dataset.spec)
    return Finished(
        title=title,
        role="student",
        member=name,
        config=config,
        serve=serve,
        model=model,
        ranker=Ranker(make_serve(model, MODES[config.distill.mode]), put(parameters)),
        version=teachers.digest_of(parameters),
        dataset=dataset,
        made_of=made_of,
    )
