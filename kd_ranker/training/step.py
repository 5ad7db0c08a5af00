"""The train step: one pure function, the same for teacher and student, for one run or many.

    batch → teacher → logits → losses → gradients → update

The distillation loss is a weighted sum of terms, each a loss and the signal that it learns from.

A step says of each run:

    loss, user_loss, distill_loss
    user_term/<loss>           the terms of the user loss, if it has several
    distill_term/<term>        the terms of the distillation loss, without their weights, if several
    gradient_norm/<part>       Euclidean norm of the gradient of the dense parameters (`dense`), the
                               mode's `transform`, or the embedding rows (`tables`)
    update_norm/<part>         Euclidean norm of what the update adds to them
    rows_touched/<table>       the share of a table's rows that have a gradient

Norms and shares cost time, so a call of many steps computes them once, after its last step. For a
run that keeps its state, norms of the update and of the tables are 0, and so are shares.

A cohort is a sequence of stacks. A stack is one or more runs that differ only in hyperparameters
(`state`). One step reads one batch, scores it once with the live teacher, and updates every run of
every stack. A single run is a cohort of one. The hyperparameters are traced, so a step compiles
once for all their values.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from kd_ranker.batch import CandidateBatch, Items, Stage
from kd_ranker.batches.cutting import PackedBatches, Span, unpack
from kd_ranker.distillation.losses import DEFAULT_NUMBERS, LOSSES, USER_LOSSES
from kd_ranker.distillation.modes import Transform
from kd_ranker.distillation.teacher_signal import SIGNALS, TeacherSignal
from kd_ranker.distillation.terms import Term
from kd_ranker.embedding.lookup import (
    EmbeddingSpec,
    Rows,
    gather_from_runs,
    gather_rows_of_runs,
    ids_of_table,
    is_known,
    rows_of_ids,
    rows_of_table,
)
from kd_ranker.embedding.row_optimizers import find_occurrences, update_tables
from kd_ranker.embedding.row_sharding import update_own_rows
from kd_ranker.models.model import Parameters, apply_model, score
from kd_ranker.training.mapping import AXIS, in_parts, join_over_devices
from kd_ranker.training.state import (
    Constants,
    Hyperparameters,
    LiveTeacher,
    States,
    TrainSpec,
    TrainState,
)

Dense = tuple[Any, Transform]
"""Dense parameters and the mode's transform, or as many numbers about them, as their gradients."""
StepMetrics = dict[str, Float[Array, "runs"]]
"""What a step says of the runs of a stack, see above."""
Stepped = tuple[States, tuple[StepMetrics, ...]]
"""The states after one or more steps, and what the last of them says of each stack."""


class Change(NamedTuple):
    """What norms and shares are computed from.

    All but the row numbers have a leading axis of runs. Rows are those of this device's requests.
    """

    gradient_norms: StepMetrics  # of dense parameters and transform
    moves: Dense  # what the update adds
    rows_before: Rows
    row_gradients: Rows
    row_numbers: dict[str, Int[Array, "M"]]  # of the lookups of each table, see `_TableUpdate`
    may_change: Bool[Array, "runs"]


class StackAfterStep(NamedTuple):
    """A stack after a step."""

    state: TrainState
    losses: StepMetrics
    change: Change


class Step(NamedTuple):
    """A train step of a cohort, in two functions that one device runs under a mapped axis `AXIS`.

    Attributes:
      take: (states, batch, hyperparameters, constants) -> the stacks after the step. The batch
        holds this device's requests; states and hyperparameters are one per stack.
      measure: the stacks after the step -> norms and shares of each, equal on all devices along
        `AXIS`.
    """

    take: Callable[
        [Sequence[TrainState], CandidateBatch, Sequence[Hyperparameters], Constants],
        tuple[StackAfterStep, ...],
    ]
    measure: Callable[[Sequence[StackAfterStep]], tuple[StepMetrics, ...]]


def make_step(
    train_specs: Sequence[TrainSpec], teacher: LiveTeacher | None = None, devices_of_runs: int = 1
) -> Step:
    """Build the step of a cohort.

    Devices that share the requests of a batch have the same states before and after, except that
    each may hold its own rows of the tables. Losses are weighted means over the valid entries,
    pairs or requests of all devices, and then over tasks. Each device divides its numerators by the
    denominators of all, and the quotients are summed, so the same global batch gives the same
    update on any number of devices. Devices along the axis of runs train other runs on the same
    requests, independently.

    Args:
      train_specs: one per stack; all of them learn from the same batches.
      teacher: the live teacher; None where probabilities come with the batch.
      devices_of_runs: the number of devices along the axis of runs, which hold the same requests.
        They share the teacher's pass and exchange only its logits.
    """

    def take(
        states: Sequence[TrainState],
        batch: CandidateBatch,
        hyperparameters: Sequence[Hyperparameters],
        constants: Constants,
    ) -> tuple[StackAfterStep, ...]:
        batch = with_live_teacher(teacher, batch, constants, devices_of_runs)
        return tuple(
            _train_stack(train_spec, state, batch, own_hyperparameters, constants.items)
            for train_spec, state, own_hyperparameters in zip(
                train_specs, states, hyperparameters, strict=True
            )
        )

    def measure(stacks: Sequence[StackAfterStep]) -> tuple[StepMetrics, ...]:
        return tuple(
            _measure(train_spec.model.embedding, stack)
            for train_spec, stack in zip(train_specs, stacks, strict=True)
        )

    return Step(take, measure)


def with_live_teacher(
    teacher: LiveTeacher | None,
    batch: CandidateBatch,
    constants: Constants,
    devices_of_runs: int = 1,
) -> CandidateBatch:
    """Replace a batch's logged probabilities by those of the live teacher.

    See `make_step` for the arguments.
    """
    if teacher is None:
        return batch
    parameters = constants.teacher
    assert parameters is not None, "a live teacher needs its parameters"
    # Scoring is the largest part of such a step: only candidates of its stage are scored. All that
    # were passed are among the first `num_scored`.
    scored = batch.first(batch.num_scored) if teacher.stage >= Stage.PASSED else batch

    def score_part(part: CandidateBatch) -> Float[Array, "R N T"]:
        return score(teacher.model, parameters, part, constants.items)

    logits = in_parts(score_part, scored, devices_of_runs)
    weight = (scored.stage >= teacher.stage)[..., None]
    return dataclasses.replace(
        batch,
        teacher_probability=jax.lax.stop_gradient(jax.nn.sigmoid(logits)),
        teacher_weight=jnp.broadcast_to(weight, logits.shape).astype(jnp.float32),
    )


class _RowUpdate(NamedTuple):
    """The rows that runs looked up, for the update of tables; all have an axis of runs."""

    gradients: Rows  # of this device; those of dense parameters are summed over devices
    learning_rate: Float[Array, "*runs"]
    may_change: Bool[Array, "*runs"]


class _Trained(NamedTuple):
    """What a step makes of one run, or stacked of all runs of a stack."""

    dense: Any
    transform: Transform
    gradient_norms: dict[str, Float[Array, "*runs"]]
    optimizer_state: optax.OptState
    non_finite_step: Int[Array, "*runs"]
    losses: dict[str, Float[Array, "*runs"]]
    row_update: _RowUpdate


def _train_stack(
    train_spec: TrainSpec,
    state: TrainState,
    batch: CandidateBatch,
    hyperparameters: Hyperparameters,
    items: Items,
) -> StackAfterStep:
    """Take one step of all runs of a stack.

    A run keeps its state if its loss, or the gradient of its dense parameters, is not finite.
    """
    embedding = train_spec.model.embedding
    tables = state.parameters.tables
    batch, targets = with_targets(train_spec, hyperparameters.terms, batch)
    # Counted from 1: a factor of 0 at the first step would waste a batch.
    step = state.step + 1
    rows = gather_rows_of_runs(embedding, tables, batch, items)

    def train_run(
        rows: Rows,
        dense: Dense,
        optimizer_state: optax.OptState,
        non_finite_step: Int[Array, ""],
        hyperparameters: Hyperparameters,
    ) -> _Trained:
        gradients, row_gradients, losses = gradients_of_run(
            train_spec, hyperparameters, dense, rows, batch, targets, items
        )
        norms = _norms_of_parts(gradients)
        is_finite = jnp.all(jnp.isfinite(jnp.stack([losses["loss"], *norms.values()])))
        takes_part = (non_finite_step == 0) & (step <= hyperparameters.steps)
        may_change = takes_part & is_finite
        factor = train_spec.schedule(step, hyperparameters.steps)
        updated = update_dense(
            train_spec, hyperparameters, factor, dense, gradients, optimizer_state
        )
        (new_dense, transform), optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(may_change, new, old), updated, (dense, optimizer_state)
        )
        return _Trained(
            dense=new_dense,
            transform=transform,
            gradient_norms=norms,
            optimizer_state=optimizer_state,
            non_finite_step=jnp.where(takes_part & ~is_finite, step, non_finite_step),
            losses=losses,
            row_update=_RowUpdate(
                gradients=row_gradients,
                learning_rate=factor * hyperparameters.optimizer.table_learning_rate,
                may_change=may_change,
            ),
        )

    trained: _Trained = jax.vmap(train_run)(
        rows,
        (state.parameters.dense, state.transform),
        state.optimizer_state,
        state.non_finite_step,
        hyperparameters,
    )
    new_tables = {
        name: _update_table(
            name, train_spec, state, batch, items, trained.row_update, hyperparameters
        )
        for name in tables
    }
    after = TrainState(
        step=step,
        parameters=Parameters(
            trained.dense, {name: table.rows for name, table in new_tables.items()}
        ),
        transform=trained.transform,
        optimizer_state=trained.optimizer_state,
        non_finite_step=trained.non_finite_step,
        stopped_after=state.stopped_after,
        unknown_ids={name: table.unknown_ids for name, table in new_tables.items()},
        owners={name: table.owner for name, table in new_tables.items()},
    )
    dense_before = (state.parameters.dense, state.transform)
    dense_after = (trained.dense, trained.transform)
    change = Change(
        gradient_norms=trained.gradient_norms,
        moves=jax.tree.map(jnp.subtract, dense_after, dense_before),
        rows_before=rows,
        row_gradients=trained.row_update.gradients,
        row_numbers={name: table.row_numbers for name, table in new_tables.items()},
        may_change=trained.row_update.may_change,
    )
    return StackAfterStep(after, trained.losses, change)


def with_targets(
    train_spec: TrainSpec, terms: Sequence[Term], batch: CandidateBatch
) -> tuple[CandidateBatch, list[TeacherSignal]]:
    """Read the targets of the distillation terms, one per term.

    Candidates without a label or a target are left out of the batch: they would only cost time.
    """
    targets = [SIGNALS[term.signal].read(batch) for term in terms]
    if train_spec.unshown_are_negatives:
        return batch, targets
    num_used = max([batch.num_labeled, *(weight.shape[1] for _, weight in targets)])
    return batch.first(num_used), targets


def gradients_of_run(
    train_spec: TrainSpec,
    hyperparameters: Hyperparameters,
    dense: Dense,
    rows: Rows,
    batch: CandidateBatch,
    targets: Sequence[TeacherSignal],
    items: Items,
) -> tuple[Dense, Rows, dict[str, Float[Array, ""]]]:
    """Return a run's gradients of its dense parameters and of its rows, and its losses.

    Call it under a mapped axis named `AXIS`. `batch` and `targets` are those of `with_targets`. The
    gradients of rows are those of this device; all else is summed over devices.
    """
    (gradients, row_gradients), losses = jax.grad(_loss, argnums=(0, 1), has_aux=True)(
        dense, rows, train_spec, hyperparameters, batch, targets, items
    )
    gradients, losses = jax.lax.psum((gradients, losses), AXIS)
    return gradients, row_gradients, losses


def _loss(
    trained: Dense,
    embedded: Rows,
    train_spec: TrainSpec,
    hyperparameters: Hyperparameters,
    batch: CandidateBatch,
    targets: Sequence[TeacherSignal],
    items: Items,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return this device's share of a run's loss, and of all its losses."""
    dense, transform = trained
    logits = apply_model(train_spec.model, dense, embedded, batch, items)
    near_shown = None
    if train_spec.drops_near_shown:
        near_shown = _is_near_shown(batch, hyperparameters.unshown_margin)
    if train_spec.unshown_are_negatives:
        batch = _with_unshown_negatives(batch, hyperparameters.unshown_weight)

    user_loss, user_terms = _user_loss(train_spec, logits, transform, batch, near_shown)
    distill_loss, distill_terms = _distill_loss(
        train_spec, hyperparameters, logits, transform, targets
    )
    loss = hyperparameters.user_weight * user_loss + hyperparameters.distill_weight * distill_loss
    losses = {"loss": loss, "user_loss": user_loss, "distill_loss": distill_loss}
    for kind, terms in (("user_term", user_terms), ("distill_term", distill_terms)):
        if len(terms) > 1:
            losses |= _named(kind, terms)
    return loss, losses


def _named(kind: str, metrics: Mapping[str, Array]) -> dict[str, Array]:
    return {f"{kind}/{name}": metric for name, metric in metrics.items()}


_TotalAndTerms = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]


def _user_loss(
    train_spec: TrainSpec,
    logits: Float[Array, "R N heads"],
    transform: Transform,
    batch: CandidateBatch,
    near_shown: Bool[Array, "R N T"] | None,
) -> _TotalAndTerms:
    """Return the sum of the terms, and each by its name.

    Candidates `near_shown` are no negatives: they have a weight of 0. None leaves all in.
    """
    user_logits = train_spec.mode.user_logits(logits[:, : batch.num_labeled], transform)
    label_weight = jnp.broadcast_to(batch.label_weight[..., None], user_logits.shape)
    if near_shown is not None:
        label_weight = jnp.where(near_shown, 0.0, label_weight)
    terms = {}
    for name, loss in USER_LOSSES[train_spec.user_loss].items():
        sums = loss(user_logits, batch.user_label, label_weight, DEFAULT_NUMBERS)
        terms[name] = _share_of_mean(*sums)
    return sum(terms.values(), jnp.zeros(())), terms


def _distill_loss(
    train_spec: TrainSpec,
    hyperparameters: Hyperparameters,
    logits: Float[Array, "R N heads"],
    transform: Transform,
    targets: Sequence[TeacherSignal],
) -> _TotalAndTerms:
    """Return the weighted sum of the terms, and each by its name; 0 in a mode without a teacher."""
    total = jnp.zeros(())
    terms: dict[str, Float[Array, ""]] = {}
    to_teacher_logits = train_spec.mode.teacher_logits
    if to_teacher_logits is None:
        return total, terms
    for term, (probability, weight) in zip(hyperparameters.terms, targets, strict=True):
        teacher_logits = to_teacher_logits(logits[:, : weight.shape[1]], transform)
        loss = LOSSES[term.loss].function
        sums = loss(teacher_logits, probability, weight, hyperparameters.loss_numbers)
        terms[term.name] = _share_of_mean(*sums)
        total += term.weight * terms[term.name]
    return total, terms


def _with_unshown_negatives(batch: CandidateBatch, weight: Float[Array, ""]) -> CandidateBatch:
    """Set a user label of 0 with this weight for each candidate that was not shown."""
    unshown = batch.candidate_mask & (batch.stage < Stage.SHOWN)
    # Candidates after the first `num_labeled` were not shown, or their labels were not drawn.
    behind = (0, unshown.shape[1] - batch.num_labeled)
    label = jnp.pad(batch.user_label, ((0, 0), behind, (0, 0)))
    return dataclasses.replace(
        batch,
        user_label=jnp.where(unshown[..., None], 0.0, label),
        label_weight=jnp.where(unshown, weight, jnp.pad(batch.label_weight, ((0, 0), behind))),
    )


def _is_near_shown(batch: CandidateBatch, margin: Float[Array, ""]) -> Bool[Array, "R N T"]:
    """Test which unshown candidates the teacher scores near the shown ones of their request.

    For a task, their probability is above (1 − margin) times the mean of the shown, by label
    weights. A candidate without a proper probability is not near, and does not count in the mean.
    If no shown candidate has a label weight and a proper probability, none is near.
    """
    candidates = batch.stage.shape[1]
    unscored = (0, candidates - batch.num_scored)
    known = jnp.pad(batch.teacher_weight > 0, ((0, 0), unscored, (0, 0)))
    probability = jnp.pad(batch.teacher_probability, ((0, 0), unscored, (0, 0)))
    probability = jnp.where(known, probability, 0.0)

    unlabeled = (0, candidates - batch.num_labeled)
    label_weight = jnp.pad(batch.label_weight, ((0, 0), unlabeled))
    is_shown = batch.stage == Stage.SHOWN
    weight = jnp.where(is_shown[..., None] & known, label_weight[..., None], 0.0)
    total = jnp.sum(weight, axis=1, keepdims=True)
    mean = jnp.sum(weight * probability, axis=1, keepdims=True) / jnp.where(total > 0, total, 1.0)
    is_near = known & (total > 0) & (probability > (1 - margin) * mean)
    return is_near & ~is_shown[..., None]


def _share_of_mean(
    numerator: Float[Array, "T"], denominator: Float[Array, "T"]
) -> Float[Array, ""]:
    """Return this device's share of the global mean; all shares add up to it."""
    total = jax.lax.psum(denominator, AXIS)
    return jnp.mean(numerator / jnp.where(total > 0, total, 1.0))


def update_dense(
    train_spec: TrainSpec,
    hyperparameters: Hyperparameters,
    factor: Float[Array, ""],
    dense: Dense,
    gradients: Dense,
    optimizer_state: optax.OptState,
) -> tuple[Dense, optax.OptState]:
    """Return the dense parameters, the transform and the optimizer's state after the update."""
    rate = factor * hyperparameters.optimizer.learning_rate
    decay = hyperparameters.optimizer.weight_decay
    direction, optimizer_state = train_spec.optimizer.update(gradients, optimizer_state, dense)
    new, transform = jax.tree.map(lambda value, along: value - rate * along, dense, direction)
    # The transform does not decay.
    old, _ = dense
    new = jax.tree.map(lambda value, before: value - rate * decay * before, new, old)
    return (new, transform), optimizer_state


class _TableUpdate(NamedTuple):
    """A table after a step."""

    rows: Float[Array, "runs rows W"]
    owner: Int[Array, "rows"]  # which of equal ids owns a row, see `find_occurrences`
    unknown_ids: Int[Array, ""]
    row_numbers: Int[Array, "M"]  # of this device's lookups; behind all rows for padding


def _update_table(
    name: str,
    train_spec: TrainSpec,
    state: TrainState,
    batch: CandidateBatch,
    items: Items,
    row_update: _RowUpdate,
    hyperparameters: Hyperparameters,
) -> _TableUpdate:
    """Update the rows of a table that the batch looks up.

    Devices exchange ids and the gradients of their rows, never an array of a table's size.
    """
    embedding: EmbeddingSpec = train_spec.model.embedding
    table = embedding.tables[name]
    ids, mask = ids_of_table(embedding, batch, items, name)
    own_row_numbers = jnp.where(mask, rows_of_ids(table, ids), table.rows)
    unknown = jax.lax.psum(jnp.sum(mask & ~is_known(table, ids), dtype=jnp.int32), AXIS)
    ids, mask = join_over_devices((ids, mask), axis=0)
    gradients = join_over_devices(rows_of_table(embedding, row_update.gradients, name), axis=1)

    # `update_own_rows` calls it, with all M ids or with the m of them whose rows lie here.
    def update(
        before: tuple[Float[Array, "runs rows W"], Int[Array, "rows"]],
        row: Int[Array, "m"],
        mask: Bool[Array, "m"],
        gradients: Float[Array, "runs m D"],
        index_of_own: Int[Array, "m"] | None,  # not needed
    ) -> tuple[Float[Array, "runs rows W"], Int[Array, "rows"]]:
        tables, owner = before
        occurrences, owner = find_occurrences(row, mask, owner)
        updated = update_tables(
            train_spec.row_optimizer,
            tables,
            occurrences,
            gradients,
            row_update.learning_rate,
            hyperparameters.optimizer.table_weight_decay,
            row_update.may_change,
            kernel_on_tpu=train_spec.row_kernel,
        )
        return updated, owner

    before = (state.parameters.tables[name], state.owners[name])
    row = rows_of_ids(table, ids)
    rows, owner = update_own_rows(embedding.row_sharding, update, before, row, mask, gradients)
    return _TableUpdate(rows, owner, state.unknown_ids[name] + unknown, own_row_numbers)


def _measure(embedding: EmbeddingSpec, stack: StackAfterStep) -> StepMetrics:
    """Return the norms of gradients and updates, and the share of each table with a gradient."""
    change = stack.change
    metrics = _named("gradient_norm", change.gradient_norms)
    metrics |= _named("update_norm", jax.vmap(_norms_of_parts)(change.moves))
    squared_gradients = jnp.zeros(change.may_change.shape)
    squared_moves = jnp.zeros(change.may_change.shape)
    for name, table in embedding.tables.items():
        own_row = change.row_numbers[name]
        in_table = jnp.minimum(own_row, table.rows - 1)  # padding has no gradient anywhere
        after = gather_from_runs(embedding, stack.state.parameters.tables[name], in_table)
        own_moves = after - rows_of_table(embedding, change.rows_before, name)
        own_gradients = rows_of_table(embedding, change.row_gradients, name)
        row, gradients, moves = join_over_devices(
            (own_row, own_gradients.swapaxes(0, 1), own_moves.swapaxes(0, 1)), axis=0
        )
        touched = _touched_rows(row, gradients, moves, change.may_change)
        squared_gradients += touched.squared_gradients
        squared_moves += touched.squared_moves
        metrics[f"rows_touched/{name}"] = touched.number / (table.size + 1)
    metrics["gradient_norm/tables"] = jnp.sqrt(squared_gradients)
    metrics["update_norm/tables"] = jnp.sqrt(squared_moves)
    return metrics


def _norms_of_parts(dense: Dense) -> dict[str, Float[Array, ""]]:
    """Return the norms of dense parameters and, if the mode has one, of its transform."""
    parts = {"dense": dense[0], "transform": dense[1]}
    return {name: norm_of(part) for name, part in parts.items() if jax.tree.leaves(part)}


class _Touched(NamedTuple):
    """The rows of a table with a gradient: their number, and sums over all their D numbers."""

    number: Float[Array, "runs"]
    squared_gradients: Float[Array, "runs"]
    squared_moves: Float[Array, "runs"]  # of what their embeddings change by


def _touched_rows(
    row: Int[Array, "M"],
    gradients: Float[Array, "M runs D"],
    moves: Float[Array, "M runs D"],
    may_change: Bool[Array, "runs"],
) -> _Touched:
    """Sum over the rows of a table that a batch looks up, each of them once.

    Args:
      row: the row of each lookup.
      gradients: that of each lookup; a row's own is their sum, and 0 for padding.
      moves: what the row of each lookup changes by, the same for all lookups of a row.
      may_change: whether a run changes at all.
    """
    # Lookups of the same row share a place: its first one among all in order. An `argsort` would
    # take longer on a CPU.
    place = jnp.searchsorted(jnp.sort(row), row)
    summed = jnp.zeros_like(gradients).at[place].add(gradients)
    moved = jnp.zeros_like(moves).at[place].set(moves)
    touched = jnp.any(summed != 0, axis=2) & may_change
    return _Touched(
        number=jnp.sum(touched, axis=0, dtype=jnp.float32),
        squared_gradients=jnp.sum(jnp.where(touched[..., None], summed**2, 0), axis=(0, 2)),
        squared_moves=jnp.sum(jnp.where(touched[..., None], moved**2, 0), axis=(0, 2)),
    )


def norm_of(tree: Any) -> Float[Array, ""]:
    """Return the Euclidean norm of all numbers of a tree with at least one leaf."""
    # One sum over all is faster than a small one for each of many leaves.
    numbers = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
    return jnp.sqrt(jnp.sum(jnp.square(numbers)))


def one_step(step: Step) -> Callable[..., Stepped]:
    """Build the function that takes one step and measures it.

    Returns:
      take(states, batch, hyperparameters, constants) -> (states, metrics), both one per stack.
    """

    def take(
        states: Sequence[TrainState],
        batch: CandidateBatch,
        hyperparameters: Sequence[Hyperparameters],
        constants: Constants,
    ) -> Stepped:
        return _stepped(step, step.take(states, batch, hyperparameters, constants))

    return take


def many_steps(step: Step) -> Callable[..., Stepped]:
    """Build the function that takes a step on each of a range of batches.

    A step is many small operations. In one program they run without the host in between, and one
    program serves any number of steps.

    Returns:
      steps(states, packed batches, (span, hyperparameters), constants) -> (states, metrics) after
      the last of the steps `span` (a `Span`, at least one step). They have the same bits as with
      one call per step.
    """
    take_once = jax.jit(step.take)  # traced once for its shapes and for the loop

    def steps(
        states: Sequence[TrainState],
        batches: PackedBatches,
        span_and_hyperparameters: tuple[Span, Sequence[Hyperparameters]],  # the same on all devices
        constants: Constants,
    ) -> Stepped:
        span, hyperparameters = span_and_hyperparameters

        def take(index: Any, stacks: tuple[StackAfterStep, ...]) -> tuple[StackAfterStep, ...]:
            before = [stack.state for stack in stacks]
            return take_once(before, unpack(batches, index), hyperparameters, constants)

        abstract = jax.eval_shape(
            lambda: take_once(states, unpack(batches, span.start), hyperparameters, constants)
        )
        # The first step needs states only; it replaces these losses and changes.
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
        first = tuple(
            stack._replace(state=state) for stack, state in zip(zeros, states, strict=True)
        )
        return _stepped(step, jax.lax.fori_loop(*span, take, first))

    return steps


def _stepped(step: Step, stacks: Sequence[StackAfterStep]) -> Stepped:
    states = tuple(stack.state for stack in stacks)
    norms_and_shares = step.measure(stacks)
    metrics = tuple(
        stack.losses | measured for stack, measured in zip(stacks, norms_and_shares, strict=True)
    )
    return states, metrics
