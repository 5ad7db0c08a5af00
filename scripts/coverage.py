#!/usr/bin/env python
"""Measures how often the report's 95% intervals contain the truth.

    python scripts/coverage.py
    python scripts/coverage.py --studies=4000 --requests=500

In each simulated study, two students pass candidates to a final ranker. A request's captured value
rises with the passed k like 1 − exp(−k / depth). The logarithm of the depth varies among repeats,
among requests, and among pairs of both. The truth is an integral over all of these.
"""

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from kd_ranker.evaluation.metrics.metric import passed_for
from kd_ranker.reporting.estimates import DRAWS
from kd_ranker.reporting.intervals import (
    OverDraws,
    combined,
    crossed_interval,
    request_counts,
)

KS = np.array([50, 60, 75, 90, 110, 135, 165, 200, 250, 320, 420, 2000])
EVERY_K = np.arange(1, KS[-1] + 1)
# A curve at `KS` times this matrix is the curve at every k, interpolated.
AT_EVERY_K = np.stack([np.interp(EVERY_K, KS, unit) for unit in np.eye(len(KS))])
DEPTHS = np.array([30.0, 24.0])  # of the baseline and of the distilled student
REPEATS = (1, 2, 3, 5)
# Deviation of log depth among requests: of both students alike, of one in all repeats, and of one
# in one repeat. Equal parts are near those of the cascade.
AMONG_REQUESTS = 0.25
# The same among repeats. In the cascade they have 60 to 90% of the variance of most means of three.
SPREADS = {"none": 0.0, "small": 0.01, "cascade": 0.03, "dominating": 0.1}
SHAPES = {"normal": stats.norm(), "skewed": stats.expon(-1)}  # both with mean 0 and deviation 1


class Measure(NamedTuple):
    """A function of a curve's number for each student: `value_captured` or `passed_for_99`."""

    number: int
    function: Any


MEASURES = {
    "mean": Measure(0, lambda before, after: after),
    "difference": Measure(0, lambda before, after: after - before),
    "passed_for_99": Measure(1, lambda before, after: after),
    # All retrieved cost as much for a student as 100 candidates for the final ranker.
    "saving": Measure(1, lambda before, after: 1 - (100 + after) / (100 + before)),
}


def numbers(sums: Float[np.ndarray, "*shape 2 K"]) -> Float[np.ndarray, "*shape 2 2"]:
    """The value captured at the second k, and `passed_for_99`, of each student."""
    share = sums / sums[..., -1:]
    needed = passed_for(np.moveaxis(share @ AT_EVERY_K, -1, 0), 0.99)
    return np.stack([share[..., 1], needed], axis=-1)


def captured(log_depth: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape K"]:
    """The captured share at each k."""
    return 1 - np.exp(-KS / np.exp(log_depth)[..., None])


def study(
    generator: np.random.Generator, spread: float, shape: Any, requests: int
) -> Float[np.ndarray, "R N 2 K"]:
    """What each request adds to the curves of both students."""
    repeats = max(REPEATS)
    log_depth = (
        np.log(DEPTHS)
        + spread * shape.rvs((repeats, 1, 2), random_state=generator)
        + AMONG_REQUESTS * generator.standard_normal((requests, 1))
        + AMONG_REQUESTS * generator.standard_normal((requests, 2))
        + AMONG_REQUESTS * generator.standard_normal((repeats, requests, 2))
    )
    value = generator.gamma(2, 0.5, (requests, 1, 1))
    return value * captured(log_depth)


def quantiles(shape: Any, count: int) -> Float[np.ndarray, "count"]:
    """Evenly spaced quantiles of a distribution, for integrals over it."""
    return shape.ppf((np.arange(count) + 0.5) / count)


def truths(spread: float, shape: Any) -> dict[str, float]:
    """Each measure, expected over repeats, with infinitely many requests."""
    of_repeats = np.log(DEPTHS) + spread * quantiles(shape, 300)[:, None]
    of_requests = np.sqrt(3) * AMONG_REQUESTS * quantiles(SHAPES["normal"], 1000)
    curves = np.mean([captured(of_repeats + effect) for effect in of_requests], axis=0)
    before, after = np.moveaxis(numbers(curves), 1, 0)
    return {
        name: float(
            measure.function(before[:, None, measure.number], after[:, measure.number]).mean()
        )
        for name, measure in MEASURES.items()
    }


def coverage(
    spread: float, shape: Any, studies: int, requests: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Per measure and number of repeats, the share of intervals that contain the truth."""
    generator = np.random.default_rng(seed)
    counts = request_counts(requests, DRAWS)
    truth = truths(spread, shape)
    holds = {(name, repeats): 0 for name in MEASURES for repeats in REPEATS}
    for _ in range(studies):
        terms = study(generator, spread, shape, requests)
        drawn = numbers(np.tensordot(counts, terms, (1, 1)))
        for name, repeats in holds:
            number, function = MEASURES[name]
            pair = (
                OverDraws(
                    tuple(range(repeats)),
                    drawn[:, :repeats, student, number],
                    requests,
                )
                for student in (0, 1)
            )
            interval = crossed_interval(combined(function, *pair))
            holds[name, repeats] += interval.low <= truth[name] <= interval.high
    for (name, repeats), count in holds.items():
        yield {"measure": name, "repeats": repeats, "coverage": 100 * count / studies}


def main() -> None:
    """Simulate the studies, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    rows = [
        {"variance of repeats": spread, "effects": shape} | row
        for spread in SPREADS
        for shape in SHAPES
        for row in coverage(SPREADS[spread], SHAPES[shape], **vars(flags))
    ]
    table = pd.DataFrame(rows).pivot(
        index=["variance of repeats", "effects", "repeats"], columns="measure", values="coverage"
    )
    print(table.reset_index().to_markdown(index=False, floatfmt=".1f"))


if __name__ == "__main__":
    main()
