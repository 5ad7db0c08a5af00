"""The input of rivals: candidates of consecutive requests as flat arrays, on the host."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from kd_ranker.batch import Stage
from kd_ranker.requests.columns import Columns, slices
from kd_ranker.requests.records import Dataset
from kd_ranker.requests.request import starts_of

# Chances without success added to those of each item, so that no item has a rate of 1 after one.
_PRIOR_CHANCES = 10


class Candidates:
    """The n candidates of consecutive requests of a split, grouped by request.

    Attributes:
      sizes: candidates of each request.
      stage: the `Stage` of each candidate.
    """

    def __init__(
        self, dataset: Dataset, split: str, requests: slice, reached: Stage = Stage.RETRIEVED
    ) -> None:
        """Prepare to read the candidates that reached a stage; fields are read when needed."""
        self._dataset = dataset
        self._requests = requests
        self._columns = dataset.columns[split]
        self._counts = self._columns.counts.of(requests)
        self._rates: np.ndarray | None = None  # of the numbers that were computed last
        self.sizes: Int[np.ndarray, "requests"] = self._counts.reached(reached)
        self.stage: Int[np.ndarray, "n"] = np.full(self.sizes.sum(), Stage.RETRIEVED, np.int8)
        self.stage[self._leading(self._counts.passed)] = Stage.PASSED
        self.stage[self._leading(self._counts.shown)] = Stage.SHOWN

    def __len__(self) -> int:
        """Return n."""
        return len(self.stage)

    @functools.cached_property
    def request(self) -> Int[np.ndarray, "n"]:
        """The place of each candidate's request among these requests."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    @property
    def item_id(self) -> Int[np.ndarray, "n"]:
        """The item of each candidate."""
        return self._fields["item_id"]

    @functools.cached_property
    def of_requests(self) -> dict[str, np.ndarray]:
        """The fields of the requests themselves, histories included, by name."""
        return self._columns.requests.fields(self._requests, np.ones_like(self.sizes))

    @functools.cached_property
    def early_scores(self) -> Float32[np.ndarray, "n S"]:
        """The scores before the final ranker; NaN where they are not known."""
        facts = self._columns.known.fields(self._requests, self._counts.known)
        known: Float32[np.ndarray, "n S"] = facts["early_scores"]
        if len(known) == len(self):
            return known
        return np.full((len(self), known.shape[1]), np.nan, np.float32)

    def user_value(self, value_weights: Sequence[float]) -> Float[np.ndarray, "n"]:
        """Return Σ over tasks of weight · user label; NaN without a label that counts."""
        fields = self._columns.labels.fields(self._requests, self._counts.shown)
        labeled = fields["user_label"] @ np.asarray(value_weights, float)
        value = np.full(len(self), np.nan)
        value[self.stage == Stage.SHOWN] = np.where(fields["label_weight"] > 0, labeled, np.nan)
        return value

    def final_value(self, value_weights: Sequence[float], reached: Stage) -> Float[np.ndarray, "n"]:
        """Return the final ranker's value of those that reached a stage; NaN where unknown."""
        weights = np.asarray(value_weights, float)
        value = self._fields["teacher_probability"][:, weights > 0] @ weights[weights > 0]
        value[~self._leading(self._counts.scored) | (self.stage < reached)] = np.nan
        return value

    def numbers(self, rates: Float32[np.ndarray, "items C"]) -> Float32[np.ndarray, "n F"]:
        """Return the dense numbers that an early ranker may read, computed once.

        They are the features of the user and the context, those of the candidate in this request,
        the cheap ones of its item, and the item's `rates`.
        """
        if self._rates is not rates:
            self._rates = rates
            self._numbers = self.numbers_of(rates, slice(None))
        return self._numbers

    def numbers_of(
        self, rates: Float32[np.ndarray, "items C"], chosen: Any
    ) -> Float32[np.ndarray, "chosen F"]:
        """Return the numbers of the candidates that a mask or a slice chooses."""
        request = self.request[chosen]
        item_id = self.item_id[chosen]
        features: Any = self._dataset.items.features
        cheap = np.asarray(features[:, : self._dataset.spec.cheap_item_features])
        parts = [
            self.of_requests["user_features"][request],
            self.of_requests["context"][request],
            self._fields["candidate_features"][chosen],
            cheap[item_id],
            rates[item_id],
        ]
        return np.concatenate(parts, axis=1, dtype=np.float32)

    @functools.cached_property
    def _fields(self) -> dict[str, np.ndarray]:
        return self._columns.candidates.fields(self._requests, self.sizes)

    def _leading(self, number: Int[np.ndarray, "requests"]) -> Bool[np.ndarray, "n"]:
        """Choose the first candidates of each request, `number` of them."""
        place = np.arange(self.sizes.sum()) - np.repeat(starts_of(self.sizes)[:-1], self.sizes)
        return place < np.repeat(number, self.sizes)


def in_parts(
    dataset: Dataset,
    split: str,
    requests: slice = slice(None),
    reached: Stage = Stage.RETRIEVED,
) -> Iterator[Candidates]:
    """Yield the candidates of consecutive requests, about a million at a time."""
    first, stop, _ = requests.indices(len(dataset.columns[split]))
    sizes = dataset.columns[split].counts.reached(reached)[first:stop]
    for part in slices(sizes):
        yield Candidates(dataset, split, slice(first + part.start, first + part.stop), reached)


def last_requests(columns: Columns, most: int) -> slice:
    """Return the last requests of a split: at most half of them, or one, and `most` candidates."""
    from_end = np.cumsum(columns.counts.retrieved[::-1])
    number = int(np.searchsorted(from_end, most, side="right"))
    number = max(1, min(number, len(columns) // 2))
    return slice(len(columns) - number, len(columns))


def item_rates(
    dataset: Dataset,
    requests: slice,
    value_weights: Sequence[float],
    scored: Stage,
    top: int,
) -> Float32[np.ndarray, "items 5"]:
    """Return numbers of each item from its passes in training requests.

    They are log(1 + times shown), the share of its passes in which it was shown, log(1 + times
    passed), the value of its user labels over the times shown, and the share of its scores that
    were among the `top` of their request. Shares have ten more passes without success. Only the
    last one needs the final ranker's scores; they count for candidates that reached the stage
    `scored`.
    """
    num_items = dataset.spec.num_items
    times_shown = np.zeros(num_items)
    times_passed = np.zeros(num_items)
    wanted = np.zeros(num_items)  # summed value of the user labels
    times_scored = np.zeros(num_items)
    times_top = np.zeros(num_items)
    for candidates in in_parts(dataset, "train", requests, Stage.PASSED):
        item_id = candidates.item_id
        is_shown = candidates.stage == Stage.SHOWN
        final_value = candidates.final_value(value_weights, scored)
        is_scored = ~np.isnan(final_value)
        is_top = is_scored & (places_by(final_value, candidates.sizes) < top)
        user_value = np.nan_to_num(candidates.user_value(value_weights))
        np.add.at(times_shown, item_id[is_shown], 1)
        np.add.at(times_passed, item_id, 1)
        np.add.at(wanted, item_id, user_value)
        np.add.at(times_scored, item_id[is_scored], 1)
        np.add.at(times_top, item_id[is_top], 1)
    rates = [
        np.log1p(times_shown),
        times_shown / (times_passed + _PRIOR_CHANCES),
        np.log1p(times_passed),
        wanted / (times_shown + _PRIOR_CHANCES),
        times_top / (times_scored + _PRIOR_CHANCES),
    ]
    return np.stack(rates, axis=1).astype(np.float32)


def places_by(
    numbers: Float[np.ndarray, "n"], sizes: Int[np.ndarray, "requests"]
) -> Int[np.ndarray, "n"]:
    """Return the place of each candidate in its request, 0 for the largest number; NaN is last.

    Of equal numbers, the earlier candidate comes first.
    """
    request = np.repeat(np.arange(len(sizes)), sizes)
    order = np.lexsort((-numbers, request))
    places = np.empty(len(numbers), np.int64)
    places[order] = np.arange(len(numbers)) - np.repeat(starts_of(sizes)[:-1], sizes)
    return places
