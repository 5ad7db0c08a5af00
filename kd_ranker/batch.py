"""The one struct that flows through the program, and the sizes that describe it.

Every room speaks of a batch in these terms: `R` requests, `N` candidates a request, `T` tasks,
`H` events of history. A batch holds what differs from request to request. What belongs to an item
alone lies once on the device, in `Items`, and is looked up by `item_id`.

Categorical features come as *category ids*. All of them share one range: that of a feature follows
those of the features before it (`FeatureSpec.category_starts`), so one table of rows serves them
all. -1 fills up where there is no value.
"""

import dataclasses
import enum
import itertools
import json
from typing import Any

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8

from kd_ranker.errors import check_choice


class Stage(enum.IntEnum):
    """How far a candidate came through the funnel that was live when it was logged."""

    PADDING = 0
    RETRIEVED = 1
    PASSED = 2
    SHOWN = 3


@flax.struct.dataclass
class CandidateBatch:
    """A batch of requests with their candidates. Probabilities lie in [0, 1].

    Entries where `stage` is `PADDING` hold zeros and mean nothing; entries of weight 0 may hold
    anything, NaN included, and contribute exactly nothing to a loss.

    Those shown stand first, then those passed, so what is known of a few candidates only need not
    be as long as the list of all: labels are of its first `labelled` entries, and in its first
    `judged` stand all that were passed and all that have a logged teacher probability. Both may be
    N.
    """

    user_id: Int[Array, "R"]
    user_features: Float[Array, "R U"]
    context: Float[Array, "R C"]
    history_id: Int[Array, "R H"]  # item ids, most recent last, padded at the end
    history_features: Float[Array, "R H E"]
    history_mask: Bool[Array, "R H"]
    item_id: Int[Array, "R N"]
    candidate_features: Float[Array, "R N X"]
    request_category: Int[Array, "R K"]  # category ids of user and context; -1 fills up
    candidate_category: Int[Array, "R N L"]  # those that differ from request to request
    stage: Int8[Array, "R N"]  # a `Stage`
    user_label: Float[Array, "R labelled T"]  # 0 or 1
    label_weight: Float[Array, "R labelled"]  # 0 where not shown
    teacher_probability: Float[Array, "R judged T"]
    teacher_weight: Float[Array, "R judged T"]  # 0 where it was not logged properly

    @property
    def candidate_mask(self) -> Bool[Array, "R N"]:
        """True where there is a candidate, False on padding."""
        return self.stage > Stage.PADDING

    @property
    def labelled(self) -> int:
        """How many candidates of each request, the first ones, can have user labels."""
        return self.label_weight.shape[1]

    @property
    def judged(self) -> int:
        """How many candidates of each request, the first ones, can have logged probabilities."""
        return self.teacher_weight.shape[1]

    def first(self, candidates: int) -> "CandidateBatch":
        """The batch with the first candidates of each request alone."""
        return dataclasses.replace(
            self, **{name: getattr(self, name)[:, :candidates] for name in _OF_CANDIDATES}
        )


_OF_CANDIDATES = (
    *("item_id", "candidate_features", "candidate_category", "stage"),
    *("user_label", "label_weight", "teacher_probability", "teacher_weight"),
)


@flax.struct.dataclass
class Items:
    """What belongs to each item alone, row by item id."""

    features: Float[Array, "items F"]
    category: Int[Array, "items I"]  # category ids; -1 fills up


@flax.struct.dataclass
class EvaluationBatch:
    """A batch for evaluation, with what only the evaluation may see.

    `true_probability` is NaN where the dataset does not know it; `request_mask` is False on the
    requests that only fill up the last batch.
    """

    batch: CandidateBatch
    true_probability: Float[Array, "R N T"]
    request_mask: Bool[Array, "R"]


CATEGORY_OWNERS = ("request", "candidate", "item")
TEACHER_SIGNALS = ("probability", "rank")


@dataclasses.dataclass(frozen=True)
class Category:
    """A categorical feature: one value, or a bag of up to `length` values without an order.

    Attributes:
      name: for people.
      of: what it belongs to, one of `CATEGORY_OWNERS`.
      size: how many values it has, those for values that are rare or unheard of included.
      length: how many category ids it takes; 1 for a single value.
    """

    name: str
    of: str
    size: int
    length: int = 1

    def __post_init__(self) -> None:
        """Raises UserError for an owner that does not exist."""
        check_choice(f"category {self.name!r}: of", self.of, CATEGORY_OWNERS)


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """The sizes of a dataset's features; stored beside the dataset as `feature_spec.json`.

    Attributes:
      dataset: the dataset's name, as in `config.data.name`.
      tasks: names of the tasks, in the order of every T axis.
      num_users: user ids lie in [0, num_users).
      num_items: item ids lie in [0, num_items).
      user_features: width U of the dense user features.
      context_features: width C of the dense request context.
      candidate_features: width X of what differs from candidate to candidate within a request.
      item_features: width F of the item feature matrix [num_items, F].
      cheap_item_features: how many of its first columns an early ranker can afford; the others are
        for final rankers alone.
      history_length: length H to which a history is cut or padded.
      history_features: width E of what is known of each event of the history.
      teacher_version: the only model version whose logged probabilities count; "" if none do.
      categories: the categorical features, in the order of their category ids.
      teacher_signal: what the log holds of the teacher, one of `TEACHER_SIGNALS`: probabilities, or
        positions, of which the probability columns then hold `teacher_signal.probability_of_rank`.
    """

    dataset: str
    tasks: tuple[str, ...]
    num_users: int
    num_items: int
    user_features: int
    context_features: int
    candidate_features: int
    item_features: int
    cheap_item_features: int
    history_length: int
    history_features: int
    teacher_version: str
    categories: tuple[Category, ...] = ()
    teacher_signal: str = "probability"

    @property
    def category_starts(self) -> tuple[int, ...]:
        """The first category id of each feature; its ids lie in [start, start + size)."""
        ends = itertools.accumulate(category.size for category in self.categories)
        return (0, *ends)[: len(self.categories)]

    @property
    def num_categories(self) -> int:
        """Category ids lie in [0, num_categories)."""
        return sum(category.size for category in self.categories)

    def category_lengths(self, of: str) -> tuple[int, ...]:
        """How many of the category ids of each request, candidate or item are of each feature.

        Args:
          of: one of `CATEGORY_OWNERS`.
        """
        return tuple(category.length for category in self.categories if category.of == of)

    def category_width(self, of: str) -> int:
        """How many category ids each request, candidate or item carries, one of CATEGORY_OWNERS."""
        return sum(self.category_lengths(of))

    def to_json(self) -> str:
        """The spec as JSON, one key an attribute."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "FeatureSpec":
        """The inverse of `to_json`."""
        fields = json.loads(text)
        fields.pop("has_true_probability", None)  # datasets of earlier releases have it
        fields["tasks"] = tuple(fields["tasks"])
        fields["categories"] = tuple(Category(**of) for of in fields.get("categories", ()))
        return cls(**fields)


def empty_batch(spec: FeatureSpec, requests: int, candidates: int) -> CandidateBatch:
    """A batch of zeros, on the host: what programs are compiled for before there is any data."""
    tasks, history = len(spec.tasks), spec.history_length

    # A batch is made on the host and typed for the device, where it is used.
    def zeros(dtype: type, *shape: int) -> Any:
        return np.zeros((requests, *shape), dtype)

    return CandidateBatch(
        user_id=zeros(np.int32),
        user_features=zeros(np.float32, spec.user_features),
        context=zeros(np.float32, spec.context_features),
        history_id=zeros(np.int32, history),
        history_features=zeros(np.float32, history, spec.history_features),
        history_mask=zeros(np.bool_, history),
        item_id=zeros(np.int32, candidates),
        candidate_features=zeros(np.float32, candidates, spec.candidate_features),
        request_category=zeros(np.int32, spec.category_width("request")),
        candidate_category=zeros(np.int32, candidates, spec.category_width("candidate")),
        stage=zeros(np.int8, candidates),
        user_label=zeros(np.float32, candidates, tasks),
        label_weight=zeros(np.float32, candidates),
        teacher_probability=zeros(np.float32, candidates, tasks),
        teacher_weight=zeros(np.float32, candidates, tasks),
    )


def abstract_items(spec: FeatureSpec) -> Items:
    """The items of a dataset by shapes and types alone, which need no memory."""

    # Typed for the device, where they are used.
    def abstract(dtype: type, width: int) -> Any:
        return jax.ShapeDtypeStruct((spec.num_items, width), dtype)

    return Items(
        features=abstract(np.float32, spec.item_features),
        category=abstract(np.int32, spec.category_width("item")),
    )
