"""Map in which worlds the final ranker's scores are worth it.

    python scripts/score_map.py --workdir=runs/map
    python scripts/score_map.py --workdir=runs/map --worlds=unseen

The worlds are small cascades. One thing differs from the center at a time: how much cheap features
express of the final ranker's order (`data.hint`), how much users differ (`data.taste`), and how
many labels there are (`data.train_requests`). The corners differ in two things. The unseen worlds
are drawn at random.

In each world and for each data seed, students of all ways and trees are tuned on validation. The
table has, as means over the data seeds with 95% intervals of Student's t: `kept`, the share of the
final ranker's own top that is passed by trees on cheap features that learned its order; the
candidates to pass for 99% of its value, by the best ranker without its scores and by the best with
them; and the share that the scores save, of all rankers, of students, and of trees.

Sweeps that are complete are kept, so several processes may share the work by `--seeds`.
"""

import argparse
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from kd_ranker import api
from kd_ranker.evaluation import results
from kd_ranker.evaluation.references import NO_RANKERS
from kd_ranker.evaluation.saving import CRITERION, needs_scores
from kd_ranker.main import read_config
from kd_ranker.report.intervals import Interval, interval

CONFIG = "configs/sweeps/cascade.py:worlds"
CENTER = {"hint": 0.0, "taste": 1.0, "train_requests": 4000}
KINDS = ("all", "students", "trees")


class World(NamedTuple):
    """Values of keys of `data` that differ from those of the config."""

    hint: float
    taste: float
    train_requests: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"hint{self.hint:g}-taste{self.taste:g}-requests{self.train_requests}"


def worlds_of(which: str) -> list[World]:
    """Return the worlds of the map, or the ones that it was not made on."""
    if which == "unseen":
        generator = np.random.default_rng(2026)
        return [
            World(
                hint=round(float(generator.uniform(0, 0.98)), 2),
                taste=round(float(generator.uniform(0, 2.5)), 2),
                train_requests=int(round(1000 * 16 ** generator.random(), -2)),
            )
            for _ in range(8)
        ]
    changes: list[dict[str, Any]] = [{}]
    changes += [{"hint": hint} for hint in (0.5, 0.8, 0.95)]
    changes += [{"taste": taste} for taste in (0.0, 2.0)]
    changes += [{"train_requests": number} for number in (1000, 16000)]
    changes += [
        {"hint": hint, "train_requests": number} for hint, number in ((0.8, 1000), (0.8, 16000))
    ]
    changes += [{"hint": 0.8, "taste": taste} for taste in (0.0, 2.0)]
    return [World(**{**CENTER, **change}) for change in changes]


def world_config(world: World, seed: int) -> ConfigDict:
    """Return the sweep of a small world: a quarter of the funnel of the default one."""
    config = read_config(CONFIG, [])
    config.data.update(**world._asdict(), seed=seed, num_users=1000, num_items=2000)
    config.data.update(validation_requests=300, test_requests=500)
    config.funnel.update(retrieved=500, passed=50, shown=5, report_at=(10, 50, 100))
    config.train.steps = 600
    config.sweep.seeds = (0,)
    return config


def measured(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """Run the sweep of a world unless it is complete, and return the row of one data seed."""
    api.prepare(config)
    api.sweep(config, workdir)
    rows = results.read_csv(workdir / results.FILE)
    rows = rows[~rows["member"].isin([results.TEACHER, *NO_RANKERS])]
    rows = rows.assign(
        with_scores=needs_scores(rows),
        trees=rows["member"].str.startswith("trees"),
        student=rows["role"] == "student",
    )
    validation, test = (
        rows[rows["split"] == split].set_index(["member", "serve"])
        for split in ("validation", "test")
    )
    # The others were not chosen on validation.
    validation = validation[validation.index.isin(test.index)]

    def best(pool: pd.Series) -> pd.Series:
        return test.loc[validation.loc[pool, CRITERION].idxmin()]

    scored, trees, student = (validation[name] for name in ("with_scores", "trees", "student"))
    found = {"kept": best(trees & scored)[f"survival@{config.funnel.passed}"]}
    for kind, pool in zip(KINDS, (scored | ~scored, student, trees), strict=True):
        with_scores, without = (best(pool & of)[CRITERION] for of in (scored, ~scored))
        found[f"saved {kind}"] = 1 - with_scores / without
        if kind == "all":
            found |= {"without": without, "with": with_scores}
    return {name: float(number) for name, number in found.items()}


def table(worlds: Mapping[World, pd.DataFrame]) -> str:
    """Return a Markdown table of a row per world."""
    columns = ["kept", "without", "with", *(f"saved {kind}" for kind in KINDS)]
    lines = [f"| {' | '.join([*World._fields, *columns])} |", "|---" * (3 + len(columns)) + "|"]
    for world, seeds in worlds.items():
        numbers = [text(name, interval(seeds[name].to_numpy())) for name in columns]
        lines.append(f"| {' | '.join(map(str, [*world, *numbers]))} |")
    return "\n".join(lines)


def text(column: str, mean: Interval) -> str:
    """Return a mean, in percent with its interval if it is a share."""
    if column in ("with", "without"):
        return f"{mean.mean:.0f}"
    if np.isnan(mean.low):
        return f"{mean.mean:.0%}"
    return f"{mean.mean:.0%} ({mean.low:.0%} to {mean.high:.0%})"


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--worlds", choices=("map", "unseen"), default="map")
    parser.add_argument("--seeds", default="0,1,2,3", help="values of data.seed")
    flags = parser.parse_args()
    seeds = [int(seed) for seed in flags.seeds.split(",")]
    worlds = worlds_of(flags.worlds)
    rows: dict[World, list[dict[str, float]]] = {world: [] for world in worlds}
    for seed, world in itertools.product(seeds, worlds):
        config = world_config(world, seed)
        config.data.dir = str(flags.workdir / "datasets")
        rows[world].append(measured(config, flags.workdir / world.name / f"seed{seed}"))
    print(table({world: pd.DataFrame(of) for world, of in rows.items()}))


if __name__ == "__main__":
    main()
