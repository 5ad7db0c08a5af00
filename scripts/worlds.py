"""Train and compare methods on several draws of the data: worlds of the cascade, final rankers.

    python scripts/worlds.py --workdir=runs/worlds
    python scripts/worlds.py --workdir=runs/worlds --tastes=0,1,2 --seeds=0,1,2,3
    python scripts/worlds.py --workdir=runs/noises --config=configs/sweeps/cascade.py:worlds \\
        --tastes=1 --noises=1,2,4 --seeds=0,1,2
    python scripts/worlds.py --workdir=runs/draws --config=configs/sweeps/filmsearch.py --tastes= \\
        --config.data.path=/data/msrd

For each `data.taste`, `data.noise` and `data.seed`, run the sweep of a config with one seed. Film
search draws the splits and trains another final ranker for each `data.seed`. Then print a Markdown
table: the mean candidates to pass with the incumbent, with mode `none`, with the best list, with
the best ranker without scores of the final ranker, and with them. The last column is the paired
difference of the last two, with Student's 95% interval over the data seeds. Complete runs are kept.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from kd_ranker import api
from kd_ranker.evaluation.baselines import LISTS, NEED_SCORES
from kd_ranker.evaluation.metrics.target import CRITERION
from kd_ranker.evaluation.saving import best
from kd_ranker.main import read_config
from kd_ranker.reporting.estimates import Estimates
from kd_ranker.reporting.intervals import interval
from kd_ranker.reporting.study import read_studies

COLUMNS = ("incumbent", "mode none", "best list", "without scores", "with scores")


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--config", default="configs/sweeps/cascade.py", help="a sweep")
    parser.add_argument("--tastes", default="0,1,2", help="values of data.taste; none: as it is")
    parser.add_argument("--noises", default="", help="values of data.noise; none: as it is")
    parser.add_argument("--seeds", default="0,1,2,3", help="values of data.seed")
    flags, overrides = parser.parse_known_args()
    seeds = [int(seed) for seed in flags.seeds.split(",")]
    print(f"| data.taste | data.noise | {' | '.join(COLUMNS)} | difference |")
    print("|---" * (len(COLUMNS) + 3) + "|")
    for taste, noise in itertools.product(flags.tastes.split(","), flags.noises.split(",")):
        each = []
        for seed in seeds:
            config = read_config(flags.config, overrides)
            config.data.seed, config.sweep.seeds = seed, (0,)
            name = f"seed{seed}"
            if noise:
                config.data.noise = float(noise)
                name = f"noise{noise}-{name}"
            if taste:
                config.data.taste = float(taste)
                name = f"taste{taste}-{name}"
            each.append(_needs(config, Path(flags.workdir) / name))
        needs = np.array(each)
        gap = interval(needs[:, -1] - needs[:, -2])
        means = " | ".join(f"{number:.0f}" for number in needs.mean(axis=0))
        difference = f"{gap.mean:+.0f} ({gap.low:+.0f} to {gap.high:+.0f})"
        print(f"| {taste} | {noise} | {means} | {difference} |", flush=True)


def _needs(config: ConfigDict, workdir: Path) -> list[float]:
    """Candidates to pass for 99% of the final value, in the order of `COLUMNS`, on test."""
    made = api.run(config, workdir)
    assert made.students
    (study,) = read_studies([Path(str(made.students.workdir))])
    estimates = Estimates(study)
    lists = best(study.references, [name for name in LISTS if name not in NEED_SCORES])
    settings = (study.incumbent, study.plain, lists, study.baseline, study.best_with_scores)
    return [estimates.of(str(setting), CRITERION).mean for setting in settings]


if __name__ == "__main__":
    main()
