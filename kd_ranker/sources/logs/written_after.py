"""Signs in the values of a column that it was written after the candidates were ranked.

A final ranker's score, the position and the stage are known only then, whatever their names. No
model may read them: they hold the answer.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

from kd_ranker.requests.request import starts_of

# Least share of the shown candidates that a final ranker's score has first in their request, from 0
# for chance to 1. Some are shown at random, some have no score, and a page weighs several scores.
ORDERS_SHOWN = 0.35
# A value is written for shown or passed candidates if others have it at most half as often.
_LEAST_KNOWN, _MOST_RATIO = 0.3, 0.5
# Fewer rows, or more values, prove nothing.
_LEAST_ROWS, _MOST_VALUES = 30, 50
# A value is that of one kind of candidates if others have it in this share of the expected rows.
_STRAY = 0.02


def share_shown_first(numbers: pd.DataFrame, request: pd.Series, shown: pd.Series) -> pd.Series:
    """Return the share of the shown candidates that a column has first in their request, by column.

    First are as many candidates as the request has shown ones: those of the largest numbers, or
    those of the smallest, whichever finds more. Missing numbers come last, and chance breaks ties.
    It is 0 for as many as a random order finds, and 1 if all are first.

    Args:
      numbers: columns of numbers, one row per candidate.
      request: the request of each.
      shown: whether each was shown; requests of which all were, or none, are left out.
    """
    codes, _ = pd.factorize(request)
    is_shown = shown.to_numpy(bool)
    sizes = np.bincount(codes)
    wanted = np.bincount(codes, weights=is_shown).astype(int)
    is_mixed = ((wanted > 0) & (wanted < sizes))[codes]
    by_chance = float((wanted / sizes)[codes[is_mixed & is_shown]].sum())
    possible = int((is_mixed & is_shown).sum()) - by_chance
    # In a random order, which stays among equal numbers.
    order = np.random.default_rng(0).permutation(len(codes))
    place = np.arange(len(codes)) - np.repeat(starts_of(sizes)[:-1], sizes)
    shares = {}
    for column in numbers:
        values = numbers[column].to_numpy(float)
        hits = []
        for keys in (values, -values):  # NaN is the last of both
            ranked = order[np.lexsort((keys[order], codes[order]))]
            is_first = place < wanted[codes[ranked]]
            hits.append(int((is_first & (is_mixed & is_shown)[ranked]).sum()))
        shares[column] = max(0.0, (max(hits) - by_chance) / possible) if possible else 0.0
    return pd.Series(shares, dtype=float)


def known_ratio(is_known: pd.Series, reached: pd.Series) -> float:
    """Return how often a value is known of other candidates, against those that reached a stage.

    It is 1 unless it is at most half as often, which points at a value that was written for them.
    """
    inside = float(is_known[reached].mean())
    outside = float(is_known[~reached].mean())
    if reached.sum() < _LEAST_ROWS or (~reached).sum() < _LEAST_ROWS:
        return 1.0
    is_written = inside >= _LEAST_KNOWN and outside <= _MOST_RATIO * inside
    return outside / inside if is_written else 1.0


class Sides(NamedTuple):
    """The rows with a value of only shown candidates, and with one of only others."""

    only_shown: pd.Series  # rows with a value that only shown candidates have
    only_others: pd.Series  # rows with a value that no shown candidate has

    def any(self) -> bool:
        """Return whether any row is on either side."""
        return bool(self.only_shown.any() or self.only_others.any())


def sides(values: pd.Series, shown: pd.Series) -> Sides:
    """Find the rows with a value that only shown candidates have, or only others.

    Args:
      values: numbers, equal for equal values, and NaN for missing ones. Of more than 50 values,
        only the missing ones are distinguished.
      shown: whether each candidate was shown.
    """
    if values.nunique() > _MOST_VALUES:
        values = values.notna().astype(float)
    codes, _ = pd.factorize(values, use_na_sentinel=False)
    rows = np.bincount(codes)
    inside = np.bincount(codes, weights=shown)
    expected = rows * float(shown.mean())
    no_others = (rows - expected >= _LEAST_ROWS) & (rows - inside <= _STRAY * (rows - expected))
    none_shown = (expected >= _LEAST_ROWS) & (inside <= _STRAY * expected)
    return Sides(
        only_shown=pd.Series(no_others[codes], values.index),
        only_others=pd.Series(none_shown[codes], values.index),
    )


def why_written_after(
    codes: pd.Series, numbers: pd.Series, request: pd.Series, shown: pd.Series, word: str = "shown"
) -> str:
    """Return the sign that a column was written after the ranking, in words; "" for none.

    Args:
      codes: a number per row, equal for equal values, NaN for missing ones.
      numbers: the values as numbers; all NaN for a column of texts.
      request: the request of each row.
      shown: whether each candidate was shown, or reached another stage.
      word: what the candidates are that reached it.
    """
    if known_ratio(codes.notna(), shown) < 1:
        share = codes.notna()[shown].mean()
        share_of_others = codes.notna()[~shown].mean()
        return (
            f"known for {share:.0%} of the {word} candidates, {share_of_others:.0%} of the others"
        )
    if sides(codes, shown).any():
        return f"one of its values separates {word} candidates from others"
    if numbers.nunique() > 2:
        share = share_shown_first(numbers.to_frame("column"), request, shown)["column"]
        if share >= ORDERS_SHOWN:
            return f"it ranks the {word} candidates first far more than chance"
    return ""


def guess_shown(codes: pd.DataFrame, positive: pd.Series) -> pd.Series:
    """Guess which candidates were shown, from columns that may have been written after the ranking.

    Where labels are known for all candidates, those not shown have none of 1: a column with a value
    at which no label is 1 separates them. Without labels, it is the column that the fewest
    candidates have, if another column depends on whether they have it.

    Args:
      codes: a number per row and column, equal for equal values, NaN for missing ones.
      positive: whether any label is 1.

    Returns:
      Whether each candidate was shown; False everywhere if no column shows it.
    """
    nobody = pd.Series(False, codes.index)
    if positive.any():
        possible = [~sides(codes[column], positive).only_others for column in codes]
        return _fewest([rows for rows in possible if not rows.all()], nobody)
    possible = []
    for column in codes:
        is_known = codes[column].notna()
        if not 0 < is_known.mean() <= _MOST_RATIO:
            continue
        others = codes.drop(columns=column)
        if any(_depends(others[other], is_known) for other in others):
            possible.append(is_known)
    return _fewest(possible, nobody)


def _fewest(possible: list[pd.Series], default: pd.Series) -> pd.Series:
    """Return the one that is True for the fewest rows."""
    return min(possible, key=lambda rows: rows.sum(), default=default)


def _depends(codes: pd.Series, shown: pd.Series) -> bool:
    return known_ratio(codes.notna(), shown) < 1 or sides(codes, shown).any()
