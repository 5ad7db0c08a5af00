"""All lookups that there are; each model names those that it uses."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kd_ranker.batch import CandidateBatch, Items
from kd_ranker.embedding.lookup import Lookup
from kd_ranker.models.layers import categories_of_items


def _every_request(batch: CandidateBatch, items: Items) -> Bool[Array, "R"]:
    del items
    return jnp.full(batch.user_id.shape, True)


def _every_candidate(batch: CandidateBatch, items: Items) -> Bool[Array, "R N"]:
    del items
    return batch.candidate_mask


def _every_event(batch: CandidateBatch, items: Items) -> Bool[Array, "R H"]:
    del items
    return batch.history_mask


def _categories(
    ids: Callable[[CandidateBatch, Items], Int[Array, "... L"]],
    mask: Callable[[CandidateBatch, Items], Bool[Array, "..."]],
) -> Lookup:
    """Return a lookup of category ids; -1 is padding, and `mask` is that of their owners."""
    return Lookup(
        "category",
        ids,
        lambda batch, items: (ids(batch, items) >= 0) & mask(batch, items)[..., None],
    )


LOOKUPS = {
    "user": Lookup("user", lambda batch, items: batch.user_id, _every_request),
    "item": Lookup("item", lambda batch, items: batch.item_id, _every_candidate),
    "request_category": _categories(lambda batch, items: batch.request_category, _every_request),
    "candidate_category": _categories(
        lambda batch, items: batch.candidate_category, _every_candidate
    ),
    "item_category": _categories(
        lambda batch, items: categories_of_items(items.category, batch.item_id, items.deal),
        _every_candidate,
    ),
}
"""The lookups that every ranker can afford: the first two in a dataset without categories."""

HISTORY_LOOKUPS = {
    "history": Lookup("item", lambda batch, items: batch.history_id, _every_event),
    "history_category": _categories(
        lambda batch, items: categories_of_items(items.category, batch.history_id, items.deal),
        _every_event,
    ),
}
"""The items of the user's history, from the tables of the candidates."""
