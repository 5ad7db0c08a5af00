"""The teacher: a final ranker with attention to the user's history for each candidate."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from kd_ranker.batch import CandidateBatch, FeatureSpec, Items
from kd_ranker.embedding.lookup import Rows
from kd_ranker.models.layers import (
    HISTORY_LOOKUPS,
    LOOKUPS,
    ItemEncoder,
    candidate_rows,
    item_inputs,
    item_rows,
    user_inputs,
    user_width,
)
from kd_ranker.models.model import ModuleClass


class HistoryAttention(nnx.Module):
    """Attention of a candidate over the user's history, after DIN (Zhou et al., KDD 2018).

        u = relu(W [event, candidate, event ⊙ candidate] + b)   [R, N, H, hidden]
        attended = Σ_h mask_h (w · u_h + a) event_h / H         [R, N, D]
        matches = Σ_h mask_h u_h / H                            [R, N, hidden]

    The weights are not normalized, as in the paper: the number of events that match a candidate
    matters, not only the best match. `matches`, which is not in the paper, counts them directly.
    The first layer is split by its inputs. So the parts that depend only on an event or only on a
    candidate are computed once for each, not for each pair.
    """

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        """Build the layers for events and candidates of size `width`."""
        self.event = nnx.Linear(width, hidden, rngs=rngs)
        self.candidate = nnx.Linear(width, hidden, use_bias=False, rngs=rngs)
        self.product = nnx.Linear(width, hidden, use_bias=False, rngs=rngs)
        self.weight = nnx.Linear(hidden, 1, rngs=rngs)

    def __call__(
        self,
        events: Float[Array, "R H D"],
        candidates: Float[Array, "R N D"],
        mask: Bool[Array, "R H"],
    ) -> tuple[Float[Array, "R N D"], Float[Array, "R N hidden"]]:
        """Return the attended history of each candidate and `matches`; zeros if it is empty."""
        hidden = (
            self.event(events)[:, None]
            + self.candidate(candidates)[:, :, None]
            + self.product(events[:, None] * candidates[:, :, None])
        )
        hidden = jax.nn.relu(hidden) * mask[:, None, :, None]
        weights = self.weight(hidden)[..., 0] * mask[:, None]
        attended = jnp.einsum("rnh,rhd->rnd", weights, events)
        return attended / events.shape[1], jnp.mean(hidden, axis=2)


class ExpertMixture(nnx.Module):
    """A mixture of experts with one gate a head: MMoE (Ma et al., KDD 2018)."""

    def __init__(self, width: int, experts: int, hidden: int, heads: int, *, rngs: nnx.Rngs):
        """Build `experts` experts of size `hidden` and one gate and one tower per head."""
        self.shape = (experts, hidden, heads)
        self.experts = nnx.Linear(width, experts * hidden, rngs=rngs)
        self.gates = nnx.Linear(width, heads * experts, rngs=rngs)
        self.towers = nnx.Param(jax.random.normal(rngs.params(), (heads, hidden)) / hidden**0.5)
        self.offset = nnx.Param(jnp.zeros(heads))

    def __call__(self, inputs: Float[Array, "... W"]) -> Float[Array, "... heads"]:
        """Return the logits of the heads."""
        experts, hidden, heads = self.shape
        leading = inputs.shape[:-1]
        outputs = jax.nn.relu(self.experts(inputs)).reshape(*leading, experts, hidden)
        gates = jax.nn.softmax(self.gates(inputs).reshape(*leading, heads, experts))
        mixed = jnp.einsum("...he,...ew->...hw", gates, outputs)
        return jnp.einsum("...hw,hw->...h", mixed, self.towers[...]) + self.offset[...]


class FinalRanker(nnx.Module):
    """History attention, cross layers, a mixture of experts.

        e = history row + Σ category means + W_e [item features, event features]     [R, H, D]
        v = item row + Σ category means + W_v [item features, candidate features]    [R, N, D]
        t, m = attention(e, v)                    [R, N, D], [R, N, hidden]
        x = [user row, user features, context, category means, Σ e / H,
             v, item and candidate features, t, t ⊙ v, m]
        z = experts(cross layers(x))              [R, N, heads]

    A cross layer maps y to x ⊙ (W y + b) + y, starting from y = x: DCN-v2 (Wang et al., WWW 2021).
    A category mean is the mean row of the values of a categorical feature: of an event's item in e,
    of the item and the candidate in v, of the request in x.
    """

    lookups = {**LOOKUPS, **HISTORY_LOOKUPS}

    def __init__(self, spec: FeatureSpec, heads: int, config: ConfigDict, *, rngs: nnx.Rngs):
        """Build the model.

        Reads `width` (D), `attention_hidden`, `cross_layers`, `experts` and `expert_hidden` from
        the config.
        """
        self.spec = spec
        width = config.width
        features = spec.item_features + spec.candidate_features
        self.event = ItemEncoder(spec.item_features + spec.history_features, width, rngs=rngs)
        self.item = ItemEncoder(features, width, rngs=rngs)
        self.attention = HistoryAttention(width, config.attention_hidden, rngs=rngs)
        joined = user_width(spec, width) + 4 * width + features + config.attention_hidden
        self.crosses = nnx.List(
            [nnx.Linear(joined, joined, rngs=rngs) for _ in range(config.cross_layers)]
        )
        self.mixture = ExpertMixture(joined, config.experts, config.expert_hidden, heads, rngs=rngs)

    def __call__(
        self, batch: CandidateBatch, rows: Rows, items: Items
    ) -> Float[Array, "R N heads"]:
        """Return the logits of every candidate."""
        spec = self.spec
        all_features = spec.item_features
        inputs = item_inputs(items, batch.history_id, batch.history_features, all_features)
        events = self.event(item_rows(rows, "history", batch.history_id, items, spec), inputs)
        inputs = item_inputs(items, batch.item_id, batch.candidate_features, all_features)
        item = self.item(candidate_rows(batch, rows, items, spec), inputs)
        attended, matches = self.attention(events, item, batch.history_mask)

        seen = jnp.sum(events * batch.history_mask[..., None], axis=1) / events.shape[1]
        request = jnp.concatenate([user_inputs(batch, rows, spec), seen], axis=-1)
        request = jnp.broadcast_to(request[:, None], (*item.shape[:2], request.shape[-1]))
        joined = jnp.concatenate(
            [request, item, inputs, attended, attended * item, matches], axis=-1
        )

        crossed = joined
        for layer in self.crosses:
            crossed = joined * layer(crossed) + crossed
        return self.mixture(crossed)


TEACHERS: dict[str, ModuleClass] = {"final_ranker": FinalRanker}
