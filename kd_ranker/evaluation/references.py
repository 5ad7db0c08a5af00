"""References: rankers without a model, against which a trained one is compared.

    oracle        sorts by the true value, where the dataset knows it
    incumbent     sorts by the score of the early ranker that filled the log, where it is known
    random        sorts at random
    popularity, show_rate, pass_rate, top_rate, static_list
                  sort by a number of the item in training, see `Statistics`

`reference_ranker` makes one `Ranker` of all references, with a serve name each, which
`evaluate.evaluate` measures like a group of students.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from kd_ranker.batch import CandidateBatch, EvaluationBatch, Items
from kd_ranker.evaluation.evaluate import Ranker, Served
from kd_ranker.models.layers import features_of_items
from kd_ranker.requests.columns import Columns, slices
from kd_ranker.requests.records import Dataset
from kd_ranker.training.state import stack_members

LISTS = ("popularity", "show_rate", "pass_rate", "top_rate", "static_list")
REFERENCES = ("oracle", "incumbent", "random", *LISTS)
# The lists that need the final ranker's scores or its order.
NEED_SCORES = ("top_rate", "static_list")
# The references that no funnel could use, or would.
NO_RANKERS = ("oracle", "random")
# The references that define only an order.
NO_PROBABILITIES = ("incumbent", "random", *LISTS)

# Failures added to each item's count, so that no item tops a list after one lucky impression.
# Shrinking towards the mean instead of 0 would put items that were never shown above most others.
_PRIOR_FAILURES = 10

# The requests to inspect for known inputs, and the share of candidates that must be known: a ranker
# that orders the others at random would look worse than it is.
_SOME, _NEARLY_ALL = 1000, 0.9


@flax.struct.dataclass
class Statistics:
    """Numbers of each item from the training split, in [0, 1], float32, by the name of the list.

        popularity   the summed label weight of its impressions, over that of the most popular item;
                     a sampled negative represents others
        show_rate    the share of the requests that passed the item in which it was shown; where the
                     log passed no other item than it showed, of those that retrieved it
        pass_rate    the share of the requests that retrieved it in which it was passed
        top_rate     the share of the requests in which the final ranker scored it, for every task,
                     in which it came among the first `top`
        static_list  the mean of Σ_t w_t p_t / Σ_t w_t over the same requests; in a dataset without
                     any, of the user labels by label weight, and there is no top_rate

    A share or mean of n has n + 10 as its denominator.
    """

    lists: dict[str, Float[Array, "items"]]
    seed: Int[Array, ""]  # of `random`


def train_statistics(
    dataset: Dataset, value_weights: Sequence[float], top: int, seed: int
) -> Statistics:
    """Return the statistics of a dataset, from one pass over its training requests.

    `top` is the number of candidates that the final ranker shows. True probabilities are not read.
    """
    weights = np.asarray(value_weights, np.float64) / np.sum(value_weights)
    counted = weights > 0
    labelled, liked, shown, passed, retrieved, scored, first, value = np.zeros(
        (8, dataset.spec.num_items)
    )
    columns = dataset.columns["train"]
    for some in slices(columns.counts.retrieved):
        of = columns.counts.of(some)
        for total, number in ((shown, of.shown), (passed, of.passed), (retrieved, of.retrieved)):
            np.add.at(total, columns.candidates.fields(some, number)["item_id"], 1)
        item_id = columns.candidates.fields(some, of.shown)["item_id"]
        of_user = columns.labels.fields(some, of.shown)
        np.add.at(labelled, item_id, of_user["label_weight"])
        np.add.at(liked, item_id, of_user["label_weight"] * (of_user["user_label"] @ weights))
        logged = columns.candidates.fields(some, of.scored)
        each = logged["teacher_probability"][:, counted] @ weights[counted]
        known = ~np.isnan(each)
        np.add.at(scored, logged["item_id"][known], 1)
        np.add.at(value, logged["item_id"][known], each[known])
        np.add.at(first, logged["item_id"][_is_first(each, of.scored, top)], 1)
    lists = {
        "popularity": labelled / (labelled.max() or 1),
        "show_rate": _rate(shown, passed if (passed > shown).any() else retrieved),
        "pass_rate": _rate(passed, retrieved),
        "static_list": _rate(liked, labelled),
    }
    if scored.any():
        lists |= {"top_rate": _rate(first, scored), "static_list": _rate(value, scored)}
    rounded = {name: jnp.asarray(of, jnp.float32) for name, of in lists.items()}
    return Statistics(rounded, jnp.int32(seed))


def _rate(
    through: Float[np.ndarray, "items"], had_the_chance: Float[np.ndarray, "items"]
) -> Float[np.ndarray, "items"]:
    return through / (had_the_chance + _PRIOR_FAILURES)


def _is_first(
    value: Float[np.ndarray, "sum"], numbers: Int[np.ndarray, "R"], top: int
) -> Bool[np.ndarray, "sum"]:
    """True for the `top` largest known values of each request; of equal ones, the first logged."""
    request = np.repeat(np.arange(len(numbers)), numbers)
    order = np.lexsort((-value, request))  # NaN last
    place = np.empty_like(order)
    place[order] = np.arange(len(order)) - np.repeat(numbers.cumsum() - numbers, numbers)
    return (place < top) & ~np.isnan(value)


def _incumbent(batch: EvaluationBatch) -> Float[Array, "R N"]:
    """The share of the request's places that have a lower score; the least for an unknown score.

    Only the order of scores means something. Shares are exact in float32, whatever the scores.
    """
    score = jnp.where(jnp.isnan(batch.incumbent), -jnp.inf, batch.incumbent)
    lower = jax.vmap(lambda of: jnp.searchsorted(jnp.sort(of), of))(score)
    return lower / score.shape[1]


def _random(seed: Int[Array, ""], batch: CandidateBatch) -> Float[Array, "R N"]:
    """Uniform numbers, determined by the seed, the user and the candidates."""
    key = jax.random.key(seed)

    def of_request(user_id: Int[Array, ""], item_id: Int[Array, "N"]) -> Float[Array, "N"]:
        of_user = jax.random.fold_in(key, user_id)
        return jax.random.uniform(jax.random.fold_in(of_user, jnp.sum(item_id)), item_id.shape)

    return jax.vmap(of_request)(batch.user_id, batch.item_id)


def _serve(statistics: Statistics, batch: EvaluationBatch, items: Items) -> Served:
    """The numbers that each reference sorts by, NaN where they are not known."""
    del items
    orders = {"incumbent": _incumbent(batch), "random": _random(statistics.seed, batch.batch)}
    for name, of_item in statistics.lists.items():
        each = features_of_items(of_item[:, None], batch.batch.item_id)
        orders[name] = each[..., 0]
    # The same number for every task: any value weights order the candidates by it.
    shape = batch.true_probability.shape
    of_tasks = {name: jnp.broadcast_to(of[..., None], shape) for name, of in orders.items()}
    return Served({"oracle": batch.true_probability, **of_tasks}, seen={})


def reference_ranker(members: Sequence[Statistics]) -> Ranker:
    """All references as one ranker, with statistics of one or more seeds as its members."""
    return Ranker(_serve, stack_members(members), sees_truth=True)


def known_references(splits: Sequence[Columns], statistics: Statistics) -> tuple[str, ...]:
    """The names of the references with a known input for nearly all candidates of all splits."""
    known = {"random", *statistics.lists}
    for name, field in (("oracle", "true_probability"), ("incumbent", "incumbent")):
        if min(_known_share(columns, field) for columns in splits) > _NEARLY_ALL:
            known.add(name)
    return tuple(name for name in REFERENCES if name in known)


def _known_share(columns: Columns, field: str) -> float:
    """The share of candidates with a number in a field, in some requests of a split."""
    some = np.arange(0, len(columns), max(1, len(columns) // _SOME))
    number = columns.counts.retrieved[some].sum()
    facts = columns.known.fields(some, columns.counts.known[some])[field]
    unknown = np.isnan(facts).any(axis=tuple(range(1, facts.ndim)))
    return float((~unknown).sum() / max(number, 1))


def item_share(
    request: Shaped[np.ndarray, "n"],
    item: Shaped[np.ndarray, "n"],
    value: Float[np.ndarray, "n"],
) -> float:
    """Share of the variance of `value` within requests that only the item explains.

        (1 − 1 / M) Σ_i n_i · c_i / Σ u v

    v is the value less its request's mean, and u = v / (1 − 1 / n) in a request of n entries. n_i
    is the number of entries of item i, c_i the mean product of two different ones of its u, and
    M = (Σ n_i)² / Σ n_i² corrects for distinct items in a request. It is the method of moments
    (Searle, Casella and McCulloch 1992). Items and requests with one entry are left out. The share
    of labels, which also vary by chance, is a lower bound of that of the probabilities.

    Each entry has a request, an item and a value. The result is about 1 where the item explains
    everything, about 0 where it explains nothing, and NaN without two entries of an item.

    >>> item_share(np.array([0, 0, 1, 1]), np.array([5, 7, 5, 7]), np.array([1.0, 0.0, 3.0, 2.0]))
    1.0
    """
    requests, items = (np.unique(ids, return_inverse=True)[1] for ids in (request, item))
    sizes = np.bincount(requests)[requests]
    within = value - (np.bincount(requests, value) / np.bincount(requests))[requests]
    scaled = within * sizes / np.maximum(sizes - 1, 1)
    number, sums, squares, total = (
        np.bincount(items[sizes > 1], of[sizes > 1], minlength=items.max(initial=0) + 1)
        for of in (np.ones_like(within), scaled, scaled**2, scaled * within)
    )
    often = number > 1
    distinct = 1 - (number[often] ** 2).sum() / max(number[often].sum(), 1) ** 2
    explained = ((sums**2 - squares)[often] / (number[often] - 1)).sum()
    whole = total[often].sum()
    return float(distinct * explained / whole) if whole else float("nan")
