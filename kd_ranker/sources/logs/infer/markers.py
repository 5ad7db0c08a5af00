"""Numbers that stand for a missing value: -1 for no time of delivery, 0 for no position.

And 0 for the scores of a request whose scores were lost.
"""

import pandas as pd

from kd_ranker.sources.logs.infer.by_name import may_count_places, varies_in_requests
from kd_ranker.sources.logs.infer.sample import Sample
from kd_ranker.sources.logs.layout import NO_PLACE

# As programs write them next to numbers that are never negative.
_NEGATIVE = (-1, -99, -999, -9_999)
# Shares of the rows with a marker.
_LEAST, _MOST = 0.002, 0.95
# Fewer whole numbers are categories, one of which may be called -1.
_LEAST_AMOUNTS = 32
# The ratio of the largest and the smallest of numbers that hardly differ, as stars of a review.
_NARROW = 10
# A share of requests that is nearly all.
_MOSTLY = 0.9
# Requests whose scores were lost: so many, with so many rows each, and not most of them.
_LEAST_LOST, _LEAST_LOST_ROWS, _MOST_LOST = 5, 10, 0.5
# A share of rows that may be 0 by chance.
_STRAY = 0.001


def find_markers(sample: Sample) -> dict[str, int]:
    """Return the columns in which a number means none, each with that number."""
    facts = sample.facts
    markers = {}
    for column in map(str, facts.index[facts["is_number"] & (facts["unit"] == "")]):
        values = sample.numbers[column].dropna()
        lowest = values.min()
        others = values[values > lowest]
        is_marker = _LEAST <= (values == lowest).mean() <= _MOST and not others.empty
        if is_marker and _means_none(sample, column, lowest, others):
            markers[column] = int(lowest)
    for column in map(str, facts.index[facts["kind"] == "float"]):
        if column not in markers and _lost_whole_requests(sample, column):
            markers[column] = 0
    return markers


def _lost_whole_requests(sample: Sample, column: str) -> bool:
    """Return whether a column is 0 for all candidates of some requests, and hardly elsewhere."""
    if not varies_in_requests(sample.facts.loc[[column]]).iat[0]:
        return False
    is_zero = sample.numbers[column] == 0
    of_requests = is_zero.groupby(sample.request).agg(["mean", "size"])
    lost = of_requests.index[(of_requests["mean"] == 1) & (of_requests["size"] >= _LEAST_LOST_ROWS)]
    is_lost = sample.request.isin(lost)
    is_rare = 0 < len(lost) / len(of_requests) < _MOST_LOST
    return bool(is_rare and len(lost) >= _LEAST_LOST and is_zero[~is_lost].mean() <= _STRAY)


def _means_none(sample: Sample, column: str, lowest: float, others: pd.Series) -> bool:
    """Return whether the lowest number of a column means none, beside the others."""
    is_fraction = bool((others % 1 != 0).any())
    if lowest == 0:
        # Stars of a review, and positions from 1.
        hardly_differ = others.min() >= 1 and others.max() <= _NARROW * others.min()
        return (is_fraction and hardly_differ) or _counts_from_one(sample, column)
    if lowest not in _NEGATIVE or others.min() < 0:
        return False
    if lowest == NO_PLACE and counts_places(sample, column, sample.numbers[column] > lowest):
        return False  # a dataset takes it for none
    is_amount = others.nunique() >= _LEAST_AMOUNTS and not sample.facts["identifiers"][column]
    is_truth = set(others) <= {0, 1}
    return is_fraction or is_amount or is_truth


def _counts_from_one(sample: Sample, column: str) -> bool:
    """Return whether a column counts some rows of each request from 1, and is 0 in others."""
    numbers = sample.numbers[column]
    if not counts_places(sample, column, numbers > 0):
        return False
    repeats_zero = (numbers == 0).groupby(sample.request).sum() > 1
    starts_at_one = numbers.where(numbers > 0).groupby(sample.request).min() == 1
    return bool((repeats_zero & starts_at_one).mean() >= _MOSTLY)


def counts_places(sample: Sample, column: str, rows: pd.Series) -> bool:
    """Return whether a column counts the rows of each request from 0 or 1, as positions do."""
    if not may_count_places(sample.facts.loc[[column]]).iat[0]:
        return False
    places = sample.numbers[column][rows].groupby(sample.request[rows])
    length = places.max() - places.min() + 1
    counts_all = (places.nunique() == places.size()) & (length == places.size())
    return bool(counts_all.mean() >= _MOSTLY and (places.size() > 1).mean() >= _MOSTLY)
