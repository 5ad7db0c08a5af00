"""From requests on the host to the fixed number of candidates that a batch holds.

Host side, NumPy, a whole batch at a time: the results are the fields of `CandidateBatch`.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from kd_ranker.batch import Stage
from kd_ranker.data.columns import Columns

Fields = dict[str, Any]
Counts = Int[np.ndarray, "R"]
Places = Int[np.ndarray, "R width"]
Mask = Bool[np.ndarray, "R width"]


def spread_evenly(
    numbers: Counts, wanted: Counts, start: Float[np.ndarray, "R"]
) -> tuple[Places, Mask]:
    """Draws `wanted` of `numbers` in each request, at even distances from a random start.

    Systematic sampling (Madow and Madow, 1944): of n in which k are wanted, place i is
    ⌊(i · n + ⌊start · n⌋) / k⌋. Each is drawn with the same probability k / n, none twice, and a
    sample of candidates in funnel order reaches from the first to the last.

    Args:
      numbers: how many there are, n.
      wanted: how many to draw, at most n.
      start: uniform in [0, 1).

    Returns:
      Places in [0, n), filled up with 0, and which of them are real.

    >>> places, real = spread_evenly(np.array([10, 3]), np.array([4, 1]), np.array([0.5, 0.5]))
    >>> places.tolist()
    [[1, 3, 6, 8], [1, 0, 0, 0]]
    """
    index = np.arange(wanted.max(initial=0))
    real = index < wanted[:, None]
    # In whole numbers: rounded ones could meet.
    offset = np.minimum((start * numbers).astype(np.int64), numbers - 1)
    places = (index * numbers[:, None] + offset[:, None]) // np.maximum(wanted, 1)[:, None]
    return np.where(real, places, 0), real


def _labelled_numbers(
    positives: Counts, negatives: Counts, negative_rate: float, slots: int
) -> tuple[Counts, Counts]:
    """How many positive and negative candidates a batch keeps with their labels."""
    wanted = np.rint(negative_rate * negatives).astype(np.int64)
    wanted = np.minimum(np.maximum(wanted, 1), negatives)
    total = positives + wanted
    # Where they do not fit, both are thinned in proportion, and neither to nothing; a single slot
    # goes to a positive.
    reserved = np.minimum(wanted, 1) if slots > 1 else np.zeros_like(wanted)
    share = np.rint(slots * positives / np.maximum(total, 1)).astype(np.int64)
    fewer = np.minimum(np.minimum(np.maximum(share, 1), np.maximum(slots - reserved, 0)), positives)
    thinned = total > slots
    kept = np.where(thinned, fewer, positives)
    return kept, np.where(thinned, np.minimum(slots - kept, wanted), wanted)


def draw_candidates(
    columns: Columns,
    requests: Int[np.ndarray, "R"],
    candidates: int,
    passed_share: float,
    negative_rate: float,
    generator: np.random.Generator,
) -> tuple[Places, Mask, Float[np.ndarray, "R width"]]:
    """Which candidates of each request a training batch holds.

    Shown ones come first: all positives, and of the n negatives a share `negative_rate`, k in
    number, each of which then counts n / k times, so that weighted sums over the labels keep their
    expectation; what does not fit is thinned and reweighted the same way. The slots that are left
    are filled from the passed and from the rest, where a shown one whose labels were not drawn
    counts as passed; where one of the two runs out the other fills up.

    Args:
      columns: the dataset.
      requests: which of its requests.
      candidates: `config.batch.candidates`, the most to hold.
      passed_share: the share of the slots left after the shown that the passed fill.
      negative_rate: the share of the shown candidates without any positive label to keep.
      generator: the source of all randomness.

    Returns:
      Places in a request's list of candidates; which of them are real, first those; and the factor
      on the label weight of each, 0 for what is not to be learned from labels.
    """
    retrieved = _lengths(columns.candidate_start, requests)
    number_shown = _lengths(columns.shown_start, requests)
    passed = np.maximum(columns.num_passed[requests], number_shown)
    starts = generator.random((4, len(requests)))

    # The shown, positives before negatives.
    index = np.arange(number_shown.max(initial=0))
    shown = index < number_shown[:, None]
    label = _of_candidates(columns.user_label, columns.shown_start[requests], index, shown)
    positive = label.any(axis=2)
    by_label = np.argsort(np.where(shown, ~positive, 2), axis=1, kind="stable")
    positives = positive.sum(axis=1)
    negatives = number_shown - positives
    kept_positives, kept_negatives = _labelled_numbers(
        positives, negatives, negative_rate, candidates
    )
    of_positives, are_positive = spread_evenly(positives, kept_positives, starts[0])
    of_negatives, are_negative = spread_evenly(negatives, kept_negatives, starts[1])
    labelled = np.take_along_axis(
        by_label,
        np.concatenate(
            [of_positives, np.where(are_negative, positives[:, None] + of_negatives, 0)], axis=1
        ),
        axis=1,
    )
    is_labelled = np.concatenate([are_positive, are_negative], axis=1)
    number_labelled = kept_positives + kept_negatives

    # The others: shown ones that were not drawn, then the rest of the passed; then the retrieved.
    drawn = np.zeros(shown.shape, bool)
    rows = np.nonzero(is_labelled)[0]
    drawn[rows, labelled[is_labelled]] = True
    left = number_shown - number_labelled
    undrawn = np.argsort(drawn | ~shown, axis=1, kind="stable")
    others, rest = left + passed - number_shown, retrieved - passed
    slots = np.minimum(candidates - number_labelled, others + rest)
    from_passed = np.minimum(np.rint(passed_share * slots).astype(np.int64), others)
    from_passed = np.maximum(from_passed, slots - rest)
    of_others, are_others = spread_evenly(others, from_passed, starts[2])
    if undrawn.shape[1]:
        again = np.take_along_axis(undrawn, np.minimum(of_others, undrawn.shape[1] - 1), axis=1)
        later = number_shown[:, None] + of_others - left[:, None]
        of_others = np.where(of_others < left[:, None], again, later)
    of_rest, are_rest = spread_evenly(rest, slots - from_passed, starts[3])

    real = np.concatenate([is_labelled, are_others, are_rest], axis=1)
    places = np.concatenate([labelled, of_others, passed[:, None] + of_rest], axis=1)
    factors = np.zeros(real.shape, np.float32)
    first_negative, first_other = are_positive.shape[1], is_labelled.shape[1]
    factors[:, :first_negative] = (positives / np.maximum(kept_positives, 1))[:, None]
    factors[:, first_negative:first_other] = (negatives / np.maximum(kept_negatives, 1))[:, None]
    # What is real moves to the front.
    front = np.argsort(~real, axis=1, kind="stable")[:, :candidates]
    real = np.take_along_axis(real, front, axis=1)
    places = np.take_along_axis(places, front, axis=1)
    factors = np.take_along_axis(factors, front, axis=1)
    return np.where(real, places, 0), real, np.where(real, factors, 0)


def batch_fields(
    columns: Columns,
    requests: Int[np.ndarray, "R"],
    places: Places,
    real: Mask,
    factors: Float[np.ndarray, "R width"],
    candidates: int,
) -> Fields:
    """The fields of `CandidateBatch` for the chosen candidates.

    Args:
      columns: the dataset.
      requests: which of its requests.
      places: which candidates of each, in the order of the batch.
      real: which of these mean anything.
      factors: a factor on the label weight of each.
      candidates: the number N to fill up to.
    """
    missing = candidates - places.shape[1]
    places, real, factors = (
        np.pad(array, [(0, 0), (0, missing)]) for array in (places, real, factors)
    )
    known_label = real & (places < _lengths(columns.shown_start, requests)[:, None])
    known_teacher = real & (places < _lengths(columns.scored_start, requests)[:, None])

    def of_candidates(array: np.ndarray, start: np.ndarray, known: Mask) -> np.ndarray:
        return _of_candidates(array, start[requests], places, known)

    stage = np.where(places < columns.num_passed[requests][:, None], Stage.PASSED, Stage.RETRIEVED)
    stage = np.where(known_label, Stage.SHOWN, stage)
    label_weight = of_candidates(columns.label_weight, columns.shown_start, known_label)
    label = of_candidates(columns.user_label, columns.shown_start, known_label)
    proper = of_candidates(columns.teacher_proper, columns.scored_start, known_teacher)
    return {
        "user_id": columns.user_id[requests],
        "user_features": columns.user_features[requests],
        "context": columns.context[requests],
        "history_id": columns.history_id[requests],
        "history_features": columns.history_features[requests],
        "history_mask": columns.history_mask[requests],
        "item_id": of_candidates(columns.item_id, columns.candidate_start, real),
        "candidate_features": of_candidates(
            columns.candidate_features, columns.candidate_start, real
        ),
        "request_category": columns.request_category[requests],
        "candidate_category": np.where(
            real[..., None],
            of_candidates(columns.candidate_category, columns.candidate_start, real),
            -1,
        ),
        "stage": np.where(real, stage, Stage.PADDING).astype(np.int8),
        "user_label": label.astype(np.float32),
        "label_weight": (label_weight * factors).astype(np.float32),
        "teacher_probability": of_candidates(
            columns.teacher_probability, columns.scored_start, known_teacher
        ),
        "teacher_weight": proper.astype(np.float32),
    }


def training_fields(
    columns: Columns,
    requests: Int[np.ndarray, "R"],
    candidates: int,
    passed_share: float,
    negative_rate: float,
    generator: np.random.Generator,
) -> Fields:
    """A training batch of some requests; see `draw_candidates`."""
    drawn = draw_candidates(columns, requests, candidates, passed_share, negative_rate, generator)
    return batch_fields(columns, requests, *drawn, candidates)


def full_fields(columns: Columns, candidates: int) -> Fields:
    """All candidates of all requests in their stored order, filled up to `candidates`."""
    requests = np.arange(len(columns))
    number = _lengths(columns.candidate_start, requests)
    index = np.arange(number.max(initial=0))
    real = index < number[:, None]
    return batch_fields(
        columns, requests, np.where(real, index, 0), real, real.astype(np.float32), candidates
    )


def _of_candidates(
    array: Num[np.ndarray, "all ..."], start: Counts, places: Places, known: Mask
) -> Num[np.ndarray, "R width ..."]:
    """The entry of each candidate, and zero where there is none."""
    if not len(array):
        return np.zeros((*known.shape, *array.shape[1:]), array.dtype)
    # What is not known may lie anywhere, and is overwritten.
    result = array.take(start[:, None] + places, axis=0, mode="clip")
    result[~known] = 0
    return result


def _lengths(start: Int[np.ndarray, "n+1"], requests: Int[np.ndarray, "R"]) -> Counts:
    return start[requests + 1] - start[requests]
