"""Layers that student and teacher share."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kd_ranker.batch import CandidateBatch


def weights_of(layer: nnx.Linear) -> tuple[Float[Array, "fan_in fan_out"], Float[Array, "fan_out"]]:
    """Kernel and bias of a linear layer that has both."""
    assert layer.kernel is not None
    assert layer.bias is not None
    return layer.kernel[...], layer.bias[...]


class MultiLayerPerceptron(nnx.Module):
    """Linear layers with a ReLU between them, none after the last."""

    def __init__(self, widths: Sequence[int], *, rngs: nnx.Rngs):
        """Builds the layers; `widths` runs from the input's width to the output's."""
        self.layers = nnx.List(
            [
                nnx.Linear(fan_in, fan_out, rngs=rngs)
                for fan_in, fan_out in itertools.pairwise(widths)
            ]
        )

    def __call__(self, inputs: Float[Array, "... fan_in"]) -> Float[Array, "... fan_out"]:
        """Applies the layers to the last axis."""
        *hidden, last = self.layers
        for layer in hidden:
            inputs = jax.nn.relu(layer(inputs))
        return last(inputs)


class ItemEncoder(nnx.Module):
    """An item's looked-up row plus a linear map of its own features: float32 [..., D]."""

    def __init__(self, features: int, width: int, *, rngs: nnx.Rngs):
        """Builds the map from `features` to `width` = D."""
        self.features = nnx.Linear(features, width, rngs=rngs)

    def __call__(
        self, row: Float[Array, "... D"], features: Float[Array, "... F"]
    ) -> Float[Array, "... D"]:
        """Row + W features + b."""
        return row + self.features(features)

    def products(
        self,
        queries: Float[Array, "R Q D"],
        row: Float[Array, "R N D"],
        features: Float[Array, "R N F"],
    ) -> Float[Array, "R Q N"]:
        """The dot products of each query with each encoded item, without encoding the items.

        q · (row + W features + b) = q · row + (qᵀ W) · features + q · b: W meets the few queries
        of a request and not its many candidates.
        """
        weights, bias = weights_of(self.features)
        return (
            jnp.einsum("rqd,rnd->rqn", queries, row)
            + jnp.einsum("rqf,rnf->rqn", queries @ weights.T, features)
            + (queries @ bias)[..., None]
        )


def features_of_items(
    item_features: Float[Array, "items F"], item_id: Int[Array, "..."], dtype: Any
) -> Float[Array, "... F"]:
    """The features of each item, in the given dtype; zeros for an id that the matrix lacks."""
    # A negative index would count from the end.
    row = jnp.where(item_id < 0, item_features.shape[0], item_id)
    return jnp.asarray(item_features).at[row].get(mode="fill", fill_value=0).astype(dtype)


def candidate_inputs(
    batch: CandidateBatch, item_features: Float[Array, "items F"]
) -> Float[Array, "R N F+X"]:
    """What a ranker reads of each candidate besides its row: its own features and the request's.

    An early ranker passes the columns that it can afford.
    """
    features = batch.candidate_features
    own = features_of_items(item_features, batch.item_id, features.dtype)
    return jnp.concatenate([own, features], axis=-1)


def user_inputs(batch: CandidateBatch, user_row: Float[Array, "R D"]) -> Float[Array, "R D+U+C"]:
    """What is known of the user and the request: row, features, context."""
    return jnp.concatenate([user_row, batch.user_features, batch.context], axis=-1)
