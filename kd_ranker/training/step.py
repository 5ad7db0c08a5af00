"""The train step: one pure function, the same for teacher and student, for one member or many.

    gather rows → logits → user loss + λ · distillation loss → gradients → update

The distillation loss is a weighted sum of terms, each a loss and the signal that it learns from.

A population is a sequence of groups. A group is one or more members that differ only in numbers
(`state`). One step reads one batch, scores it once with the live teacher, and updates every member
of every group. A single run is a population of one. The numbers in which members differ are traced,
so a step compiles once for all their values.
"""

import dataclasses
from collections.abc import Callable, Sequence
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
from kd_ranker.embedding.deal import with_own
from kd_ranker.embedding.lookup import (
    EmbeddingSpec,
    Rows,
    embeddings,
    gather_rows,
    ids_of_table,
    is_known,
    rows_of_ids,
    rows_of_table,
)
from kd_ranker.embedding.row_optimizers import RowOptimizer, find_occurrences, update_tables
from kd_ranker.models.model import Parameters, apply_model, score
from kd_ranker.training.mapping import AXIS, in_parts, join_over_devices
from kd_ranker.training.state import (
    Frozen,
    Hyperparameters,
    LiveTeacher,
    Recipe,
    States,
    TrainState,
)

_LOSSES = ("loss", "user_loss", "distill_loss")
_Dense = tuple[Any, Transform]  # dense parameters and the transform, or their gradients
Losses = dict[str, Float[Array, "members"]]
Stepped = tuple[States, tuple[Losses, ...]]
Step = Callable[[Sequence[TrainState], CandidateBatch, Sequence[Hyperparameters], Frozen], Stepped]


def make_step(
    recipes: Sequence[Recipe], teacher: LiveTeacher | None = None, sharing: int = 1
) -> Step:
    """Build the function that one device runs under a mapped axis named `AXIS`.

    The batch holds this device's requests. The states are the same on all devices before and after.
    Losses are weighted means over the valid entries, pairs or requests of all devices, and then
    over tasks. Numerators and denominators are summed over the axis before they are divided, so the
    same global batch gives the same update on any number of devices. Devices along the axis of
    members train other members on the same requests, independently.

    Args:
      recipes: one per group; all of them learn from the same batches.
      teacher: the live teacher; None where probabilities come with the batch.
      sharing: the number of devices that hold the same requests, `DeviceMap.members`. They share
        the teacher's pass and exchange only its probabilities.

    Returns:
      step(states, batch, hyperparameters, frozen) -> (states, losses). States, hyperparameters and
      losses are one per group. `losses` holds `loss`, `user_loss` and `distill_loss`, equal on all
      devices.
    """

    def step(
        states: Sequence[TrainState],
        batch: CandidateBatch,
        hyperparameters: Sequence[Hyperparameters],
        frozen: Frozen,
    ) -> Stepped:
        scored = with_live_teacher(teacher, batch, frozen, sharing)
        trained = [
            _train_group(recipe, state, scored, numbers, frozen.items)
            for recipe, state, numbers in zip(recipes, states, hyperparameters, strict=True)
        ]
        return tuple(state for state, _ in trained), tuple(losses for _, losses in trained)

    return step


def in_turn(step: Step) -> Callable[..., Stepped]:
    """Build the function that takes a step of `make_step` on each of a range of batches.

    A step is many small operations. In one program they run without the host in between, and one
    program serves any number of steps.

    Returns:
      steps(states, packed batches, (span, hyperparameters), frozen) -> (states, losses) after the
      last of the steps `span` (a `Span`, at least one step). They have the same bits as with one
      call per step.
    """

    def steps(
        states: Sequence[TrainState],
        batches: PackedBatches,
        same_on_all: tuple[Span, Sequence[Hyperparameters]],
        frozen: Frozen,
    ) -> Stepped:
        span, hyperparameters = same_on_all

        def take(at: Any, before: Stepped) -> Stepped:
            return step(before[0], unpack(batches, at), hyperparameters, frozen)

        of_members = [jnp.zeros(state.non_finite_step.shape) for state in states]
        no_losses = tuple(dict.fromkeys(_LOSSES, zeros) for zeros in of_members)
        return jax.lax.fori_loop(*span, take, (tuple(states), no_losses))

    return steps


def with_live_teacher(
    teacher: LiveTeacher | None, batch: CandidateBatch, frozen: Frozen, sharing: int = 1
) -> CandidateBatch:
    """Replace a batch's logged probabilities by those of the live teacher.

    See `make_step` for the arguments.
    """
    if teacher is None:
        return batch
    parameters, items = frozen.teacher, frozen.items
    assert parameters is not None, "a live teacher needs its parameters"
    # Scoring is the largest part of such a step: only candidates of its stage are scored.
    judged = batch.first(batch.judged) if teacher.stage >= Stage.PASSED else batch
    logits = in_parts(lambda part: score(teacher.model, parameters, part, items), judged, sharing)
    weight = (judged.stage >= teacher.stage)[..., None]
    return dataclasses.replace(
        batch,
        teacher_probability=jax.lax.stop_gradient(jax.nn.sigmoid(logits)),
        teacher_weight=jnp.broadcast_to(weight, logits.shape).astype(jnp.float32),
    )


def _train_group(
    recipe: Recipe, state: TrainState, batch: CandidateBatch, numbers: Hyperparameters, items: Items
) -> tuple[TrainState, Losses]:
    """One step of all members of a group; one without a finite loss is frozen from this step."""
    spec, tables = recipe.model.embedding, state.parameters.tables
    signals = [SIGNALS[term.signal].read(batch) for term in numbers.terms]
    if not recipe.unshown_are_negatives:
        # Candidates without a label or a signal would only cost time.
        batch = batch.first(max([batch.labelled, *(weight.shape[1] for _, weight in signals)]))
    # Counted from 1: a factor of 0 at the first step would waste a batch.
    step, members = state.step + 1, len(state.non_finite_step)
    # With one member on one device, reuse the gathered rows for the update. Those of many members
    # would not stay in a cache, and each device gathers other rows.
    reuses_rows = members == 1 and jax.lax.axis_size(AXIS) == 1

    def train_member(
        member: Int[Array, ""],
        dense: _Dense,
        optimizer_state: optax.OptState,
        non_finite_step: Int[Array, ""],
        numbers: Hyperparameters,
    ) -> tuple[_Dense, optax.OptState, Int[Array, ""], Losses, _OfRows]:
        rows = gather_rows(spec, tables, batch, items, whole_rows=reuses_rows, member=member)
        (gradients, of_rows), losses = jax.grad(_losses, argnums=(0, 1), has_aux=True)(
            dense, embeddings(spec, rows), recipe, numbers, batch, signals, items
        )
        gradients, losses = jax.lax.psum((gradients, losses), AXIS)
        finite = jnp.isfinite(losses["loss"])
        takes_part = (non_finite_step == 0) & (step <= numbers.steps)
        may_change = takes_part & finite
        factor, peak = recipe.schedule(step, numbers.steps), numbers.optimizer
        rate, decay = factor * peak.learning_rate, peak.weight_decay
        direction, after = recipe.optimizer.update(gradients, optimizer_state, dense)
        new, transform = jax.tree.map(lambda value, step: value - rate * step, dense, direction)
        # The transform does not decay.
        new = jax.tree.map(lambda new, old: new - rate * decay * old, new, dense[0])
        updated = jax.tree.map(
            lambda new, old: jnp.where(may_change, new, old),
            ((new, transform), after),
            (dense, optimizer_state),
        )
        non_finite_step = jnp.where(takes_part & ~finite, step, non_finite_step)
        gathered = rows if reuses_rows else None
        table_rate = factor * peak.table_learning_rate
        return *updated, non_finite_step, losses, _OfRows(of_rows, gathered, table_rate, may_change)

    (dense, transform), optimizer_state, non_finite_step, losses, of_rows = jax.vmap(train_member)(
        jnp.arange(members),
        (state.parameters.dense, state.transform),
        *(state.optimizer_state, state.non_finite_step, numbers),
    )
    decay = numbers.optimizer.table_weight_decay
    updated = {
        name: _update_table(name, spec, recipe.row_optimizer, state, batch, items, of_rows, decay)
        for name in tables
    }
    tables, owners, unknown_ids = (
        {name: of[at] for name, of in updated.items()} for at in range(3)
    )
    after = TrainState(
        step=step,
        parameters=Parameters(dense, tables),
        transform=transform,
        optimizer_state=optimizer_state,
        non_finite_step=non_finite_step,
        unknown_ids=unknown_ids,
        owners=owners,
    )
    return after, losses


def _losses(
    trained: _Dense,
    embedded: Rows,
    recipe: Recipe,
    numbers: Hyperparameters,
    batch: CandidateBatch,
    signals: Sequence[TeacherSignal],
    items: Items,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return this device's share of a member's losses."""
    dense, transform = trained
    mode = recipe.mode
    logits = apply_model(recipe.model, dense, embedded, batch, items)
    if recipe.unshown_are_negatives:
        batch = _with_unshown_negatives(batch, numbers.unshown_weight)
    user_logits = mode.user_logits(logits[:, : batch.labelled], transform)
    label_weight = jnp.broadcast_to(batch.label_weight[..., None], user_logits.shape)
    user_loss = jnp.zeros(())
    for user in USER_LOSSES[recipe.user_loss]:
        totals = user(user_logits, batch.user_label, label_weight, DEFAULT_NUMBERS)
        user_loss += _mean_over_devices(*totals)
    distill_loss = jnp.zeros(())
    for term, (probability, weight) in zip(numbers.terms, signals, strict=True):
        if mode.teacher_logits is None:
            continue
        teacher_logits = mode.teacher_logits(logits[:, : weight.shape[1]], transform)
        totals = LOSSES[term.loss].function(teacher_logits, probability, weight, numbers.loss)
        distill_loss += term.weight * _mean_over_devices(*totals)
    loss = numbers.user_weight * user_loss + numbers.distill_weight * distill_loss
    return loss, dict(zip(_LOSSES, (loss, user_loss, distill_loss), strict=True))


def _with_unshown_negatives(batch: CandidateBatch, weight: Float[Array, ""]) -> CandidateBatch:
    """Set a user label of 0 with this weight for each candidate that was not shown."""
    unshown = batch.candidate_mask & (batch.stage < Stage.SHOWN)
    # Candidates after the first `labelled` were not shown, or their labels were not drawn.
    behind = (0, unshown.shape[1] - batch.labelled)
    label = jnp.pad(batch.user_label, ((0, 0), behind, (0, 0)))
    return dataclasses.replace(
        batch,
        user_label=jnp.where(unshown[..., None], 0.0, label),
        label_weight=jnp.where(unshown, weight, jnp.pad(batch.label_weight, ((0, 0), behind))),
    )


def _mean_over_devices(
    numerator: Float[Array, "T"], denominator: Float[Array, "T"]
) -> Float[Array, ""]:
    """Return this device's share of the global mean; all shares add up to it."""
    total = jax.lax.psum(denominator, AXIS)
    return jnp.mean(numerator / jnp.where(total > 0, total, 1.0))


class _OfRows(NamedTuple):
    """The rows of the lookups of members, for the update of tables; all have an axis of members."""

    gradients: Rows  # of this device; all other gradients are summed over devices
    gathered: Rows | None  # the rows themselves; without them, the update has to read them
    learning_rate: Float[Array, "members"]
    may_change: Bool[Array, "members"]


def _update_table(
    name: str,
    spec: EmbeddingSpec,
    optimizer: RowOptimizer,
    state: TrainState,
    batch: CandidateBatch,
    items: Items,
    of_rows: _OfRows,
    decay: Float[Array, "members"],
) -> tuple[Float[Array, "members rows W"], Int[Array, "rows"], Int[Array, ""]]:
    """Return a table, its owners and its number of unknown ids after a step.

    Devices exchange ids and the gradients of their rows, never an array of a table's size.
    """
    table = spec.tables[name]
    ids, mask = ids_of_table(spec, batch, items, name)
    unknown = jax.lax.psum(jnp.sum(mask & ~is_known(table, ids), dtype=jnp.int32), AXIS)
    ids, mask = join_over_devices((ids, mask), axis=0)

    def update(
        before: tuple[Float[Array, "members rows W"], Int[Array, "rows"]],
        row: Int[Array, "m"],
        mask: Bool[Array, "m"],
        gradients: Float[Array, "members m D"],
        _: Int[Array, "m"] | None,
    ) -> tuple[Float[Array, "members rows W"], Int[Array, "rows"]]:
        tables, owner = before
        occurrences, owner = find_occurrences(row, mask, owner)
        rows = of_rows.gathered
        gathered = rows_of_table(spec, rows, name)[0] if rows else None
        numbers = of_rows.learning_rate, decay, of_rows.may_change
        return update_tables(optimizer, tables, occurrences, gradients, *numbers, gathered), owner

    of_ids = join_over_devices(rows_of_table(spec, of_rows.gradients, name), axis=1)
    before, row = (state.parameters.tables[name], state.owners[name]), rows_of_ids(table, ids)
    updated, owner = with_own(spec.deal, update, before, row, mask, of_ids)
    return updated, owner, state.unknown_ids[name] + unknown
