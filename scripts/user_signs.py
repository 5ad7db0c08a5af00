"""Hold estimates of users' change from a log against the truth, over pairs of ways.

    python scripts/user_signs.py runs/worlds/*/sweep

For each pair of rankers in each sweep of the cascade, whose truth is known, and for 100 and 200
passed: the sign of the difference in true value, if its 95% interval excludes 0, against the sign
of three estimates from labels. Print a Markdown table by coverage and kind of pair: the share of
right signs, of all pairs and of those in which the interval of the estimate excludes 0.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from kd_ranker.evaluation.references import LISTS, NO_RANKERS
from kd_ranker.report.estimates import COVERED, Estimates
from kd_ranker.report.study import read_studies

KS = (100, 200)
TRUTH = "true_value_captured@{k}"
ESTIMATES = {
    "end-to-end hit rate": "end_to_end_hit_rate@{k}/watch",
    "covered value": "covered_user_value@{k}",
    "IPS over random slots": "ips_user_value@{k}",
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("workdirs", nargs="+", type=Path, help="of sweeps of the cascade")
    pairs = pd.DataFrame(
        pair for workdir in parser.parse_args().workdirs for pair in _pairs(workdir)
    )
    pairs["coverage"] = np.where(pairs["covered"] < COVERED, f"below {COVERED}", f"from {COVERED}")
    keys = ["coverage", "kind", "estimate"]
    print(f"| {' | '.join(keys)} | pairs | right sign | interval excludes 0 | right sign there |")
    print("|---" * 7 + "|")
    for names, of in pairs.groupby(keys, sort=False):
        sure = of[of["sure"]]
        cells = (*names, len(of), _share(of), len(sure), _share(sure))
        print(f"| {' | '.join(map(str, cells))} |")


def _kind(*names: str) -> str:
    if "incumbent" in names:
        return "with the incumbent"
    return "with a list" if {*names} & {*LISTS} else "two students"


def _share(pairs: pd.DataFrame) -> str:
    return f"{100 * pairs['right'].mean():.0f}%" if len(pairs) else ""


def _pairs(workdir: Path) -> Iterator[dict[str, object]]:
    """A line per pair, number passed and estimate, of pairs whose true difference is shown."""
    (study,) = read_studies([workdir])
    estimates = Estimates(study)
    names = [name for name in estimates.settings if name not in ("teacher", *NO_RANKERS)]
    for (one, other), k in itertools.product(itertools.combinations(names, 2), KS):
        truth = estimates.gap(one, other, TRUTH.format(k=k))
        if not (truth.low > 0 or truth.high < 0):
            continue
        covered = min(estimates.of(name, f"coverage@{k}").mean for name in (one, other))
        for name, column in ESTIMATES.items():
            gap = estimates.gap(one, other, column.format(k=k))
            yield {
                "kind": _kind(one, other),
                "estimate": name,
                "covered": covered,
                "right": np.sign(gap.mean) == np.sign(truth.mean),
                "sure": gap.low > 0 or gap.high < 0,
            }


if __name__ == "__main__":
    main()
