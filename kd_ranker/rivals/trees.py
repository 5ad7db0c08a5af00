"""LambdaMART (Burges 2010) of LightGBM, on the numbers that an early ranker may read.

Trees read the dense features that students read, and rates of the items in earlier requests. They
learn from the last training requests; the rates are those of the requests before, so that no rate
contains the label that it helps to predict.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from kd_ranker.batch import Stage
from kd_ranker.errors import UserError
from kd_ranker.requests.records import Dataset
from kd_ranker.rivals.candidates import (
    Candidates,
    in_parts,
    item_rates,
    last_requests,
    places_by,
)

Target = Literal["labels", "stages", "scores"]
"""What trees learn: user labels, how far a candidate came, or the final ranker's order."""

# The most training candidates to read, and of a request the most of each stage to learn from, at
# random. Shown ones that a user wanted are always learned from.
_MOST_CANDIDATES = 3_000_000
_MOST_OF_STAGE = {Stage.SHOWN: 100, Stage.PASSED: 30, Stage.RETRIEVED: 30}
# The most candidates of a request without a label to learn from as unwanted.
_UNLABELED = 30
# More trees, or larger ones, did no better in the cascade and in film search, and take longer.
_NUM_TREES = 50
# LightGBM takes grades below this number.
_MOST_GRADES = 31
_PARAMETERS = {
    "objective": "lambdarank",
    "num_leaves": 15,
    "max_bin": 63,
    "learning_rate": 0.1,
    "min_data_in_leaf": 50,
    "deterministic": True,
    "force_row_wise": True,
    "seed": 0,
    "verbose": -1,
}


class TreeData(NamedTuple):
    """The sampled candidates of some training requests, to fit trees to."""

    numbers: Float32[np.ndarray, "n F"]  # the last one needs the final ranker's scores
    sizes: Int[np.ndarray, "requests"]
    stage: Int[np.ndarray, "n"]
    user_value: Float[np.ndarray, "n"]
    final_place: Float[np.ndarray, "n"]  # by the final ranker, in the whole request; NaN: no score
    draw: Float[np.ndarray, "n"]  # uniform, of each candidate; those of a stage with the largest


class Trees(NamedTuple):
    """A fitted model, which reads as many of a candidate's first numbers as it has features."""

    model: Any  # a `lightgbm.Booster`
    rates: Float32[np.ndarray, "items C"]

    def score(self, candidates: Candidates) -> Float[np.ndarray, "n"]:
        """Return the sum of the leaves that a candidate reaches."""
        numbers = candidates.numbers(self.rates)[:, : self.model.num_feature()]
        return np.asarray(self.model.predict(numbers))

    @property
    def operations(self) -> float:
        """The comparisons and additions of a candidate, by the training candidates' paths."""
        nodes = self.model.trees_to_dataframe()
        # A tree without a split has no counts, and takes nothing.
        has_split = nodes.groupby("tree_index")["node_index"].transform("size") > 1
        leaves = nodes[nodes["left_child"].isna() & has_split]
        on_paths = (leaves["node_depth"] * leaves["count"]).groupby(leaves["tree_index"]).sum()
        return float((on_paths / leaves.groupby("tree_index")["count"].sum()).sum())


def lightgbm() -> Any:
    """Import LightGBM; UserError if it is not installed, or a library that it needs."""
    try:
        import lightgbm as module
    except (ImportError, OSError) as error:
        raise UserError(
            f"the rival 'trees' needs LightGBM, which cannot be imported ({error}); install it "
            "with: pip install lightgbm; or leave 'trees' out of sweep.rivals"
        ) from error
    return module


def tree_data(
    dataset: Dataset, value_weights: Sequence[float], scored: Stage, shown: int
) -> tuple[TreeData, Float32[np.ndarray, "items C"]]:
    """Sample candidates of the last training requests; return them, and the rates of the items.

    The final ranker's scores count for candidates that reached the stage `scored`. The rate of an
    item at the top is that among the first `shown`.
    """
    columns = dataset.columns["train"]
    learning = last_requests(columns, _MOST_CANDIDATES)
    rates = item_rates(dataset, slice(0, learning.start), value_weights, scored, shown)
    generator = np.random.default_rng(0)
    parts = []
    for candidates in in_parts(dataset, "train", learning):
        draw = generator.random(len(candidates))
        user_value = candidates.user_value(value_weights)
        chosen = _sample(candidates, user_value > 0, draw)
        final_value = candidates.final_value(value_weights, scored)
        final_place = places_by(final_value, candidates.sizes).astype(float)
        final_place[np.isnan(final_value)] = np.nan
        parts.append(
            TreeData(
                numbers=candidates.numbers_of(rates, chosen),
                sizes=np.bincount(candidates.request[chosen], minlength=len(candidates.sizes)),
                stage=candidates.stage[chosen],
                user_value=user_value[chosen],
                final_place=final_place[chosen],
                draw=draw[chosen],
            )
        )
    columns_of_parts = zip(*parts, strict=True)
    return TreeData(*(np.concatenate(column) for column in columns_of_parts)), rates


def _sample(
    candidates: Candidates, is_wanted: Bool[np.ndarray, "n"], draw: Float[np.ndarray, "n"]
) -> Bool[np.ndarray, "n"]:
    """Choose the candidates that a user wanted, and some others of each stage at random."""
    chosen = is_wanted.copy()
    for stage, most in _MOST_OF_STAGE.items():
        is_other = (candidates.stage == stage) & ~is_wanted
        drawn = np.where(is_other, draw, np.nan)
        chosen |= is_other & (places_by(drawn, candidates.sizes) < most)
    return chosen


def fit(
    data: TreeData,
    target: Target,
    rates: Float32[np.ndarray, "items C"],
    shown: int,
    with_rates: bool,
) -> Trees:
    """Fit trees to a target, with the rates of the items or without.

    Rates help where tomorrow's requests want the items of today's. Without the last of them, trees
    on labels and on stages need no scores.
    """
    # The rates are the last numbers.
    if not with_rates:
        left_out = rates.shape[1]
    elif target == "scores":
        left_out = 0
    else:
        left_out = 1
    numbers = data.numbers[:, : data.numbers.shape[1] - left_out]
    grade, gains = _grades(data, target, shown)
    is_learned = np.full(len(grade), True)
    if target == "labels":
        is_labeled = ~np.isnan(data.user_value)
        draw_of_unlabeled = np.where(is_labeled, np.nan, data.draw)
        is_learned = is_labeled | (places_by(draw_of_unlabeled, data.sizes) < _UNLABELED)
    request = np.repeat(np.arange(len(data.sizes)), data.sizes)
    sizes = np.bincount(request[is_learned], minlength=len(data.sizes))
    module = lightgbm()
    learned = module.Dataset(numbers[is_learned], grade[is_learned], group=sizes[sizes > 0])
    model = module.train({**_PARAMETERS, "label_gain": gains}, learned, _NUM_TREES)
    return Trees(model, rates)


def _grades(data: TreeData, target: Target, shown: int) -> tuple[Int[np.ndarray, "n"], list[float]]:
    """Return the grade of each candidate, from 0, and the gain of each grade."""
    if target == "stages":
        return data.stage - int(Stage.RETRIEVED), [0.0, 1.0, 3.0]
    if target == "scores":
        half = -(-shown // 2)
        # One grade more for each of these that the place is below; NaN is below none.
        ends = [5 * shown, 2 * shown, shown, half]
        grade = np.sum([data.final_place < end for end in ends], axis=0)
        return grade, [0.0, 1.0, 3.0, 7.0, 15.0]
    value = np.nan_to_num(data.user_value)
    levels = np.unique(value)
    if len(levels) > _MOST_GRADES:
        levels = np.unique(np.quantile(value[value > 0], np.linspace(0, 1, _MOST_GRADES - 1)))
        levels = np.concatenate([[0.0], levels])
    return np.searchsorted(levels, value, side="right") - 1, levels.tolist()
