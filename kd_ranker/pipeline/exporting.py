"""The ranker of a finished run, found again to be exported, and what its export costs."""

from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from kd_ranker.batch import IN_BATCH, CandidateBatch, Items
from kd_ranker.batches.evaluation import evaluation_batches
from kd_ranker.config import identity
from kd_ranker.distillation.modes import MODES, ToProbability
from kd_ranker.errors import UserError, check_choice
from kd_ranker.evaluation import results
from kd_ranker.evaluation.evaluate import Ranker, Served
from kd_ranker.evaluation.metrics import metric_of
from kd_ranker.models.model import COMPUTE_DTYPES, Model, Parameters, score
from kd_ranker.pipeline import runs, teachers
from kd_ranker.pipeline.measure import Reference, Students, measure, reference, report_at
from kd_ranker.requests.records import Dataset
from kd_ranker.serving.programs import Exported, Servable, call, falls_into_parts, make_programs
from kd_ranker.sweep.members import common
from kd_ranker.sweep.sweep import open_sweep
from kd_ranker.training import recipes
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.checkpoints import Identity
from kd_ranker.training.state import select_member, stack_members

_EXAMPLE_REQUESTS = 4


class Finished(NamedTuple):
    """A ranker of a finished run.

    Attributes:
      role: "student" or "teacher".
      member: its name in the run.
      config: its own.
      serve: its serving choice.
      dataset: what it was trained on.
      known: the teacher that it is measured by; None for a teacher.
      trained: the same as an export sees it.
      whose: the identity of its checkpoint.
    """

    role: str
    member: str
    config: ConfigDict
    serve: str
    dataset: Dataset
    known: Reference | None
    trained: Servable
    whose: Identity


def find(workdir: Path, member: str, serve: str) -> Finished:
    """The ranker of a run that is done.

    Args:
      workdir: of `train`, `sweep` or `train_teacher`.
      member: its name in a sweep.
      serve: its serving choice; "" is that of its config.

    Raises:
      UserError: there is no such run, member or serving choice, the run is not done, or its dataset
        is not what it was trained on.
    """
    if not (workdir / workdirs.CONFIG_FILE).exists():
        raise UserError(f"{workdir} holds no run: it has no {workdirs.CONFIG_FILE}")
    command, config = workdirs.owner_of(workdir), workdirs.read_config(workdir)
    again = f"python -m experiments.{command}, with the flags it was started with"
    if not (workdir / results.FILE).exists():
        raise UserError(f"the run in {workdir} is not finished; go on with: {again}")
    if command == "sweep":
        sweep = open_sweep(config, workdir)
        cohort_of = {name: place for place, names in enumerate(sweep.plan) for name in names}
        check_choice("--member", member, cohort_of)
        place = cohort_of[member]
        members, folder = sweep.cohorts[place], sweep.folders[place]
    else:
        if member:
            raise UserError(f"{workdir} holds one ranker, not {member!r}; leave --member out")
        if command == "train_teacher":
            return _teacher(config, workdir, serve)
        members, folder = {"": config}, workdir
    return _student(members, member, folder, serve, again)


def check_choices(finished: Finished, items: str, formats: Collection[str]) -> None:
    """Raises UserError if the ranker has no item embeddings, or a format not its arithmetic."""
    if items != "float32" and not falls_into_parts(finished.trained):
        raise UserError(
            f"--items={items!r}: this {finished.role} is one program, which has no item "
            "embeddings; leave --items out"
        )
    computes = finished.config[finished.role].compute_dtype
    if "onnx" in formats and COMPUTE_DTYPES[computes].dtype != jnp.float32:
        raise UserError(
            f"{finished.role}.compute_dtype={computes!r}: the converter to ONNX lacks {computes}; "
            "name --formats=jax alone"
        )


def _student(
    members: Mapping[str, ConfigDict], member: str, folder: Path, serve: str, again: str
) -> Finished:
    config = members[member]
    serve = serve or config.distill.serve
    mode = MODES[config.distill.mode]
    check_choice("--serve", serve, mode.serve)
    teacher, dataset = teachers.teacher_and_dataset(config)
    whose = runs.students_identity(members, dataset, teacher)
    groups, step = runs.trained_students(dataset, members, folder, whose)
    if step < max(each.train.steps for each in members.values()):
        raise UserError(f"the run in {folder} stopped at step {step}; go on with: {again}")
    (group,) = (group for group in groups if member in group.names)
    place = group.names.index(member)
    if diverged := group.non_finite_step[place]:
        raise UserError(f"the loss of {member or folder} stopped being finite at step {diverged}")
    model, _ = recipes.student_model(config, dataset.spec)
    parameters = select_member(group.ranker.parameters, place)
    trained = _trained(model, parameters, config, dataset, mode.serve[serve])
    known = reference(common(members), dataset, teacher)
    return Finished("student", member, config, serve, dataset, known, trained, whose)


def _teacher(config: ConfigDict, workdir: Path, serve: str) -> Finished:
    mode = MODES["none"]
    check_choice("--serve", serve or "user", mode.serve)
    dataset = teachers.dataset_of(config)
    config.teacher.workdir = str(workdir)
    teacher = teachers.load_teacher(config, dataset)
    trained = _trained(teacher.model, teacher.parameters, config, dataset, mode.serve["user"])
    whose = {**identity.of_teacher(config, dataset.identity), "version": teacher.version}
    return Finished("teacher", "", config, "user", dataset, None, trained, whose)


def _trained(
    model: Model,
    parameters: Parameters,
    config: ConfigDict,
    dataset: Dataset,
    probability: ToProbability,
) -> Servable:
    weights = tuple(config.value_weights)
    return Servable(model, parameters, dataset.spec, dataset.items, probability, weights)


def beside(finished: Finished) -> Path:
    """The folder of the dataset, or of the one that it is a scored copy of."""
    return teachers.dataset_of(finished.config).directory


def example(finished: Finished) -> CandidateBatch:
    """A few requests of the test split, with all their candidates."""
    config = finished.config
    batches = evaluation_batches(
        finished.dataset,
        "test",
        requests=_EXAMPLE_REQUESTS,
        candidates=config.funnel.retrieved,
        limit=_EXAMPLE_REQUESTS,
    )
    return next(iter(batches)).batch


def about(finished: Finished, workdir: Path, exported: Exported, items: str) -> dict[str, Any]:
    """The part of an export's description that is about the ranker.

    Args:
      finished: the ranker.
      workdir: of its run.
      exported: its programs.
      items: the type of its item embeddings.
    """
    packages = ("kd_ranker", "jax", "jaxlib", "flax", "numpy", "jax2onnx", "onnxruntime")
    return {
        "role": finished.role,
        "member": finished.member,
        "mode": finished.config.distill.mode if finished.role == "student" else "",
        "serve": finished.serve,
        "dataset": finished.dataset.identity,
        "run": dict(finished.whose),
        "versions": {name: _version(name) for name in packages if _version(name)},
        "results": _results(finished, workdir),
        "difference": _difference(finished, exported),
        "items": {"type": items, "cost": _cost_of_items(finished, exported, items)},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _results(finished: Finished, workdir: Path) -> dict[str, dict[str, float]]:
    """The numbers of its rows in `results.csv`, by split."""
    table = results.read_csv(workdir / results.FILE).fillna({"member": ""})
    rows = table[table["role"] == finished.role]
    if finished.role == "student":
        rows = rows[(rows["member"] == finished.member) & (rows["serve"] == finished.serve)]
    names = [str(name) for name in table if metric_of(str(name))]
    return {
        str(row["split"]): {name: row[name] for name in names if np.isfinite(row[name])}
        for row in rows.to_dict("records")
    }


def _difference(finished: Finished, exported: Exported) -> float:
    """The largest difference of the example's probabilities to those that were evaluated."""
    trained, batch = finished.trained, example(finished)

    @jax.jit
    def evaluate(parameters: Parameters, batch: CandidateBatch, items: Items) -> Any:
        return trained.probability(score(trained.model, parameters, batch, items))

    evaluated = evaluate(trained.parameters, batch, trained.items)
    found = _as_ranker(exported, finished.serve).serve
    served = found(exported.tables, batch, trained.items).probability[finished.serve]
    mask = np.asarray(batch.candidate_mask)
    return float(np.abs(np.asarray(evaluated - served))[mask].max())


def _as_ranker(exported: Exported, serve: str) -> Ranker:
    """The exported programs as the evaluation sees a ranker; its parameters are the tables."""

    @jax.jit
    def served(held: Mapping[str, Any], batch: CandidateBatch, items: Items) -> Served:
        del items
        fields = {field.name: getattr(batch, field.name) for field in IN_BATCH}
        answer = call(exported.programs, {**fields, **held})
        return Served({serve: answer["probability"]}, {})

    return Ranker(served, stack_members([exported.tables]))


def _cost_of_items(finished: Finished, exported: Exported, items: str) -> dict[str, Any]:
    """The survival on the test split with embeddings of float32, and with those of this type."""
    if items == "float32" or finished.known is None:
        return {}
    whole = make_programs(finished.trained, "float32")
    names, config = ("float32", items), finished.config
    students = [
        Students((name,), _as_ranker(of, finished.serve), (0,), (0,))
        for name, of in zip(names, (whole, exported), strict=True)
    ]
    measured = measure(
        *(config, finished.dataset, "test", finished.known, dict.fromkeys(names, config), students),
        serves=dict.fromkeys(names, (finished.serve,)),
        costs=False,
    )
    told = [f"{name}@{k}" for name in ("survival", "value_captured") for k in report_at(config).ks]
    return {
        str(row["member"]): {name: row[name] for name in told}
        for row in measured.rows
        if row["role"] == "student"
    }
