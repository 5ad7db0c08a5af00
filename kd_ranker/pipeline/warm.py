"""Training that starts with the parameters of an earlier run (`train.warm_start`).

Its dataset is that of the run, or one that extends it (`data.extends`), so known ids keep their
rows. The parameters are those of the run, with the slots of embedding rows. Rows of new ids are as
initialized. The step, the schedule and the optimizer of dense parameters start from zero.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from kd_ranker.errors import UserError
from kd_ranker.models.model import Model, Parameters
from kd_ranker.pipeline import trained
from kd_ranker.pipeline.job import Job
from kd_ranker.pipeline.remote import fetched, place_of
from kd_ranker.training.loop import Begin
from kd_ranker.training.recipes import Group
from kd_ranker.training.state import States, select_member


def warm_start(job: Job) -> Begin | None:
    """Return a function that starts initial states from `train.warm_start`; None if that is "".

    The function raises UserError: there is no such run or it is not finished, it was trained on
    other ids, or its model has other sizes.
    """

    def begin(states: States) -> States:
        model, start = _open(job)
        return tuple(
            dataclasses.replace(
                state, parameters=_grown(job, model, start, group, state.parameters)
            )
            for group, state in zip(job.groups, states, strict=True)
        )

    return begin if job.trainee.train.warm_start else None


def _open(job: Job) -> tuple[Model, Parameters]:
    """Return the model to start from, and its parameters on the host."""
    workdir = job.trainee.train.warm_start
    with fetched(place_of(workdir)) as folder:
        try:
            ranker = trained.open_finished(folder)
        except UserError as error:
            raise UserError(f"train.warm_start={workdir}: {error}") from error
        role = "student" if job.members else "teacher"
        if ranker.role != role:
            raise UserError(f"train.warm_start={workdir} is of a {ranker.role}, not of a {role}")
        dataset, before = job.opened.dataset, ranker.dataset.identity["dataset"]
        if before not in (*dataset.earlier, dataset.identity["dataset"]):
            raise UserError(
                f"train.warm_start={workdir} was trained on {before}, and its ids are not those of "
                f"{dataset.directory}; name a run on that dataset, or on one that it extends"
            )
        parameters = ranker.parameters
        if role == "teacher":  # which is served without slots
            state, _ = trained.restored_teacher(ranker.config, ranker.dataset, folder)
            parameters = select_member(state.parameters, 0)
        return ranker.model, jax.tree.map(np.asarray, parameters)


def _grown(
    job: Job, model: Model, start: Parameters, group: Group, fresh: Parameters
) -> Parameters:
    """Return the parameters of a group's members, the same for each except in rows of new ids."""
    old, new = model.embedding, group.recipe.model.embedding

    def shapes(dense: Any, members: int) -> Any:
        return jax.tree.structure(dense), [of.shape[members:] for of in jax.tree.leaves(dense)]

    agree = shapes(start.dense, 0) == shapes(fresh.dense, 1)
    agree &= {name: of.hashed for name, of in old.tables.items()} == {
        name: of.hashed for name, of in new.tables.items()
    }
    if not agree or any(
        start.tables[name].shape[1] != fresh.tables[name].shape[2]
        or old.tables[name].size > of.size
        or (of.hashed and old.tables[name].size != of.size)
        for name, of in new.tables.items()
    ):
        raise UserError(
            f"train.warm_start={job.trainee.train.warm_start} has a model of other sizes, or rows "
            "of another optimizer, than the config; keep the keys of the model, distill.mode and "
            "optimizer.table_name of that run"
        )
    tables: dict[str, Any] = {}
    for name, rows in start.tables.items():
        table = np.array(fresh.tables[name])
        known = old.tables[name].size
        table[:, :known] = rows[:known]
        table[:, new.tables[name].size] = rows[known]  # that of ids without a row
        tables[name] = table
    dense = jax.tree.map(lambda of, like: np.broadcast_to(of, like.shape), start.dense, fresh.dense)
    return Parameters(dense, tables)
