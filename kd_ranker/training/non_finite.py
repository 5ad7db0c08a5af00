"""The quantities that a run computes in a step, in order, and the first that is not finite.

    features, labels, teacher → rows, parameters → logits → terms → loss → gradients → update

A run whose loss or gradient stops being finite keeps its state from before that step, so the step
can be taken again. Padding and entries of weight 0 may hold any value, and are not looked at.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from kd_ranker.batch import CandidateBatch, Items
from kd_ranker.distillation.modes import Transform
from kd_ranker.embedding.lookup import Rows
from kd_ranker.models.model import apply_model
from kd_ranker.training.mapping import AXIS
from kd_ranker.training.state import Hyperparameters, TrainSpec
from kd_ranker.training.step import Dense, gradients_of_run, norm_of, update_dense, with_targets

_MEND_DATA = "mend it where it comes from"
_MEND_TEACHER = "mend the teacher, or the scores that it logged"
_SMALLER_STEPS = "try a smaller learning rate or weight"


@flax.struct.dataclass
class Learned:
    """What a run has learned before a step, as far as the step reads it."""

    dense: Any
    transform: Transform
    optimizer_state: optax.OptState  # of the dense parameters and the transform
    rows: Rows  # the embeddings that the batch of `with_targets` looks up


@flax.struct.dataclass
class StepInputs:
    """What one run computes a step from."""

    step: int  # counted from 1
    batch: CandidateBatch  # of all devices, with the scores of a live teacher
    learned: Learned


class Computed(NamedTuple):
    """What a step computes from its inputs, up to the update of the dense parameters."""

    user_logits: Float[Array, "R N T"]
    teacher_logits: Float[Array, "R N T"] | None  # None in a mode without a teacher
    losses: dict[str, Float[Array, ""]]
    gradients: Dense
    row_gradients: Rows
    updated: Dense


class Quantity(NamedTuple):
    """A named array of a step, and the names of its axes."""

    name: str
    values: Any
    axes: tuple[str, ...] = ()
    counts: Any = True  # where entries mean something; it broadcasts to the values
    remedy: str = _SMALLER_STEPS
    ids: Any = None  # of rows of a table: the ids that looked them up


class Finding(NamedTuple):
    """The first quantity of a step that is not finite, and what to do about it."""

    quantity: str  # "" if all were finite when the step was taken again
    remedy: str = _SMALLER_STEPS

    def __str__(self) -> str:
        if not self.quantity:
            return f"taken again, all was finite; {self.remedy}"
        return f"the first value that is not is {self.quantity}; {self.remedy}"


def compute_step(
    train_spec: TrainSpec, hyperparameters: Hyperparameters, inputs: StepInputs, items: Items
) -> Computed:
    """Compute a step of one run as `step.make_step` does, on one device."""
    learned = inputs.learned
    mode = train_spec.mode

    def on_axis(_: Any) -> Computed:
        batch, targets = with_targets(train_spec, hyperparameters.terms, inputs.batch)
        logits = apply_model(train_spec.model, learned.dense, learned.rows, batch, items)
        user_logits = mode.user_logits(logits, learned.transform)
        teacher_logits = None
        if mode.teacher_logits:
            teacher_logits = mode.teacher_logits(logits, learned.transform)
        dense = (learned.dense, learned.transform)
        gradients, row_gradients, losses = gradients_of_run(
            train_spec, hyperparameters, dense, learned.rows, batch, targets, items
        )
        factor = train_spec.schedule(jnp.asarray(inputs.step), hyperparameters.steps)
        updated, _ = update_dense(
            train_spec, hyperparameters, factor, dense, gradients, learned.optimizer_state
        )
        return Computed(
            user_logits=user_logits,
            teacher_logits=teacher_logits,
            losses=losses,
            gradients=gradients,
            row_gradients=row_gradients,
            updated=updated,
        )

    # A step sums over the axis of devices, which here is one of length 1.
    computed = jax.vmap(on_axis, axis_name=AXIS)(jnp.zeros(1))
    return jax.tree.map(lambda leaf: leaf[0], computed)


def quantities_of(
    train_spec: TrainSpec,
    hyperparameters: Hyperparameters,
    inputs: StepInputs,
    items: Items,
    computed: Computed,
) -> Iterator[Quantity]:
    """Return the quantities of a step in the order in which they depend on each other."""
    yield from _of_batch(inputs.batch, items)
    batch, _ = with_targets(train_spec, hyperparameters.terms, inputs.batch)
    learned = inputs.learned
    yield from _of_rows("", train_spec, learned.rows, batch, items)
    yield from _of_dense("", (learned.dense, learned.transform))

    axes = ("request", "candidate", "task")
    for name, logits in (("user", computed.user_logits), ("teacher", computed.teacher_logits)):
        if logits is not None:
            yield Quantity(f"the {name} logits", logits, axes, batch.candidate_mask[..., None])
    yield from _of_losses(computed.losses)
    yield from _of_dense("the gradient of ", computed.gradients)
    # The squares of large numbers may be infinite.
    yield Quantity("the norm of the gradient", norm_of(computed.gradients))
    yield from _of_rows("the gradient of ", train_spec, computed.row_gradients, batch, items)
    yield from _of_dense("", computed.updated, " after the update")


def _of_batch(batch: CandidateBatch, items: Items) -> Iterator[Quantity]:
    """Return the features, labels and scores of a batch."""
    is_candidate = batch.candidate_mask[..., None]
    is_event = batch.history_mask[..., None]
    of_candidate = ("request", "candidate", "column")
    of_event = ("request", "event", "column")
    features = items.features
    for name, values, axes, counts in (
        ("user_features", batch.user_features, ("request", "column"), True),
        ("context", batch.context, ("request", "column"), True),
        ("history_features", batch.history_features, of_event, is_event),
        ("item_features of the history", features[batch.history_id], of_event, is_event),
        ("candidate_features", batch.candidate_features, of_candidate, is_candidate),
        ("item_features", features[batch.item_id], of_candidate, is_candidate),
    ):
        yield Quantity(f"the feature {name}", values, axes, counts, _MEND_DATA)
    weight = batch.label_weight
    yield Quantity("the label weight", weight, ("request", "candidate"), True, _MEND_DATA)
    axes = ("request", "candidate", "task")
    yield Quantity("the user label", batch.user_label, axes, weight[..., None] > 0, _MEND_DATA)
    probability = batch.teacher_probability
    counts = batch.teacher_weight > 0
    yield Quantity("the teacher's probability", probability, axes, counts, _MEND_TEACHER)


def _of_rows(
    prefix: str, train_spec: TrainSpec, rows: Rows, batch: CandidateBatch, items: Items
) -> Iterator[Quantity]:
    """Return the rows of tables that a batch looks up, or their gradients."""
    axes = ("request", "entry", "value")
    for name, lookup in train_spec.model.embedding.lookups.items():
        ids = lookup.ids(batch, items)
        counts = lookup.mask(batch, items)[..., None]
        text = f"{prefix}the row of the table {lookup.table}"
        if name != lookup.table:
            text += f" for {name}"
        yield Quantity(text, rows[name], (*axes[: ids.ndim], "column"), counts, ids=ids)


def _of_dense(prefix: str, dense: Dense, suffix: str = "") -> Iterator[Quantity]:
    """Return the dense parameters and the transform, or their gradients."""
    for name, tree in zip(("the dense parameter ", "the transform's "), dense, strict=True):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            yield Quantity(f"{prefix}{name}{_name_of(path)}{suffix}", leaf)


def _name_of(path: jax.tree_util.KeyPath) -> str:
    """Return the name of a leaf, such as `towers.layers.0.kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def _of_losses(losses: dict[str, Any]) -> Iterator[Quantity]:
    """Return the losses, each after its terms."""
    for kind, name in (("user", "the user loss"), ("distill", "the distillation loss")):
        for key, value in losses.items():
            if key.startswith(f"{kind}_term/"):
                yield Quantity(f"the term {key.partition('/')[2]} of {name}", value)
        yield Quantity(name, losses[f"{kind}_loss"])
    yield Quantity("the loss", losses["loss"])


def first_non_finite(quantities: Iterator[Quantity], tasks: Sequence[str]) -> Finding | None:
    """Return the first quantity with an entry that is not finite; None without one."""
    for quantity in quantities:
        values = np.asarray(quantity.values)
        counts = np.broadcast_to(np.asarray(quantity.counts), values.shape)
        is_bad = ~np.isfinite(values) & counts
        if is_bad.any():
            first = np.argwhere(is_bad)[0].tolist()
            return Finding(quantity.name + _place(quantity, first, tasks), quantity.remedy)
    return None


def _place(quantity: Quantity, index: Sequence[int], tasks: Sequence[str]) -> str:
    """Say where an entry of a quantity is, as ` at request 3, candidate 5, task watch`."""
    places = [
        f"{axis} {tasks[number] if axis == 'task' else number}"
        for axis, number in zip(quantity.axes, index, strict=False)
        if axis != "column" or quantity.ids is None
    ]
    text = f" at {', '.join(places)}" if places else ""
    if quantity.ids is None:
        return text
    return f"{text}, id {int(np.asarray(quantity.ids)[tuple(index[:-1])])}"
