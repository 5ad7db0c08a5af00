"""Lookups and layers that student and teacher share."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Num

from kd_ranker.batch import WHOLE, CandidateBatch, FeatureSpec, Items, RowSharding
from kd_ranker.embedding.lookup import Lookup, Rows
from kd_ranker.embedding.row_sharding import read


def weights_of(layer: nnx.Linear) -> tuple[Float[Array, "fan_in fan_out"], Float[Array, "fan_out"]]:
    """Return the kernel and the bias of a linear layer that has both."""
    assert layer.kernel is not None
    assert layer.bias is not None
    return layer.kernel[...], layer.bias[...]


class MultiLayerPerceptron(nnx.Module):
    """Linear layers with a ReLU between them, none after the last."""

    def __init__(self, widths: Sequence[int], *, rngs: nnx.Rngs):
        """Build the layers; `widths` runs from the input's width to the output's."""
        self.layers = nnx.List(
            [nnx.Linear(*sizes, rngs=rngs) for sizes in itertools.pairwise(widths)]
        )

    def __call__(self, inputs: Float[Array, "... fan_in"]) -> Float[Array, "... fan_out"]:
        """Apply the layers to the last axis."""
        *hidden, last = self.layers
        for layer in hidden:
            inputs = jax.nn.relu(layer(inputs))
        return last(inputs)


class ItemEncoder(nnx.Module):
    """The embedding row of an item plus a linear map of its features: float32 [..., D]."""

    def __init__(self, features: int, width: int, *, rngs: nnx.Rngs):
        """Build the map from `features` to `width` = D."""
        self.features = nnx.Linear(features, width, rngs=rngs)

    def __call__(
        self, row: Float[Array, "... D"], features: Float[Array, "... F"]
    ) -> Float[Array, "... D"]:
        """Return row + W features + b."""
        return row + self.features(features)

    def products(
        self,
        queries: Float[Array, "R Q D"],
        row: Float[Array, "R N D"],
        features: Float[Array, "R N F"],
    ) -> Float[Array, "R Q N"]:
        """Return the dot products of queries with encoded items, without encoding the items.

        q · (row + W features + b) = q · row + (qᵀ W) · features + q · b: W multiplies the few
        queries of a request and not its many candidates.
        """
        weights, bias = weights_of(self.features)
        return linear_products(queries, row, weights, features) + (queries @ bias)[..., None]


def linear_products(
    queries: Float[Array, "R Q D"],
    row: Float[Array, "R N D"],
    weights: Float[Array, "F D"],
    features: Float[Array, "R N F"],
) -> Float[Array, "R Q N"]:
    """Return the products q · (row + W features) as q · row + (qᵀ W) · features."""
    return jnp.einsum("rqd,rnd->rqn", queries, row) + jnp.einsum(
        "rqf,rnf->rqn", queries @ weights.T, features
    )


def features_of_items(
    known: Num[Array, "items W"],
    item_id: Int[Array, "..."],
    row_sharding: RowSharding = WHOLE,
    columns: int | None = None,
    missing: int = 0,
) -> Num[Array, "... columns"]:
    """Return the first columns, or all, of each item's row; `missing` for an id outside `known`.

    Rows are sliced after they are read: slicing the matrix would cost time in its size per step.
    """
    is_known = (item_id >= 0) & (item_id < known.shape[0] * row_sharding.devices)
    row = read(row_sharding, jnp.asarray(known), jnp.where(is_known, item_id, 0), slice(columns))
    # A product with 1 separates the read from later operations: for matrix products in bfloat16, a
    # TPU would otherwise convert the whole matrix before it reads a few rows of it.
    known_row = is_known[..., None]
    return jnp.where(known_row, row * known_row.astype(known.dtype), missing)


def _categories_of_items(items: Items, item_id: Int[Array, "..."]) -> Int[Array, "... I"]:
    return features_of_items(items.category, item_id, items.row_sharding, missing=-1)


def _field(name: str) -> Callable[[CandidateBatch, Items], Array]:
    """Return a function that reads a field of a batch."""
    return lambda batch, items: getattr(batch, name)


def _of_items(name: str) -> Callable[[CandidateBatch, Items], Int[Array, "... I"]]:
    """Return a function that reads the categories of the items in a field of ids."""
    return lambda batch, items: _categories_of_items(items, getattr(batch, name))


def _every_request(batch: CandidateBatch, items: Items) -> Bool[Array, "R"]:
    return jnp.full(batch.user_id.shape, True)


def _categories(
    ids: Callable[[CandidateBatch, Items], Int[Array, "... L"]],
    mask: Callable[[CandidateBatch, Items], Bool[Array, "..."]],
) -> Lookup:
    """Return a lookup of category ids; -1 is padding, and `mask` is that of their owners."""

    def known(batch: CandidateBatch, items: Items) -> Bool[Array, "... L"]:
        return (ids(batch, items) >= 0) & mask(batch, items)[..., None]

    return Lookup("category", ids, known)


_CANDIDATES = _field("candidate_mask")
_EVENTS = _field("history_mask")

LOOKUPS = {
    "user": Lookup("user", _field("user_id"), _every_request),
    "item": Lookup("item", _field("item_id"), _CANDIDATES),
    "request_category": _categories(_field("request_category"), _every_request),
    "candidate_category": _categories(_field("candidate_category"), _CANDIDATES),
    "item_category": _categories(_of_items("item_id"), _CANDIDATES),
}
"""The lookups that every ranker can afford: the first two in a dataset without categories."""

HISTORY_LOOKUPS = {
    "history": Lookup("item", _field("history_id"), _EVENTS),
    "history_category": _categories(_of_items("history_id"), _EVENTS),
}
"""The items of the user's history, from the tables of the candidates."""


def category_shares(
    category: Int[Array, "... L"], lengths: Sequence[int], dtype: Any
) -> Float[Array, "... L"]:
    """Return the share of each value in the mean of its feature: 1 / their number, 0 for padding.

    The ids are concatenated over features, and -1 is padding. A feature has `lengths` of them.
    """
    shares = []
    for end, length in zip(itertools.accumulate(lengths), lengths, strict=True):
        has_value = (category[..., end - length : end] >= 0).astype(dtype)
        shares.append(has_value / jnp.maximum(jnp.sum(has_value, axis=-1, keepdims=True), 1))
    return jnp.concatenate(shares, axis=-1)


def category_means(
    rows: Float[Array, "... L D"], category: Int[Array, "... L"], lengths: Sequence[int]
) -> Float[Array, "... K*D"]:
    """Return the concatenated mean rows of K categorical features, 0 for one without a value.

    `rows` are those of the ids; see `category_shares` for these.
    """
    weighted = category_shares(category, lengths, rows.dtype)[..., None] * rows
    ends = list(itertools.accumulate(lengths))
    features = jnp.split(weighted, ends[:-1], axis=-2)
    return jnp.concatenate([jnp.sum(feature, axis=-2) for feature in features], axis=-1)


def plus_category_means(
    row: Float[Array, "... D"],
    rows: Float[Array, "... L D"],
    category: Int[Array, "... L"],
    lengths: Sequence[int],
) -> Float[Array, "... D"]:
    """Return a row plus the mean row of each categorical feature, as one sum over their values."""
    shares = category_shares(category, lengths, rows.dtype)
    return row + jnp.sum(shares[..., None] * rows, axis=-2)


def item_rows(
    rows: Rows, lookup: str, item_id: Int[Array, "..."], items: Items, spec: FeatureSpec
) -> Float[Array, "... D"]:
    """Return the embedding part of items: item row + Σ_f mean row of their categorical feature f.

    The lookup of their ids is "item" for candidates and "history" for events.
    """
    row = rows[lookup]
    if lengths := spec.category_lengths("item"):
        category = _categories_of_items(items, item_id)
        row = plus_category_means(row, rows[f"{lookup}_category"], category, lengths)
    return row


def candidate_rows(
    batch: CandidateBatch, rows: Rows, items: Items, spec: FeatureSpec
) -> Float[Array, "R N D"]:
    """Return `item_rows` of each candidate plus the mean rows of the candidate's categories."""
    row = item_rows(rows, "item", batch.item_id, items, spec)
    if lengths := spec.category_lengths("candidate"):
        category = batch.candidate_category
        row = plus_category_means(row, rows["candidate_category"], category, lengths)
    return row


def item_inputs(
    items: Items, item_id: Int[Array, "R N"], features: Float[Array, "R N X"], columns: int
) -> Float[Array, "R N columns+X"]:
    """Return the other inputs of candidates or events: the item's features, and their own.

    The item contributes its first `columns` features, those that a ranker can afford.
    """
    of_item = features_of_items(items.features, item_id, items.row_sharding, columns)
    return jnp.concatenate([of_item.astype(features.dtype), features], axis=-1)


def user_inputs(
    batch: CandidateBatch, rows: Rows, spec: FeatureSpec
) -> Float[Array, "R user_width"]:
    """Return the inputs of the user and the request: row, features, context, category means."""
    inputs = [rows["user"], batch.user_features, batch.context]
    if lengths := spec.category_lengths("request"):
        means = category_means(rows["request_category"], batch.request_category, lengths)
        inputs.append(means)
    return jnp.concatenate(inputs, axis=-1)


class HistoryMean(nnx.Module):
    """The mean of the events of the user's history, once per request.

        h = Σ_e mask_e (row_e + W x_e) / Σ_e mask_e         [R, D]

    row_e is that of `item_rows`; x_e contains the cheap features of the event's item and the
    features of the event. An empty history gives 0. All events have equal weights for all
    candidates, as in Covington, Adams and Sargin (RecSys 2016, section 3.2).
    """

    def __init__(self, spec: FeatureSpec, width: int, *, rngs: nnx.Rngs):
        """Build W for rows of `width` = D."""
        self.spec = spec
        features = spec.cheap_item_features + spec.history_features
        self.features = nnx.Linear(features, width, use_bias=False, rngs=rngs)

    def __call__(self, batch: CandidateBatch, rows: Rows, items: Items) -> Float[Array, "R D"]:
        """Return the mean of each request's history."""
        spec = self.spec
        events = batch.history_id
        features = item_inputs(items, events, batch.history_features, spec.cheap_item_features)
        mask = batch.history_mask[..., None]
        number = jnp.maximum(jnp.sum(mask, axis=1), 1)

        def mean(values: Float[Array, "R H W"]) -> Float[Array, "R W"]:
            return jnp.sum(values * mask, axis=1) / number

        # W is linear, so it multiplies the mean of the events and not each of them.
        row = item_rows(rows, "history", events, items, spec)
        return mean(row) + self.features(mean(features))


def user_width(spec: FeatureSpec, width: int) -> int:
    """Return the width of `user_inputs` with rows of `width` = D."""
    rows = 1 + len(spec.category_lengths("request"))
    return rows * width + spec.user_features + spec.context_features
