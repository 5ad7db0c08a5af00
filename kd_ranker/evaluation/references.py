"""References: rankers without a model, against which a trained one has to earn its place.

    oracle        sorts by the true value, where the dataset knows it
    incumbent     sorts by the score of the early ranker that filled the log, where the dataset
                  knows it
    random        sorts at random
    popularity    sorts by how often training has shown an item
    static_list   sorts by the mean value of an item in training, whoever the user is, less where
                  training tells little of it

All of them are one `Ranker`, measured by `evaluate.evaluate` like a group of students, with a serve
name each:

    statistics = train_statistics(dataset, config.value_weights, seed=0)
    names = known_references(dataset.columns["test"])
    _, [*of_students, sums] = evaluate(
        teacher, [*students, reference_ranker([statistics])], ..., serves=[..., names]
    )
    row = only_order(totals.summarise(select_member(sums["popularity"], 0), ...))

Of the numbers that `ORDER_ALONE` serve only the order means something; those of the oracle are
probabilities.
"""

from collections.abc import Callable, Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kd_ranker.batch import EvaluationBatch, Items
from kd_ranker.evaluation import metrics
from kd_ranker.evaluation.evaluate import Ranker, Served
from kd_ranker.models.layers import features_of_items
from kd_ranker.requests.columns import Columns, slices
from kd_ranker.requests.records import Dataset
from kd_ranker.training.state import stack_members

# So many times more, and for nothing, is an item taken to have been told of. So none tops a list
# for one lucky impression. Towards the mean of all items in place of 0, those that were never shown
# would stand above those that were and pleased less than most; a funnel did not show them, though.
_FOR_NOTHING = 10


@flax.struct.dataclass
class Statistics:
    """The knowledge of references: numbers of each item in [0, 1] from the training split, float32.

    Attributes:
      shown: how often it was shown, over the same of the item that was shown most. An impression
        counts by its label weight, so a sampled negative stands for those that were left out.
      value: n / (n + 10) times the mean over the n training requests that tell of it of
        Σ_t w_t y_t / Σ_t w_t, with the value weights w, where y are the teacher's probabilities,
        over the candidates for which all of them were logged properly. In a dataset without any of
        these, y are the user labels, weighted by label weight, of which n is then the sum. 0 for an
        item that training tells nothing of. Of a count like `shown` nothing needs smoothing.
      seed: of `random`.
    """

    shown: Float[Array, "items"]
    value: Float[Array, "items"]
    seed: Int[Array, ""]


Reference = Callable[[Statistics, EvaluationBatch], Float[Array, "R N T"]]
"""From the statistics and a batch to what a reference ranks by: in [0, 1], or NaN if unknown."""


def train_statistics(dataset: Dataset, value_weights: Sequence[float], seed: int) -> Statistics:
    """The statistics of a dataset, from one pass over its training requests.

    Args:
      dataset: the dataset; true probabilities are not read.
      value_weights: a weight a task, not all 0.
      seed: of the reference `random`.
    """
    weights = np.asarray(value_weights, np.float64) / np.sum(value_weights)
    shown, of_labels, judged, of_teacher = np.zeros((4, dataset.spec.num_items))
    columns = dataset.columns["train"]
    for some in slices(columns.kept):
        of = columns.counts.of(some)
        item_id = columns.candidates.fields(some, of.shown)["item_id"]
        of_user = columns.labels.fields(some, of.shown)
        np.add.at(shown, item_id, of_user["label_weight"])
        value = of_user["label_weight"] * (of_user["user_label"] @ weights)
        np.add.at(of_labels, item_id, value)
        scored = columns.candidates.fields(some, of.scored)
        value = scored["teacher_probability"] @ weights
        known = ~np.isnan(value)
        np.add.at(judged, scored["item_id"][known], 1)
        np.add.at(of_teacher, scored["item_id"][known], value[known])
    told, number = (of_teacher, judged) if judged.any() else (of_labels, shown)
    value = told / (number + _FOR_NOTHING)
    most = shown.max()
    return Statistics(
        shown=jnp.asarray(shown / most if most else shown, jnp.float32),
        value=jnp.asarray(value, jnp.float32),
        seed=jnp.int32(seed),
    )


def oracle(statistics: Statistics, batch: EvaluationBatch) -> Float[Array, "R N T"]:
    """The true probabilities; NaN where the dataset does not know them."""
    del statistics
    return batch.true_probability


def incumbent(statistics: Statistics, batch: EvaluationBatch) -> Float[Array, "R N T"]:
    """The share of the request's places that have a lower score; the least for an unknown score.

    Only the order of scores means something. Shares are exact in float32, whatever the scores.
    """
    del statistics
    score = jnp.where(jnp.isnan(batch.incumbent), -jnp.inf, batch.incumbent)
    lower = jax.vmap(lambda of: jnp.searchsorted(jnp.sort(of), of))(score)
    return _for_all_tasks(lower / score.shape[1], batch)


def random(statistics: Statistics, batch: EvaluationBatch) -> Float[Array, "R N T"]:
    """Uniform numbers, which follow from the seed, the user and the candidates alone."""
    key = jax.random.key(statistics.seed)

    def of_request(user_id: Int[Array, ""], item_id: Int[Array, "N"]) -> Float[Array, "N"]:
        of_user = jax.random.fold_in(key, user_id)
        return jax.random.uniform(jax.random.fold_in(of_user, jnp.sum(item_id)), item_id.shape)

    return _for_all_tasks(jax.vmap(of_request)(batch.batch.user_id, batch.batch.item_id), batch)


def popularity(statistics: Statistics, batch: EvaluationBatch) -> Float[Array, "R N T"]:
    """`Statistics.shown` of each candidate."""
    return _of_items(statistics.shown, batch)


def static_list(statistics: Statistics, batch: EvaluationBatch) -> Float[Array, "R N T"]:
    """`Statistics.value` of each candidate."""
    return _of_items(statistics.value, batch)


def _of_items(numbers: Float[Array, "items"], batch: EvaluationBatch) -> Float[Array, "R N T"]:
    of_candidates = features_of_items(numbers[:, None], batch.batch.item_id, 1, numbers.dtype)
    return _for_all_tasks(of_candidates[..., 0], batch)


def _for_all_tasks(value: Float[Array, "R N"], batch: EvaluationBatch) -> Float[Array, "R N T"]:
    """The same number for every task: any value weights order the candidates by it."""
    return jnp.broadcast_to(value[..., None], batch.true_probability.shape)


REFERENCES: dict[str, Reference] = {
    "oracle": oracle,
    "incumbent": incumbent,
    "random": random,
    "popularity": popularity,
    "static_list": static_list,
}
"""By name."""

ORDER_ALONE = ("incumbent", "random", "popularity", "static_list")
"""The references whose numbers are no probabilities."""

# Requests that suffice to find out what a dataset knows.
_SOME = 1000


def known_references(columns: Columns) -> tuple[str, ...]:
    """The names of the references that have what they sort by, in some requests of a split."""
    some = np.arange(0, len(columns), max(1, len(columns) // _SOME))
    facts = columns.known.fields(some, columns.counts.known[some])
    needed = {"oracle": "true_probability", "incumbent": "incumbent"}
    return tuple(
        name for name in REFERENCES if name not in needed or not np.isnan(facts[needed[name]]).all()
    )


def _serve(statistics: Statistics, batch: EvaluationBatch, items: Items) -> Served:
    del items
    served = {name: reference(statistics, batch) for name, reference in REFERENCES.items()}
    return Served(served, met={})


def reference_ranker(members: Sequence[Statistics]) -> Ranker:
    """All references as one ranker, with a serve name each.

    Args:
      members: statistics, of several seeds for instance, which are measured side by side.
    """
    return Ranker(_serve, stack_members(members), sees_truth=True)


def only_order(row: Mapping[str, float]) -> dict[str, float]:
    """The measured columns of a reference of `ORDER_ALONE`.

    Args:
      row: the columns of `totals.summarise`.

    Returns:
      The same, NaN in each column that takes the ranker's numbers for probabilities.
    """

    def takes_probabilities(column: str) -> bool:
        metric = metrics.metric_of(column)
        return metric is not None and "ranker" in metric.probabilities_of

    return {
        column: float("nan") if takes_probabilities(column) else number
        for column, number in row.items()
    }
