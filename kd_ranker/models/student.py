"""Students: early rankers that spend little on a candidate.

Whatever depends on the user alone has the shape [R, ...] and is computed once a request; only the
lines that carry an axis N are paid for by each candidate.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from kd_ranker.batch import CandidateBatch, FeatureSpec
from kd_ranker.embedding.lookup import Lookup, Rows
from kd_ranker.models.layers import (
    ItemEncoder,
    MultiLayerPerceptron,
    candidate_inputs,
    user_inputs,
)
from kd_ranker.models.model import ModuleClass

LOOKUPS = {
    "user": Lookup(table="user", ids="user_id", mask=""),
    "item": Lookup(table="item", ids="item_id", mask="candidate_mask"),
}


class MultiInterest(nnx.Module):
    """Several user embeddings, combined for each candidate by how well they match it.

        u = MLP([user row, user features, context])        [R, E, D]
        v = item row + W [cheap item features, candidate features] + b   [R, N, D]
        s = u · v                                          [R, N, E]
        c = Σ_e softmax(s)_e u_e                           [R, N, D]
        z = V [c, v, s] + a                                [R, N, heads]

    The combination follows multi-interest retrieval models (Li et al., MIND, CIKM 2019) with a
    softmax over the interests in place of routing.
    """

    lookups = LOOKUPS

    def __init__(self, spec: FeatureSpec, heads: int, config: ConfigDict, *, rngs: nnx.Rngs):
        """Builds the model; reads `width` (D), `interests` (E) and `hidden` from the config."""
        user_width = config.width + spec.user_features + spec.context_features
        self.interests = config.interests
        self.cheap_features = spec.cheap_item_features
        self.user = MultiLayerPerceptron(
            [user_width, *config.hidden, config.interests * config.width], rngs=rngs
        )
        self.item = ItemEncoder(
            spec.cheap_item_features + spec.candidate_features, config.width, rngs=rngs
        )
        self.heads = nnx.Linear(2 * config.width + config.interests, heads, rngs=rngs)

    def __call__(
        self, batch: CandidateBatch, rows: Rows, item_features: Float[Array, "items F"]
    ) -> Float[Array, "R N heads"]:
        """The logits of every candidate."""
        users = self.user(user_inputs(batch, rows["user"]))
        users = users.reshape(*users.shape[:-1], self.interests, -1)
        item = self.item(
            rows["item"], candidate_inputs(batch, item_features[:, : self.cheap_features])
        )
        match = jnp.einsum("red,rnd->rne", users, item)
        combined = jnp.einsum("rne,red->rnd", jax.nn.softmax(match), users)
        return self.heads(jnp.concatenate([combined, item, match], axis=-1))


class TwoTower(nnx.Module):
    """One user embedding a head, one item embedding, and their dot products.

    u = MLP([user row, user features, context])  [R, heads, D]
    v = item row + W [cheap item features, candidate features] + b   [R, N, D]
    z = u · v / sqrt(D) + offset                 [R, N, heads]
    """

    lookups = LOOKUPS

    def __init__(self, spec: FeatureSpec, heads: int, config: ConfigDict, *, rngs: nnx.Rngs):
        """Builds the model; reads `width` (D) and `hidden` from the config."""
        user_width = config.width + spec.user_features + spec.context_features
        self.cheap_features = spec.cheap_item_features
        self.user = MultiLayerPerceptron(
            [user_width, *config.hidden, heads * config.width], rngs=rngs
        )
        self.item = ItemEncoder(
            spec.cheap_item_features + spec.candidate_features, config.width, rngs=rngs
        )
        self.offset = nnx.Param(jnp.zeros(heads))

    def __call__(
        self, batch: CandidateBatch, rows: Rows, item_features: Float[Array, "items F"]
    ) -> Float[Array, "R N heads"]:
        """The logits of every candidate."""
        item = self.item(
            rows["item"], candidate_inputs(batch, item_features[:, : self.cheap_features])
        )
        users = self.user(user_inputs(batch, rows["user"]))
        users = users.reshape(*users.shape[:-1], -1, item.shape[-1]) / jnp.sqrt(item.shape[-1])
        return jnp.einsum("rhd,rnd->rnh", users, item) + self.offset[...]


STUDENTS: dict[str, ModuleClass] = {"multi_interest": MultiInterest, "two_tower": TwoTower}
