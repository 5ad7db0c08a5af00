"""The train step: one pure function, the same for teacher and student, for one member or many.

    gather rows → logits → user loss + λ · distillation loss → gradients → update

The distillation loss is a weighted sum of terms, each a loss and the signal that it learns from.

A population is a sequence of groups, and a group is one or more members that differ in numbers
alone (`state`). One step reads one batch, has the live teacher score it once, and updates every
member of every group. A single run is a population of one. The numbers in which members differ are
traced, so a step compiles once however many values are tried.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kd_ranker.batch import CandidateBatch, Items, Stage
from kd_ranker.batches.cutting import PackedBatches, Span, unpack
from kd_ranker.distillation.losses import DEFAULT_NUMBERS, LOSSES, USER_LOSSES
from kd_ranker.distillation.modes import Transform
from kd_ranker.distillation.teacher_signal import SIGNALS, Heard
from kd_ranker.embedding.lookup import Rows, embeddings, gather_rows
from kd_ranker.models.model import apply_model, score
from kd_ranker.training.mapping import in_parts
from kd_ranker.training.placing import AXIS
from kd_ranker.training.state import (
    Frozen,
    Hyperparameters,
    LiveTeacher,
    Recipe,
    States,
    TrainState,
)
from kd_ranker.training.update import Gradients, update_group

_LOSSES = ("loss", "user_loss", "distill_loss")
Losses = dict[str, Float[Array, "members"]]
Step = Callable[
    [Sequence[TrainState], CandidateBatch, Sequence[Hyperparameters], Frozen],
    tuple[States, tuple[Losses, ...]],
]


def make_step(
    recipes: Sequence[Recipe], teacher: LiveTeacher | None = None, sharing: int = 1
) -> Step:
    """Builds the function that one device runs under a mapped axis named `AXIS`.

    The batch holds this device's requests; the states are the same on all devices before and after.
    Losses are weighted means over what counts on all devices (entries, or as the loss has it pairs
    or requests), and then over tasks: numerators and denominators are summed over the axis first
    and divided afterwards, so the same global batch gives the same update on any number of devices.
    Devices along the axis of members hold other members and the same requests, and a member knows
    nothing of them.

    Args:
      recipes: one a group; all of them learn from the same batches.
      teacher: the live teacher; None where probabilities come with the batch.
      sharing: the number of devices that hold the same requests, `DeviceMap.members`. They share
        the teacher's pass, and only its probabilities travel.

    Returns:
      step(states, batch, hyperparameters, frozen) -> (states, losses), all but the batch and
      `frozen` one a group. `losses` holds `loss`, `user_loss` and `distill_loss`, equal on all
      devices.
    """

    def step(
        states: Sequence[TrainState],
        batch: CandidateBatch,
        hyperparameters: Sequence[Hyperparameters],
        frozen: Frozen,
    ) -> tuple[States, tuple[Losses, ...]]:
        whole = with_live_teacher(teacher, batch, frozen, sharing)
        trained = [
            _train_group(recipe, state, whole, numbers, frozen.items)
            for recipe, state, numbers in zip(recipes, states, hyperparameters, strict=True)
        ]
        return tuple(state for state, _ in trained), tuple(losses for _, losses in trained)

    return step


def in_turn(step: Step) -> Callable[..., tuple[States, tuple[Losses, ...]]]:
    """Builds the function that takes a step of `make_step` on each of several batches in turn.

    A step is many small operations. In one program they follow each other without the host, and one
    program does for any number of steps.

    Returns:
      steps(states, packed batches, (span, hyperparameters), frozen) -> (states, losses): those
      after the last of the steps `span` (a `Span`, at least one step), which are bit by bit as if
      each had been taken by itself.
    """

    def steps(
        states: Sequence[TrainState],
        batches: PackedBatches,
        same_on_all: tuple[Span, Sequence[Hyperparameters]],
        frozen: Frozen,
    ) -> tuple[States, tuple[Losses, ...]]:
        span, hyperparameters = same_on_all

        def take(
            at: Any, before: tuple[States, tuple[Losses, ...]]
        ) -> tuple[States, tuple[Losses, ...]]:
            return step(before[0], unpack(batches, at), hyperparameters, frozen)

        of_members = [jnp.zeros(state.non_finite_step.shape) for state in states]
        no_losses = tuple(dict.fromkeys(_LOSSES, zeros) for zeros in of_members)
        return jax.lax.fori_loop(*span, take, (tuple(states), no_losses))

    return steps


def with_live_teacher(
    teacher: LiveTeacher | None, batch: CandidateBatch, frozen: Frozen, sharing: int = 1
) -> CandidateBatch:
    """The batch with the teacher's own probabilities in place of the logged ones.

    See `make_step` for the arguments.
    """
    if teacher is None:
        return batch
    parameters, items = frozen.teacher, frozen.items
    assert parameters is not None, "a live teacher needs its parameters"
    # Scoring is most of such a step, so only candidates that may meet the teacher are scored.
    meets = batch.first(batch.judged) if teacher.stage >= Stage.PASSED else batch
    logits = in_parts(lambda part: score(teacher.model, parameters, part, items), meets, sharing)
    scored = meets.stage >= teacher.stage
    return dataclasses.replace(
        batch,
        teacher_probability=jax.lax.stop_gradient(jax.nn.sigmoid(logits)),
        teacher_weight=jnp.broadcast_to(scored[..., None], logits.shape).astype(jnp.float32),
    )


def _train_group(
    recipe: Recipe,
    state: TrainState,
    batch: CandidateBatch,
    numbers: Hyperparameters,
    items: Items,
) -> tuple[TrainState, Losses]:
    """One step of all members of a group."""
    heard = [SIGNALS[term.signal](batch) for term in recipe.terms]
    if not recipe.unshown_are_negatives:
        # Candidates that meet neither a label nor a signal would only cost time.
        batch = batch.first(max([batch.labelled, *(weight.shape[1] for _, weight in heard)]))
    spec = recipe.model.embedding
    # With one member on one device, reuse the gathered rows for the update. Those of several
    # members would not stay in a cache, and each device gathers rows of its own.
    reuses_rows = len(state.non_finite_step) == 1 and jax.lax.axis_size(AXIS) == 1

    tables = state.parameters.tables

    def of_member(
        member: Int[Array, ""], dense: Any, transform: Transform, numbers: Hyperparameters
    ) -> tuple[Gradients, dict[str, Float[Array, ""]], Rows]:
        rows = gather_rows(spec, tables, batch, items, whole_rows=reuses_rows, member=member)
        embedded = embeddings(spec, rows)
        gradients, losses = jax.grad(_losses, argnums=(0, 1, 2), has_aux=True)(
            dense, transform, embedded, recipe, numbers, batch, heard, items
        )
        return Gradients(*gradients), losses, rows

    members = jnp.arange(len(state.non_finite_step))
    gradients, losses, rows = jax.vmap(of_member)(
        members, state.parameters.dense, state.transform, numbers
    )
    dense, transform = gradients.dense, gradients.transform
    (dense, transform), losses = jax.lax.psum(((dense, transform), losses), AXIS)
    after = update_group(
        recipe,
        state,
        batch,
        items,
        numbers,
        Gradients(dense, transform, gradients.rows),
        jnp.isfinite(losses["loss"]),
        rows if reuses_rows else None,
    )
    return after, losses


def _losses(
    dense: Any,
    transform: Transform,
    embedded: Rows,
    recipe: Recipe,
    numbers: Hyperparameters,
    batch: CandidateBatch,
    heard: Sequence[Heard],
    items: Items,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """This device's share of a member's losses."""
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
    # A mode without a teacher has a weight and no term.
    for term, (probability, weight), factor in zip(
        recipe.terms, heard, numbers.term_weights, strict=False
    ):
        assert mode.teacher_logits is not None, "a mode without a teacher has no terms"
        seen = mode.teacher_logits(logits[:, : weight.shape[1]], transform)
        totals = LOSSES[term.loss].function(seen, probability, weight, numbers.loss)
        distill_loss += factor * _mean_over_devices(*totals)
    loss = numbers.user_weight * user_loss + numbers.distill_weight * distill_loss
    return loss, dict(zip(_LOSSES, (loss, user_loss, distill_loss), strict=True))


def _with_unshown_negatives(batch: CandidateBatch, weight: Float[Array, ""]) -> CandidateBatch:
    """The batch with a user label of 0 and this weight for each candidate that was not shown."""
    unshown = batch.candidate_mask & (batch.stage < Stage.SHOWN)
    # Who stands behind the first `labelled` was not shown, or its labels were not drawn.
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
    """This device's share of the global mean: the shares of all devices add up to it."""
    total = jax.lax.psum(denominator, AXIS)
    return jnp.mean(numerator / jnp.where(total > 0, total, 1.0))
