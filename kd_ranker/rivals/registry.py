"""The kinds of rivals, with the datasets that they apply to, and how to fit them."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Float32

from kd_ranker.batch import Stage
from kd_ranker.errors import UserError
from kd_ranker.requests.records import Dataset
from kd_ranker.requests.request import starts_of
from kd_ranker.rivals import ease, fusion, trees
from kd_ranker.rivals.candidates import Candidates, in_parts


class Scorer(Protocol):
    """An order of candidates by a number, the largest first; NaN is last."""

    def score(self, candidates: Candidates) -> Float[np.ndarray, "n"]:
        """Return the number of each candidate."""
        ...


class Rival(NamedTuple):
    """A fitted ranker, with one of the settings that validation chooses from."""

    family: str  # validation keeps one rival of each
    setting: str  # in words; "" if there is nothing to choose
    scorer: Scorer
    needs_scores: bool = False  # whether its training needs the final ranker's scores
    operations: float = 0.0  # of a candidate, as FLOPs are counted

    @property
    def name(self) -> str:
        """The name in results: the family and the setting."""
        return f"{self.family}: {self.setting}" if self.setting else self.family


class Task(NamedTuple):
    """The dataset and the funnel that rivals are fitted to."""

    dataset: Dataset
    value_weights: Sequence[float]
    shown: int  # items that the final ranker shows
    scored: Stage | None  # which training candidates have logged scores; None: no scores are logged


def family_of(name: str) -> str:
    """Return the family of a rival's name.

    >>> family_of("rank fusion: k0 60")
    'rank fusion'
    """
    return name.partition(": ")[0]


def _fusion(task: Task) -> list[Rival]:
    names = task.dataset.spec.early_scores
    rivals = [
        Rival(f"score {name}", "", fusion.OneScore(index)) for index, name in enumerate(names)
    ]
    rivals += [
        Rival("rank fusion", f"k0 {constant}", fusion.RankFusion(constant), operations=len(names))
        for constant in fusion.RANK_CONSTANTS
    ]
    deviations = _deviations(task.dataset)
    # Of two scores, only the weight of the second one varies.
    first = 1 if len(names) == 2 else 0
    for index in range(first, len(names)):
        for weight in fusion.WEIGHTS:
            if weight == 1 and index < len(names) - 1:
                continue  # the same sum for each index
            weights = np.ones(len(names))
            weights[index] = weight
            setting = " + ".join(
                f"{number:g} {name}" for number, name in zip(weights, names, strict=True)
            )
            scorer = fusion.ScoreSum(tuple((weights / deviations).tolist()))
            rivals.append(Rival("score sum", setting, scorer, operations=2 * len(names)))
    return rivals


def _deviations(dataset: Dataset) -> Float[np.ndarray, "S"]:
    """Return the standard deviation of each early score on validation, 0 if none is known."""
    scores = np.concatenate([part.early_scores for part in in_parts(dataset, "validation")])
    deviations = [np.std(column[~np.isnan(column)].astype(float)) for column in scores.T]
    return np.nan_to_num(deviations)


def _trees(task: Task) -> list[Rival]:
    data, rates = trees.tree_data(
        task.dataset, task.value_weights, task.scored or Stage.SHOWN, task.shown
    )
    targets: list[trees.Target] = ["labels"]
    counts = task.dataset.columns["train"].counts
    if (counts.retrieved > counts.shown).any():
        targets.append("stages")
    if task.scored is not None and not np.isnan(data.final_place).all():
        targets.append("scores")
    rivals = []
    for target in targets:
        for with_rates in (True, False):
            fitted = trees.fit(data, target, rates, task.shown, with_rates)
            rivals.append(
                Rival(
                    f"trees on {target}",
                    "with item rates" if with_rates else "without item rates",
                    fitted,
                    needs_scores=target == "scores",
                    operations=fitted.operations,
                )
            )
    return rivals


def _ease(task: Task) -> list[Rival]:
    taken = ease.taken_items(task.dataset)
    rivals = []
    for regularization in ease.REGULARIZATIONS:
        fitted = ease.fit(taken, regularization)
        setting = f"regularization {regularization:g}"
        rivals.append(Rival("EASE", setting, fitted, operations=fitted.operations))
    return rivals


def _why_no_fusion(dataset: Dataset) -> str:
    names = dataset.spec.early_scores
    if len(names) < 2:
        return f"it fuses at least two scores, and data.columns.early_scores names {len(names)}"
    for name, deviation in zip(names, _deviations(dataset), strict=True):
        if not deviation > 0:
            return (
                f"data.columns.early_scores names {name!r}, which is the same for all validation "
                "candidates, or missing"
            )
    return ""


def _why_no_trees(dataset: Dataset) -> str:
    del dataset
    trees.lightgbm()
    return ""


def _why_no_ease(dataset: Dataset) -> str:
    if not dataset.spec.history_length:
        return "requests have no history"
    if dataset.spec.num_items > ease.MOST_ITEMS:
        return (
            f"it inverts a matrix of items by items, and takes at most {ease.MOST_ITEMS:,} items; "
            f"there are {dataset.spec.num_items:,}"
        )
    return ""


class Kind(NamedTuple):
    """An entry of `sweep.rivals`."""

    why_not: Callable[[Dataset], str]  # the reason why it does not apply to a dataset, or ""
    fit: Callable[[Task], list[Rival]]


RIVALS: dict[str, Kind] = {
    "fusion": Kind(_why_no_fusion, _fusion),
    "trees": Kind(_why_no_trees, _trees),
    "ease": Kind(_why_no_ease, _ease),
}
"""By the name in `sweep.rivals`. A program may add its own before it starts a sweep."""


def check(dataset: Dataset, names: Sequence[str]) -> None:
    """Raise UserError for a rival that does not apply to a dataset."""
    for name in names:
        if reason := RIVALS[name].why_not(dataset):
            raise UserError(
                f"sweep.rivals has {name!r}, which does not apply: {reason}; change that, or leave "
                f"{name!r} out"
            )


def fit(task: Task, names: Sequence[str]) -> list[Rival]:
    """Fit the named rivals with each of their settings."""
    return [rival for name in names for rival in RIVALS[name].fit(task)]


def order_keys(
    rivals: Sequence[Rival], dataset: Dataset, split: str
) -> Float32[np.ndarray, "sum rivals"]:
    """Return a number in [0, 1) per candidate of a split and rival, in the order of its scores.

    It is the share of the request's candidates that have a lower score: float32 keeps their order,
    whatever the scores. The least is that of a missing score.
    """
    sizes = dataset.columns[split].counts.retrieved
    keys = np.empty((sizes.sum(), len(rivals)), np.float32)
    start = 0
    for candidates in in_parts(dataset, split):
        stop = start + len(candidates)
        for index, rival in enumerate(rivals):
            keys[start:stop, index] = _share_below(rival.scorer.score(candidates), candidates)
        start = stop
    return keys


def _share_below(scores: Float[np.ndarray, "n"], candidates: Candidates) -> Float[np.ndarray, "n"]:
    """Return the share of its request's candidates with a lower score than each candidate."""
    known = np.where(np.isnan(scores), -np.inf, scores)
    share = np.empty(len(known))
    for start, stop in itertools.pairwise(starts_of(candidates.sizes)):
        of_request = known[start:stop]
        share[start:stop] = np.searchsorted(np.sort(of_request), of_request) / (stop - start)
    return share
