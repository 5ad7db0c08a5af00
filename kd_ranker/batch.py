"""The fields of a request, and their structs: `Request` on disk, `CandidateBatch` in a step.

All rooms use the same symbols: `R` requests, `N` candidates per request, `T` tasks, `H` events of
history. Each field is declared once, in `FIELDS`. To add a field, add a line there and a line in
each struct that holds it. A batch holds the data that differ between requests. Data that depend
only on the item are stored once on the device, in `Items`, and are looked up by `item_id`.

Categorical features are stored as *category ids*. All features share one range of ids: the ids of a
feature follow those of the features before it (`FeatureSpec.category_starts`), so one table of rows
serves them all. Values that a longer log adds have ids after those of all features. -1 marks a
missing value.
"""

import dataclasses
import enum
import itertools
import json
from collections.abc import Callable
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int8, Int32, UInt8

from kd_ranker.errors import UserError, check_choice, check_tasks


class Stage(enum.IntEnum):
    """The stage that a candidate reached in the funnel that was live when it was logged."""

    PADDING = 0
    RETRIEVED = 1
    PASSED = 2
    SHOWN = 3


CATEGORY_OWNERS = ("request", "candidate", "item")
TEACHER_SIGNALS = ("probability", "rank", "score")
# Attributes of `FeatureSpec` that earlier releases did not have.
_LATER_FIELDS = ("later_categories", "early_scores")


@dataclasses.dataclass(frozen=True)
class Category:
    """A categorical feature: one value, or a bag of up to `length` values without an order.

    Attributes:
      name: a readable name.
      of: its owner, one of `CATEGORY_OWNERS`.
      size: the number of its values, including those for rare or unknown values.
      length: the number of its category ids per owner; 1 for a single value.

    Raises:
      UserError: the owner does not exist, or a number is not whole and at least 1.
    """

    name: str
    of: str
    size: int
    length: int = 1

    def __post_init__(self) -> None:
        check_choice(f"category {self.name!r}: of", self.of, CATEGORY_OWNERS)
        for number in ("size", "length"):
            _check_size(f"category {self.name!r}: {number}", getattr(self, number), least=1)


def _check_size(what: str, size: Any, least: int) -> None:
    """Raise UserError unless a size is a whole number of at least `least`."""
    if not isinstance(size, (int, np.integer)) or size < least:
        raise UserError(f"{what}={size!r} must be a whole number, at least {least}")


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """The sizes of a dataset's features; stored with the dataset as `feature_spec.json`.

    Attributes:
      dataset: the dataset's name, as in `config.data.name`.
      tasks: names of the tasks, in the order of every T axis.
      num_users: user ids lie in [0, num_users).
      num_items: item ids lie in [0, num_items).
      user_features: width U of the dense user features.
      context_features: width C of the dense request context.
      candidate_features: width X of the dense features of a candidate within a request.
      item_features: width F of the item feature matrix [num_items, F].
      cheap_item_features: the number of its first columns that an early ranker can afford; only
        final rankers read the others.
      history_length: length H to which a history is cut or padded.
      history_features: width E of the features of each event of the history.
      teacher_version: logged probabilities count only from this model version; "" if none count.
      categories: the categorical features, in the order of their category ids.
      teacher_signal: the form of the logged teacher values, one of `TEACHER_SIGNALS`:
        probabilities, positions or scores. For the last two, the probability columns hold
        `teacher_signal.probability_of_rank` and `probability_of_score`.
      later_categories: the number of category ids after those of the features. A longer log adds
        them for new values of any feature; its vocabularies map values to ids.
      early_scores: names of the scores that candidates have before the final ranker runs.

    Raises:
      UserError: a size is not a whole number, there are more cheap item features than item
        features, the signal does not exist, or the tasks are not distinct names without dots.
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
    later_categories: int = 0
    early_scores: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        tasks: Any = self.tasks  # from a program that may not check types
        if isinstance(tasks, str):
            raise UserError(f"tasks={tasks!r} must be a tuple of names")
        for task in tasks:
            # They become keys of a config, where a dot separates names.
            if not isinstance(task, str) or not task or "." in task:
                raise UserError(f"task {task!r}: the name of a task is a text without dots")
        check_tasks(self.tasks, self.tasks)
        for field in dataclasses.fields(self):
            if field.type is int:
                _check_size(field.name, getattr(self, field.name), least=0)
        if self.cheap_item_features > self.item_features:
            raise UserError(
                f"cheap_item_features={self.cheap_item_features} counts the first of "
                f"item_features={self.item_features}, so it cannot be more; lower it"
            )
        check_choice("teacher_signal", self.teacher_signal, TEACHER_SIGNALS)

    @property
    def category_starts(self) -> tuple[int, ...]:
        """The first category id of each feature; its ids lie in [start, start + size)."""
        ends = itertools.accumulate(category.size for category in self.categories)
        return (0, *ends)[: len(self.categories)]

    @property
    def num_categories(self) -> int:
        """Category ids lie in [0, num_categories)."""
        return sum(category.size for category in self.categories) + self.later_categories

    def category_lengths(self, owner: str) -> tuple[int, ...]:
        """Return the number of category ids of each feature of an owner in `CATEGORY_OWNERS`."""
        return tuple(category.length for category in self.categories if category.of == owner)

    def category_width(self, owner: str) -> int:
        """Return the number of category ids that such an owner carries in all."""
        return sum(self.category_lengths(owner))

    def to_json(self) -> str:
        """Return the spec as JSON, a key per attribute; without `_LATER_FIELDS` that are empty."""
        fields = dataclasses.asdict(self)
        for name in _LATER_FIELDS:  # so that datasets without them keep their provenance
            if not fields[name]:
                del fields[name]
        return json.dumps(fields, indent=2, default=int)

    @classmethod
    def from_json(cls, text: str) -> "FeatureSpec":
        """Read what `to_json` wrote."""
        fields = json.loads(text)
        fields["tasks"] = tuple(fields["tasks"])
        fields["early_scores"] = tuple(fields.get("early_scores", ()))
        categories = fields.get("categories", ())
        fields["categories"] = tuple(Category(**category) for category in categories)
        return cls(**fields)


Owner = Literal["request", "event", "candidate", "shown", "scored", "known"]
"""The owner of a field, which determines the number of its entries per request.

    "request"      the request itself
    "event"        each event of its history
    "candidate"    each of its candidates
    "shown"        each candidate that was shown: the first ones
    "scored"       each candidate that the teacher scored: the first ones, too
    "known"        each candidate, or none: facts that only the evaluation reads
"""


class Field(NamedTuple):
    """A field of a request."""

    name: str  # of the attribute of `Request`, of `CandidateBatch`, or of both
    of: Owner
    stored: type | None  # on disk; None if it is computed on the way to a batch
    dtype: type | None  # in a batch; None if no model reads it
    # Sizes of a dataset -> the number of values per entry; None for a scalar. A field of width 0
    # that is optional in `Request` is not stored.
    width: Callable[[FeatureSpec], int] | None = None
    nothing: float = 0  # the value of a missing entry
    # Sizes of a dataset -> the number of ids; None if the field is not an id. A stored id is in
    # [0, ids), or is `nothing`.
    ids: Callable[[FeatureSpec], int] | None = None

    def shape(self, spec: FeatureSpec) -> tuple[int, ...]:
        """Return the shape of an entry."""
        return (self.width(spec),) if self.width else ()


def _tasks(spec: FeatureSpec) -> int:
    return len(spec.tasks)


def _early_scores(spec: FeatureSpec) -> int:
    return len(spec.early_scores)


def _request_categories(spec: FeatureSpec) -> int:
    return spec.category_width("request")


def _candidate_categories(spec: FeatureSpec) -> int:
    return spec.category_width("candidate")


_num_items = attrgetter("num_items")
_num_categories = attrgetter("num_categories")

# All fields of a request: name, owner, type on disk, type in a batch, width. Batches are packed in
# this order.
FIELDS = (
    Field("request_id", "request", np.int64, None),
    Field("time", "request", np.int64, None),
    Field("user_id", "request", np.int32, np.int32, ids=attrgetter("num_users")),
    Field("user_features", "request", np.float32, np.float32, attrgetter("user_features")),
    Field("context", "request", np.float32, np.float32, attrgetter("context_features")),
    Field(
        "request_category",
        "request",
        np.int32,
        np.int32,
        _request_categories,
        nothing=-1,
        ids=_num_categories,
    ),
    Field("history_id", "event", np.int32, np.int32, ids=_num_items),
    Field("history_features", "event", np.float32, np.float32, attrgetter("history_features")),
    Field("history_mask", "event", None, np.bool_),
    Field("item_id", "candidate", np.int32, np.int32, ids=_num_items),
    Field(
        "candidate_features", "candidate", np.float32, np.float32, attrgetter("candidate_features")
    ),
    Field(
        "candidate_category",
        "candidate",
        np.int32,
        np.int32,
        _candidate_categories,
        nothing=-1,
        ids=_num_categories,
    ),
    Field("num_passed", "request", np.int32, None),
    Field("stage", "candidate", None, np.int8),
    Field("user_label", "shown", np.uint8, np.float32, _tasks),
    Field("label_weight", "shown", np.float32, np.float32),
    Field("teacher_probability", "scored", np.float32, np.float32, _tasks, nothing=np.nan),
    # The field has two forms. A stored request has one weight per candidate, as the log has it. A
    # batch has one per candidate and task, which is 0 where the probability is not proper.
    Field("teacher_weight", "scored", np.float32, None),
    Field("teacher_weight", "scored", None, np.float32, _tasks),
    Field("teacher_version", "request", str, None),
    Field("true_probability", "known", np.float32, None, _tasks, nothing=np.nan),
    Field("incumbent", "known", np.float32, None, nothing=np.nan),
    Field("propensity", "known", np.float32, None, nothing=np.nan),
    Field("early_scores", "known", np.float32, None, _early_scores, nothing=np.nan),
)
STORED = tuple(field for field in FIELDS if field.stored is not None)  # of `Request`
IN_BATCH = tuple(field for field in FIELDS if field.dtype is not None)  # of `CandidateBatch`


@dataclasses.dataclass(frozen=True)
class Request:
    """One request as stored on disk, without padding.

    The N candidates are in funnel order: the S shown ones first, then the rest of the P passed
    ones, then the rest of the retrieved. User labels are therefore known for a prefix of length S.
    A teacher that scored only passed candidates has logged a prefix of length P (A below: S ≤ P,
    and A is 0, S, P or N). Only labels, teacher probabilities and true probabilities may stem from
    after `time`.

    True probabilities, incumbent, propensity and early scores are for the evaluation only: V is N
    there. In training requests, and in a dataset without any of the four, V is 0. NaN is an unknown
    value.
    """

    request_id: int
    time: int  # seconds
    user_id: int
    user_features: Float32[np.ndarray, "U"]
    context: Float32[np.ndarray, "C"]
    history_id: Int32[np.ndarray, "H"]  # most recent last, at most `history_length` of them
    history_features: Float32[np.ndarray, "H E"]
    item_id: Int32[np.ndarray, "N"]
    candidate_features: Float32[np.ndarray, "N X"]
    num_passed: int
    user_label: UInt8[np.ndarray, "S T"]
    label_weight: Float32[np.ndarray, "S"]
    teacher_probability: Float32[np.ndarray, "A T"]  # as logged: NaN and nonsense included
    teacher_weight: Float32[np.ndarray, "A"]  # 0 where the log marks a missing write
    teacher_version: str  # of the model that wrote `teacher_probability`
    true_probability: Float32[np.ndarray, "V T"]
    # Category ids, see above; None in a dataset without such features.
    request_category: Int32[np.ndarray, "K"] | None = None
    candidate_category: Int32[np.ndarray, "N L"] | None = None
    # None: unknown.
    incumbent: Float32[np.ndarray, "V"] | None = None  # score of today's early ranker
    propensity: Float32[np.ndarray, "V"] | None = None  # see `EvaluationBatch`
    early_scores: Float32[np.ndarray, "V scores"] | None = None  # see `FeatureSpec`; higher first


@flax.struct.dataclass
class CandidateBatch:
    """A batch of requests with their candidates. Probabilities lie in [0, 1].

    Entries with `stage` `PADDING` have no meaning. Entries of weight 0 may hold any value, NaN too,
    and contribute exactly 0 to a loss.

    Shown candidates with a drawn label come first, then the others that were passed (among them
    shown ones without a drawn label), then the rest. So data of only a few candidates have shorter
    arrays. The first `num_labeled` entries can have labels. The first `num_scored` entries include
    all passed candidates and all with a logged teacher probability. Either number may be N.
    """

    user_id: Int[Array, "R"]
    user_features: Float[Array, "R U"]
    context: Float[Array, "R C"]
    history_id: Int[Array, "R H"]  # item ids, most recent last, padded at the end
    history_features: Float[Array, "R H E"]
    history_mask: Bool[Array, "R H"]
    item_id: Int[Array, "R N"]
    candidate_features: Float[Array, "R N X"]
    request_category: Int[Array, "R K"]  # category ids of user and context; -1 is padding
    candidate_category: Int[Array, "R N L"]  # those that differ from request to request
    stage: Int8[Array, "R N"]  # a `Stage`
    user_label: Float[Array, "R labeled T"]  # 0 or 1
    label_weight: Float[Array, "R labeled"]  # 0 where not shown
    teacher_probability: Float[Array, "R num_scored T"]
    teacher_weight: Float[Array, "R num_scored T"]  # 0 where it was not logged properly

    @property
    def candidate_mask(self) -> Bool[Array, "R N"]:
        """True where there is a candidate, False on padding."""
        return self.stage > Stage.PADDING

    @property
    def num_labeled(self) -> int:
        """The number of first candidates of each request that can have user labels."""
        return self.label_weight.shape[1]

    @property
    def num_scored(self) -> int:
        """The number of first candidates that can be passed ones or have logged probabilities."""
        return self.teacher_weight.shape[1]

    def first(self, candidates: int) -> "CandidateBatch":
        """Return the batch with only the first candidates of each request."""
        shorter = {
            field.name: getattr(self, field.name)[:, :candidates]
            for field in IN_BATCH
            if field.of not in ("request", "event")
        }
        return dataclasses.replace(self, **shorter)


class RowSharding(NamedTuple):
    """How rows are spread over devices, see `embedding.row_sharding`."""

    devices: int = 1  # 1 keeps all rows on each device
    axis: str = ""  # the mapped axis of the devices


WHOLE = RowSharding()


@flax.struct.dataclass
class Items:
    """The features and categories of each item, one row per item id.

    Rows may be sharded over devices; each device then holds its part.
    """

    features: Float[Array, "items F"]
    category: Int[Array, "items I"]  # category ids; -1 is padding
    row_sharding: RowSharding = flax.struct.field(pytree_node=False, default=WHOLE)


@flax.struct.dataclass
class EvaluationBatch:
    """A batch for evaluation, with facts that only the evaluation may see; NaN where unknown.

    The propensity is the probability in (0, 1] with which the log showed a candidate that it
    showed; NaN on the others.
    """

    batch: CandidateBatch
    true_probability: Float[Array, "R N T"]  # in [0, 1]
    incumbent: Float[Array, "R N"]  # score of the early ranker that filled the log, higher first
    propensity: Float[Array, "R N"]
    request_mask: Bool[Array, "R"]  # False on requests that only pad the last batch
    # True on requests that the final ranker scored whole, if a log has such ones and others; None:
    # the funnel is measured on all requests.
    whole: Bool[Array, "R"] | None = None
    # Of rankers that are no programs, see `rivals.registry.order_keys`; by default of none.
    rivals: Float[Array, "R N S"] = flax.struct.field(
        default_factory=lambda: jnp.zeros((1, 1, 0), jnp.float32)
    )


def empty_batch(spec: FeatureSpec, requests: int, candidates: int) -> CandidateBatch:
    """Return a batch of zeros on the host, for compiling programs before any data exist."""
    abstract = abstract_batch(spec, requests, candidates)
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)


def abstract_batch(spec: FeatureSpec, requests: int, candidates: int) -> CandidateBatch:
    """Return a batch of only shapes and types, which needs no memory."""
    entries = {"request": (), "event": (spec.history_length,)}
    # Typed for the device, where it is used.
    fields: dict[str, Any] = {}
    for field in IN_BATCH:
        entries_per_request = entries.get(field.of, (candidates,))
        shape = (requests, *entries_per_request, *field.shape(spec))
        fields[field.name] = jax.ShapeDtypeStruct(shape, field.dtype)
    return CandidateBatch(**fields)


def abstract_items(spec: FeatureSpec) -> Items:
    """Return the items of a dataset as only shapes and types, which need no memory."""
    features: Any = jax.ShapeDtypeStruct((spec.num_items, spec.item_features), np.float32)
    category: Any = jax.ShapeDtypeStruct((spec.num_items, spec.category_width("item")), np.int32)
    return Items(features, category)
