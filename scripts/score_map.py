"""Map in which worlds the final ranker's scores are worth it.

    python scripts/score_map.py --workdir=runs/map
    python scripts/score_map.py --workdir=runs/map --worlds=map,unseen --figure=map.svg \\
        "--more=film search=runs/filmsearch/sweep"

The worlds are small cascades. One thing differs from the center at a time: how much cheap features
express of the final ranker's order (`data.hint`), how much users differ (`data.taste`), and how
many labels there are (`data.train_requests`). The corners differ in two things. The unseen worlds
are drawn at random. `--more` adds a finished sweep of other data, and `--point` a mark to the
figure, as for the final rankers of `scripts/cross_encoder.py`.

In each world and for each data seed, students of all methods and trees are tuned on validation. The
table has the mean over the data seeds, with 95% intervals of Student's t. The first two columns are
what an owner of a log can measure in seconds, without a student: the share of the final ranker's
own top that survives if the best trees on cheap features pass `funnel.passed` candidates, with its
order as their labels; and the most that survives with any other cheap ranker that needs no scores
(today's, a list of items, a fusion, trees on user labels or stages). The others are the candidates
to pass for 99% of the final value, by the best ranker without scores and by the best with them, and
what the scores save: as a share of the retrieved candidates, and of those to pass, for the best of
all rankers, of students, and of trees.

Sweeps that are complete are kept, so several processes may share the work by `--seeds`.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import altair as alt
import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from kd_ranker import api
from kd_ranker.evaluation import results
from kd_ranker.evaluation.baselines import NO_RANKERS
from kd_ranker.evaluation.metrics.target import CRITERION
from kd_ranker.evaluation.saving import of_split
from kd_ranker.main import read_config
from kd_ranker.reporting.figures import Chart
from kd_ranker.reporting.intervals import Interval, interval
from kd_ranker.reporting.study import Pair, Study, read_studies

CONFIG = "configs/sweeps/cascade.py:worlds"
KINDS = {"map": "worlds of the map", "unseen": "unseen worlds"}
# The score test of docs/results.md: trees that keep this share leave few candidates to save, and
# nothing is saved where they keep so many points less than others.
FEW_TO_SAVE, OTHERS_AHEAD = 0.7, -2
CENTER = {"hint": 0.0, "taste": 1.0, "train_requests": 4000}


class World(NamedTuple):
    """Values of keys of `data` that differ from those of the config."""

    hint: float
    taste: float
    train_requests: int

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return f"hint{self.hint:g}-taste{self.taste:g}-requests{self.train_requests}"

    @property
    def title(self) -> str:
        """Its name in the table."""
        return f"hint {self.hint:g}, taste {self.taste:g}, {self.train_requests:,} requests"


class Measured(NamedTuple):
    """What one sweep shows; shares are in [0, 1]."""

    kept: float  # by the best trees on the final ranker's order
    kept_by_others: float  # by the best other cheap ranker, which needs no scores
    without: float  # candidates to pass
    with_scores: float
    of_retrieved: float  # share that the scores save
    all: float
    students: float
    trees: float


TITLES = {
    "kept": "top kept: trees on its scores",
    "kept_by_others": "top kept: best other cheap ranker",
    "without": "to pass, without scores",
    "with_scores": "with scores",
    "of_retrieved": "saved, % of retrieved",
    "all": "saved, % of those to pass",
    "students": "students only",
    "trees": "trees only",
}


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


def measured(folder: Path) -> Measured:
    """Return the numbers of a finished sweep."""
    (study,) = read_studies([folder])
    rows = pd.concat([study.rows, study.references])
    rows = rows[~rows["setting"].isin(NO_RANKERS)]
    # Settings that validation did not choose are not measured on test.
    rows = rows[rows["setting"].isin(of_split(rows, "test")["setting"])]
    kept = f"survival@{study.passed}"
    means = rows.groupby(["split", "setting"])[[CRITERION, kept]].mean()
    validation = means.loc["validation"]
    test = means.loc["test"]
    first = rows.groupby("setting").first()
    needs_scores = first["needs_scores"].astype(bool)
    is_student = first["role"] == "student"
    is_trees = first.index.to_series().str.startswith("trees")

    def best_setting(to_pass: pd.Series) -> str:
        return "" if to_pass.empty else str(to_pass.idxmin())

    def best(is_allowed: pd.Series) -> Pair:
        return Pair(
            best_setting(validation.loc[is_allowed & needs_scores, CRITERION]),
            best_setting(validation.loc[is_allowed & ~needs_scores, CRITERION]),
        )

    def passed(setting: str) -> float:
        return float(test[CRITERION].get(setting, np.nan))

    def saved(pair: Pair) -> float:
        return 1 - passed(pair.with_scores) / passed(pair.without)

    of_all = best(pd.Series(True, needs_scores.index))
    of_trees = best(is_trees)
    without = passed(of_all.without)
    with_scores = passed(of_all.with_scores)
    return Measured(
        kept=float(validation[kept].get(of_trees.with_scores, np.nan)),
        kept_by_others=float(validation.loc[~needs_scores & ~is_student, kept].max()),
        without=without,
        with_scores=with_scores,
        of_retrieved=(without - with_scores) / _retrieved(study),
        all=saved(of_all),
        students=saved(best(is_student)),
        trees=saved(of_trees),
    )


def _retrieved(study: Study) -> float:
    """The mean number of candidates of a test request."""
    return float(study.tested["candidates"].mean())


def table(points: pd.DataFrame) -> str:
    """Return a Markdown table of a row per world; see `intervals_of` for the points."""
    lines = [f"| world | {' | '.join(TITLES.values())} |", "|---" * (1 + len(TITLES)) + "|"]
    for title, row in points.iterrows():
        cells = [_text(column, row[column]) for column in TITLES]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _text(column: str, mean: Interval) -> str:
    if np.isnan(mean.mean):
        return ""
    if column in ("with_scores", "without"):
        return f"{mean.mean:.0f}"
    digits = 1 if column in ("kept", "kept_by_others", "of_retrieved") else 0
    text = f"{mean.mean:.{digits}%}"
    is_saving = column not in ("kept", "kept_by_others")
    if is_saving and not np.isnan(mean.low):
        text += f" ({mean.low:.{digits}%} to {mean.high:.{digits}%})"
    return text


def chart(points: pd.DataFrame) -> Chart:
    """Return what the scores save over what trees on the final ranker's order keep beyond others.

    Marks are filled where these trees keep 70% or more.
    """
    data = [
        {
            "ahead": 100 * (row["kept"].mean - row["kept_by_others"].mean),
            "is_filled": row["kept"].mean >= FEW_TO_SAVE,
            "kind": row["kind"],
            "title": title,
            "saved": row["of_retrieved"].mean,
            "low": row["of_retrieved"].low,
            "high": row["of_retrieved"].high,
        }
        for title, row in points.iterrows()
    ]
    values = json.loads(pd.DataFrame(data).to_json(orient="records"))
    saved = "share of the retrieved candidates that the scores save"
    y = alt.Y("saved:Q", title=saved, axis=alt.Axis(format="%"))
    base = alt.Chart(alt.InlineData(values=values)).encode(
        x=alt.X(
            "ahead:Q",
            title="points of its top that trees on its scores keep beyond other cheap rankers",
            axis=alt.Axis(format="+"),
        ),
        color=alt.Color("kind:N", title=None, legend=alt.Legend(orient="top")),
    )
    marks = base.encode(y=y, tooltip="title:N")
    named = marks.encode(text="title:N").transform_filter("datum.kind === 'other data'")
    zero = alt.Chart(alt.InlineData(values=[{"zero": 0}])).mark_rule(strokeDash=[6, 5])
    return alt.layer(
        zero.encode(y="zero:Q"),
        alt.Chart(alt.InlineData(values=[{"cut": OTHERS_AHEAD}]))
        .mark_rule(strokeDash=[6, 5])
        .encode(x="cut:Q"),
        base.mark_rule(opacity=0.5).encode(y=alt.Y("low:Q", title=saved), y2="high:Q"),
        marks.mark_point(size=60, opacity=1).transform_filter("!datum.is_filled"),
        marks.mark_point(size=60, opacity=1, filled=True).transform_filter("datum.is_filled"),
        # Beside the other marks, of which there are many on the right of the middle.
        named.transform_filter("!datum.is_filled").mark_text(align="right", dx=-8, fontSize=10),
        named.transform_filter("datum.is_filled").mark_text(align="left", dx=5, dy=13, fontSize=10),
    ).properties(width=520, height=320)


def main() -> None:
    """Runs what is missing, prints the table, and draws the map."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--worlds", default="map", help="map, unseen, both, or none")
    parser.add_argument("--seeds", default="0,1,2,3", help="values of data.seed")
    parser.add_argument("--more", action="append", default=[], help="NAME=FOLDER of a sweep")
    parser.add_argument(
        "--point", action="append", default=[], help="NAME=KEPT,OTHERS,SAVED for the figure only"
    )
    parser.add_argument("--figure", help="the file of the map, .svg or .png")
    flags = parser.parse_args()
    seeds = [int(seed) for seed in flags.seeds.split(",")]
    rows: dict[str, dict[str, Any]] = {}
    for which in filter(None, flags.worlds.split(",")):
        worlds = worlds_of(which)
        measurements: dict[World, list[Measured]] = {world: [] for world in worlds}
        for seed, world in itertools.product(seeds, worlds):
            folder = flags.workdir / world.folder / f"seed{seed}"
            # Written last.
            if not (folder / results.FILE).exists():
                config = world_config(world, seed)
                config.data.dir = str(flags.workdir / "datasets")
                api.prepare(config)
                api.sweep(config, folder)
            measurements[world].append(measured(folder))
        for world, per_seed in measurements.items():
            rows[world.title] = _intervals(per_seed) | {"kind": KINDS[which]}
    for more in flags.more:
        name, _, folder = more.partition("=")
        rows[name] = _intervals([measured(Path(folder))]) | {"kind": "other data"}
    points = pd.DataFrame.from_dict(rows, orient="index")
    print(table(points))
    if flags.figure:
        chart(pd.concat([points, _read_points(flags.point)])).save(flags.figure)


def _read_points(points: list[str]) -> pd.DataFrame:
    """Read points that were measured elsewhere, without intervals."""
    rows = {}
    for point in points:
        name, _, numbers = point.partition("=")
        kept, others, saved = (interval(np.array([float(number)])) for number in numbers.split(","))
        rows[name] = {
            "kept": kept,
            "kept_by_others": others,
            "of_retrieved": saved,
            "kind": "other data",
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def _intervals(per_seed: list[Measured]) -> dict[str, Interval]:
    """Return the mean of each number over the data seeds, with its interval."""
    numbers = pd.DataFrame(per_seed)
    return {column: interval(numbers[column].to_numpy()) for column in Measured._fields}


if __name__ == "__main__":
    main()
