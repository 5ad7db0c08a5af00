"""Hold estimates of users' change from a log against the truth, over pairs of rankers.

    python scripts/user_signs.py runs/worlds/*/sweep runs/noises/*/sweep

For each pair of rankers in each sweep of the cascade, whose truth is known, and for `funnel.passed`
and half of it: take the sign of the difference in true value if its 95% interval excludes 0, and
the signs of three estimates from labels. Pairs whose coverage is too low are left out. Print two
Markdown tables: of the estimates by kind of pair, and of the covered value by world. Both have the
share of right signs, the pairs in which the interval of the estimate excludes 0, how many of these
have the wrong sign, and the median ratio of estimated to true differences.

A pair of a student with scores and a ranker without them is a gain or a loss of that student, by
the estimate. The report tells only its loss, by the covered value.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kd_ranker.evaluation.baselines import LISTS, NEED_SCORES, NO_RANKERS
from kd_ranker.reporting.estimates import COVERED, Estimates
from kd_ranker.reporting.study import Study, read_studies

TRUTH = "true_value_captured@{k}"
COVERED_VALUE = "covered value"
ESTIMATES = {
    COVERED_VALUE: "covered_user_value@{k}",
    "end-to-end hit rate": "end_to_end_hit_rate@{k}/watch",
    "IPS over random slots": "ips_user_value@{k}",
}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("workdirs", nargs="+", type=Path, help="of sweeps of the cascade")
    pairs = pd.DataFrame(
        pair for workdir in parser.parse_args().workdirs for pair in _pairs(workdir)
    )
    _print_table(pairs, ["kind", "estimate"])
    print()
    covered = pairs[pairs["estimate"] == COVERED_VALUE]
    _print_table(covered, ["taste", "noise", "k", "kind"])


def _print_table(pairs: pd.DataFrame, keys: list[str]) -> None:
    head = [*keys, "pairs", "right sign", "interval excludes 0", "wrong sign there", "size"]
    print(f"| {' | '.join(head)} |")
    print("|---" * len(head) + "|")
    for names, group in pairs.groupby(keys):
        right = f"{100 * group['right'].mean():.0f}%"
        wrong = (group["sure"] & ~group["right"]).sum()
        size = f"{group['size'].median():.1f}"
        cells = (*names, len(group), right, group["sure"].sum(), wrong, size)
        print(f"| {' | '.join(map(str, cells))} |")


def _kind(one: str, other: str, students_with_scores: set[str], gain: float) -> str:
    """Name the kind of a pair; `gain` is the estimated difference of the first to the second."""
    if "incumbent" in (one, other):
        return "with the incumbent"
    with_scores = students_with_scores | {*NEED_SCORES}
    if one in students_with_scores and other not in with_scores:
        rival = "a list" if other in LISTS else "a student"
        return f"{'gain' if gain > 0 else 'loss'} by scores against {rival} without"
    return "others with a list" if {one, other} & {*LISTS} else "other students"


def _pairs(workdir: Path) -> Iterator[dict[str, Any]]:
    """A line per pair, number passed and estimate, of pairs whose true difference is shown."""
    (study,) = read_studies([workdir])
    estimates = Estimates(study)
    scores = _students_with_scores(study)
    names = [name for name in estimates.settings if name not in ("teacher", *NO_RANKERS)]
    # Students with scores come first in their pairs.
    names = sorted(names, key=lambda name: name not in scores)
    ks = (study.passed // 2, study.passed)
    for (one, other), k in itertools.product(itertools.combinations(names, 2), ks):
        truth = estimates.gap(one, other, TRUTH.format(k=k))
        coverage = min(estimates.of(name, f"coverage@{k}").mean for name in (one, other))
        if not (truth.low > 0 or truth.high < 0) or coverage < COVERED:
            continue
        for name, column in ESTIMATES.items():
            gap = estimates.gap(one, other, column.format(k=k))
            yield {
                "taste": study.config.data.taste,
                # Earlier sweeps have no such key.
                "noise": study.config.data.get("noise", 1.0),
                "k": k,
                "kind": _kind(one, other, scores, gap.mean),
                "estimate": name,
                "right": np.sign(gap.mean) == np.sign(truth.mean),
                "sure": gap.low > 0 or gap.high < 0,
                "size": gap.mean / truth.mean,
            }


def _students_with_scores(study: Study) -> set[str]:
    return {*study.tested.loc[study.tested["needs_scores"], "setting"]}


if __name__ == "__main__":
    main()
