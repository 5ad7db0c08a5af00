"""Show whom the labels of a log favor, with rankers that are drawn and not trained.

    python scripts/label_bias.py
    python scripts/label_bias.py --noises=1,2,4 --seeds=10,11 --requests=1000

The worlds are those of `configs/sweeps/cascade.py:worlds`, one for each `data.noise` and
`data.seed`. A ranker orders candidates by their value at these logits: the true ones, plus a share
of the errors of the final ranker, plus a share of the incumbent's standardized score, plus noise of
the item and of the candidate. A ranker with a larger share of the errors agrees more with the final
ranker than one with a smaller share, as a student that learns from scores does.

For each pair of rankers with different shares of the errors, and for `funnel.passed` and half of
it, take the difference in true value if its 95% interval over requests excludes 0, and that of each
estimate from labels, for the ranker that agrees more. Print a Markdown table by world and estimate:
pairs, gains and losses by the estimate whose interval excludes 0, and how many of these have the
wrong sign. No log has the last estimate, the truth of the candidates that it passed. It shows what
no estimate from labels of these candidates can know.
"""

import argparse
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.stats
from jaxtyping import Float, Int
from ml_collections import ConfigDict
from scipy.special import expit, logit

from kd_ranker.configs import sweeps
from kd_ranker.reporting.estimates import DRAWS
from kd_ranker.reporting.intervals import OverDraws, crossed_interval, request_counts
from kd_ranker.requests.request import Request
from kd_ranker.sources import cascade


class Ranker(NamedTuple):
    """What is added to the true logits."""

    errors: float  # share of the errors of the final ranker
    incumbent: float  # share of the standardized score of the incumbent
    noise: float  # deviation of an item's noise, and of a candidate's


# The numbers passed, as shares of `funnel.passed`.
PASSED = (0.5, 1.0)
RANKERS = [
    Ranker(errors, incumbent, noise)
    for errors, incumbent, noise in itertools.product((0.0, 0.5, 1.0), (0.0, 1.0), (0.5, 1.0, 1.5))
]


class Values(NamedTuple):
    """Summed values of the items that the funnels of a ranker show, by number passed.

    The last of the K numbers passed is all of them.
    """

    true: Float[np.ndarray, "N K"]  # by the truth, of all retrieved
    covered: Float[np.ndarray, "N K"]  # by the labels, of the candidates that the log passed
    ips: Float[np.ndarray, "N K"]  # the same, each label over its propensity
    covered_truth: Float[np.ndarray, "N K"]  # the same funnel, by the truth


ESTIMATES = ("covered", "ips", "covered_truth")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--noises", default="1,2,4", help="values of data.noise")
    parser.add_argument("--seeds", default="0,1", help="values of data.seed")
    parser.add_argument("--requests", type=int, default=1000, help="test requests of a world")
    flags = parser.parse_args()
    seeds = [int(seed) for seed in flags.seeds.split(",")]
    print("| data.noise | estimate | pairs | gains | wrong | losses | wrong |")
    print("|---" * 7 + "|")
    for noise in map(float, flags.noises.split(",")):
        pairs = pd.concat([_pairs(noise, seed, flags.requests) for seed in seeds])
        for estimate in ESTIMATES:
            gains = pairs[pairs[estimate] > 0]
            losses = pairs[pairs[estimate] < 0]
            wrong_gains = (gains["true"] < 0).sum()
            wrong_losses = (losses["true"] > 0).sum()
            print(
                f"| {noise} | {estimate} | {len(pairs)} | {len(gains)} | {wrong_gains} | "
                f"{len(losses)} | {wrong_losses} |",
                flush=True,
            )


def _pairs(noise: float, seed: int, number: int) -> pd.DataFrame:
    """The signs of true and estimated differences of pairs whose true one is sure.

    They are for the ranker that agrees more; 0 if the interval includes 0.
    """
    config = sweeps.cascade("worlds")
    config.data.update(noise=noise, seed=seed, test_requests=number)
    source = cascade.open_source(config.data, cascade.TASKS, config.funnel)
    requests = list(source.requests("test"))
    rng = np.random.default_rng(seed)
    values = [_values(requests, ranker, config, rng) for ranker in RANKERS]
    counts = request_counts(number, DRAWS)
    signs = []
    # Rankers are in the order of their shares of the errors.
    for less, more in itertools.combinations(range(len(RANKERS)), 2):
        if RANKERS[less].errors == RANKERS[more].errors:
            continue
        for k in range(len(PASSED)):
            pair_signs = {"true": _sign(values[more].true, values[less].true, k, counts)}
            if not pair_signs["true"]:
                continue
            for name in ESTIMATES:
                first = getattr(values[more], name)
                second = getattr(values[less], name)
                pair_signs[name] = _sign(first, second, k, counts)
            signs.append(pair_signs)
    return pd.DataFrame(signs, columns=Values._fields)


def _values(
    requests: Sequence[Request], ranker: Ranker, config: ConfigDict, rng: np.random.Generator
) -> Values:
    """Return the values of one ranker, with noise of its own."""
    funnel = config.funnel
    ks = [*(round(share * funnel.passed) for share in PASSED), funnel.retrieved]
    item_noise = rng.standard_normal((config.data.num_items, len(cascade.TASKS)))
    shape = (len(requests), len(ks))
    values = Values(np.zeros(shape), np.zeros(shape), np.zeros(shape), np.zeros(shape))
    for place, request in enumerate(requests):
        assert request.incumbent is not None
        assert request.propensity is not None
        logits = logit(request.true_probability)
        teacher_logits = logit(request.teacher_probability)
        candidate_noise = rng.standard_normal(logits.shape)
        incumbent = scipy.stats.zscore(request.incumbent)[:, None]
        score = logits + ranker.errors * (teacher_logits - logits) + ranker.incumbent * incumbent
        score += ranker.noise * (item_noise[request.item_id] + candidate_noise)
        value = expit(score) @ cascade.PRODUCTION_VALUE_WEIGHTS
        teacher_value = request.teacher_probability @ cascade.PRODUCTION_VALUE_WEIGHTS
        true_value = request.true_probability @ cascade.PRODUCTION_VALUE_WEIGHTS
        # Only shown candidates, which come first, have labels.
        user_value = np.zeros(len(value))
        user_value[: funnel.shown] = request.user_label @ cascade.PRODUCTION_VALUE_WEIGHTS
        for column, k in enumerate(ks):
            shown = _shown(value, teacher_value, k, funnel.shown)
            values.true[place, column] = true_value[shown].sum()
            part = funnel.passed / funnel.retrieved
            slots = part * funnel.shown
            shown = _shown(
                value[: funnel.passed],
                teacher_value[: funnel.passed],
                math.ceil(part * k),
                math.ceil(slots),
            )
            # The last slot counts for the fraction that is left.
            weight = np.clip(slots - np.arange(len(shown)), 0, 1)
            values.covered[place, column] = weight @ user_value[shown]
            by_propensity = user_value[shown] / request.propensity[shown]
            values.ips[place, column] = weight @ np.nan_to_num(by_propensity)
            values.covered_truth[place, column] = weight @ true_value[shown]
    return values


def _shown(
    value: Float[np.ndarray, "n"], teacher_value: Float[np.ndarray, "n"], k: int, shown: int
) -> Int[np.ndarray, "shown"]:
    """The places that the teacher shows of a ranker's first k."""
    passed = np.argpartition(-value, k - 1)[:k]
    return passed[np.argsort(-teacher_value[passed])[:shown]]


def _sign(
    one: Float[np.ndarray, "N K"],
    other: Float[np.ndarray, "N K"],
    k: int,
    counts: Int[np.ndarray, "1+B N"],
) -> int:
    """Return the sign of the difference in the share of the value, 0 if its interval has 0."""
    first = counts @ one
    second = counts @ other
    change = first[:, k] / first[:, -1] - second[:, k] / second[:, -1]
    gap = crossed_interval(OverDraws((0,), change[:, None], counts.shape[1]))
    return int(gap.low > 0) - int(gap.high < 0)


if __name__ == "__main__":
    main()
