#!/usr/bin/env python
"""Measure how often studies like a sweep decide that the final ranker's scores save something.

    python scripts/power.py runs/cascade/sweep
    python scripts/power.py runs/cascade/sweep --difference=0.2 --studies=20000

Studies are simulated from the sweep's own curves, with a true saving of `--difference`. Each
repeat deviates from it by a normal number. The deviation is one of the ratio of costs, since what a
seed changes of a cost is in proportion to it, and it is pooled over all tested settings. The test
requests deviate by one of the sweep's draws of them, and the draws of a study are the sweep's draws
around that one. The interval is that of a report.

The columns are the share of studies with an interval above 0 (power), the share with the true
saving in their interval (coverage, and that of a saving of 0), and the median half-width.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float

from kd_ranker.reporting.estimates import Estimates
from kd_ranker.reporting.intervals import OverDraws, crossed_interval
from kd_ranker.reporting.study import Study, read_studies

REPEATS = (2, 3, 4, 5, 6, 8)


def deviation_of_repeats(study: Study, estimates: Estimates) -> float:
    """Return the standard deviation of the log ratio of costs, pooled over the tested settings."""
    students = study.tested[study.tested["role"] == "student"]
    settings = [name for name in students["setting"].unique() if name != study.baseline]
    ratios = [1 - estimates.saved_over_draws(setting).numbers[0] for setting in settings]
    return float(np.mean([np.log(of_setting).var(ddof=1) for of_setting in ratios]) ** 0.5)


def simulated(
    generator: np.random.Generator,
    shifts: Float[np.ndarray, "B R"],
    deviation: float,
    repeats: int,
    truth: float,
    requests: int,
) -> OverDraws:
    """Draw the savings of a study; `shifts` are those of a draw of requests, by real repeat."""
    columns = generator.permutation(np.resize(np.arange(shifts.shape[1]), repeats))
    drawn = shifts[:, columns]
    on_test = truth + (1 - truth) * deviation * generator.standard_normal(repeats)
    on_test += drawn[generator.integers(len(drawn))]
    return OverDraws(tuple(range(repeats)), np.vstack([on_test, on_test + drawn]), requests)


def main() -> None:
    """Simulate the studies, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("sweep", type=Path, help="the workdir of a sweep, or of a run's sweep")
    parser.add_argument("--difference", type=float, default=0.25, help="the true saving")
    parser.add_argument("--studies", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    (study,) = read_studies([flags.sweep])
    estimates = Estimates(study)
    assert study.best_with_scores, "no student of this sweep learns from the scores"
    saved = estimates.saved_over_draws(study.best_with_scores)
    deviation = deviation_of_repeats(study, estimates)
    shifts = saved.numbers[1:] - saved.numbers[0]
    of_requests = shifts.mean(axis=1).std()
    print(f"deviation of a repeat's ratio: {deviation:.3f}; of the requests: {of_requests:.3f}\n")
    generator = np.random.default_rng(flags.seed)
    rows = []
    for repeats in REPEATS:
        intervals = [
            crossed_interval(
                simulated(generator, shifts, deviation, repeats, truth, saved.requests)
            )
            for truth in [flags.difference] * flags.studies + [0.0] * flags.studies
        ]
        low, high = np.array([(found.low, found.high) for found in intervals]).T
        true, null = slice(flags.studies), slice(flags.studies, None)
        rows.append({
            "repeats": repeats,
            "power, %": 100 * np.mean(low[true] > 0),
            "coverage, %": 100 * np.mean(
                (low[true] <= flags.difference) & (flags.difference <= high[true])
            ),
            "coverage of 0, %": 100 * np.mean((low[null] <= 0) & (high[null] >= 0)),
            "half-width": np.median(high - low) / 2,
        })  # fmt: skip
    formats = ("", ".1f", ".1f", ".1f", ".3f")
    print(pd.DataFrame(rows).to_markdown(index=False, floatfmt=formats))


if __name__ == "__main__":
    main()
