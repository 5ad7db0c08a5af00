"""Baselines: rankers without a model, against which a trained one is compared.

    oracle        sorts by the true value, where the dataset knows it
    incumbent     sorts by the score of the early ranker that filled the log, where it is known
    random        sorts at random
    popularity, show_rate, pass_rate, top_rate, static_list
                  sort by a number of the item in training, see `lists_of`
    rivals        sort by numbers that were computed before, see `kd_ranker.rivals`

`baseline_ranker` makes one `Ranker` of all baselines, with a serve name each, which
`evaluate.evaluate` measures like the heads of a student. In `results.csv` their role is
`reference`.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Float, Int

from kd_ranker.batch import CandidateBatch, EvaluationBatch, Items
from kd_ranker.evaluation.evaluate import Ranker, Serve, Served
from kd_ranker.models.layers import features_of_items
from kd_ranker.requests.columns import Columns, slices
from kd_ranker.requests.records import Dataset

LISTS = ("popularity", "show_rate", "pass_rate", "top_rate", "static_list")
BASELINES = ("oracle", "incumbent", "random", *LISTS)
# The lists that need the final ranker's scores or its order.
NEED_SCORES = ("top_rate", "static_list")
# The references that no funnel could use, or would.
NO_RANKERS = ("oracle", "random")

# Failures added to each item's count, so that no item tops a list after one lucky impression.
# Shrinking towards the mean instead of 0 would put items that were never shown above most others.
_PRIOR_FAILURES = 10

# The number of requests to inspect for known inputs.
_INSPECTED = 1000
# The share of candidates with a known input: a ranker that orders the others at random would look
# worse than it is.
_NEARLY_ALL = 0.9


Lists = dict[str, Float[Array, "items"]]
"""Numbers of each item, by the name of the list."""


def lists_of(dataset: Dataset, value_weights: Sequence[float], top: int) -> Lists:
    """Return the lists of a dataset, from one pass over its training requests.

        popularity   the summed label weight of its impressions, over that of the most popular item;
                     a sampled negative represents others
        show_rate    the share of the requests that passed the item in which it was shown; where the
                     log passed no other item than it showed, of those that retrieved it
        pass_rate    the share of the requests that retrieved it in which it was passed
        top_rate     the share of the requests in which the final ranker scored it, for every task,
                     in which it came among the first `top`
        static_list  the mean of Σ_t w_t p_t / Σ_t w_t over the same requests; in a dataset without
                     any, of the user labels by label weight, and there is no top_rate

    Numbers are in [0, 1], float32; a share or mean of n has n + 10 as its denominator. `top` is the
    number of candidates that the final ranker shows. True probabilities are not read.
    """
    weights = np.asarray(value_weights, np.float64) / np.sum(value_weights)
    counted = weights > 0
    columns = dataset.columns["train"]
    num_items = dataset.spec.num_items
    # Sums over requests, of each item.
    labeled = np.zeros(num_items)
    liked = np.zeros(num_items)
    shown = np.zeros(num_items)
    passed = np.zeros(num_items)
    retrieved = np.zeros(num_items)
    scored = np.zeros(num_items)
    first = np.zeros(num_items)
    value = np.zeros(num_items)
    for requests in slices(columns.counts.retrieved):
        counts = columns.counts.of(requests)

        np.add.at(shown, _items(columns, requests, counts.shown), 1)
        np.add.at(passed, _items(columns, requests, counts.passed), 1)
        np.add.at(retrieved, _items(columns, requests, counts.retrieved), 1)

        item_id = _items(columns, requests, counts.shown)
        labels = columns.labels.fields(requests, counts.shown)
        np.add.at(labeled, item_id, labels["label_weight"])
        np.add.at(liked, item_id, labels["label_weight"] * (labels["user_label"] @ weights))

        logged = columns.candidates.fields(requests, counts.scored)
        logged_value = logged["teacher_probability"][:, counted] @ weights[counted]
        known = ~np.isnan(logged_value)
        np.add.at(scored, logged["item_id"][known], 1)
        np.add.at(value, logged["item_id"][known], logged_value[known])
        request = np.repeat(np.arange(len(counts.scored)), counts.scored)
        # Of equal values the first logged comes first; an unknown one has no rank.
        rank = pd.Series(logged_value).groupby(request).rank(method="first", ascending=False)
        np.add.at(first, logged["item_id"][rank <= top], 1)
    lists = {
        "popularity": labeled / (labeled.max() or 1),
        "show_rate": _rate(shown, passed if (passed > shown).any() else retrieved),
        "pass_rate": _rate(passed, retrieved),
        "static_list": _rate(liked, labeled),
    }
    if scored.any():
        lists |= {"top_rate": _rate(first, scored), "static_list": _rate(value, scored)}
    return {name: jnp.asarray(numbers, jnp.float32) for name, numbers in lists.items()}


def _items(
    columns: Columns, requests: slice, numbers: Int[np.ndarray, "n"]
) -> Int[np.ndarray, "m"]:
    """Return the items of the first candidates of each of some requests, one after the other."""
    return columns.candidates.fields(requests, numbers)["item_id"]


def _rate(
    through: Float[np.ndarray, "items"], had_the_chance: Float[np.ndarray, "items"]
) -> Float[np.ndarray, "items"]:
    return through / (had_the_chance + _PRIOR_FAILURES)


def _incumbent(batch: EvaluationBatch) -> Float[Array, "R N"]:
    """The share of the request's places that have a lower score; the least for an unknown score.

    Only the order of scores means something. Shares are exact in float32, whatever the scores.
    """
    score = jnp.where(jnp.isnan(batch.incumbent), -jnp.inf, batch.incumbent)
    lower = jax.vmap(lambda scores: jnp.searchsorted(jnp.sort(scores), scores))(score)
    return lower / score.shape[1]


def _random(batch: CandidateBatch) -> Float[Array, "R N"]:
    """Uniform numbers, determined by the user and the candidates."""
    key = jax.random.key(0)

    def of_request(user_id: Int[Array, ""], item_id: Int[Array, "N"]) -> Float[Array, "N"]:
        user_key = jax.random.fold_in(key, user_id)
        request_key = jax.random.fold_in(user_key, jnp.sum(item_id))
        return jax.random.uniform(request_key, item_id.shape)

    return jax.vmap(of_request)(batch.user_id, batch.item_id)


def _serve(rivals: tuple[str, ...], lists: Lists, batch: EvaluationBatch, items: Items) -> Served:
    """The numbers that each reference sorts by, NaN where they are not known."""
    del items
    orders = {"incumbent": _incumbent(batch), "random": _random(batch.batch)}
    for name, numbers in lists.items():
        orders[name] = features_of_items(numbers[:, None], batch.batch.item_id)[..., 0]
    orders |= {name: batch.rivals[..., index] for index, name in enumerate(rivals)}
    served = {"oracle": batch.true_probability}
    for name, order in orders.items():
        # The same number for every task: any value weights order the candidates by it.
        served[name] = jnp.broadcast_to(order[..., None], batch.true_probability.shape)
    return Served(served, seen={})


def baseline_ranker(lists: Lists, rivals: Sequence[str] = ()) -> Ranker:
    """All references as one ranker; `rivals` name the batches' numbers of them."""
    return Ranker(_server(tuple(rivals)), lists, sees_truth=True)


# One function for the same names, so that it is compiled once.
@functools.lru_cache(maxsize=16)
def _server(rivals: tuple[str, ...]) -> Serve:
    return functools.partial(_serve, rivals)


def known_baselines(splits: Sequence[Columns], lists: Lists) -> tuple[str, ...]:
    """The names of the references with a known input for nearly all candidates of all splits."""
    known = {"random", *lists}
    for name, field in (("oracle", "true_probability"), ("incumbent", "incumbent")):
        if min(_known_share(columns, field) for columns in splits) > _NEARLY_ALL:
            known.add(name)
    return tuple(name for name in BASELINES if name in known)


def _known_share(columns: Columns, field: str) -> float:
    """The share of candidates with a number in a field, in some requests of a split."""
    requests = np.arange(0, len(columns), max(1, len(columns) // _INSPECTED))
    num_candidates = columns.counts.retrieved[requests].sum()
    facts = columns.known.fields(requests, columns.counts.known[requests])[field]
    is_unknown = np.isnan(facts).any(axis=tuple(range(1, facts.ndim)))
    return float((~is_unknown).sum() / max(num_candidates, 1))
