"""Students: early rankers with a low cost per candidate.

Arrays that depend only on the user have the shape [R, ...] and are computed once per request. Only
operations on arrays with an axis N have a cost per candidate.
"""

import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from kd_ranker.batch import CandidateBatch, FeatureSpec, Items
from kd_ranker.embedding.lookup import Rows
from kd_ranker.models.layers import (
    HISTORY_LOOKUPS,
    LOOKUPS,
    HistoryMean,
    ItemEncoder,
    MultiLayerPerceptron,
    candidate_rows,
    item_inputs,
    user_inputs,
    user_width,
    weights_of,
)
from kd_ranker.models.model import ModuleClass

Users = dict[str, Float[Array, "R ..."]]

HISTORIES = ("none", "mean")
"""The ways in which a student may read the user's history, by `config.student.history`."""


def reads_history(config: ConfigDict) -> bool:
    """Return True if the student of `config.student` reads the user's history."""
    return config.history != "none"


@runtime_checkable
class InParts(Protocol):
    """A student that scores a candidate by dot products of its embedding with a few queries.

    It can be served in parts: `users` once per request, embeddings by `item` once per item, and
    `logits` of their products.
    """

    spec: FeatureSpec
    item: ItemEncoder  # of the cheap features of the item, then those of the candidate

    def users(self, batch: CandidateBatch, rows: Rows, items: Items) -> Users:
        """Return the arrays of a request, [R, ...]: `queries` [R, Q, D] and others."""
        ...

    def logits(self, users: Users, products: Float[Array, "R Q N"]) -> Float[Array, "R N heads"]:
        """Return the logits from these arrays and the products of `queries` with candidates."""
        ...


class _Towers(nnx.Module):
    """A user tower and an item tower; a class with the methods of `InParts` scores by both."""

    lookups = {**LOOKUPS, **HISTORY_LOOKUPS}
    reads_history = staticmethod(reads_history)
    history: HistoryMean | None = None

    def _build(self, spec: FeatureSpec, outputs: int, config: ConfigDict, rngs: nnx.Rngs) -> None:
        """Build the towers; that of the user has this number of outputs."""
        self.spec = spec
        inputs = user_width(spec, config.width)
        if reads_history(config):
            inputs += config.width
        self.user = MultiLayerPerceptron([inputs, *config.hidden, outputs], rngs=rngs)
        self.item = ItemEncoder(
            spec.cheap_item_features + spec.candidate_features, config.width, rngs=rngs
        )

    def _build_history(self, config: ConfigDict, rngs: nnx.Rngs) -> None:
        # Last, so that the initial values of the other layers do not depend on it.
        reads = reads_history(config)
        self.history = HistoryMean(self.spec, config.width, rngs=rngs) if reads else None

    def __call__(
        self: Any, batch: CandidateBatch, rows: Rows, items: Items
    ) -> Float[Array, "R N heads"]:
        """Return the logits of every candidate."""
        users = self.users(batch, rows, items)
        products = self.item.products(
            users["queries"],
            candidate_rows(batch, rows, items, self.spec),
            item_inputs(
                items, batch.item_id, batch.candidate_features, self.spec.cheap_item_features
            ),
        )
        return self.logits(users, products)

    def _outputs(
        self, batch: CandidateBatch, rows: Rows, items: Items
    ) -> Float[Array, "R outputs"]:
        """Return the outputs of the user tower."""
        inputs = user_inputs(batch, rows, self.spec)
        if self.history is not None:
            inputs = jnp.concatenate([inputs, self.history(batch, rows, items)], axis=-1)
        return self.user(inputs)


class MultiInterest(_Towers):
    """Several user embeddings, combined for each candidate by their match with it.

        u = MLP([user row, user features, context, category means, h])     [R, E, D]
        v = item row + Σ category means + W [cheap item features, candidate features] + b
                                                           [R, N, D]
        s = u · v                                          [R, N, E]
        c = Σ_e softmax(s)_e u_e                           [R, N, D]
        z = V [c, v, s] + a                                [R, N, heads]

    The combination follows multi-interest retrieval models (Li et al., MIND, CIKM 2019) with a
    softmax over the interests in place of routing. A category mean is the mean row of the values of
    a categorical feature, of the request in u, of the item and the candidate in v. With
    `history = "mean"`, h is that of `HistoryMean`; otherwise h is omitted.
    """

    def __init__(self, spec: FeatureSpec, heads: int, config: ConfigDict, *, rngs: nnx.Rngs):
        """Build the model; reads `width` (D), `interests` (E), `hidden` and `history`."""
        self.interests = config.interests
        self._build(spec, config.interests * config.width, config, rngs)
        self.heads = nnx.Linear(2 * config.width + config.interests, heads, rngs=rngs)
        self._build_history(config, rngs)

    # Fused by hand, because XLA's version is slow on a CPU: docs/benchmarks.md has the times.
    def users(self, batch: CandidateBatch, rows: Rows, items: Items) -> Users:
        """Return the queries [u, V_v + V_s u] and each interest's share of the logits, V_c u."""
        users = self._outputs(batch, rows, items)
        users = users.reshape(users.shape[0], self.interests, -1)
        # Split V into the parts that multiply c, v and s. As s is linear in v, and c in the weights
        # of the interests, V multiplies the few user embeddings of a request, not its candidates.
        width = users.shape[-1]
        weights, _ = weights_of(self.heads)
        combine, direct, matched = jnp.split(weights, [width, 2 * width])
        direct = direct.T + jnp.einsum("eh,red->rhd", matched, users)
        return {"queries": jnp.concatenate([users, direct], axis=1), "combined": users @ combine}

    def logits(self, users: Users, products: Float[Array, "R Q N"]) -> Float[Array, "R N heads"]:
        """Return the logits from the products [s, V_v v + V_s s]."""
        _, offset = weights_of(self.heads)
        match, direct = jnp.split(products, [self.interests], axis=1)
        # Divide the softmax by its sum last, and take the few interests and heads one by one: a
        # reduction over so short an axis costs a CPU more than all the arithmetic here.
        of_interest = [match[:, interest] for interest in range(self.interests)]
        highest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, of_interest))
        share = [jnp.exp(match - highest) for match in of_interest]
        scale = 1 / functools.reduce(jnp.add, share)
        combined = jnp.einsum("reh,ren->rhn", users["combined"], jnp.stack(share, axis=1))
        return jnp.stack(
            [
                scale * combined[:, head] + direct[:, head] + offset[head]
                for head in range(offset.shape[0])
            ],
            axis=-1,
        )


class TwoTower(_Towers):
    """One user embedding per head, one item embedding, and their dot products.

        u = MLP([user row, user features, context, category means, h])     [R, heads, D]
        v = item row + Σ category means + W [cheap item features, candidate features] + b
                                                           [R, N, D]
        z = u · v / sqrt(D) + offset                       [R, N, heads]

    Category means and h are those of `MultiInterest`.
    """

    def __init__(self, spec: FeatureSpec, heads: int, config: ConfigDict, *, rngs: nnx.Rngs):
        """Build the model; reads `width` (D), `hidden` and `history` from the config."""
        self._build(spec, heads * config.width, config, rngs)
        self.offset = nnx.Param(jnp.zeros(heads))
        self._build_history(config, rngs)

    def users(self, batch: CandidateBatch, rows: Rows, items: Items) -> Users:
        """Return the queries u / sqrt(D)."""
        users = self._outputs(batch, rows, items)
        width = rows["user"].shape[-1]
        return {"queries": users.reshape(users.shape[0], -1, width) / jnp.sqrt(width)}

    def logits(self, users: Users, products: Float[Array, "R Q N"]) -> Float[Array, "R N heads"]:
        """Return the logits from the products u · v / sqrt(D)."""
        del users
        return products.swapaxes(1, 2) + self.offset[...]


STUDENTS: dict[str, ModuleClass] = {"multi_interest": MultiInterest, "two_tower": TwoTower}
