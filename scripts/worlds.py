"""Train and compare ways in worlds of several degrees of personalisation.

    python scripts/worlds.py --workdir=runs/worlds
    python scripts/worlds.py --workdir=runs/worlds --tastes=0,1,2 --seeds=0,1,2,3

For each `data.taste` and `data.seed`, run the sweep of `configs/sweeps/cascade.py` with one seed.
Then print a Markdown table: the mean candidates to pass with the incumbent, with mode `none`, with
the best list, with the best ranker without scores of the final ranker, and with them. The last
column is the paired difference of the last two, with Student's 95% interval over the data seeds.
Complete runs are kept.
"""

import argparse
from pathlib import Path

import numpy as np

from kd_ranker import api
from kd_ranker.configs import sweeps
from kd_ranker.evaluation.references import LISTS, NEED_SCORES
from kd_ranker.evaluation.saving import CRITERION, best
from kd_ranker.report.choices import best_with_scores
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.intervals import interval
from kd_ranker.report.study import read_studies

COLUMNS = ("incumbent", "mode none", "best list", "without scores", "with scores")


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--tastes", default="0,1,2", help="values of data.taste")
    parser.add_argument("--seeds", default="0,1,2,3", help="values of data.seed")
    parser.add_argument("--data_dir", default="datasets", help="data.dir")
    flags = parser.parse_args()
    tastes, seeds = (
        [float(part) for part in text.split(",")] for text in (flags.tastes, flags.seeds)
    )
    print(f"| data.taste | {' | '.join(COLUMNS)} | difference |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for taste in tastes:
        each = np.array([_needs(flags, taste, int(seed)) for seed in seeds])
        gap = interval(each[:, -1] - each[:, -2])
        means = " | ".join(f"{number:.0f}" for number in each.mean(axis=0))
        print(
            f"| {taste:g} | {means} | {gap.mean:+.0f} ({gap.low:+.0f} to {gap.high:+.0f}) |",
            flush=True,
        )


def _needs(flags: argparse.Namespace, taste: float, seed: int) -> list[float]:
    """Candidates to pass for 99% of the final value, in the order of `COLUMNS`, on test."""
    config = sweeps.cascade()
    config.data.taste, config.data.seed, config.sweep.seeds = taste, seed, (0,)
    config.data.dir = flags.data_dir
    workdir = Path(flags.workdir) / f"taste{taste:g}-seed{seed}"
    made = api.run(config, workdir)
    (study,) = read_studies([Path(str(made.students.workdir))])
    estimates = Estimates(study)
    lists = best(study.references, [name for name in LISTS if name not in NEED_SCORES])
    settings = (study.incumbent, study.plain, lists, study.baseline, best_with_scores(study))
    return [estimates.of(str(setting), CRITERION).mean for setting in settings]


if __name__ == "__main__":
    main()
