"""Students: early rankers that spend little on a candidate.

Arrays that depend on the user alone have the shape [R, ...] and are computed once a request; only
the lines that carry an axis N are paid for by each candidate.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from kd_ranker.batch import CandidateBatch, FeatureSpec, Items
from kd_ranker.embedding.lookup import Rows
from kd_ranker.models.layers import (
    HistoryMean,
    ItemEncoder,
    MultiLayerPerceptron,
    candidate_inputs,
    candidate_rows,
    user_inputs,
    user_width,
    weights_of,
)
from kd_ranker.models.lookups import HISTORY_LOOKUPS, LOOKUPS
from kd_ranker.models.model import ModuleClass

HISTORIES = ("none", "mean")
"""The ways in which a student may read the user's history, by `config.student.history`."""


def reads_history(config: ConfigDict) -> bool:
    """True if the student of `config.student` reads the user's history."""
    return config.history != "none"


def _history(spec: FeatureSpec, config: ConfigDict, rngs: nnx.Rngs) -> HistoryMean | None:
    return HistoryMean(spec, config.width, rngs=rngs) if reads_history(config) else None


def _user_width(spec: FeatureSpec, config: ConfigDict) -> int:
    """The width of `_user_inputs`."""
    return user_width(spec, config.width) + reads_history(config) * config.width


def _user_inputs(
    batch: CandidateBatch,
    rows: Rows,
    items: Items,
    spec: FeatureSpec,
    history: HistoryMean | None,
) -> Float[Array, "R user_width"]:
    """The inputs of the user's tower: `user_inputs`, and the mean of the history if it is read."""
    inputs = user_inputs(batch, rows, spec)
    if history is None:
        return inputs
    return jnp.concatenate([inputs, history(batch, rows, items)], axis=-1)


class MultiInterest(nnx.Module):
    """Several user embeddings, combined for each candidate by how well they match it.

        u = MLP([user row, user features, context, category means, h])     [R, E, D]
        v = item row + Σ category means + W [cheap item features, candidate features] + b
                                                           [R, N, D]
        s = u · v                                          [R, N, E]
        c = Σ_e softmax(s)_e u_e                           [R, N, D]
        z = V [c, v, s] + a                                [R, N, heads]

    The combination follows multi-interest retrieval models (Li et al., MIND, CIKM 2019) with a
    softmax over the interests in place of routing. A category mean is the mean row of the values of
    a categorical feature, of the request in u, of the item and the candidate in v. With
    `history = "mean"`, h is that of `HistoryMean`; else there is none.
    """

    lookups = {**LOOKUPS, **HISTORY_LOOKUPS}
    reads_history = staticmethod(reads_history)

    def __init__(self, spec: FeatureSpec, heads: int, config: ConfigDict, *, rngs: nnx.Rngs):
        """Builds the model; reads `width` (D), `interests` (E), `hidden` and `history`."""
        self.interests = config.interests
        self.spec = spec
        self.user = MultiLayerPerceptron(
            [_user_width(spec, config), *config.hidden, config.interests * config.width],
            rngs=rngs,
        )
        self.item = ItemEncoder(
            spec.cheap_item_features + spec.candidate_features, config.width, rngs=rngs
        )
        self.heads = nnx.Linear(2 * config.width + config.interests, heads, rngs=rngs)
        self.history = _history(spec, config, rngs)

    def __call__(
        self, batch: CandidateBatch, rows: Rows, items: Items
    ) -> Float[Array, "R N heads"]:
        """The logits of every candidate."""
        # Fused by hand, for what XLA's own way takes on a CPU: docs/benchmarks.md has the times.
        users = self.user(_user_inputs(batch, rows, items, self.spec, self.history))
        users = users.reshape(users.shape[0], self.interests, -1)
        # Split V into the parts that multiply c, v and s. As s is linear in v, and c in the weights
        # of the interests, V meets the request's few user embeddings and not its many candidates.
        width = users.shape[-1]
        weights, offset = weights_of(self.heads)
        combine, direct, matched = jnp.split(weights, [width, 2 * width])
        direct = direct.T + jnp.einsum("eh,red->rhd", matched, users)
        products = self.item.products(
            jnp.concatenate([users, direct], axis=1),
            candidate_rows(batch, rows, items, self.spec),
            candidate_inputs(batch, items, self.spec.cheap_item_features),
        )
        match, direct = jnp.split(products, [self.interests], axis=1)
        # Divide the softmax by its sum last, and take the few interests and heads one by one: a
        # reduction over so short an axis costs a CPU more than all the arithmetic here.
        of_interest = [match[:, interest] for interest in range(self.interests)]
        highest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, of_interest))
        share = [jnp.exp(match - highest) for match in of_interest]
        scale = 1 / functools.reduce(jnp.add, share)
        combined = jnp.einsum("reh,ren->rhn", users @ combine, jnp.stack(share, axis=1))
        return jnp.stack(
            [
                scale * combined[:, head] + direct[:, head] + offset[head]
                for head in range(offset.shape[0])
            ],
            axis=-1,
        )


class TwoTower(nnx.Module):
    """One user embedding a head, one item embedding, and their dot products.

        u = MLP([user row, user features, context, category means, h])     [R, heads, D]
        v = item row + Σ category means + W [cheap item features, candidate features] + b
                                                           [R, N, D]
        z = u · v / sqrt(D) + offset                       [R, N, heads]

    A category mean is the mean row of the values of a categorical feature, of the request in u, of
    the item and the candidate in v. With `history = "mean"`, h is that of `HistoryMean`; else there
    is none.
    """

    lookups = {**LOOKUPS, **HISTORY_LOOKUPS}
    reads_history = staticmethod(reads_history)

    def __init__(self, spec: FeatureSpec, heads: int, config: ConfigDict, *, rngs: nnx.Rngs):
        """Builds the model; reads `width` (D), `hidden` and `history` from the config."""
        self.spec = spec
        self.user = MultiLayerPerceptron(
            [_user_width(spec, config), *config.hidden, heads * config.width], rngs=rngs
        )
        self.item = ItemEncoder(
            spec.cheap_item_features + spec.candidate_features, config.width, rngs=rngs
        )
        self.offset = nnx.Param(jnp.zeros(heads))
        self.history = _history(spec, config, rngs)

    def __call__(
        self, batch: CandidateBatch, rows: Rows, items: Items
    ) -> Float[Array, "R N heads"]:
        """The logits of every candidate."""
        users = self.user(_user_inputs(batch, rows, items, self.spec, self.history))
        width = rows["item"].shape[-1]
        products = self.item.products(
            users.reshape(users.shape[0], -1, width) / jnp.sqrt(width),
            candidate_rows(batch, rows, items, self.spec),
            candidate_inputs(batch, items, self.spec.cheap_item_features),
        )
        return products.swapaxes(1, 2) + self.offset[...]


STUDENTS: dict[str, ModuleClass] = {"multi_interest": MultiInterest, "two_tower": TwoTower}
