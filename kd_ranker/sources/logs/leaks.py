"""Features that nearly determine a label, and may be known only after a request."""

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
import scipy.stats
from jaxtyping import Int

from kd_ranker.batch import Stage
from kd_ranker.sources.logs.database import Database
from kd_ranker.sources.logs.layout import OWNERS, LogLayout

SHOWN = "shown"
# Largest shares of the uncertainty of being shown, and of a label, that a feature may remove. The
# score of the current ranker is known before the request, and removes much of the first.
REVEALS_SHOWN, REVEALS_LABEL = 0.9, 0.5
# Least rank correlation of a copy of a teacher's score. Scores of earlier stages agree less.
_COPIES_TEACHER = 0.95
_BINS, _FEW_VALUES = 20, 50
_LEAST_ANSWERS = 30
_LEVEL = 1e-3


def find_leaks(database: Database, layout: LogLayout) -> dict[str, dict[str, float]]:
    """Find features that reveal a label, what was shown, or a teacher's order of candidates.

    Args:
      database: holds `sampled`, some 100,000 candidates of whole requests.
      layout: of the log.

    Returns:
      Feature -> label, or "shown" -> the share of its uncertainty removed, where that is too much;
      or teacher -> the rank correlation with its score.
    """
    features = [of for of in layout.of(*OWNERS) if of.kind in ("dense", "category")]
    features = [of for of in features if of.place is None]
    if not features:
        return {}
    rows = database.fetch("SELECT * FROM sampled").to_pandas()
    values = rows[[f"feature:{of.name}" for of in features]]
    values.columns = [of.name for of in features]
    answers = {SHOWN: (rows["stage"] == Stage.SHOWN).astype(float)}
    answers |= {f"label of {of}": rows[f"label:{of}"].astype(float) for of in layout.tasks}
    teachers = {f"teacher of {of}": rows[f"teacher:{of}"] for of in layout.scored_tasks}
    numbers = values[[of.name for of in features if of.kind == "dense"]].astype(float)
    found = copies_of_teachers(numbers, rows["number"], teachers)
    for feature in features:
        bins = bins_of(values[feature.name])
        for name, answer in answers.items():
            share = share_revealed(bins, answer)
            if share >= (REVEALS_SHOWN if name == SHOWN else REVEALS_LABEL):
                found.setdefault(feature.name, {})[name] = share
    return found


def bins_of(values: pd.Series) -> Int[np.ndarray, "n"]:
    """The bin of each value: 20 of about as many numbers, or one per value if these are few.

    Missing values have a bin, which texts of more than 50 values share: their information cannot be
    distinguished from chance.
    """
    codes, distinct = pd.factorize(values, sort=True)
    if len(distinct) <= _FEW_VALUES:
        return codes
    if not pd.api.types.is_numeric_dtype(values):
        return np.full(len(codes), -1)
    number = np.bincount(codes[codes >= 0])
    middle = np.cumsum(number) - number / 2
    places = np.floor(_BINS * middle / number.sum()).astype(int)
    return np.append(places, -1)[codes]


def share_revealed(bins: Int[np.ndarray, "n"], answer: pd.Series) -> float:
    """The share of the uncertainty of an answer that bins remove: I(bin; answer) / H(answer).

    I is the estimate from counts, less its bias of about (bins − 1) / 2n (Miller, 1955). 0 where a
    G-test at the level of 0.001 does not distinguish it from chance, and with fewer than 30 answers
    of one kind.

    Args:
      bins: the bin of each row, from -1.
      answer: 1, 0, or NaN for none.

    >>> bins = np.repeat([0, 1], 100)
    >>> round(share_revealed(bins, pd.Series(bins, dtype=float)), 2)
    1.0
    >>> share_revealed(bins, pd.Series(np.tile([0.0, 1.0], 100)))
    0.0
    """
    known = answer.notna().to_numpy()
    cells = 2 * (bins[known] + 1) + (answer[known] == 1)
    counts = np.bincount(cells, minlength=2 * (bins.max(initial=-1) + 2)).reshape(-1, 2)
    counts = counts[counts.any(axis=1)]
    if len(counts) < 2 or counts.sum(axis=0).min() < _LEAST_ANSWERS:
        return 0.0
    test = scipy.stats.chi2_contingency(counts, correction=False, lambda_="log-likelihood")
    if test.pvalue > _LEVEL:
        return 0.0
    information = max(test.statistic - test.dof, 0.0) / 2 / counts.sum()
    return float(information / scipy.stats.entropy(counts.sum(axis=0)))


def copies_of_teachers(
    numbers: pd.DataFrame, request: pd.Series, teachers: Mapping[str, pd.Series]
) -> dict[str, dict[str, float]]:
    """Column -> teacher with the same order of scores -> Spearman's correlation within requests.

    Args:
      numbers: columns of numbers, one row per candidate.
      request: the request of each.
      teachers: name -> scores; NaN where a candidate was not scored.
    """
    copies: dict[str, dict[str, float]] = {}
    for teacher, score in teachers.items():
        by = request[score.notna()]
        ranks = numbers.loc[by.index].groupby(by).rank()
        ranks -= ranks.groupby(by).transform("mean")
        own = score.loc[by.index].groupby(by).rank()
        own -= own.groupby(by).transform("mean")
        enough = ranks.columns[ranks.notna().sum() >= _LEAST_ANSWERS]
        found = ranks[enough].corrwith(own).abs()
        for column, correlation in found[found >= _COPIES_TEACHER].items():
            copies.setdefault(str(column), {})[teacher] = float(correlation)
    return copies


def remarks_of(shares: Mapping[str, float], feature: str) -> Iterator[str]:
    """Yield one sentence per answer that a feature reveals."""
    for name, share in shares.items():
        what = f"reveals {share:.0%} of the uncertainty of the {name}"
        if name == SHOWN:
            what = f"reveals {share:.0%} of which candidates were shown"
        elif name.startswith("teacher"):
            what = f"orders candidates like the {name} (rank correlation {share:.2f})"
        yield f"Feature {feature!r} {what}: is it known before they are ranked?"
